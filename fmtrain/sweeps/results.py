"""What a sweep found: its trials best first, which of them noise cannot tell apart, and what probes say of the best."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from optuna.distributions import CategoricalDistribution
from optuna.trial import FrozenTrial, TrialState
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from fmtrain.sweeps.config import Probe, Sweep
from fmtrain.sweeps.process import RUN
from repmetrics.decisions.run_selection import borda_count, comparison_warnings, select_setting, tied_with_best
from repmetrics.measurement.registry import METRICS
from repmetrics.probes.common import PROBES
from repmetrics.scoring.tables import error_places

PROBED = "probes.json"
BETTER = {"maximize": "higher", "minimize": "lower"}


class TrialRow(NamedTuple):
    """A finished trial.

    Attributes:
        number: The trial's.
        state: complete, pruned or crashed.
        params: Its settings.
        values: Of the metrics at its last look; none of a crashed trial.
        errors: Their standard errors.
        signals: Value and standard error of all that its last look measured.
        step: Of that look.
        alarms: How many stood at it.
        folder: Of the trial.
        seconds: From its start to its end.
        why: Of a crashed trial.
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
    """The trials that count, best first by the first metric; pruned ones after those that completed, crashed last."""
    sign = -1 if sweep.directions[0] == "maximize" else 1
    order = ("complete", "pruned", "crashed")

    def place(row: TrialRow) -> tuple[int, float, int]:
        return order.index(row.state), sign * row.values[0] if row.values else math.inf, row.number

    return sorted((_row(trial, sweep) for trial in trials if _state(trial)), key=place)


def _state(trial: FrozenTrial) -> str | None:
    if trial.state == TrialState.FAIL:
        return "crashed" if "crash" in trial.user_attrs else None
    return {TrialState.COMPLETE: "complete", TrialState.PRUNED: "pruned"}.get(trial.state)


def _row(trial: FrozenTrial, sweep: Sweep) -> TrialRow:
    noted, state = trial.user_attrs, _state(trial)
    assert state is not None
    look = noted.get("look", {})
    found = look.get("signals", {})
    known = state != "crashed" and all(name in found for name in sweep.metrics)
    return TrialRow(
        number=trial.number,
        state=state,
        params=trial.params,
        values=tuple(found[name][0] for name in sweep.metrics) if known else (),
        errors=tuple(found[name][1] for name in sweep.metrics) if known else (),
        signals=found,
        step=look.get("step"),
        alarms=look.get("alarms", 0),
        folder=noted.get("folder"),
        seconds=trial.duration.total_seconds() if trial.duration else 0.0,
        why=noted.get("crash"),
    )


def pareto_front(found: Sequence[TrialRow], sweep: Sweep) -> list[TrialRow]:
    """Completed trials that no other beats in every metric: with one metric, the best."""
    signs = [1 if direction == "maximize" else -1 for direction in sweep.directions]
    scored = [
        (row, [s * v for s, v in zip(signs, row.values, strict=True)]) for row in found if row.state == "complete"
    ]

    def beaten(mine: list[float]) -> bool:
        return any(all(t >= m for t, m in zip(theirs, mine, strict=True)) and theirs != mine for _, theirs in scored)

    return [row for row, mine in scored if not beaten(mine)]


def probe_best(found: Sequence[TrialRow], sweep: Sweep, probe: Probe) -> dict[int, dict[str, Any]]:
    """Linear probe and kNN of the best completed trials' last checkpoints, by number; kept in the sweep's folder.

    Called by every driver at its end; what stands there already is not computed again.
    """
    from repmetrics.data.open import open_data
    from repmetrics.scoring.score import EmbedSettings, score_checkpoint

    kept = sweep.out / PROBED
    probes: dict[int, dict[str, Any]] = {}
    if kept.is_file():
        stated = json.loads(kept.read_text(encoding="utf-8"))
        probes = {int(number): entry for number, entry in stated["probes"].items() if stated["data"] == probe.data}
    source = open_data(Path(probe.data))
    for row in [row for row in found if row.state == "complete"][: probe.best]:
        checkpoint = Path(str(row.folder)) / RUN / "checkpoints" / "last.ckpt"
        if row.number in probes or not checkpoint.is_file():  # on another machine
            continue
        score = score_checkpoint(
            checkpoint, source, overrides={}, channels={}, metrics=("rankme",), settings=EmbedSettings()
        )
        probes[row.number] = {name: score.measurements[name].to_json() for name in PROBES}
    new = kept.with_name(f"{PROBED}.{os.getpid()}")
    new.write_text(json.dumps({"data": probe.data, "probes": probes}, indent=2) + "\n", encoding="utf-8")
    os.replace(new, kept)
    return probes


def tied_rows(found: Sequence[TrialRow], sweep: Sweep) -> list[TrialRow]:
    """Completed trials tied with the best, by :func:`~repmetrics.decisions.run_selection.tied_with_best`."""
    complete, values, errors = _scored(found)
    return [complete[k] for k in tied_with_best(values, errors, direction=BETTER[sweep.directions[0]])]


