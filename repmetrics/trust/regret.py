"""Cost in probe score of choosing by a metric, beside baselines."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from repmetrics.decisions.run_selection import borda_count
from repmetrics.measurement.registry import METRICS
from repmetrics.trust.bootstrap import Array, Interval, RunTable, interval

BASELINES = ("last", "loss", "random")


class Regret(NamedTuple):
    """What choosing by one signal costs, in the target's own unit.

    Attributes:
        signal: a metric; "borda", all metrics with a direction together, behind the alarms' gate; or a baseline:
            "last", "loss" (the lowest), "random" (its expectation).
        target: the probe.
        checkpoint: the run's best look minus the one chosen, mean over runs.
        relative: that over (best − median), sums over runs.
        against_last: regret of the last checkpoint minus this one's; above 0, it beats the last.
        run: the best run's last look minus the chosen run's; None for "last".
        run_relative: that over (best − median) of the runs.
        against_random: expected regret of a random run minus this one's; above 0, it beats chance. None for "last".
    """

    signal: str
    target: str
    checkpoint: Interval
    relative: float
    against_last: Interval
    run: Interval | None
    run_relative: float | None
    against_random: Interval | None


def selection_regret(values: Array, target: Array) -> Array:
    """Regret of choosing by the highest value, in rows: the best of the target minus the chosen, the first of equals.

    NaN is never chosen; a row without any value costs NaN.

    Example:
        >>> selection_regret(np.array([[3.0, 9.0, 5.0]]), np.array([[0.6, 0.7, 0.8]])).round(3).tolist()
        [0.1]
    """
    scored = np.where(np.isnan(values) | np.isnan(target), -np.inf, values)
    best = np.where(np.isnan(target), -np.inf, target).max(-1)
    taken = np.take_along_axis(target, scored.argmax(-1)[..., None], -1)[..., 0]
    with np.errstate(invalid="ignore"):
        return np.where((scored == -np.inf).all(-1), math.nan, best - taken)


def preference(bench: RunTable, signal: str, directed: Sequence[str]) -> tuple[list[Array], Array]:
    """What a signal prefers, the higher the better: among the trained looks of each run, and among the last looks."""
    trained = [steps > 0 for steps in bench.steps()]

    def turned(name: str) -> list[Array]:
        sign = -1 if name == "loss" or METRICS[name].direction == "lower" else 1
        return [sign * values[mine] for values, mine in zip(bench.values(name), trained, strict=True)]

    if signal == "last":
        counted = [np.arange(float(mine.sum())) for mine in trained]
        return counted, np.full(len(counted), math.nan)
    if signal == "borda":
        alarms = [[x.alarms for x in run if x.step > 0] for run in bench.by_run]
        votes, better = {name: turned(name) for name in directed}, dict.fromkeys(directed, "higher")
        within = [borda_count({k: v[i].tolist() for k, v in votes.items()}, direction=better, alarms=a)
                  for i, a in enumerate(alarms)]  # fmt: skip
        final = borda_count({k: [float(x[-1]) for x in v] for k, v in votes.items()}, direction=better,
                      alarms=[a[-1] for a in alarms])  # fmt: skip
        return [np.where(np.isinf(points), math.nan, points) for points in within], final
    values = turned(signal)
    return values, np.array([mine[-1] for mine in values])


def regret(bench: RunTable, signal: str, target: str, *, directed: Sequence[str] = ()) -> Regret:
    """What choosing by a signal costs; the untrained look at step 0 is no candidate."""
    truths = [t[s > 0] for t, s in zip(bench.values(target), bench.steps(), strict=True)]
    final = np.array([t[-1] for t in truths])
    drawn = bench.bootstrap_indices(len(final))
    lasts = np.array([np.nanmax(t) - t[-1] for t in truths])
    chance, chances = np.nanmax(final) - np.nanmean(final), np.nanmax(final[drawn], 1) - np.nanmean(final[drawn], 1)
    if signal == "random":
        costs, whole, draws = np.array([np.nanmax(t) - np.nanmean(t) for t in truths]), float(chance), chances
    else:
        within, among = preference(bench, signal, directed)
        costs = np.array([float(selection_regret(v, t)) for v, t in zip(within, truths, strict=True)])
        whole, draws = float(selection_regret(among, final)), selection_regret(among[drawn], final[drawn])
    room = np.array([np.nanmax(t) - np.nanmedian(t) for t in truths])
    known = ~np.isnan(costs)
    spread = float(np.nanmax(final) - np.nanmedian(final))
    return Regret(
        signal=signal,
        target=target,
        checkpoint=bench.mean(list(costs)),
        relative=float(costs[known].sum() / room[known].sum()) if room[known].sum() > 0 else math.nan,
        against_last=bench.mean(list(lasts - costs)),
        run=None if signal == "last" else interval(whole, draws, runs=len(final)),
        run_relative=whole / spread if signal != "last" and spread > 0 else None,
        against_random=None if signal == "last" else interval(chance - whole, chances - draws, runs=len(final)),
    )


def noise_regret(bench: RunTable, target: str, *, seed: int, draws: int = 200) -> float:
    """Regret within runs of a selector that is perfect but for the probe's own errors, taken as independent.

    Each look's target is drawn anew around what was measured; choosing the best drawn one costs, on what was
    measured, this much. Looks at one data set share part of their errors, so it is an upper bound. NaN without errors.
    """
    generator = np.random.default_rng(seed)
    costs = []
    for mine in bench.by_run:
        later = [x for x in mine if x.step > 0 and target in x.values]
        if not later or any(target not in x.errors for x in later):
            return math.nan
        truth, error = (np.array([getattr(x, kind)[target] for x in later]) for kind in ("values", "errors"))
        places = (truth + error * generator.standard_normal((draws, len(truth)))).argmax(1)
        costs.append(float((truth.max() - truth[places]).mean()))
    return float(np.mean(costs))
