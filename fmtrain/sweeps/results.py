"""Results of a sweep: the ranked trials, which of them noise cannot distinguish, and probes of the best."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import optuna
from optuna.distributions import CategoricalDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial
from rich.console import RenderableType

from fmtrain.sweeps.command_line import RUN
from fmtrain.sweeps.decisions import current, is_crashed
from fmtrain.sweeps.parameters import is_inside
from fmtrain.sweeps.settings import Probe, Sweep
from repmetrics.atomic_write import write_text
from repmetrics.decisions.comparability import comparison_warnings
from repmetrics.decisions.run_ranking import (
    STATES,
    Ranking,
    RunSummary,
    borda_winner,
    conclusions,
    exclusion_lines,
    rank_runs,
)
from repmetrics.decisions.run_selection import select_setting
from repmetrics.measurement.registry import PROBES
from repmetrics.measurement.result import format_value
from repmetrics.scoring.run_table import runs_csv, runs_table

PROBED = "probes.json"
MIN_FOR_IMPORTANCE = 10
"""Different values of the metric from which on the importance of a parameter is given."""
TABLE_FRAME = 4
"""Lines of a table that are no rows."""
BETTER = {"maximize": "higher", "minimize": "lower"}


class TrialRow(NamedTuple):
    """A finished trial.

    Attributes:
        number: Number of the trial.
        state: complete, pruned, collapsed, diverged, out of memory or crashed.
        params: Settings.
        values: Metrics at the last evaluation; empty for a trial without one, or that crashed.
        errors: Standard errors of the metrics.
        signals: Value and standard error of everything that the last evaluation measured.
        step: Step of that evaluation.
        alarms: Number of alarms active at that evaluation.
        folder: Folder of the trial.
        seconds: Time from start to end.
        why: Reason of a crash, or of another bad end.
        kinds: Kinds of the alarms.
        repeats: Number of the trial whose settings it repeats, or None.
        seed: Seed of a repeat.
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
    kinds: tuple[str, ...] = ()
    repeats: int | None = None
    seed: int | None = None

    @property
    def chosen_from(self) -> bool:
        """Whether the trial can be chosen: it is complete and has no alarm at its end."""
        return self.state == "complete" and not self.alarms


def rows(trials: Sequence[FrozenTrial], sweep: Sweep, *, running: bool = False) -> list[TrialRow]:
    """Finished trials, best first by the first metric: those to choose from, then those with an alarm, then others.

    Args:
        trials: Trials of the study.
        sweep: The sweep.
        running: Whether to add the trials that are running.
    """
    sign = -1 if sweep.directions[0] == "maximize" else 1

    def rank(row: TrialRow) -> tuple[int, bool, float, int]:
        value = sign * row.values[0] if row.values else math.inf
        return STATES.index(row.state), row.alarms > 0, value, row.number

    shown = [t for t in current(trials) if _state(t) is not None and (running or t.state != TrialState.RUNNING)]
    ranked = sorted((_row(trial, sweep) for trial in shown), key=rank)
    if len(sweep.metrics) > 1 or all(row.repeats is None for row in ranked):
        return ranked
    settings = enumerate(ranking(ranked, sweep).settings)  # by their means
    place = {run.name: k for k, setting in settings for run in setting.runs}
    return sorted(ranked, key=lambda row: (place.get(f"trial {row.number}", len(ranked)), row.repeats is not None))


def _state(trial: FrozenTrial) -> str | None:
    if trial.state == TrialState.FAIL:
        return "crashed" if is_crashed(trial) else None
    if "ending" in trial.user_attrs:
        return str(trial.user_attrs["ending"][0])
    names = {TrialState.COMPLETE: "complete", TrialState.PRUNED: "pruned", TrialState.RUNNING: "running"}
    return names.get(trial.state)


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
        why=attrs.get("crash") or attrs.get("ending", [None, None])[1],
        kinds=tuple(evaluation.get("kinds", ())),
        repeats=attrs.get("repeats"),
        seed=attrs.get("seed"),
    )


def summaries(ranked: Sequence[TrialRow]) -> list[RunSummary]:
    """The trials as runs of the table that `repmetrics select` shares."""
    return [
        RunSummary(
            name=f"trial {row.number}",
            state=row.state,
            settings=row.params,
            step=row.step,
            signals={name: (float(v or 0.0), e) for name, (v, e) in row.signals.items()} if row.values else {},
            alarms=row.kinds or ("alarm",) * row.alarms,
            reason=row.why or "",
            repeats=None if row.repeats is None else f"trial {row.repeats}",
        )
        for row in ranked
    ]


def ranking(ranked: Sequence[TrialRow], sweep: Sweep) -> Ranking:
    """Ranking by the first metric."""
    return rank_runs(summaries(ranked), metric=sweep.metrics[0], direction=BETTER[sweep.directions[0]])


def pareto_front(ranked: Sequence[TrialRow], sweep: Sweep) -> list[TrialRow]:
    """Trials without an alarm that no other beats in every metric: with one metric, the best over its seeds."""
    usable = [row for row in ranked if row.chosen_from]
    if len(sweep.metrics) == 1:
        best = ranking(ranked, sweep).settings[:1]
        return [row for row in usable if best and f"trial {row.number}" == best[0].name]
    signs = [1 if direction == "maximize" else -1 for direction in sweep.directions]
    scored = [(row, [s * v for s, v in zip(signs, row.values, strict=True)]) for row in usable]

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
    for row in [row for row in ranked if row.chosen_from][: probe.best]:
        checkpoint = Path(str(row.folder)) / RUN / "checkpoints" / "last.ckpt"
        if row.number in probes or not checkpoint.is_file():  # on another machine
            continue
        score = score_checkpoint(checkpoint, source, overrides={}, metrics=("rankme",), settings=EmbedSettings())
        probes[row.number] = {name: score.measurements[name].to_json() for name in PROBES}
    write_text(path, json.dumps({"data": probe.data, "probes": probes}, indent=2) + "\n")
    return probes


