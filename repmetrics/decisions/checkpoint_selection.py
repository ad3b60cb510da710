"""Which checkpoint is better, and which to keep: pure functions of measurements."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from repmetrics.measurement.result import Measurement, difference

BEYOND_NOISE = 2.0
"""Paired standard errors; below, two checkpoints are taken as equal. The monitor's stopping rule uses the same."""

Scores = Mapping[str, Measurement]


class Comparison(NamedTuple):
    """The second against the first, on one metric.

    Attributes:
        name: the metric.
        change: second − first.
        standard_error: of the change, paired over the same groups; None where there are no groups.
        outcome: "better" or "worse" beyond noise, "no difference" within it, "unknown" without an error or direction.
        why: for "unknown", the reason.
    """

    name: str
    change: float
    standard_error: float | None
    outcome: Literal["better", "worse", "no difference", "unknown"]
    reason: str | None = None

    @property
    def z(self) -> float:
        """The change in standard errors; NaN without one, 0 for no change at all."""
        if self.standard_error is None:
            return math.nan
        if self.change == 0:
            return 0.0
        return self.change / self.standard_error if self.standard_error else math.copysign(math.inf, self.change)


def compare(first: Scores, second: Scores) -> list[Comparison]:
    """Whether the second is better than the first beyond noise, metric by metric.

    The error of a change is the paired jackknife's: both checkpoints saw the same slides, and what the slides
    share cancels.

    Raises:
        ValueError: no common metric, or rows that are not the same.
    """
    names = [name for name in first if name in second]
    if not names:
        raise ValueError("nothing to compare: the two have no metric in common")
    return [_compare_one(first[name], second[name]) for name in names]


def _compare_one(first: Measurement, second: Measurement) -> Comparison:
    change = second.value - first.value
    if math.isnan(change):
        return Comparison(first.name, change, None, "unknown", first.reason or second.reason)
    if first.n != second.n:
        raise ValueError(f"{first.name} was measured on {first.n} and on {second.n} rows: compare on the same data")
    if first.standard_error is None or second.standard_error is None:
        return Comparison(first.name, change, None, "unknown", first.reason or second.reason)
    value, error = difference(first, second)
    if first.direction == "neither":
        return Comparison(first.name, value, error, "unknown", "neither direction is better")
    if abs(value) <= BEYOND_NOISE * error:
        return Comparison(first.name, value, error, "no difference")
    return Comparison(first.name, value, error, "better" if (value > 0) == (first.direction == "higher") else "worse")


class Choice(NamedTuple):
    """The checkpoint to keep.

    Attributes:
        kept: its place.
        by: the metric that chose.
        peak: the place of the best value.
        tied: places that are not worse than the best beyond noise.
        reason: in words.
        confidence: in words.
    """

    position: int
    by: str
    peak: int
    tied: tuple[int, ...]
    reason: str
    confidence: str


def select_checkpoint(scores: Sequence[Scores], *, by: str = "rankme") -> Choice:
    """RankMe's rule: the best value, and on a plateau the first checkpoint that reaches it.

    A checkpoint is on the plateau when the best is not better than it by more than two paired standard errors.
    Without errors there is no plateau, and the best value is taken as it stands.

    Args:
        scores: measurements, in the order of training.
        by: the metric that chooses.

    Raises:
        ValueError: nothing to choose from, the metric missing, NaN everywhere, or without a better direction.
    """
    if len(scores) < 2:
        raise ValueError(f"a choice needs at least 2 checkpoints, got {len(scores)}")
    if lacking := [i for i, score in enumerate(scores) if by not in score]:
        raise ValueError(f"{by!r} was not measured for {len(lacking)} of {len(scores)} checkpoints")
    measured = [score[by] for score in scores]
    if measured[0].direction == "neither":
        raise ValueError(f"{by} has no better direction: choose by another")
    sign = 1 if measured[0].direction == "higher" else -1
    ranked = [i for i, m in enumerate(measured) if not math.isnan(m.value)]
    if not ranked:
        raise ValueError(f"{by} is NaN for every checkpoint: {measured[0].reason}")
    peak = max(ranked, key=lambda i: sign * measured[i].value)
    against = {i: _compare_one(measured[i], measured[peak]) for i in ranked if i != peak}
    tied = tuple(i for i in ranked if i == peak or against[i].outcome == "no difference")
    extreme = "highest" if sign > 0 else "lowest"
    if tied[0] == peak:
        reason = f"it has the {extreme} {by}, {measured[peak].value:.6g}"
    else:
        reason = (
            f"the first whose {by} ({measured[tied[0]].value:.6g}) is within noise of the {extreme}, "
            f"{measured[peak].value:.6g}"
        )
    return Choice(tied[0], by, peak, tied, reason, _confidence(against, tied, peak))


def _confidence(against: Mapping[int, Comparison], tied: Sequence[int], peak: int) -> str:
    if not against:
        return "it is the only one that has a value"
    if any(verdict.standard_error is None for verdict in against.values()):
        why = next(verdict.reason for verdict in against.values() if verdict.standard_error is None)
        return f"not known: {why}"
    if len(tied) > 1:
        return f"{len(tied)} of {len(against) + 1} checkpoints cannot be told apart"
    nearest = min(against.values(), key=lambda verdict: abs(verdict.z))
    return f"the nearest other is {abs(nearest.z):.1f} paired standard errors away"
