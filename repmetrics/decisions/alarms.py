"""Rules for a running training: collapse alarms, when to stop, which checkpoints to keep. Pure functions of a history.

Their constants stand here and nowhere else. They are proposals, chosen to be free of the features' scale, N and D.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from repmetrics.measurement.result import Measurement, change_error

Kind = Literal["not finite", "complete collapse", "dimensional collapse", "dead features", "precision"]

COMPLETE_DIRECTION = 0.01
"""Complete collapse: 1 − ‖E u‖² below this; all features point the same way."""
COMPLETE_VARIANCE = 1e-3
"""Complete collapse: share of the energy that is variance below this; the rest is a common offset."""
DIMENSIONAL_SHARE = 0.05
"""Dimensional collapse: centred RankMe below this share of min(N − 1, D)."""
DROP_SHARE = 0.25
"""Dimensional collapse: centred RankMe lower than its running maximum by more than this share …"""
DROP_ERRORS = 3.0
"""… and by more than so many paired standard errors, where these are known."""
DEAD_SHARE = 0.05
"""Dead features: share of columns without variance above this."""
PRECISION_RATIO = 2.0**-8
"""Precision: median std/|mean| of the columns below bfloat16's resolution, with bfloat16 features."""
CONSECUTIVE = 2
"""An alarm needs so many measurements in a row; one that is not finite needs none."""


class CollapseStats(NamedTuple):
    """What the alarms look at beside the metrics, from features (N, D).

    Attributes:
        spread: 1 − ‖E u‖² of the rows' directions u; 0 … 1, 0 is complete collapse.
        variance_share: centred energy over total energy; 0 … 1.
        dead_features: share of columns with variance below 1e-6 × the median of all columns, or 0.
        offset_ratio: median over columns of std/|mean|.
        bfloat16: whether the features came in that precision.
    """

    spread: float
    variance_share: float
    dead_features: float
    offset_ratio: float
    bfloat16: bool


class AlarmInput(NamedTuple):
    """What the alarms need to know of one look."""

    step: int
    rank: Measurement | None
    collapse_stats: CollapseStats | None
    nonfinite: int


class Alarm(NamedTuple):
    """A collapse, its kind and the numbers that show it."""

    kind: Kind
    reason: str


def collapse_stats(features: Tensor) -> CollapseStats:
    """The vital signs of features (N, D).

    Example:
        >>> collapse_stats(torch.ones(10, 4)).spread
        0.0
    """
    rows = features.detach().to(torch.float64)
    mean, variance = rows.mean(0), rows.var(0, correction=0)
    direction = torch.nn.functional.normalize(rows, dim=1).mean(0)
    energy = float(rows.square().sum(1).mean())
    floor = 1e-6 * variance.median()
    return CollapseStats(
        spread=max(0.0, 1 - float(direction.square().sum())),
        variance_share=float(variance.sum()) / energy if energy > 0 else 0.0,
        dead_features=float((variance <= floor).double().mean()),
        offset_ratio=float((variance.sqrt() / mean.abs()).nan_to_num(nan=0.0, posinf=math.inf).median()),
        bfloat16=features.dtype == torch.bfloat16,
    )


def alarms(history: Sequence[AlarmInput], *, warmup_steps: int = 0) -> tuple[Alarm, ...]:
    """The alarms that stand after the last look of a history.

    Args:
        history: all looks, oldest first.
        warmup_steps: looks up to this step, step 0 among them, count neither as hits nor for the running maximum.
    """
    if not history:
        return ()
    last = history[-1]
    if last.nonfinite:
        return (Alarm("not finite", f"{last.nonfinite} held-out samples have NaN or Inf features"),)
    seen = [point for point in history if point.step > warmup_steps and not point.nonfinite]
    if len(seen) < CONSECUTIVE or last is not seen[-1]:
        return ()
    recent = [_hits(seen[: len(seen) - back]) for back in range(CONSECUTIVE)]
    kinds = set.intersection(*({alarm.kind for alarm in hits} for hits in recent))
    return tuple(alarm for alarm in recent[0] if alarm.kind in kinds)


def _hits(seen: Sequence[AlarmInput]) -> list[Alarm]:
    found: list[Alarm] = []
    vital, rank = seen[-1].collapse_stats, seen[-1].rank
    if vital is not None:
        if vital.spread < COMPLETE_DIRECTION:
            found.append(Alarm("complete collapse", f"1 − ‖E u‖² = {vital.spread:.2g}: all features point one way"))
        elif vital.variance_share < COMPLETE_VARIANCE:
            found.append(
                Alarm("complete collapse", f"variance is {vital.variance_share:.2g} of the energy: the rest is offset")
            )
        if vital.dead_features > DEAD_SHARE:
            found.append(Alarm("dead features", f"{vital.dead_features:.0%} of the features do not vary"))
        if vital.bfloat16 and vital.offset_ratio < PRECISION_RATIO:
            found.append(
                Alarm("precision", f"median std/|mean| = {vital.offset_ratio:.2g}: below the resolution of bfloat16")
            )
    if rank is not None and not math.isnan(rank.value):
        found.extend(_rank_hits(rank, [point.rank for point in seen[:-1] if point.rank is not None]))
    return found


def _rank_hits(rank: Measurement, before: Sequence[Measurement]) -> list[Alarm]:
    highest = min(rank.n - 1, rank.d)
    if rank.value < DIMENSIONAL_SHARE * highest:
        share = rank.value / highest
        return [
            Alarm("dimensional collapse", f"{rank.name} is {rank.value:.3g}, {share:.1%} of the {highest} possible")
        ]
    best = max(before, key=lambda m: m.value, default=rank)
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
