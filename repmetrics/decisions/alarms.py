"""Collapse alarms for a training run, as pure functions of its evaluations.

The thresholds do not depend on the scale of the features, on N or on D. Those of the fall are set so that none of the
healthy runs of ``benchmarks/results/trust.csv`` raises an alarm; the others are proposals.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from repmetrics.functional.correlation import is_dead
from repmetrics.measurement.result import Measurement, change_error

Kind = Literal["not finite", "complete collapse", "dimensional collapse", "dead features", "precision"]

RANK_METRIC = "rankme_centered"
"""Metric of :attr:`AlarmInput.rank`, which shows dimensional collapse."""
COMPLETE_DIRECTION = 0.01
"""Complete collapse: 1 − ‖E u‖² is below this, so that all features point the same way."""
COMPLETE_VARIANCE = 1e-3
"""Complete collapse: the share of variance in the energy is below this; the rest is a common offset."""
DIMENSIONAL_SHARE = 0.05
"""Dimensional collapse: the rank is below this share of its largest possible value."""
DROP_SHARE = 0.4
"""Dimensional collapse: the rank is below its maximum by more than this share …"""
DROP_ERRORS = 3.0
"""… and by more than this number of paired standard errors, if these are known."""
SETTLED_EVALUATIONS = 3
"""The maximum counts from the first rank that this many later ones do not undercut …"""
SETTLED_SHARE = 0.05
"""… by more than this share: an untrained network has a wide spectrum, so that the rank falls first."""
DEAD_SHARE = 0.05
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
    """Data of one evaluation that the alarms read; ``rank`` is the value of :data:`RANK_METRIC`."""

    step: int
    rank: Measurement | None
    collapse_stats: CollapseStats | None
    nonfinite: int


class Alarm(NamedTuple):
    """Kind of a collapse, and the numbers that show it."""

    kind: Kind
    reason: str


def collapse_stats(features: Tensor) -> CollapseStats:
    """Compute the statistics of features (N, D) that show collapse.

    Example:
        >>> collapse_stats(torch.ones(10, 4)).spread
        0.0
    """
    rows = features.detach().to(torch.float64)
    mean, variance = rows.mean(0), rows.var(0, correction=0)
    direction = torch.nn.functional.normalize(rows, dim=1, eps=1e-300).mean(0)
    energy = float(rows.square().sum(1).mean())
    return CollapseStats(
        spread=max(0.0, 1 - float(direction.square().sum())),
        variance_share=float(variance.sum()) / energy if energy > 0 else 0.0,
        dead_features=float(is_dead(variance, mean, dtype=features.dtype).double().mean()),
        offset_ratio=float((variance.sqrt() / mean.abs()).nan_to_num(nan=0.0, posinf=math.inf).median()),
        bfloat16=features.dtype == torch.bfloat16,
    )


def alarms(history: Sequence[AlarmInput], *, warmup_steps: int = 0) -> tuple[Alarm, ...]:
    """Return the alarms that are active after the last evaluation.

    Args:
        history: All evaluations, oldest first.
        warmup_steps: Last step of the warm-up. Its evaluations, with that of step 0, raise no alarm and do not count
            for the running maximum.
    """
    if not history:
        return ()
    last = history[-1]
    if last.nonfinite:
        return (Alarm("not finite", f"{last.nonfinite} held-out samples have NaN or Inf features"),)
    valid = [evaluation for evaluation in history if evaluation.step > warmup_steps and not evaluation.nonfinite]
    if len(valid) < CONSECUTIVE or last is not valid[-1]:
        return ()
    first = history[0].collapse_stats if history[0].step == 0 else None
    recent = [_candidates(valid[: len(valid) - back], untrained=first) for back in range(CONSECUTIVE)]
    kinds = set.intersection(*({alarm.kind for alarm in candidates} for candidates in recent))
    return tuple(alarm for alarm in recent[0] if alarm.kind in kinds)


def _candidates(history: Sequence[AlarmInput], *, untrained: CollapseStats | None) -> list[Alarm]:
    """Return the alarms that the last evaluation alone would raise."""
    candidates: list[Alarm] = []
    stats, rank = history[-1].collapse_stats, history[-1].rank
    if stats is not None:
        if stats.spread < COMPLETE_DIRECTION and not _leaves_start("spread", history, untrained=untrained):
            reason = f"1 − ‖E u‖² = {stats.spread:.2g}: all features point one way"
            candidates.append(Alarm("complete collapse", reason))
        elif (
            stats.spread >= COMPLETE_DIRECTION
            and stats.variance_share < COMPLETE_VARIANCE
            and not _leaves_start("variance_share", history, untrained=untrained)
        ):
            reason = f"variance is {stats.variance_share:.2g} of the energy: the rest is offset"
            candidates.append(Alarm("complete collapse", reason))
        if stats.dead_features > DEAD_SHARE:
            candidates.append(Alarm("dead features", f"{stats.dead_features:.0%} of the features do not vary"))
        if stats.bfloat16 and stats.offset_ratio < PRECISION_RATIO:
            reason = f"median std/|mean| = {stats.offset_ratio:.2g}: below the resolution of bfloat16"
            candidates.append(Alarm("precision", reason))
    if rank is not None and not math.isnan(rank.value):
        candidates.extend(_rank_candidates(rank, [past.rank for past in history[:-1] if past.rank is not None]))
    return candidates


def _leaves_start(name: str, history: Sequence[AlarmInput], *, untrained: CollapseStats | None) -> bool:
    """Whether a network that starts collapsed, as ViTs with a layer scale of 1e-5 do, has not yet stopped spreading."""
    limit = COMPLETE_DIRECTION if name == "spread" else COMPLETE_VARIANCE
    if untrained is None or getattr(untrained, name) >= limit:
        return False
    values = [getattr(e.collapse_stats, name) for e in history if e.collapse_stats is not None]
    return bool(values[-1] > max([getattr(untrained, name), *values[:-1]]))


def largest_rank(rank: Measurement) -> int:
    """Largest possible value of :data:`RANK_METRIC` on the measured rows: min(N − 1, D)."""
    return min(rank.n - 1, rank.d)


def _rank_candidates(rank: Measurement, before: Sequence[Measurement]) -> list[Alarm]:
    highest = largest_rank(rank)
    if rank.value < DIMENSIONAL_SHARE * highest:
        share = rank.value / highest
        return [
            Alarm("dimensional collapse", f"{rank.name} is {rank.value:.3g}, {share:.1%} of the {highest} possible")
        ]
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
