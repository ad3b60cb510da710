"""Ranking of finished runs without labels: who is excluded, what noise explains, and how sure the choice is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from repmetrics.decisions.run_selection import borda_count, tied_with_best
from repmetrics.decisions.slide_draws import format_share
from repmetrics.measurement.registry import METRICS

DRAWS = 4_000
"""Draws of the bootstrap."""

SEED_SPREAD = (
    "seed noise is not in the errors: three seeds of one setting spread RankMe by 8 % (DINOv2) and 5 % (DINO) in "
    "benchmarks/tissue, up to twice the errors given here; seeds = 3 measures it"
)
"""Said where no setting was run with several seeds."""

STATES = ("complete", "running", "pruned", "collapsed", "diverged", "out of memory", "crashed")
"""States of a run, in the order of tables."""


class RunSummary(NamedTuple):
    """A finished run.

    Attributes:
        name: Name of the run.
        state: One of :data:`STATES`.
        settings: Settings that vary between the runs.
        step: Step of the last evaluation.
        signals: Value and standard error by metric at the last evaluation.
        alarms: Alarms active at the last evaluation.
        reason: Why it is not complete.
        repeats: Name of the run whose settings it repeats with another seed, or None.
    """

    name: str
    state: str
    settings: Mapping[str, Any]
    step: int | None
    signals: Mapping[str, tuple[float, float | None]]
    alarms: tuple[str, ...] = ()
    reason: str = ""
    repeats: str | None = None


class RankedSetting(NamedTuple):
    """A setting with one run, or several that differ in their seed.

    Attributes:
        runs: Its complete runs, the first one first.
        value: Mean of the metric over its runs.
        error: Standard error of `value`: held-out noise, and seed noise where it was measured; None if unknown.
        spread: Standard deviation over seeds; None with one run.
    """

    runs: tuple[RunSummary, ...]
    value: float
    error: float | None
    spread: float | None

    @property
    def name(self) -> str:
        """Name of its first run."""
        return self.runs[0].name


class Ranking(NamedTuple):
    """Settings by a metric, the best first.

    Attributes:
        settings: Those that can be chosen.
        excluded: Runs that cannot: pruned, with an alarm at the end, or without a value.
        metric: Metric of the ranking.
        direction: "higher" or "lower".
        seed_noise: Standard deviation over seeds, pooled over the settings with several runs; None without one.
        confidence: Share of bootstrap draws of the errors in which the first stays first; None without errors.
    """

    settings: tuple[RankedSetting, ...]
    excluded: tuple[RunSummary, ...]
    metric: str
    direction: str
    seed_noise: float | None
    confidence: float | None

    @property
    def tied(self) -> list[RankedSetting]:
        """The first setting, and those within two standard errors of the difference from it."""
        values, errors = [s.value for s in self.settings], [s.error for s in self.settings]
        return [self.settings[k] for k in tied_with_best(values, errors, direction=self.direction)]


def rank_runs(runs: Sequence[RunSummary], *, metric: str, direction: str) -> Ranking:
    """Rank the complete runs by a metric. Runs with an alarm at the end are excluded.

    Example:
        >>> values = {"run 0": (9.0, 0.5), "run 1": (12.0, 0.5), "run 2": (11.5, 0.5)}
        >>> runs = [RunSummary(name, "complete", {}, 9, {"rankme": pair}) for name, pair in values.items()]
        >>> ranking = rank_runs(runs, metric="rankme", direction="higher")
        >>> [s.name for s in ranking.settings], [s.name for s in ranking.tied], ranking.confidence > 0.7
        (['run 1', 'run 2', 'run 0'], ['run 1', 'run 2'], True)
    """
    if direction not in ("higher", "lower"):
        raise ValueError(f"{metric} has no better direction: choose by another metric")
    usable = [run for run in runs if run.state == "complete" and not run.alarms and _finite(run, metric)]
    names = {run.name for run in usable}
    groups: dict[str, list[RunSummary]] = {}
    for run in sorted(usable, key=lambda run: run.repeats is not None):
        first = run.repeats if run.repeats in names else run.name
        groups.setdefault(str(first), []).append(run)
    seed_noise = pooled_spread([[run.signals[metric][0] for run in group] for group in groups.values()])
    sign = 1 if direction == "higher" else -1
    settings = [_setting(group, metric, seed_noise=seed_noise) for group in groups.values()]
    settings.sort(key=lambda setting: -sign * setting.value)
    excluded = [run for run in runs if run not in usable]
    share = confidence([sign * s.value for s in settings], [s.error for s in settings])
    return Ranking(tuple(settings), tuple(excluded), metric, direction, seed_noise, share)


def _finite(run: RunSummary, metric: str) -> bool:
    return metric in run.signals and math.isfinite(run.signals[metric][0])


def _setting(group: Sequence[RunSummary], metric: str, *, seed_noise: float | None) -> RankedSetting:
    values = [run.signals[metric][0] for run in group]
    errors = [error for run in group if (error := run.signals[metric][1]) is not None]
    within = sum(errors) / len(errors) if len(errors) == len(group) else None  # seeds share the held-out slides
    between = None if seed_noise is None else seed_noise / math.sqrt(len(values))
    error = None if within is None and between is None else math.hypot(within or 0.0, between or 0.0)
    spread = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return RankedSetting(tuple(group), float(np.mean(values)), error, spread)


def pooled_spread(groups: Sequence[Sequence[float]]) -> float | None:
    """Standard deviation within groups, pooled; None if no group has two values.

    Example:
        >>> pooled_spread([[1.0, 3.0], [5.0], [2.0, 2.0]])
        1.0
    """
    squares = sum(float(np.var(group)) * len(group) for group in groups)
    freedom = sum(len(group) - 1 for group in groups)
    return math.sqrt(squares / freedom) if freedom else None


def confidence(scores: Sequence[float], errors: Sequence[float | None], *, seed: int = 0) -> float | None:
    """Share of draws in which the first of the scores (higher is better) is the best; None without errors.

    Each draw adds normal noise with the standard errors, independently for each score. Runs share held-out slides, so
    that the share is rather too low than too high.

    Example:
        >>> confidence([3.0, 1.0], [0.1, 0.1]), confidence([1.0, 1.0], [None, 0.1])
        (1.0, None)
    """
    if len(scores) < 2 or any(error is None for error in errors):
        return None
    noise: NDArray[np.float64] = np.random.default_rng(seed).standard_normal((DRAWS, len(scores)))
    drawn = np.asarray(scores) + noise * np.asarray(errors, dtype=float)
    return float((drawn.argmax(1) == 0).mean())


def borda_winner(ranking: Ranking) -> tuple[str, list[str]] | None:
    """Run that Borda's count over all label-free signals prefers, and the names of the signals.

    None without two runs, or two signals.
    """
    runs = [setting.runs[0] for setting in ranking.settings]
    names = [name for name in METRICS if METRICS[name].direction != "neither" and all(name in r.signals for r in runs)]
    if len(names) < 2 or len(runs) < 2:
        return None
    values = {name: [run.signals[name][0] for run in runs] for name in names}
    points = borda_count(values, direction={name: METRICS[name].direction for name in names})
    return runs[int(points.argmax())].name, names


def conclusions(ranking: Ranking) -> list[str]:
    """What the ranking says, in sentences."""
    excluded = exclusion_lines(ranking.excluded)
    if not ranking.settings:
        return ["no run can be chosen", *excluded]
    first, tied = ranking.settings[0], ranking.tied
    extreme = "highest" if ranking.direction == "higher" else "lowest"
    mean = f"mean of {len(first.runs)} seeds of " if len(first.runs) > 1 else ""
    equal = [setting.name for setting in ranking.settings if setting.value == first.value]
    if len(equal) > 1:
        lines = [f"{', '.join(equal)} have the same {ranking.metric}, the {extreme}: it does not choose among them"]
    else:
        lines = [f"{first.name} has the {extreme} {mean}{ranking.metric}"]
    if len(ranking.settings) == 1:
        lines.append("it is the only one that can be chosen")
    elif first.error is None:
        lines.append("unknown whether other runs are as good: the runs give no standard errors")
    else:
        if ranking.confidence is not None:
            lines.append(
                f"confidence {format_share(ranking.confidence)}: share of draws of the errors in which it stays first"
            )
        if len(tied) > 1:
            lines.append(f"noise cannot distinguish {', '.join(setting.name for setting in tied)}")
    if ranking.seed_noise is not None:
        lines.append(f"seeds spread {ranking.metric} by {ranking.seed_noise:.3g}, which is part of the errors")
    elif len(ranking.settings) > 1:
        lines.append(SEED_SPREAD)
    return [*lines, *excluded]


def exclusion_lines(excluded: Sequence[RunSummary]) -> list[str]:
    """Which runs are excluded, by name, with the reason."""
    lines = []
    for run in excluded:
        if run.alarms and run.state in ("complete", "collapsed"):
            lines.append(f"excluded, alarm at its end: {run.name} ({', '.join(run.alarms)}): inspect before using it")
        elif run.state in ("collapsed", "diverged", "out of memory", "crashed"):
            lines.append(f"{run.name} {run.state}: {run.reason}" if run.reason else f"{run.name} {run.state}")
        elif run.state == "complete":
            lines.append(f"{run.name} has no value to rank")
    return lines
