"""Results of a sweep: the ranked trials, which of them noise cannot distinguish, and probes of the best."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from optuna.distributions import CategoricalDistribution
from optuna.trial import FrozenTrial, TrialState
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from fmtrain.sweeps.config import Probe, Sweep
from fmtrain.sweeps.process import RUN, format_setting
from repmetrics.atomic_write import write_text
from repmetrics.decisions import run_selection
from repmetrics.decisions.run_selection import borda_count, comparison_warnings, select_setting
from repmetrics.measurement.registry import METRICS
from repmetrics.measurement.result import format_value
from repmetrics.probes.common import PROBES

PROBED = "probes.json"
BETTER = {"maximize": "higher", "minimize": "lower"}


class TrialRow(NamedTuple):
    """A finished trial.

    Attributes:
        number: Number of the trial.
        state: complete, pruned or crashed.
        params: Settings.
        values: Metrics at the last evaluation; empty for a crashed trial.
        errors: Standard errors of the metrics.
        signals: Value and standard error of everything that the last evaluation measured.
        step: Step of that evaluation.
        alarms: Number of alarms active at that evaluation.
        folder: Folder of the trial.
        seconds: Time from start to end.
        why: Reason of a crash.
    """

    number: int
    state: str
    params: Mapping[str, Any]
    values: tuple[float, ...]
    errors: tuple[float | None, ...]
    signals: Mapping[str, Sequence[float | None]]
    step: int | None
    alarms: int
    folder: str | None
    seconds: float
    why: str | None


def rows(trials: Sequence[FrozenTrial], sweep: Sweep) -> list[TrialRow]:
    """Finished trials, best first by the first metric: completed ones, then pruned ones, then crashed ones."""
    sign = -1 if sweep.directions[0] == "maximize" else 1
    order = ("complete", "pruned", "crashed")

    def rank(row: TrialRow) -> tuple[int, float, int]:
        return order.index(row.state), sign * row.values[0] if row.values else math.inf, row.number

    return sorted((_row(trial, sweep) for trial in trials if _state(trial)), key=rank)


def _state(trial: FrozenTrial) -> str | None:
    if trial.state == TrialState.FAIL:
        return "crashed" if "crash" in trial.user_attrs else None
    return {TrialState.COMPLETE: "complete", TrialState.PRUNED: "pruned"}.get(trial.state)


def _row(trial: FrozenTrial, sweep: Sweep) -> TrialRow:
    attrs, state = trial.user_attrs, _state(trial)
    assert state is not None
    evaluation = attrs.get("look", {})
    signals = evaluation.get("signals", {})
    known = state != "crashed" and all(name in signals for name in sweep.metrics)
    return TrialRow(
        number=trial.number,
        state=state,
        params=trial.params,
        values=tuple(signals[name][0] for name in sweep.metrics) if known else (),
        errors=tuple(signals[name][1] for name in sweep.metrics) if known else (),
        signals=signals,
        step=evaluation.get("step"),
        alarms=evaluation.get("alarms", 0),
        folder=attrs.get("folder"),
        seconds=trial.duration.total_seconds() if trial.duration else 0.0,
        why=attrs.get("crash"),
    )


def _completed(ranked: Sequence[TrialRow]) -> list[TrialRow]:
    return [row for row in ranked if row.state == "complete"]


def pareto_front(ranked: Sequence[TrialRow], sweep: Sweep) -> list[TrialRow]:
    """Completed trials that no other trial beats in every metric: with one metric, the best."""
    signs = [1 if direction == "maximize" else -1 for direction in sweep.directions]
    scored = [(row, [s * v for s, v in zip(signs, row.values, strict=True)]) for row in _completed(ranked)]

    def dominated(score: list[float]) -> bool:
        return any(other != score and all(o >= s for o, s in zip(other, score, strict=True)) for _, other in scored)

    return [row for row, score in scored if not dominated(score)]


def probe_best(ranked: Sequence[TrialRow], sweep: Sweep, probe: Probe) -> dict[int, dict[str, Any]]:
    """Linear probe and kNN of the best trials' last checkpoints by number, stored in the sweep's folder.

    Every driver calls this at its end. Stored probes are not computed again.
    """
    from repmetrics.data.open import open_data
    from repmetrics.scoring.score import score_checkpoint
    from repmetrics.scoring.settings import EmbedSettings

    path = sweep.out / PROBED
    probes: dict[int, dict[str, Any]] = {}
    if path.is_file():
        stored = json.loads(path.read_text(encoding="utf-8"))
        probes = {int(number): entry for number, entry in stored["probes"].items() if stored["data"] == probe.data}
    source = open_data(Path(probe.data))
    for row in _completed(ranked)[: probe.best]:
        checkpoint = Path(str(row.folder)) / RUN / "checkpoints" / "last.ckpt"
        if row.number in probes or not checkpoint.is_file():  # on another machine
            continue
        score = score_checkpoint(checkpoint, source, overrides={}, metrics=("rankme",), settings=EmbedSettings())
        probes[row.number] = {name: score.measurements[name].to_json() for name in PROBES}
    write_text(path, json.dumps({"data": probe.data, "probes": probes}, indent=2) + "\n")
    return probes


def tied_with_best(ranked: Sequence[TrialRow], sweep: Sweep) -> list[TrialRow]:
    """Completed trials tied with the best, by :func:`~repmetrics.decisions.run_selection.tied_with_best`."""
    complete = _completed(ranked)
    values, errors = [row.values[0] for row in complete], [row.errors[0] for row in complete]
    return [complete[k] for k in run_selection.tied_with_best(values, errors, direction=BETTER[sweep.directions[0]])]


def borda_winner(ranked: Sequence[TrialRow]) -> tuple[TrialRow, list[str]] | None:
    """Completed trial that Borda's count over all label-free signals prefers, and the names of the signals.

    None without two trials free of alarms, or two signals.
    """
    complete = [row for row in _completed(ranked) if not row.alarms]
    names = [
        name for name in METRICS if METRICS[name].direction != "neither" and all(name in r.signals for r in complete)
    ]
    if len(names) < 2 or len(complete) < 2:
        return None
    signals = {name: [float(row.signals[name][0] or 0.0) for row in complete] for name in names}
    points = borda_count(signals, direction={name: METRICS[name].direction for name in names})
    return complete[int(points.argmax())], names


def conclusion(ranked: Sequence[TrialRow], sweep: Sweep) -> list[str]:
    """Conclusions and warnings, in sentences."""
    warnings = comparison_warnings(list(sweep.parameters), metrics=sweep.metrics)
    if len(sweep.metrics) > 1:
        numbers = ", ".join(str(row.number) for row in pareto_front(ranked, sweep))
        return [f"no trial is better in {' and '.join(sweep.metrics)} than: {numbers}", *warnings]
    tied, complete = tied_with_best(ranked, sweep), _completed(ranked)
    if alarmed := [str(row.number) for row in complete if row.alarms]:
        trials = ("trial " if len(alarmed) == 1 else "trials ") + ", ".join(alarmed)
        warnings.insert(0, f"collapse alarm active at the end of {trials}: inspect before using it")
    extreme = "highest" if sweep.directions[0] == "maximize" else "lowest"
    lines = [f"trial {complete[0].number} has the {extreme} {sweep.metrics[0]}"]
    if complete[0].errors[0] is None:
        lines.append("unknown whether other trials are as good: the runs give no standard errors")
    elif len(tied) > 1:
        lines.append(f"noise cannot distinguish trials {', '.join(str(row.number) for row in tied)}")
        (axis, *others) = sweep.parameters
        if not others and not isinstance(sweep.parameters[axis], CategoricalDistribution):
            values, errors = [row.values[0] for row in complete], [row.errors[0] for row in complete]
            settings = [row.params[axis] for row in complete]
            smallest = complete[select_setting(settings, values, errors, direction=BETTER[sweep.directions[0]])]
            lines.append(f"RankMe's rule selects the smallest {axis} among them: trial {smallest.number}")
    if (winner := borda_winner(ranked)) is not None:
        lines.append(f"Borda's count over {', '.join(winner[1])} prefers trial {winner[0].number}")
    return [*lines, *warnings]


def table(ranked: Sequence[TrialRow], sweep: Sweep, probes: Mapping[int, Mapping[str, Any]]) -> RenderableType:
    """One row per trial, best first, and the conclusions below."""
    trials = Table()
    for heading in ("trial", "state", *sweep.parameters, "step", *sweep.metrics, *(["linear probe"] if probes else [])):
        trials.add_column(heading, justify="left" if heading == "state" else "right", overflow="fold")
    for row in ranked:
        probe = probes.get(row.number, {}).get("linear_probe")
        trials.add_row(
            str(row.number),
            row.state,
            *(format_setting(row.params.get(name)) for name in sweep.parameters),
            "–" if row.step is None else str(row.step),
            *([format_value(v, e) for v, e in zip(row.values, row.errors, strict=True)] or ["–"] * len(sweep.metrics)),
            *([format_value(probe["value"], probe["standard_error"]) if probe else "–"] if probes else []),
        )
    crashes = [f"trial {row.number} crashed: {row.why}" for row in ranked if row.why]
    return Group(trials, *(Text(line) for line in [*conclusion(ranked, sweep), *crashes]))


def to_json(ranked: Sequence[TrialRow], sweep: Sweep, probes: Mapping[int, Any]) -> dict[str, Any]:
    """Plain types for JSON."""
    return {
        "study": sweep.study,
        "metrics": list(sweep.metrics),
        "directions": list(sweep.directions),
        "best": [row.number for row in pareto_front(ranked, sweep)],
        "level": [row.number for row in tied_with_best(ranked, sweep)] if len(sweep.metrics) == 1 else None,
        "conclusion": conclusion(ranked, sweep),
        "trials": [{**row._asdict(), "probe": probes.get(row.number)} for row in ranked],
    }
