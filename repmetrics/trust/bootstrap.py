"""Runs as arrays, and bootstrap intervals over runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm
from scipy.stats import t as student_t

from repmetrics.trust.runs import Evaluation

Array = NDArray[np.float64]

MIN_RUNS_FOR_INTERVAL = 6
"""Fewest runs with a bootstrap interval. Of three runs, all resamples are nearly alike."""


class Interval(NamedTuple):
    """An estimate and its 95 % bootstrap interval; NaN where no run has a value, or too few have.

    Attributes:
        value: The estimate.
        low: Lower bound.
        high: Upper bound.
        p: Two-sided p-value of zero, for tests of many intervals together.
    """

    value: float
    low: float
    high: float
    p: float = math.nan

    def sign(self, zero: float = 0.0) -> int:
        """1 or −1 if the whole interval lies above or below `zero`, otherwise 0.

        Example:
            >>> Interval(0.5, 0.1, 0.8).sign(), Interval(0.1, -0.2, 0.3).sign()
            (1, 0)
        """
        return int(self.low > zero) - int(self.high < zero)


class RunTable:
    """The evaluations of one scope as arrays, with the draws of the bootstrap.

    Args:
        evaluations: Evaluations of at least three runs.
        draws: Number of bootstrap draws.
        seed: Seed of the draws.
    """

    def __init__(self, evaluations: Sequence[Evaluation], *, draws: int, seed: int) -> None:
        self.runs = list(dict.fromkeys(item.run for item in evaluations))
        if len(self.runs) < 3:
            raise ValueError(f"trust needs at least 3 runs, got {len(self.runs)}: {', '.join(self.runs)}")
        self.by_run = [sorted((x for x in evaluations if x.run == run), key=lambda x: x.step) for run in self.runs]
        for run, items in zip(self.runs, self.by_run, strict=True):
            if len(items) < 3:
                raise ValueError(f"trust needs at least 3 evaluations per run, {run} has fewer")
            if items[-1].step <= 0:
                raise ValueError(f"trust selects among evaluations after step 0, and {run} has none")
        self.draws, self.seed = draws, seed
        count = len(self.runs)
        indices = self.bootstrap_indices(count)
        self.weights = np.stack([np.bincount(row, minlength=count) for row in indices]).astype(float)

    def bootstrap_indices(self, count: int) -> NDArray[np.int64]:
        """Bootstrap draws of `count` runs, (draws, count)."""
        return np.random.default_rng(self.seed).integers(0, count, (self.draws, count))

    def values(self, name: str) -> list[Array]:
        """Values by run; NaN where not measured."""
        return [np.array([x.loss if name == "loss" else x.values.get(name, math.nan) for x in r]) for r in self.by_run]

    def steps(self) -> list[Array]:
        """Steps of the evaluations, by run."""
        return [np.array([float(x.step) for x in items]) for items in self.by_run]

    def mean(self, per_run: Sequence[float]) -> Interval:
        """Mean over the runs that have a value."""
        values = np.array(per_run)
        known = ~np.isnan(values)
        if not known.any():
            return Interval(math.nan, math.nan, math.nan)
        weights = self.weights[:, known]
        with np.errstate(invalid="ignore", divide="ignore"):
            draws = weights @ values[known] / weights.sum(1)
        return interval(float(values[known].mean()), draws, runs=int(known.sum()))


def interval(value: float, draws: Array, *, runs: int) -> Interval:
    """Percentile interval of the draws that have a value; NaN bounds below `MIN_RUNS_FOR_INTERVAL` runs.

    The percentiles are expanded for few runs (Hesterberg 2015, arXiv 1411.5279, section 5.4). Plain percentiles are as
    narrow as if the spread of n runs were known. At n = 12 they cover 87 % instead of 95 %.
    """
    known = draws[~np.isnan(draws)]
    if not len(known) or runs < MIN_RUNS_FOR_INTERVAL:
        return Interval(value, math.nan, math.nan)
    tail = 100 * norm.cdf(-math.sqrt(runs / (runs - 1)) * student_t.ppf(0.975, runs - 1))
    low, high = np.percentile(known, (tail, 100 - tail))
    return Interval(value, float(low), float(high), p_value(value, float(known.std()), runs=runs))


def p_value(value: float, spread: float, *, runs: int) -> float:
    """Two-sided p-value of zero, by Student's t of the bootstrap's standard deviation, expanded for few runs.

    Percentiles of some thousand draws have no tail for the small p-values that many tests need.

    Example:
        >>> round(p_value(2.2, 1.0, runs=12), 3), p_value(0.0, 0.0, runs=12)
        (0.059, 1.0)
    """
    if spread == 0:
        return 1.0 if value == 0 else 2.0 ** (1 - runs)  # all runs agree: the p-value of their signs
    t = abs(value) / (spread * math.sqrt(runs / (runs - 1)))
    return float(2 * student_t.sf(t, runs - 1))
