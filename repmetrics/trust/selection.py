"""Selection among runs by a signal: pairwise accuracy, regret of the best of k random runs, successive halving."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from repmetrics.trust.bootstrap import Array, Interval, interval

SET_SIZE = 5
"""Number of random runs to choose from."""


class Selection(NamedTuple):
    """How well a signal selects among runs.

    Attributes:
        signal: Name of the signal.
        runs: Number of runs.
        pairwise: Share of pairs of runs in which the run with the better signal has the better target.
        pairwise_within: The same over the pairs of one group (method).
        regret: Expected shortfall of the selected run against the best of k random runs.
        gain: Regret of a random choice minus `regret`; above 0, the signal beats chance.
    """

    signal: str
    runs: int
    pairwise: Interval
    pairwise_within: Interval
    regret: Interval
    gain: Interval


def pairwise_accuracy(
    signal: Array, target: Array, *, groups: Sequence[str] | None = None, weights: Array | None = None
) -> Array:
    """Share of pairs of runs that the signal orders as the target does, for each weighting of the runs.

    A tie of the signal counts half; pairs with equal targets are left out. NaN is worse than every value.

    Args:
        signal: Values (n,), higher is better.
        target: Values (n,), higher is better.
        groups: Group of each run; with it, only pairs of one group count.
        weights: Weights (B, n) of the runs; default: one weighting with equal weights.

    Returns:
        Shares (B,); NaN without any pair.

    Example:
        >>> pairwise_accuracy(np.array([1.0, 3, 2]), np.array([0.1, 0.2, 0.3])).round(3).tolist()
        [0.667]
    """
    order, truth = _ranks(signal), np.asarray(target, dtype=float)
    weights = np.ones((1, len(order))) if weights is None else weights
    sign = np.sign(truth[:, None] - truth)
    if groups is not None:
        codes = np.unique(np.asarray(groups), return_inverse=True)[1]
        sign = np.where(codes[:, None] == codes, sign, 0)
    correct = np.where(sign != 0, (1 + sign * np.sign(order[:, None] - order)) / 2, 0)

    def total(pairs: Array) -> Array:
        sums: Array = ((weights @ pairs) * weights).sum(1)
        return sums

    with np.errstate(invalid="ignore", divide="ignore"):
        shares: Array = total(correct) / total((sign != 0).astype(float))
    return shares


class Tournaments:
    """Choice among k random runs, in expectation over all sets of k, in the sample and in bootstrap draws of the runs.

    The run in place j of n, from the worst on, is the best of a random set with probability C(j − 1, k − 1)/C(n, k).

    Args:
        target: Target of each run (n,), higher is better.
        k: Number of runs to choose from; fewer if there are fewer runs.
        draws: Number of bootstrap draws.
        seed: Seed of the draws.
    """

    def __init__(self, target: Array, *, k: int = SET_SIZE, draws: int = 1000, seed: int = 0) -> None:
        self.target = np.asarray(target, dtype=float)
        count = len(self.target)
        if count < 3:
            raise ValueError(f"a selection among runs needs at least 3 runs, got {count}")
        if np.isnan(self.target).any():
            raise ValueError("the target of a run is NaN: leave out runs without a probe")
        k = min(k, count)
        self.chances = np.array([math.comb(j, k - 1) / math.comb(count, k) for j in range(count)])
        generator = np.random.default_rng(seed)
        self.samples: NDArray[np.int64] = generator.integers(0, count, (draws, count))
        self.weights = np.stack([np.bincount(row, minlength=count) for row in self.samples]).astype(float)
        self.jitter = generator.random((draws, count)) * 1e-6  # breaks ties at random
        sorted_targets = np.sort(np.concatenate([self.target[None], self.target[self.samples]]), axis=1)
        self.best, self.means = sorted_targets @ self.chances, sorted_targets.mean(1)

    def chance(self) -> Array:
        """Regret of a random choice: of the sample first, then of each draw (1 + B,)."""
        chances: Array = self.best - self.means
        return chances

    def regret(self, signal: Array) -> Array:
        """Regret of the choice by a signal (n,), higher is better: of the sample first, then of each draw (1 + B,).

        Example:
            >>> Tournaments(np.array([0.1, 0.2, 0.6]), k=2, draws=1).regret(np.array([2.0, 1, 3])).round(3)[:1].tolist()
            [0.033]
        """
        ranks = _ranks(signal)
        order = np.argsort(ranks)
        ties = np.unique(ranks, return_inverse=True)[1]
        means = np.bincount(ties, weights=self.target) / np.bincount(ties)  # tied runs are chosen with equal chances
        value = means[ties][order] @ self.chances
        orders = np.argsort(ranks[self.samples] + self.jitter, axis=1)
        drawn = np.take_along_axis(self.target[self.samples], orders, axis=1) @ self.chances
        regrets: Array = self.best - np.concatenate([[value], drawn])
        return regrets

    def selection(self, name: str, signal: Array, *, groups: Sequence[str] | None = None) -> Selection:
        """All statistics of one signal.

        Example:
            >>> Tournaments(np.array([0.1, 0.2, 0.3])).selection("perfect", np.array([1.0, 2, 3])).regret.value
            0.0
        """
        runs = len(self.target)
        regrets, chances = self.regret(signal), self.chance()

        def accuracy(of: Sequence[str] | None) -> Interval:
            value = float(pairwise_accuracy(signal, self.target, groups=of)[0])
            return interval(value, pairwise_accuracy(signal, self.target, groups=of, weights=self.weights), runs=runs)

        gains = chances - regrets
        return Selection(
            signal=name,
            runs=runs,
            pairwise=accuracy(None),
            pairwise_within=accuracy(groups) if groups is not None else Interval(math.nan, math.nan, math.nan),
            regret=interval(float(regrets[0]), regrets[1:], runs=runs),
            gain=interval(float(gains[0]), gains[1:], runs=runs),
        )


class Halving(NamedTuple):
    """Successive halving of runs on a signal.

    Attributes:
        saved: Share of the training steps of all runs that is not spent.
        lost: Target of the best run minus that of the run that the signal selects among those that remain.
        lost_probed: The same if a probe selects among those that remain.
    """

    saved: float
    lost: float
    lost_probed: float


def successive_halving(signals: Mapping[float, Array], target: Array, *, last: Array) -> Halving:
    """Stop the worse half of the runs at each stage, then choose among the rest.

    Args:
        signals: Share of training at each stage → values (n,) of all runs, higher is better.
        target: Target of each run at its end (n,).
        last: Values (n,) at the end, to choose among the runs that remain.

    Example:
        >>> values = np.array([1.0, 2, 3, 4])
        >>> successive_halving({0.25: values, 0.5: values}, values, last=values)
        Halving(saved=0.5, lost=0.0, lost_probed=0.0)
    """
    alive = np.arange(len(target))
    spent, before = 0.0, 0.0
    for share, values in sorted(signals.items()):
        spent += (share - before) * len(alive)
        ranks = _ranks(values)[alive]
        alive = alive[np.argsort(-ranks, kind="stable")[: math.ceil(len(alive) / 2)]]
        before = share
    spent += (1 - before) * len(alive)
    chosen = alive[_ranks(last)[alive].argmax()]
    best = float(np.max(target))
    return Halving(1 - spent / len(target), best - float(target[chosen]), best - float(target[alive].max()))


def _ranks(signal: Array) -> Array:
    values = np.asarray(signal, dtype=float)
    ranks: Array = rankdata(np.where(np.isnan(values), -np.inf, values))
    return ranks
