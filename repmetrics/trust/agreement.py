"""Agreement of a metric with a probe: within runs, with the step partialled out, and among runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.stats import rankdata

from repmetrics.measurement.registry import METRICS
from repmetrics.trust.bootstrap import Array, Interval, RunTable, interval
from repmetrics.trust.rank_correlation import centered_ranks, kendall, partial_correlation, spearman


class Agreement(NamedTuple):
    """Rank correlations of one metric with one target; positive if better occurs with better.

    Attributes:
        metric: Name of the metric.
        target: Name of the probe.
        within: Kendall's τ-b over the evaluations of a run, mean over runs.
        within_rho: Spearman's ρ over the evaluations of a run, mean over runs.
        beyond_time: Correlation of ranks within runs with the rank of the step partialled out: the information that
            the metric has beyond the step.
        across: τ-b over the last evaluations of the runs.
        across_rho: Spearman's ρ over the last evaluations of the runs.
        across_beyond_time: Spearman's ρ over all evaluations of all runs with the step partialled out.
        directed: False if the literature gives no better direction of the metric; the sign is then as measured.
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


def agreement(table: RunTable, metric: str, target: str) -> Agreement:
    """Agreement of a metric with a target."""
    direction = METRICS[metric].direction
    sign = -1.0 if direction == "lower" else 1.0
    columns = zip(table.values(metric), table.values(target), table.steps(), strict=True)
    pairs = [tuple(v[~np.isnan(m + t)] for v in (sign * m, t, s)) for m, t, s in columns]
    taus = [float(kendall(m, t)[0]) if len(m) >= 3 else math.nan for m, t, _ in pairs]
    rhos = [float(spearman(m, t)) if len(m) >= 3 else math.nan for m, t, _ in pairs]

    last = np.array([[v[-1] if len(v) else math.nan for v in p] for p in pairs])
    known = ~np.isnan(last[:, 0] + last[:, 1])
    m, t = last[known, 0], last[known, 1]
    across = across_rho = Interval(math.nan, math.nan, math.nan)
    if known.sum() >= 3:
        across = interval(float(kendall(m, t)[0]), kendall(m, t, table.weights[:, known]), runs=len(m))
        indices = table.bootstrap_indices(len(m))
        across_rho = interval(float(spearman(m, t)), spearman(m[indices], t[indices]), runs=len(m))
    return Agreement(
        metric=metric,
        target=target,
        within=table.mean(taus),
        within_rho=table.mean(rhos),
        beyond_time=_given_step(table, pairs, rank_within=True),
        across=across,
        across_rho=across_rho,
        across_beyond_time=_given_step(table, pairs, rank_within=False),
        directed=direction != "neither",
    )


def _given_step(table: RunTable, pairs: Sequence[tuple[Array, ...]], *, rank_within: bool) -> Interval:
    """Partial correlation of ranks given the rank of the step, over all evaluations: ranked within runs, or together.

    All draws use the ranks of the whole sample; only the weights of the runs are drawn. Within runs, a run whose
    metric rises or falls with every step has no information beyond the step. It does not count among the runs that an
    interval needs.
    """
    if rank_within:
        ranks = [np.stack([centered_ranks(v) for v in p]) if len(p[0]) else np.zeros((3, 0)) for p in pairs]
    else:
        pooled = [np.concatenate([p[k] for p in pairs]) for k in range(3)]
        if len(pooled[0]) < 3:
            return Interval(math.nan, math.nan, math.nan)
        ends = np.cumsum([len(p[0]) for p in pairs])[:-1]
        ranks = np.split(np.stack([rankdata(v) for v in pooled]), ends, axis=1)
    products = np.stack([x @ x.T for x in ranks])  # (runs, 3, 3)
    informative = len(pairs)
    if rank_within:
        mm, ms, ss = products[:, 0, 0], products[:, 0, 2], products[:, 2, 2]
        informative = int((mm * ss - ms**2 > 1e-9 * mm * ss).sum())
    sums, counts = np.stack([x.sum(1) for x in ranks]), np.array([x.shape[1] for x in ranks], dtype=float)

    def partial(weights: Array) -> Array:
        total = np.einsum("br,rij->bij", weights, products)
        mean, n = weights @ sums, (weights @ counts)[:, None, None]
        c = total - mean[:, :, None] * mean[:, None, :] / n
        return partial_correlation(c[:, 0, 1], c[:, 0, 2], c[:, 1, 2], c[:, 0, 0], c[:, 1, 1], c[:, 2, 2])

    with np.errstate(invalid="ignore", divide="ignore"):
        return interval(float(partial(np.ones((1, len(pairs))))[0]), partial(table.weights), runs=informative)
