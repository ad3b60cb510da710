"""Which of a report's many correlations and gains are shown when all of them are read together."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

from repmetrics.trust.bootstrap import Interval
from repmetrics.trust.regret import BASELINES
from repmetrics.trust.report import Trust

Question = Literal["within", "beyond_time", "against_last", "across", "against_random"]
FAMILY_ERROR = 0.05
"""Probability that any sign is shown where there is none, over all questions and metrics of one target."""


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p-values by Holm's step-down method; NaN stays NaN and does not count.

    Source:
        Holm 1979, "A simple sequentially rejective multiple test procedure".

    Example:
        >>> holm([0.01, 0.04, math.nan, 0.03])
        [0.03, 0.06, nan, 0.06]
    """
    known = sorted((i for i, p in enumerate(p_values) if not math.isnan(p)), key=lambda i: p_values[i])
    adjusted = [math.nan] * len(p_values)
    largest = 0.0
    for rank, i in enumerate(known):
        largest = max(largest, min(1.0, (len(known) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


def answers(report: Trust, target: str) -> dict[tuple[Question, str], Interval]:
    """Every interval that a sentence of the report may state, by question and signal."""
    intervals: dict[tuple[Question, str], Interval] = {}
    for a in report.agreements:
        if a.target == target and a.directed:
            intervals |= {("within", a.metric): a.within, ("beyond_time", a.metric): a.beyond_time}
            intervals["across", a.metric] = a.across
    for r in report.regrets:
        if r.target == target and r.signal not in BASELINES:
            intervals["against_last", r.signal] = r.against_last
            if r.against_random is not None:
                intervals["against_random", r.signal] = r.against_random
    return intervals


def shown_signs(report: Trust, target: str) -> Mapping[tuple[Question, str], int]:
    """1 or −1 for each interval whose sign is shown, 0 for the others, all together at `FAMILY_ERROR`."""
    intervals = answers(report, target)
    adjusted = holm([interval.p for interval in intervals.values()])
    return {
        key: int(math.copysign(1, interval.value)) if p <= FAMILY_ERROR else 0
        for (key, interval), p in zip(intervals.items(), adjusted, strict=True)
    }
