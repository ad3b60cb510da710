"""How far label-free metrics can be trusted: do they go with a probe, does choosing by them beat the last checkpoint?

Every interval is a bootstrap over runs, the unit that is drawn anew when an experiment is repeated.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm, rankdata
from scipy.stats import t as student_t

from repmetrics.catalogue import METRICS
from repmetrics.choosing import borda, unfair
from repmetrics.looks import Look, varying
from repmetrics.rank_correlation import centred_ranks, kendall, partial_correlation, spearman

Array = NDArray[np.float64]
BASELINES = ("last", "loss", "random")


FEWEST = 6
"""Runs below which a bootstrap over them gives no interval: with three, every resample says the same."""


class Interval(NamedTuple):
    """An estimate and its 95 % bootstrap interval; NaN where there is nothing to estimate from."""

    value: float
    low: float
    high: float

    def beyond(self, zero: float = 0.0) -> int:
        """1 or −1 if the whole interval lies above or below `zero`, otherwise 0.

        Example:
            >>> Interval(0.5, 0.1, 0.8).beyond(), Interval(0.1, -0.2, 0.3).beyond()
            (1, 0)
        """
        return int(self.low > zero) - int(self.high < zero)


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


class Trust(NamedTuple):
    """The report of one scope: one method, or all.

    Attributes:
        scope: the method, or "all methods".
        runs: how many.
        looks: how many in all.
        agreements: of every metric with every target.
        regrets: of every signal and baseline.
        noise: by target, the regret that a perfect selector would seem to have because the probe itself is noisy.
        notes: what was left out, and why.
    """

    scope: str
    runs: int
    looks: int
    agreements: list[Agreement]
    regrets: list[Regret]
    noise: Mapping[str, float]
    notes: list[str]


class Bench:
    """The looks of one scope as arrays, with the bootstrap's draws.

    Args:
        looks: of at least three runs.
        draws: of the bootstrap.
        seed: of the draws.

    Raises:
        ValueError: fewer than three runs, or a run with fewer than three looks or none after step 0.
    """

    def __init__(self, looks: Sequence[Look], *, draws: int, seed: int) -> None:
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
        self.weights = np.stack([np.bincount(row, minlength=count) for row in self.drawn(count)]).astype(float)

    def drawn(self, count: int) -> NDArray[np.int64]:
        """The bootstrap's draws of `count` runs, (draws, count)."""
        return np.random.default_rng(self.seed).integers(0, count, (self.draws, count))

    def of(self, name: str) -> list[Array]:
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


def agreement(bench: Bench, metric: str, target: str) -> Agreement:
    """How a metric goes with a target."""
    sign = -1.0 if metric in METRICS and METRICS[metric].better == "lower" else 1.0
    pairs = [(sign * m, t, s) for m, t, s in zip(bench.of(metric), bench.of(target), bench.steps(), strict=True)]
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
        drawn = bench.drawn(len(m))
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
        directed=metric not in METRICS or METRICS[metric].better != "neither",
    )


def _given_step(bench: Bench, pairs: Sequence[tuple[Array, Array, Array]], *, rank_within: bool) -> Interval:
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


# ── regret ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def cost(values: Array, target: Array) -> Array:
    """Regret of choosing by the highest value, in rows: the best of the target minus the chosen, the first of equals.

    NaN is never chosen; a row without any value costs NaN.

    Example:
        >>> cost(np.array([[3.0, 9.0, 5.0]]), np.array([[0.6, 0.7, 0.8]])).round(3).tolist()
        [0.1]
    """
    scored = np.where(np.isnan(values) | np.isnan(target), -np.inf, values)
    best = np.where(np.isnan(target), -np.inf, target).max(-1)
    taken = np.take_along_axis(target, scored.argmax(-1)[..., None], -1)[..., 0]
    with np.errstate(invalid="ignore"):
        return np.where((scored == -np.inf).all(-1), math.nan, best - taken)


def preference(bench: Bench, signal: str, directed: Sequence[str]) -> tuple[list[Array], Array]:
    """What a signal prefers, the higher the better: among the trained looks of each run, and among the last looks."""
    trained = [steps > 0 for steps in bench.steps()]

    def turned(name: str) -> list[Array]:
        sign = -1 if name == "loss" or METRICS[name].better == "lower" else 1
        return [sign * values[mine] for values, mine in zip(bench.of(name), trained, strict=True)]

    if signal == "last":
        counted = [np.arange(float(mine.sum())) for mine in trained]
        return counted, np.full(len(counted), math.nan)
    if signal == "borda":
        alarms = [[x.alarms for x in run if x.step > 0] for run in bench.by_run]
        votes, better = {name: turned(name) for name in directed}, dict.fromkeys(directed, "higher")
        within = [borda({k: v[i].tolist() for k, v in votes.items()}, better=better, alarms=a)
                  for i, a in enumerate(alarms)]  # fmt: skip
        final = borda({k: [float(x[-1]) for x in v] for k, v in votes.items()}, better=better,
                      alarms=[a[-1] for a in alarms])  # fmt: skip
        return [np.where(np.isinf(points), math.nan, points) for points in within], final
    values = turned(signal)
    return values, np.array([mine[-1] for mine in values])


