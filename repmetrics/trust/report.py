"""The trust report: how well label-free metrics track a probe, and what selecting by them costs.

All intervals are bootstrap intervals over runs, the unit that a repeated experiment would draw again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import product
from typing import NamedTuple, TypeVar

import numpy as np

from repmetrics.decisions.comparability import comparison_warnings
from repmetrics.measurement.registry import METRICS
from repmetrics.progress import Meter
from repmetrics.report.settings import varying_settings
from repmetrics.trust.agreement import Agreement, agreement
from repmetrics.trust.bootstrap import MIN_RUNS_FOR_INTERVAL, RunTable
from repmetrics.trust.regret import BASELINES, Regret, noise_regret, preference, regret
from repmetrics.trust.runs import Evaluation
from repmetrics.trust.selection import Selection, Tournaments

T = TypeVar("T")


class Trust(NamedTuple):
    """Report of one scope: one method, or all.

    Attributes:
        scope: The method, or "all methods".
        runs: Number of runs.
        looks: Number of evaluations of all runs.
        agreements: Agreement of every metric with every target.
        regrets: Regret of every signal and baseline.
        selections: By target, how well each signal selects among the runs by their last evaluations, best first; empty
            without a signal.
        noise: Regret by target that a perfect selector seems to have because the probe itself is noisy.
        notes: What was left out, and why.
    """

    scope: str
    runs: int
    looks: int  # the name is a key of the JSON output
    agreements: list[Agreement]
    regrets: list[Regret]
    selections: Mapping[str, list[Selection]]
    noise: Mapping[str, float]
    notes: list[str]


def analyze(
    evaluations: Sequence[Evaluation],
    *,
    targets: Sequence[str],
    metrics: Sequence[str] = (),
    draws: int = 2000,
    seed: int = 0,
    meter: Meter | None = None,
) -> list[Trust]:
    """Report of each method with at least three runs, and of all methods together.

    Args:
        evaluations: Evaluations of all runs.
        targets: Names of probes.
        metrics: Label-free metrics; default: all that were measured.
        draws: Number of bootstrap draws.
        seed: Seed of the draws.
        meter: Counts the signals whose intervals are computed.

    Raises:
        ValueError: A name is no probe or no metric, or there are too few runs or evaluations.
    """
    present = list(dict.fromkeys(name for item in evaluations for name in item.values))
    measured = [name for name in METRICS if name in present]
    for name in targets:
        if name in METRICS:
            raise ValueError(f"{name} is a label-free metric and no target: name a probe")
    for name in (*targets, *metrics):
        if name not in present:
            raise ValueError(f"no evaluation has {name!r}: there are {', '.join(present) or 'no values'}")
    if unknown := [name for name in metrics if name not in METRICS]:
        raise ValueError(f"{unknown[0]} is not a label-free metric: there are {', '.join(measured)}")
    probed = [item for item in evaluations if all(name in item.values for name in targets)]
    omitted = len(evaluations) - len(probed)
    notes = [f"{omitted} evaluations without a probe are left out"] if omitted else []
    methods = list(dict.fromkeys(item.method for item in probed))
    scopes = {method or "unnamed": [x for x in probed if x.method == method] for method in methods}
    scopes = {scope: items for scope, items in scopes.items() if len({x.run for x in items}) >= 3}
    if len(methods) > 1:
        scopes["all methods"] = probed
    plans = [
        _plan(items, scope, list(metrics) or measured, draws=draws, seed=seed)
        for scope, items in (scopes or {"all runs": probed}).items()
    ]
    meter = Meter() if meter is None else meter
    meter.total = len(targets) * sum(len(p.usable) + len(p.signals) + len(p.selecting) for p in plans)
    reports = []
    for plan in plans:
        report = _report(plan, targets, meter=meter)
        items = [item for run in plan.table.by_run for item in run]
        reports.append(report._replace(notes=[*report.notes, *notes, *_comparison_warnings(items)]))
    return reports


def in_scope(report: Trust, evaluations: Sequence[Evaluation]) -> list[Evaluation]:
    """Evaluations of the runs of a report's scope."""
    return [x for x in evaluations if report.scope in (x.method or "unnamed", "all methods", "all runs")]


def _comparison_warnings(evaluations: Sequence[Evaluation]) -> list[str]:
    methods = list(dict.fromkeys(x.method for x in evaluations))
    of_methods = [[x.settings for x in evaluations if x.method == method] for method in methods]
    axes = [name for settings in of_methods for name in varying_settings(settings)]
    return comparison_warnings(list(dict.fromkeys(axes)), methods=methods, widths=[x.width for x in evaluations])


class _Plan(NamedTuple):
    """What is computed in one scope: agreement of `usable` metrics, regret of `signals`, selection by `selecting`."""

    scope: str
    table: RunTable
    usable: list[str]
    directed: list[str]
    signals: list[str]
    selecting: list[str]
    notes: list[str]


def _plan(evaluations: Sequence[Evaluation], scope: str, metrics: Sequence[str], *, draws: int, seed: int) -> _Plan:
    table, notes = RunTable(evaluations, draws=draws, seed=seed), list[str]()
    if len(table.runs) < MIN_RUNS_FOR_INTERVAL:
        notes.append(
            f"{len(table.runs)} runs are too few for intervals, which need {MIN_RUNS_FOR_INTERVAL}: no conclusion is "
            "drawn from them"
        )
    usable = []
    for metric in metrics:
        values = np.concatenate(table.values(metric))
        if np.isnan(values).all() or np.nanmax(values) == np.nanmin(values):
            notes.append(f"{metric} has the same value at every evaluation, or none: left out")
        else:
            usable.append(metric)
    directed = [name for name in usable if METRICS[name].direction != "neither"]
    baselines = [b for b in BASELINES if b != "loss" or not np.isnan(np.concatenate(table.values("loss"))).all()]
    signals = [*baselines, *directed, *(["borda"] if len(directed) > 1 else [])]
    selecting = [signal for signal in signals if signal not in ("last", "random")]
    return _Plan(scope, table, usable, directed, signals, selecting, notes)


def _report(plan: _Plan, targets: Sequence[str], *, meter: Meter) -> Trust:
    table, directed = plan.table, plan.directed
    return Trust(
        scope=plan.scope,
        runs=len(table.runs),
        looks=sum(len(items) for items in table.by_run),
        agreements=[
            agreement(table, metric, target) for target, metric in _counted(product(targets, plan.usable), meter)
        ],
        regrets=[
            regret(table, signal, target, directed=directed)
            for target, signal in _counted(product(targets, plan.signals), meter)
        ],
        selections={
            target: _selections(table, _counted(plan.selecting, meter), target, directed=directed)
            for target in targets
            if plan.selecting
        },
        noise={target: noise_regret(table, target, seed=table.seed) for target in targets},
        notes=plan.notes,
    )


def _counted(items: Iterable[T], meter: Meter) -> Iterator[T]:
    """The items; each counts when the next is taken."""
    for item in items:
        yield item
        meter.advance(1)


def _selections(table: RunTable, signals: Iterable[str], target: str, *, directed: Sequence[str]) -> list[Selection]:
    """Selection among the runs by each signal, smallest regret first."""
    final = np.array([values[-1] for values in table.values(target)])
    tournaments = Tournaments(final, draws=table.draws, seed=table.seed)
    methods = [items[0].method for items in table.by_run]
    groups = methods if len(set(methods)) > 1 else None
    selections = [
        tournaments.selection(signal, preference(table, signal, directed)[1], groups=groups) for signal in signals
    ]
    return sorted(selections, key=lambda selection: selection.regret.value)