def _scored(found: Sequence[TrialRow]) -> tuple[list[TrialRow], list[float], list[float | None]]:
    complete = [row for row in found if row.state == "complete"]
    return complete, [row.values[0] for row in complete], [row.errors[0] for row in complete]


def borda_winner(found: Sequence[TrialRow]) -> tuple[TrialRow, list[str]] | None:
    """The completed trial that Borda's count over all label-free signals prefers, and their names.

    None without two trials free of alarms, or two signals.
    """
    complete = [row for row in found if row.state == "complete" and not row.alarms]
    names = [
        name for name in METRICS if METRICS[name].direction != "neither" and all(name in r.signals for r in complete)
    ]
    if len(names) < 2 or len(complete) < 2:
        return None
    signals = {name: [float(row.signals[name][0] or 0.0) for row in complete] for name in names}
    points = borda_count(signals, direction={name: METRICS[name].direction for name in names})
    return complete[int(points.argmax())], names


def conclusion(found: Sequence[TrialRow], sweep: Sweep) -> list[str]:
    """What the sweep says, and what speaks against it, in sentences."""
    warnings = comparison_warnings(list(sweep.parameters), metrics=sweep.metrics)
    if len(sweep.metrics) > 1:
        numbers = ", ".join(str(row.number) for row in pareto_front(found, sweep))
        return [f"no trial is better in {' and '.join(sweep.metrics)} than: {numbers}", *warnings]
    same, (complete, values, errors) = tied_rows(found, sweep), _scored(found)
    if alarmed := [str(row.number) for row in complete if row.alarms]:
        warnings.insert(
            0, f"a collapse alarm stood at the end of: {', '.join(alarmed)}; do not take one of these unseen"
        )
    extreme = "highest" if sweep.directions[0] == "maximize" else "lowest"
    lines = [f"trial {complete[0].number} has the {extreme} {sweep.metrics[0]}"]
    if errors[0] is None:
        lines.append("whether others are as good is not known: the runs give no standard errors")
    elif len(same) > 1:
        lines.append(f"noise cannot tell apart trials {', '.join(str(row.number) for row in same)}")
        (axis, *others) = sweep.parameters
        if not others and not isinstance(sweep.parameters[axis], CategoricalDistribution):
            settings = [row.params[axis] for row in complete]
            kept = complete[select_setting(settings, values, errors, direction=BETTER[sweep.directions[0]])]
            lines.append(f"RankMe's rule takes the smallest {axis} among them: trial {kept.number}")
    if (counted := borda_winner(found)) is not None:
        lines.append(f"Borda's count over {', '.join(counted[1])} prefers trial {counted[0].number}")
    return [*lines, *warnings]


def table(found: Sequence[TrialRow], sweep: Sweep, probes: Mapping[int, Mapping[str, Any]]) -> RenderableType:
    """A row a trial, best first, and what it comes to below."""
    made = Table()
    for heading in ("trial", "state", *sweep.parameters, "step", *sweep.metrics, *(["linear probe"] if probes else [])):
        made.add_column(heading, justify="left" if heading == "state" else "right", overflow="fold")
    for row in found:
        probe = probes.get(row.number, {}).get("linear_probe")
        made.add_row(
            str(row.number),
            row.state,
            *(format_short(row.params.get(name)) for name in sweep.parameters),
            "–" if row.step is None else str(row.step),
            *([with_error(v, e) for v, e in zip(row.values, row.errors, strict=True)] or ["–"] * len(sweep.metrics)),
            *([with_error(probe["value"], probe["standard_error"]) if probe else "–"] if probes else []),
        )
    lines = [f"trial {row.number} crashed: {row.why}" for row in found if row.why]
    return Group(made, *(Text(line) for line in [*conclusion(found, sweep), *lines]))


def format_short(value: object) -> str:
    """A setting for the reader.

    Example:
        >>> format_short(0.00123456), format_short("kde"), format_short(None)
        ('0.00123', 'kde', 'None')
    """
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def with_error(value: float, error: float | None) -> str:
    """A value with as many digits as its error supports.

    Example:
        >>> with_error(45.1234, 0.518), with_error(45.1234, None)
        ('45.12 ± 0.52', '45.12')
    """
    if not error:
        return f"{value:.4g}"
    places = error_places(error)
    return f"{value:.{places}f} ± {error:.{places}f}"


def to_json(found: Sequence[TrialRow], sweep: Sweep, probes: Mapping[int, Any]) -> dict[str, Any]:
    """Plain types."""
    return {
        "study": sweep.study,
        "metrics": list(sweep.metrics),
        "directions": list(sweep.directions),
        "best": [row.number for row in pareto_front(found, sweep)],
        "level": [row.number for row in tied_rows(found, sweep)] if len(sweep.metrics) == 1 else None,
        "conclusion": conclusion(found, sweep),
        "trials": [{**row._asdict(), "probe": probes.get(row.number)} for row in found],
    }
