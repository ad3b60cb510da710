"""Agreement of a metric with a probe: within runs, given the step, and among runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.stats import rankdata

from repmetrics.measurement.registry import METRICS
from repmetrics.trust.bootstrap import Array, Interval, RunTable, interval
from repmetrics.trust.rank_correlation import centred_ranks, kendall, partial_correlation, spearman


class Agreement(NamedTuple):
    """How one metric goes with one target; each sign is turned so that positive means "better goes with better".

    Attributes:
        metric: its name.
        target: the probe's.
        within: Kendall's τ-b over the looks of a run, mean over runs.
        within_rho: Spearman's ρ likewise.
        beyond_time: correlation of ranks within runs, after the step's rank is taken out of both: what the metric
            knows that a clock does not.
        across: τ-b over the runs' last looks.
        across_rho: Spearman's ρ likewise.
        across_beyond_time: Spearman's ρ over all looks of all runs, given the logarithm of the step.
        directed: False where the literature gives the metric no better direction; its sign is then as measured.
    """

    metric: str
    target: str
    within: Interval
    within_rho: Interval
    beyond_time: Interval
    across: Interval
    across_rho: Interval
    across_beyond_time: Interval
    directed: bool


def agreement(bench: RunTable, metric: str, target: str) -> Agreement:
    """How a metric goes with a target."""
    sign = -1.0 if metric in METRICS and METRICS[metric].direction == "lower" else 1.0
    pairs = [
        (sign * m, t, s) for m, t, s in zip(bench.values(metric), bench.values(target), bench.steps(), strict=True)
    ]
    pairs = [tuple(v[~np.isnan(m + t)] for v in (m, t, s)) for m, t, s in pairs]  # type: ignore[misc]
    enough = [len(m) >= 3 for m, _, _ in pairs]
    taus = [float(kendall(m, t)[0]) if ok else math.nan for ok, (m, t, _) in zip(enough, pairs, strict=True)]
    rhos = [float(spearman(m, t)) if ok else math.nan for ok, (m, t, _) in zip(enough, pairs, strict=True)]

    last = np.array([[v[-1] if len(v) else math.nan for v in p] for p in pairs])
    known = ~np.isnan(last[:, 0] + last[:, 1])
    m, t = last[known, 0], last[known, 1]
    across = across_rho = Interval(math.nan, math.nan, math.nan)
    if known.sum() >= 3:
        across = interval(float(kendall(m, t)[0]), kendall(m, t, bench.weights[:, known]), runs=len(m))
        drawn = bench.bootstrap_indices(len(m))
        across_rho = interval(float(spearman(m, t)), spearman(m[drawn], t[drawn]), runs=len(m))
    return Agreement(
        metric=metric,
        target=target,
        within=bench.mean(taus),
        within_rho=bench.mean(rhos),
        beyond_time=_given_step(bench, pairs, rank_within=True),
        across=across,
        across_rho=across_rho,
        across_beyond_time=_given_step(bench, pairs, rank_within=False),
        directed=metric not in METRICS or METRICS[metric].direction != "neither",
    )


def _given_step(bench: RunTable, pairs: Sequence[tuple[Array, Array, Array]], *, rank_within: bool) -> Interval:
    """Partial correlation of ranks given the step's, over all looks: ranked within runs, or over all together.

    The ranks are those of the whole sample in every draw; only how often a run counts is drawn. Within runs, one in
    which the metric rose or fell with every step says nothing, and does not count among those that an interval needs.
    """
    if rank_within:
        ranked = [np.stack([centred_ranks(v) for v in p]) if len(p[0]) else np.zeros((3, 0)) for p in pairs]
    else:
        together = [np.concatenate([p[k] for p in pairs]) for k in range(3)]
        if len(together[0]) < 3:
            return Interval(math.nan, math.nan, math.nan)
        ends = np.cumsum([len(p[0]) for p in pairs])[:-1]
        ranked = np.split(np.stack([rankdata(v) for v in together]), ends, axis=1)
    products = np.stack([x @ x.T for x in ranked])  # (runs, 3, 3)
    telling = len(pairs)
    if rank_within:
        mm, ms, ss = products[:, 0, 0], products[:, 0, 2], products[:, 2, 2]
        telling = int((mm * ss - ms**2 > 1e-9 * mm * ss).sum())
    sums, counts = np.stack([x.sum(1) for x in ranked]), np.array([x.shape[1] for x in ranked], dtype=float)

    def partial(weights: Array) -> Array:
        total = np.einsum("br,rij->bij", weights, products)
        mean, n = weights @ sums, (weights @ counts)[:, None, None]
        c = total - mean[:, :, None] * mean[:, None, :] / n
        return partial_correlation(c[:, 0, 1], c[:, 0, 2], c[:, 1, 2], c[:, 0, 0], c[:, 1, 1], c[:, 2, 2])

    with np.errstate(invalid="ignore", divide="ignore"):
        return interval(float(partial(np.ones((1, len(pairs))))[0]), partial(bench.weights), runs=telling)
