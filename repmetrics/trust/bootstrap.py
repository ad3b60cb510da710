"""Intervals by a bootstrap over runs."""

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


FEWEST = 6
"""Runs below which a bootstrap over them gives no interval: with three, every resample says the same."""


class Interval(NamedTuple):
    """An estimate and its 95 % bootstrap interval; NaN where there is nothing to estimate from."""

    value: float
    low: float
    high: float

    def sign(self, zero: float = 0.0) -> int:
        """1 or −1 if the whole interval lies above or below `zero`, otherwise 0.

        Example:
            >>> Interval(0.5, 0.1, 0.8).sign(), Interval(0.1, -0.2, 0.3).sign()
            (1, 0)
        """
        return int(self.low > zero) - int(self.high < zero)


class RunTable:
    """The looks of one scope as arrays, with the bootstrap's draws.

    Args:
        looks: of at least three runs.
        draws: of the bootstrap.
        seed: of the draws.

    Raises:
        ValueError: fewer than three runs, or a run with fewer than three looks or none after step 0.
    """

    def __init__(self, looks: Sequence[Evaluation], *, draws: int, seed: int) -> None:
        self.runs = list(dict.fromkeys(look.run for look in looks))
        if len(self.runs) < 3:
            raise ValueError(f"trust needs at least 3 runs, got {len(self.runs)}: {', '.join(self.runs)}")
        self.by_run = [sorted((x for x in looks if x.run == run), key=lambda x: x.step) for run in self.runs]
        if short := [run for run, mine in zip(self.runs, self.by_run, strict=True) if len(mine) < 3]:
            raise ValueError(f"trust needs at least 3 looks a run, {short[0]} has fewer")
        if untrained := [run for run, mine in zip(self.runs, self.by_run, strict=True) if mine[-1].step <= 0]:
            raise ValueError(f"trust chooses among looks after step 0, and {untrained[0]} has none")
        self.draws, self.seed = draws, seed
        count = len(self.runs)
        self.weights = np.stack([np.bincount(row, minlength=count) for row in self.bootstrap_indices(count)]).astype(
            float
        )

    def bootstrap_indices(self, count: int) -> NDArray[np.int64]:
        """The bootstrap's draws of `count` runs, (draws, count)."""
        return np.random.default_rng(self.seed).integers(0, count, (self.draws, count))

    def values(self, name: str) -> list[Array]:
        """Values by run; NaN where it was not measured."""
        return [np.array([x.loss if name == "loss" else x.values.get(name, math.nan) for x in r]) for r in self.by_run]

    def steps(self) -> list[Array]:
        """Of the looks, by run."""
        return [np.array([float(x.step) for x in mine]) for mine in self.by_run]

    def mean(self, per_run: Sequence[float]) -> Interval:
        """The mean over runs that have a value."""
        values = np.array(per_run)
        known = ~np.isnan(values)
        if not known.any():
            return Interval(math.nan, math.nan, math.nan)
        weights = self.weights[:, known]
        with np.errstate(invalid="ignore", divide="ignore"):
            draws = weights @ values[known] / weights.sum(1)
        return interval(float(values[known].mean()), draws, runs=int(known.sum()))


def interval(value: float, draws: Array, *, runs: int) -> Interval:
    """Percentiles of the draws that have a value, if enough runs were drawn from.

    They are expanded for few runs (Hesterberg 2015, arXiv 1411.5279, section 5.4): plain ones are as narrow as if the
    spread of n runs were known, and cover 87 % instead of 95 % at n = 12.
    """
    known = draws[~np.isnan(draws)]
    if not len(known) or runs < FEWEST:
        return Interval(value, math.nan, math.nan)
    tail = 100 * norm.cdf(-math.sqrt(runs / (runs - 1)) * student_t.ppf(0.975, runs - 1))
    low, high = np.percentile(known, (tail, 100 - tail))
    return Interval(value, float(low), float(high))
