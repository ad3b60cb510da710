"""Collapse alarms for a training run, as pure functions of its evaluations.

The thresholds do not depend on the scale of the features, on N or on D. Those of the shares below are set on one half
of the runs of ``benchmarks/trust``; ``benchmarks/trust/alarms.py`` counts hits and false alarms on the other half.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from repmetrics.functional.correlation import HasVariances, column_mean_and_variance, is_dead
from repmetrics.functional.linalg import float64_blocks
from repmetrics.measurement.result import Measurement, change_error

Kind = Literal[
    "not finite", "complete collapse", "dimensional collapse", "degraded features", "dead features", "precision"
]

RANK_METRIC = "rankme_centered"
"""Metric of :attr:`AlarmInput.rank`, which shows dimensional collapse."""
COMPLETE_DIRECTION = 0.01
"""Complete collapse: 1 − ‖E u‖² is below this, so that all features point the same way."""
COMPLETE_VARIANCE = 1e-3
"""Complete collapse: the share of variance in the energy is below this; the rest is a common offset."""
DIMENSIONAL_SHARE = 0.05
"""Dimensional collapse: the rank is below this share of its largest possible value."""
RETRIEVAL_METRICS = ("view_retrieval", "view_retrieval_whitened")
"""Metrics of :attr:`AlarmInput.retrieval`: whether the features still tell images apart."""
RETRIEVAL_SHARE = 0.6
"""Degraded features: each of these metrics is below this share of its maximum, the untrained network included …"""
RETRIEVAL_ERRORS = 3.0
"""… and by more than this number of standard errors."""
CHANCE_RATIO = 5.0
"""Features tell images apart if each of these metrics is above this many times chance, 1/images."""
DROP_SHARE = 0.4
"""Dimensional collapse where no views are measured: the rank is below its maximum by more than this share …"""
DROP_ERRORS = 3.0
"""… and by more than this number of paired standard errors, if these are known."""
SETTLED_EVALUATIONS = 3
"""The maximum counts from the first rank that this many later ones do not undercut …"""
SETTLED_SHARE = 0.05
"""… by more than this share: an untrained network has a wide spectrum, so that the rank falls first."""
DEAD_SHARE = 0.25
"""Dead features: the share of columns without variance is above this."""
PRECISION_RATIO = 2.0**-8
"""Precision: bfloat16 features, whose median std/|mean| over columns is below the resolution of bfloat16."""
CONSECUTIVE = 2
"""Number of consecutive evaluations that an alarm needs, unless features are not finite."""


class CollapseStats(NamedTuple):
    """Numbers that the alarms read in addition to the rank, from features (N, D).

    Attributes:
        spread: 1 − ‖E u‖² of the rows' directions u; 0 … 1, 0 is complete collapse.
        variance_share: Centered energy over total energy; 0 … 1.
        dead_features: Share of dead columns, as :func:`~repmetrics.functional.correlation.dead_features` defines them.
        offset_ratio: Median over columns of std/|mean|.
        bfloat16: Whether the features are bfloat16.
    """

    spread: float
    variance_share: float
    dead_features: float
    offset_ratio: float
    bfloat16: bool


class AlarmInput(NamedTuple):
    """Data of one evaluation that the alarms read.

    Attributes:
        step: Optimizer steps before it.
        rank: Value of :data:`RANK_METRIC`.
        collapse_stats: Further statistics of the features.
        nonfinite: Number of samples with NaN or Inf features.
        retrieval: Values of :data:`RETRIEVAL_METRICS`, or empty unless all are known.
    """

    step: int
    rank: Measurement | None
    collapse_stats: CollapseStats | None
    nonfinite: int
    retrieval: tuple[Measurement, ...] = ()


class Alarm(NamedTuple):
    """Kind of a collapse, and the numbers that show it."""

    kind: Kind
    reason: str


def collapse_stats(features: Tensor, *, moments: HasVariances | None = None) -> CollapseStats:
    """Compute the statistics of features (N, D) that show collapse.

    Args:
        features: Features (N, D), any floating dtype.
        moments: Their means and variances, if these are known already.

    Example:
        >>> collapse_stats(torch.ones(10, 4)).spread
        0.0
    """
    mean, variance = column_mean_and_variance(features) if moments is None else (moments.mean, moments.variances())
    direction = torch.zeros_like(mean)
    for rows in float64_blocks(features):
        direction += torch.nn.functional.normalize(rows, dim=1, eps=1e-300).sum(0)
    energy = float(variance.sum() + mean.square().sum())
    return CollapseStats(
        spread=max(0.0, 1 - float((direction / len(features)).square().sum())),
        variance_share=float(variance.sum()) / energy if energy > 0 else 0.0,
        dead_features=float(is_dead(variance, mean, dtype=features.dtype).double().mean()),
        offset_ratio=float((variance.sqrt() / mean.abs()).nan_to_num(nan=0.0, posinf=math.inf).median()),
        bfloat16=features.dtype == torch.bfloat16,
    )


def alarms(
    history: Sequence[AlarmInput], *, warmup_steps: int = 0, consecutive: int = CONSECUTIVE
) -> tuple[Alarm, ...]:
    """Return the alarms that are active after the last evaluation.

    Where views are measured, a fall of the rank alone is no alarm: the rank of healthy runs falls as often as that of
    broken ones.

    Args:
        history: All evaluations, oldest first.
        warmup_steps: Last step of the warm-up. Its evaluations, with that of step 0, raise no alarm and do not count
            for the running maximum of the rank. View retrieval at step 0 counts.
        consecutive: Number of evaluations in a row that must show it. A choice among checkpoints, whose steps may lie
            far apart, takes 1.
    """
    if not history:
        return ()
    last = history[-1]
    if last.nonfinite:
        return (Alarm("not finite", f"{last.nonfinite} held-out samples have NaN or Inf features"),)
    valid = [evaluation for evaluation in history if evaluation.step > warmup_steps and not evaluation.nonfinite]
    if len(valid) < consecutive or last is not valid[-1]:
        return ()
    first = history[0] if history[0].step == 0 and not history[0].nonfinite else None
    recent = [_candidates(valid[: len(valid) - back], untrained=first) for back in range(consecutive)]
    kinds = set.intersection(*({alarm.kind for alarm in candidates} for candidates in recent))
    return tuple(alarm for alarm in recent[0] if alarm.kind in kinds)


def _candidates(history: Sequence[AlarmInput], *, untrained: AlarmInput | None) -> list[Alarm]:
    """Return the alarms that the last evaluation alone would raise."""
    stats, rank, retrieval = history[-1].collapse_stats, history[-1].rank, history[-1].retrieval
    fall = _retrieval_fall(retrieval, [past.retrieval for past in (untrained, *history[:-1]) if past])
    candidates = [] if stats is None else _stats_candidates(stats)
    if stats is not None:
        apart = bool(retrieval) and not fall and all(m.value > CHANCE_RATIO * 2 / m.n for m in retrieval)
        start = None if untrained is None else untrained.collapse_stats
        candidates += _complete(stats, history, untrained=start, apart=apart)
    if rank is not None and not math.isnan(rank.value):
        earlier = [past.rank for past in history[:-1] if past.rank is not None and not math.isnan(past.rank.value)]
        candidates += _low_rank(rank) or ([] if retrieval else _rank_fall(rank, earlier))
    return candidates + fall


def _stats_candidates(stats: CollapseStats) -> list[Alarm]:
    candidates: list[Alarm] = []
    if stats.dead_features > DEAD_SHARE:
        candidates.append(Alarm("dead features", f"{stats.dead_features:.0%} of the features do not vary"))
    if stats.bfloat16 and stats.offset_ratio < PRECISION_RATIO:
        reason = f"median std/|mean| = {stats.offset_ratio:.2g}: below the resolution of bfloat16"
        candidates.append(Alarm("precision", reason))
    return candidates


def _complete(
    stats: CollapseStats, history: Sequence[AlarmInput], *, untrained: CollapseStats | None, apart: bool
) -> list[Alarm]:
    """Complete collapse.

    Some networks start with a large common offset, as ViTs with a layer scale of 1e-5 do. They are not collapsed while
    they spread, or while their features tell images ``apart``.
    """
    if stats.spread < COMPLETE_DIRECTION:
        name, limit, reason = (
            "spread",
            COMPLETE_DIRECTION,
            f"1 − ‖E u‖² = {stats.spread:.2g}: all features point one way",
        )
    elif stats.variance_share < COMPLETE_VARIANCE:
        name, limit = "variance_share", COMPLETE_VARIANCE
        reason = f"variance is {stats.variance_share:.2g} of the energy: the rest is offset"
    else:
        return []
    if untrained is not None and getattr(untrained, name) < limit:
        values = [getattr(e.collapse_stats, name) for e in history if e.collapse_stats is not None]
        if apart or values[-1] > max([getattr(untrained, name), *values[:-1]]):
            return []
    return [Alarm("complete collapse", reason)]


def largest_rank(rank: Measurement) -> int:
    """Largest possible value of :data:`RANK_METRIC` on the measured rows: min(N − 1, D)."""
    return min(rank.n - 1, rank.d)


def _low_rank(rank: Measurement) -> list[Alarm]:
    highest = largest_rank(rank)
    if rank.value >= DIMENSIONAL_SHARE * highest:
        return []
    share = rank.value / highest
    return [Alarm("dimensional collapse", f"{rank.name} is {rank.value:.3g}, {share:.1%} of the {highest} possible")]


def _retrieval_fall(values: Sequence[Measurement], before: Sequence[Sequence[Measurement]]) -> list[Alarm]:
    """Alarm if every view retrieval fell: one of them may fall alone, as the raw one does with a dominant direction."""
    if not values:
        return []
    reasons = []
    for i, last in enumerate(values):
        known = [past[i] for past in before if past and not math.isnan(past[i].value)]
        best = max(known, key=lambda m: m.value, default=last)
        fall = best.value - last.value
        if not fall > max((1 - RETRIEVAL_SHARE) * best.value, RETRIEVAL_ERRORS * _error_of_shares(best, last)):
            return []
        reasons.append(f"{last.name} fell from {best.value:.2g} to {last.value:.2g}")
    return [Alarm("degraded features", " and ".join(reasons) + ": the features tell images apart less well")]


def _error_of_shares(first: Measurement, second: Measurement) -> float:
    """Standard error of the change: paired if groups are known, else of shares of n/2 independent pairs of views."""
    error = change_error(first, second)
    if error is not None and not math.isnan(error):
        return error
    return math.sqrt(sum(2 * m.value * (1 - m.value) / m.n for m in (first, second)))


def _rank_fall(rank: Measurement, before: Sequence[Measurement]) -> list[Alarm]:
    start = _settled([m.value for m in (*before, rank)])
    if start is None:
        return []
    best = max((*before, rank)[start:], key=lambda m: m.value)
    drop = best.value - rank.value
    error = change_error(best, rank)
    if drop > DROP_SHARE * best.value and (error is None or drop > DROP_ERRORS * error):
        errors = "" if error is None else f", {drop / error:.0f} paired standard errors" if error > 0 else ""
        return [
            Alarm(
                "dimensional collapse",
                f"{rank.name} fell from {best.value:.3g} to {rank.value:.3g}, {drop / best.value:.0%} below its maximum"
                + errors,
            )
        ]
    return []


def _settled(ranks: Sequence[float]) -> int | None:
    """Index at which the first fall of the rank ends, or None if it has not ended.

    Example:
        >>> _settled([40, 30, 20, 19.5, 19.8, 21]), _settled([40, 30, 20])
        (2, None)
    """
    for i, rank in enumerate(ranks[: len(ranks) - SETTLED_EVALUATIONS]):
        if min(ranks[i + 1 : i + 1 + SETTLED_EVALUATIONS]) >= (1 - SETTLED_SHARE) * rank:
            return i
    return None