def tied_with_best(ranked: Sequence[TrialRow], sweep: Sweep) -> list[TrialRow]:
    """Trials that noise cannot distinguish from the best, by :attr:`Ranking.tied`."""
    result = ranking(ranked, sweep)
    names = {setting.name for setting in result.tied} if result.settings else set()
    return [row for row in ranked if f"trial {row.number}" in names]


def conclusion(ranked: Sequence[TrialRow], sweep: Sweep) -> list[str]:
    """Conclusions and warnings, in sentences."""
    warnings = comparison_warnings(list(sweep.parameters), metrics=sweep.metrics)
    if len(sweep.metrics) > 1:
        numbers = ", ".join(str(row.number) for row in pareto_front(ranked, sweep))
        excluded = [run for run in summaries(ranked) if run.state != "complete" or run.alarms]
        what = f"no trial is better in {' and '.join(sweep.metrics)} than: {numbers}"
        return [what if numbers else "no trial can be chosen", *exclusion_lines(excluded), *warnings]
    result = ranking(ranked, sweep)
    lines = conclusions(result)
    if result.settings and len(tied := result.tied) > 1:
        (axis, *others) = sweep.parameters
        if not others and not isinstance(sweep.parameters[axis], CategoricalDistribution):
            settings = [s.runs[0].settings[axis] for s in tied]
            values, errors = [s.value for s in tied], [s.error for s in tied]
            smallest = tied[select_setting(settings, values, errors, direction=result.direction)]
            lines.append(f"RankMe's rule selects the smallest {axis} among them: {smallest.name}")
    if (winner := borda_winner(result)) is not None:
        lines.append(f"Borda's count over {', '.join(winner[1])} prefers {winner[0]}")
    return [*lines, *warnings]


def table(
    ranked: Sequence[TrialRow], sweep: Sweep, probes: Mapping[int, Mapping[str, Any]], *, height: int | None = None
) -> RenderableType:
    """One row per trial, best first, and the conclusions below.

    Args:
        ranked: All trials.
        sweep: The sweep.
        probes: Probes by number of the trial.
        height: Lines that the table may take, for the best trials and those that run; None for all trials.
    """
    shown, lines = list(ranked), conclusion(ranked, sweep)
    if height is not None and len(shown) + len(lines) + TABLE_FRAME > height:
        running = [row for row in ranked if row.state == "running"]
        best = [row for row in ranked if row.state != "running"]
        shown = [*best[: max(height - TABLE_FRAME - 3 - len(running), 1)], *running]
        lines = [f"and {len(ranked) - len(shown)} more trials", *lines[:1]]
    probed = {f"trial {number}": probe["linear_probe"] for number, probe in probes.items()}
    column = {name: format_value(p["value"], p["standard_error"]) for name, p in probed.items()}
    return runs_table(
        summaries(shown),
        sweep.metrics,
        lines,
        heading="trial",
        ranking=ranking(ranked, sweep) if len(sweep.metrics) == 1 else None,
        extra={"linear probe": column} if probed else {},
    )


def to_csv(ranked: Sequence[TrialRow]) -> str:
    """All trials with their settings and signals."""
    return runs_csv(summaries(ranked))


def importance(trials: Sequence[FrozenTrial], sweep: Sweep) -> list[str]:
    """Importance of each parameter for the metric over the present ranges, in a sentence; empty where it is unknown.

    Complete trials count, without repeats with other seeds.
    """
    from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

    counted = [t for t in trials if t.state == TrialState.COMPLETE and "repeats" not in t.user_attrs]
    counted = [t for t in counted if all(is_inside(t.params.get(k), d) for k, d in sweep.parameters.items())]
    if len(sweep.metrics) > 1 or len(sweep.parameters) < 2 or len({t.value for t in counted}) < MIN_FOR_IMPORTANCE:
        return []
    study = optuna.create_study(direction=sweep.directions[0])
    for t in counted:  # ranges may have been extended since
        study.add_trial(create_trial(value=t.value, params=t.params, distributions=dict(sweep.parameters)))
    shares = get_param_importances(study, evaluator=PedAnovaImportanceEvaluator())
    text = ", ".join(f"{name} {share:.0%}" for name, share in shares.items())
    return [f"importance for the {sweep.metrics[0]} of the best tenth (PED-ANOVA): {text}"]


def to_json(ranked: Sequence[TrialRow], sweep: Sweep, probes: Mapping[int, Any]) -> dict[str, Any]:
    """Plain types for JSON."""
    single = len(sweep.metrics) == 1
    return {
        "study": sweep.study,
        "metrics": list(sweep.metrics),
        "directions": list(sweep.directions),
        "best": [row.number for row in pareto_front(ranked, sweep)],
        "level": [row.number for row in tied_with_best(ranked, sweep)] if single else None,
        "confidence": ranking(ranked, sweep).confidence if single else None,
        "conclusion": conclusion(ranked, sweep),
        "trials": [{**row._asdict(), "probe": probes.get(row.number)} for row in ranked],
    }
