"""How far label-free metrics can be trusted: do they go with a probe, does choosing by them beat the last checkpoint?

Every interval is a bootstrap over runs, the unit that is drawn anew when an experiment is repeated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from repmetrics.decisions.run_selection import comparison_warnings
from repmetrics.measurement.registry import METRICS
from repmetrics.trust.agreement import Agreement, agreement
from repmetrics.trust.bootstrap import FEWEST, RunTable
from repmetrics.trust.regret import BASELINES, Regret, noise_regret, regret
from repmetrics.trust.runs import Evaluation, varying_settings


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


# ── regret ─────────────────────────────────────────────────────────────────────────────────────────────────────────


# ── the report ─────────────────────────────────────────────────────────────────────────────────────────────────────


def analyze(
    looks: Sequence[Evaluation],
    *,
    targets: Sequence[str],
    metrics: Sequence[str] = (),
    draws: int = 2000,
    seed: int = 0,
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


def _unfair(looks: Sequence[Evaluation]) -> list[str]:
    methods = list(dict.fromkeys(x.method for x in looks))
    axes = [name for method in methods for name in varying_settings([x for x in looks if x.method == method])]
    return comparison_warnings(list(dict.fromkeys(axes)), methods=methods, widths=[x.width for x in looks])


def _report(
    looks: Sequence[Evaluation], scope: str, targets: Sequence[str], metrics: Sequence[str], *, draws: int, seed: int
) -> Trust:
    bench, notes = RunTable(looks, draws=draws, seed=seed), list[str]()
    if len(bench.runs) < FEWEST:
        notes.append(
            f"{len(bench.runs)} runs are too few for intervals, which need {FEWEST}: nothing is claimed of them"
        )
    usable = []
    for metric in metrics:
        values = np.concatenate(bench.values(metric))
        if np.isnan(values).all() or np.nanmax(values) == np.nanmin(values):
            notes.append(f"{metric} has the same value at every look, or none: left out")
        else:
            usable.append(metric)
    directed = [name for name in usable if METRICS[name].direction != "neither"]
    baselines = [b for b in BASELINES if b != "loss" or not np.isnan(np.concatenate(bench.values("loss"))).all()]
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
