"""Regret: the cost, in probe score, of selecting by a metric or by a baseline."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from repmetrics.decisions.run_selection import borda_count
from repmetrics.measurement.registry import METRICS
from repmetrics.trust.bootstrap import Array, Interval, RunTable, interval

BASELINES = ("last", "loss", "random")
NOISE_DRAWS = 200


class Regret(NamedTuple):
    """Cost of selecting by one signal, in the unit of the target.

    Attributes:
        signal: A metric; "borda", Borda's count over all metrics with a direction, without evaluations that have
            alarms; or a baseline: "last", "loss" (the lowest), "random" (its expectation).
        target: Name of the probe.
        checkpoint: Target of the run's best evaluation minus that of the selected one, mean over runs.
        relative: Sum of `checkpoint` over runs, divided by the sum of (best − median).
        against_last: Regret of the last checkpoint minus this one's; above 0, the signal beats the last.
        run: Target of the best run's last evaluation minus that of the selected run; None for "last".
        run_relative: `run` divided by (best − median) of the runs.
        against_random: Expected regret of a random run minus this one's; above 0, the signal beats chance. None for
            "last".
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
    """Best target of a row minus the target at the row's highest value; of equal values, the first is selected.

    NaN is never selected; a row without any value has regret NaN.

    Example:
        >>> selection_regret(np.array([[3.0, 9.0, 5.0]]), np.array([[0.6, 0.7, 0.8]])).round(3).tolist()
        [0.1]
    """
    scores = np.where(np.isnan(values) | np.isnan(target), -np.inf, values)
    best = np.where(np.isnan(target), -np.inf, target).max(-1)
    selected = np.take_along_axis(target, scores.argmax(-1)[..., None], -1)[..., 0]
    with np.errstate(invalid="ignore"):
        return np.where((scores == -np.inf).all(-1), math.nan, best - selected)


def preference(table: RunTable, signal: str, directed: Sequence[str]) -> tuple[list[Array], Array]:
    """Scores of a signal, higher is better: of each run's evaluations after step 0, and of the last evaluations."""
    trained = [steps > 0 for steps in table.steps()]

    def scores(name: str) -> list[Array]:
        sign = -1 if name == "loss" or METRICS[name].direction == "lower" else 1
        return [sign * values[after] for values, after in zip(table.values(name), trained, strict=True)]

    if signal == "last":
        return [np.arange(float(after.sum())) for after in trained], np.full(len(trained), math.nan)
    if signal == "borda":
        alarms = [[x.alarms for x in items if x.step > 0] for items in table.by_run]
        votes, higher = {name: scores(name) for name in directed}, dict.fromkeys(directed, "higher")
        within = [borda_count({k: v[i].tolist() for k, v in votes.items()}, direction=higher, alarms=a)
                  for i, a in enumerate(alarms)]  # fmt: skip
        final = borda_count({k: [float(x[-1]) for x in v] for k, v in votes.items()}, direction=higher,
                            alarms=[a[-1] for a in alarms])  # fmt: skip
        return [np.where(np.isinf(points), math.nan, points) for points in within], final
    values = scores(signal)
    return values, np.array([of_run[-1] for of_run in values])


def regret(table: RunTable, signal: str, target: str, *, directed: Sequence[str] = ()) -> Regret:
    """Regret of selecting by a signal; the evaluation at step 0, of the untrained network, is no candidate."""
    truths = [t[s > 0] for t, s in zip(table.values(target), table.steps(), strict=True)]
    final = np.array([t[-1] for t in truths])
    indices = table.bootstrap_indices(len(final))
    chance = float(np.nanmax(final) - np.nanmean(final))
    chances = np.nanmax(final[indices], 1) - np.nanmean(final[indices], 1)
    if signal == "random":
        costs, run_cost, draws = np.array([np.nanmax(t) - np.nanmean(t) for t in truths]), chance, chances
    else:
        within, among = preference(table, signal, directed)
        costs = np.array([float(selection_regret(v, t)) for v, t in zip(within, truths, strict=True)])
        run_cost, draws = float(selection_regret(among, final)), selection_regret(among[indices], final[indices])
    last_costs = np.array([np.nanmax(t) - t[-1] for t in truths])
    spreads = np.array([np.nanmax(t) - np.nanmedian(t) for t in truths])
    known = ~np.isnan(costs)
    run_spread = float(np.nanmax(final) - np.nanmedian(final))
    return Regret(
        signal=signal,
        target=target,
        checkpoint=table.mean(list(costs)),
        relative=float(costs[known].sum() / spreads[known].sum()) if spreads[known].sum() > 0 else math.nan,
        against_last=table.mean(list(last_costs - costs)),
        run=None if signal == "last" else interval(run_cost, draws, runs=len(final)),
        run_relative=run_cost / run_spread if signal != "last" and run_spread > 0 else None,
        against_random=None if signal == "last" else interval(chance - run_cost, chances - draws, runs=len(final)),
    )


def noise_regret(table: RunTable, target: str, *, seed: int) -> float:
    """Regret within runs of a selector that is perfect but for the probe's errors, taken as independent.

    Each evaluation's target is redrawn around its measured value. Selecting the best redrawn value costs this much of
    the measured value. Evaluations on one data set share part of their errors, so this is an upper bound. NaN without
    errors.
    """
    generator = np.random.default_rng(seed)
    costs = []
    for items in table.by_run:
        trained = [x for x in items if x.step > 0 and target in x.values]
        if not trained or any(target not in x.errors for x in trained):
            return math.nan
        truth, error = (np.array([getattr(x, kind)[target] for x in trained]) for kind in ("values", "errors"))
        selected = (truth + error * generator.standard_normal((NOISE_DRAWS, len(truth)))).argmax(1)
        costs.append(float((truth.max() - truth[selected]).mean()))
    return float(np.mean(costs))