def regret(bench: Bench, signal: str, target: str, *, directed: Sequence[str] = ()) -> Regret:
    """What choosing by a signal costs; the untrained look at step 0 is no candidate."""
    truths = [t[s > 0] for t, s in zip(bench.of(target), bench.steps(), strict=True)]
    final = np.array([t[-1] for t in truths])
    drawn = bench.drawn(len(final))
    lasts = np.array([np.nanmax(t) - t[-1] for t in truths])
    chance, chances = np.nanmax(final) - np.nanmean(final), np.nanmax(final[drawn], 1) - np.nanmean(final[drawn], 1)
    if signal == "random":
        costs, whole, draws = np.array([np.nanmax(t) - np.nanmean(t) for t in truths]), float(chance), chances
    else:
        within, among = preference(bench, signal, directed)
        costs = np.array([float(cost(v, t)) for v, t in zip(within, truths, strict=True)])
        whole, draws = float(cost(among, final)), cost(among[drawn], final[drawn])
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


def noise_regret(bench: Bench, target: str, *, seed: int, draws: int = 200) -> float:
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


# ── the report ─────────────────────────────────────────────────────────────────────────────────────────────────────


def trust(
    looks: Sequence[Look], *, targets: Sequence[str], metrics: Sequence[str] = (), draws: int = 2000, seed: int = 0
) -> list[Trust]:
    """The report: of each method that has three runs, and of all together.

    Args:
        looks: of all runs.
        targets: probes, higher is better.
        metrics: names; default: every metric of the catalogue that was measured.
        draws: of the bootstrap over runs.
        seed: of the bootstrap.

    Raises:
        ValueError: an unknown name, a target that is no probe, or too few runs or looks.
    """
    present = list(dict.fromkeys(name for look in looks for name in look.values))
    measured = [name for name in METRICS if name in present]
    for name in targets:
        if name in METRICS:
            raise ValueError(f"{name} is a label-free metric and no target: name a probe")
    for name in (*targets, *metrics):
        if name not in present:
            raise ValueError(f"no look has {name!r}: there are {', '.join(present) or 'no values'}")
    if unknown := [name for name in metrics if name not in METRICS]:
        raise ValueError(f"{unknown[0]} is not a label-free metric: there are {', '.join(measured)}")
    probed = [look for look in looks if all(name in look.values for name in targets)]
    left_out = [f"{len(looks) - len(probed)} looks without a probe are left out"] if len(probed) < len(looks) else []
    looks = probed
    methods = list(dict.fromkeys(look.method for look in looks))
    scopes = {method or "unnamed": [x for x in looks if x.method == method] for method in methods}
    enough = {scope: mine for scope, mine in scopes.items() if len({x.run for x in mine}) >= 3}
    if len(methods) > 1:
        enough["all methods"] = looks
    found = []
    for scope, mine in (enough or {"all runs": looks}).items():
        report = _report(mine, scope, targets, list(metrics) or measured, draws=draws, seed=seed)
        found.append(report._replace(notes=[*report.notes, *left_out, *_unfair(mine)]))
    return found


def _unfair(looks: Sequence[Look]) -> list[str]:
    methods = list(dict.fromkeys(x.method for x in looks))
    axes = [name for method in methods for name in varying([x for x in looks if x.method == method])]
    return unfair(list(dict.fromkeys(axes)), methods=methods, widths=[x.width for x in looks])


def _report(
    looks: Sequence[Look], scope: str, targets: Sequence[str], metrics: Sequence[str], *, draws: int, seed: int
) -> Trust:
    bench, notes = Bench(looks, draws=draws, seed=seed), list[str]()
    if len(bench.runs) < FEWEST:
        notes.append(
            f"{len(bench.runs)} runs are too few for intervals, which need {FEWEST}: nothing is claimed of them"
        )
    usable = []
    for metric in metrics:
        values = np.concatenate(bench.of(metric))
        if np.isnan(values).all() or np.nanmax(values) == np.nanmin(values):
            notes.append(f"{metric} has the same value at every look, or none: left out")
        else:
            usable.append(metric)
    directed = [name for name in usable if METRICS[name].better != "neither"]
    baselines = [b for b in BASELINES if b != "loss" or not np.isnan(np.concatenate(bench.of("loss"))).all()]
    signals = [*baselines, *directed, *(["borda"] if len(directed) > 1 else [])]
    return Trust(
        scope=scope,
        runs=len(bench.runs),
        looks=len(looks),
        agreements=[agreement(bench, metric, target) for target in targets for metric in usable],
        regrets=[regret(bench, signal, target, directed=directed) for target in targets for signal in signals],
        noise={target: noise_regret(bench, target, seed=seed) for target in targets},
        notes=notes,
    )
