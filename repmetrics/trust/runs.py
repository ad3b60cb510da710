"""What each run measured at each step, read from folders of runs or from one table."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from repmetrics.atomic_write import write_csv
from repmetrics.data.read_csv import read_csv
from repmetrics.measurement.registry import PROBES
from repmetrics.monitoring.record import read_runs as read_records
from repmetrics.monitoring.record import record_files
from repmetrics.report.settings import find_settings, varying_settings

RESERVED_COLUMNS = ("run", "method", "seed", "axis", "step", "loss", "alarms")
PARAM = "param."


class Evaluation(NamedTuple):
    """One evaluation of one run.

    Attributes:
        run: Name of the run.
        method: Training method; runs of different methods are compared only on request.
        step: Optimizer steps before the evaluation.
        loss: Mean training loss since the previous evaluation, or NaN.
        alarms: Number of active collapse alarms.
        alarm_kinds: Their kinds; empty if only the number is known.
        values: Values of metrics and probes by name.
        errors: Standard errors by name, where known.
        settings: Hyperparameters by name.
        width: Number of features per sample, where known.
        conventions: What is and is not done to the features, by metric.
    """

    run: str
    method: str
    step: int
    loss: float
    alarms: int
    values: Mapping[str, float]
    errors: Mapping[str, float]
    settings: Mapping[str, str]
    width: int | None = None
    conventions: Mapping[str, str] = MappingProxyType({})
    alarm_kinds: tuple[str, ...] = ()


def read_runs(path: Path) -> list[Evaluation]:
    """All evaluations in a folder with ``measurements.jsonl`` files at any depth, or in a table.

    A run is named by its folder. Where several runs wrote to one file, the id of each follows in parentheses. Where
    α-ReQ was measured, |α − 1|, which has a direction, is added.
    """
    return [_with_alpha_distance(item) for item in _read(path)]


def _read(path: Path) -> list[Evaluation]:
    if path.is_dir():
        files = record_files(path)
        if not files:
            raise ValueError(f"{path} holds no run: expected folders with measurements.jsonl, or name a .csv table")
        folder, monitors = Counter(file.parent for file in files).most_common(1)[0]
        if monitors > 1:
            raise ValueError(
                f"{folder} has records of several monitors, which are no separate runs: "
                "keep the file of one monitor in the folder of each run"
            )
        # What lies in the folder of a single run belongs to it.
        above = path.absolute() if len(files) > 1 else path.absolute().parent
        return [
            item
            for file in files
            for item in _evaluations_from_run(file, name=str(file.parent.relative_to(path)), above=above)
        ]
    if path.suffix.lower() != ".csv":
        raise ValueError(f"{path} is neither a folder of runs nor a .csv table")
    columns, rows = read_csv(path)
    if missing := [name for name in ("run", "step") if name not in columns]:
        raise ValueError(
            f"{path.name} has no column {' and '.join(missing)}: a row is one evaluation of a run at a step"
        )
    evaluations = []
    for line, row in enumerate(rows, start=2):  # the header is line 1
        try:
            evaluations.append(_evaluation_from_row(row))
        except ValueError as error:
            raise ValueError(f"{path.name}, line {line}: {error}") from error
    return evaluations


def _with_alpha_distance(item: Evaluation) -> Evaluation:
    added = {"alpha_distance": abs(item.values["alpha_req"] - 1)} if "alpha_req" in item.values else {}
    errors = {"alpha_distance": item.errors["alpha_req"]} if "alpha_req" in item.errors else {}
    return item._replace(values=added | dict(item.values), errors=errors | dict(item.errors))


def _evaluation_from_row(row: Mapping[str, str]) -> Evaluation:
    measured = {k: v for k, v in row.items() if k not in RESERVED_COLUMNS and not k.startswith(PARAM)}
    numbers = {name: value for name, text in measured.items() if math.isfinite(value := _number(text))}
    return Evaluation(
        run=row["run"],
        method=row.get("method", ""),
        step=int(row["step"]),
        loss=_number(row.get("loss", "")),
        alarms=int(row.get("alarms") or 0),
        values={name: value for name, value in numbers.items() if not name.endswith("_se")},
        errors={name.removesuffix("_se"): value for name, value in numbers.items() if name.endswith("_se")},
        settings={k.removeprefix(PARAM): v for k, v in row.items() if k.startswith(PARAM) and v},
    )


def _number(text: str) -> float:
    return float(text) if text else math.nan


def _evaluations_from_run(file: Path, *, name: str, above: Path) -> list[Evaluation]:
    method, settings = find_settings(file.absolute(), root=above)
    try:
        records = read_records(file)
        evaluations = [
            _evaluation_from_entry(
                entry, run=name if len(records) == 1 else f"{name} ({run})", method=method, settings=settings
            )
            for run, entries in records.items()
            for entry in entries
        ]
    except KeyError as error:
        raise ValueError(f"{file} is no record of a run: a line has no {error}") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is no record of a run: {error}") from error
    if not evaluations:
        raise ValueError(f"{file} contains no evaluation yet: wait for the first, or exclude this run")
    return evaluations


def _evaluation_from_entry(
    entry: Mapping[str, Any], *, run: str, method: str, settings: Mapping[str, str]
) -> Evaluation:
    measured = entry["measurements"]
    values = {k: m["value"] for k, m in measured.items() if _is_finite(m["value"])}
    probed = {k: measured[k].get("details", {}).get("null_floor") for k in PROBES if k in measured}
    color = {f"{k}_colour": floor for k, floor in probed.items() if floor is not None}
    return Evaluation(
        run=run,
        method=method,
        step=entry["step"],
        loss=entry["loss"] if _is_finite(entry.get("loss")) else math.nan,
        alarms=len(entry.get("alarms") or ()),
        values=values | color,
        errors={k: m["standard_error"] for k, m in measured.items() if _is_finite(m.get("standard_error"))},
        settings=settings,
        width=next((m.get("d") for m in measured.values()), None),
        alarm_kinds=tuple(kind for kind, _ in entry.get("alarms") or ()),
        conventions={k: m["convention"] for k, m in measured.items() if "convention" in m},
    )


def _is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def write_table(evaluations: Sequence[Evaluation], path: Path) -> None:
    """Write a table that :func:`read_runs` reads: one row per evaluation."""
    varying = varying_settings([item.settings for item in evaluations])
    rows = []
    for item in evaluations:
        row: dict[str, Any] = {"run": item.run, "method": item.method, "step": item.step}
        row |= {"loss": "" if math.isnan(item.loss) else f"{item.loss:.6g}", "alarms": item.alarms}
        row |= {f"{PARAM}{name}": item.settings.get(name, "") for name in varying}
        for name, value in item.values.items():
            row[name] = f"{value:.6g}"
            if name in item.errors:
                row[f"{name}_se"] = f"{item.errors[name]:.6g}"
        rows.append(row)
    write_csv(path, list(dict.fromkeys(name for row in rows for name in row)), rows)
