"""Looks: what each run measured at each step, from folders of runs or from one table."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from repmetrics.monitoring.record import read_jsonl

RESERVED_COLUMNS = ("run", "method", "seed", "axis", "step", "loss", "alarms")
PARAM = "param."


class Evaluation(NamedTuple):
    """One look at one run.

    Attributes:
        run: its name.
        method: what trained it; runs of different methods are compared only when asked.
        step: optimizer steps before it.
        loss: mean training loss since the look before, if known.
        alarms: collapse alarms that stood.
        values: by name, metrics and probes alike.
        errors: their standard errors, where known.
        settings: hyperparameters by name.
        width: features a sample, where known.
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


def read_runs(path: Path) -> list[Evaluation]:
    """Every look below a folder that holds ``measurements.jsonl`` files, or of a table.

    Raises:
        ValueError: nothing is there, a run has no look, or a file is not what it should be.
    """
    if path.is_dir():
        files = sorted(path.rglob("measurements.jsonl"))
        if not files:
            raise ValueError(f"{path} holds no run: expected folders with measurements.jsonl, or name a .csv table")
        return [look for file in files for look in _evaluations_from_run(file, name=str(file.parent.relative_to(path)))]
    if path.suffix.lower() != ".csv":
        raise ValueError(f"{path} is neither a folder of runs nor a .csv table")
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        lacking = [name for name in ("run", "step") if name not in (reader.fieldnames or ())]
        if lacking:
            raise ValueError(f"{path.name} has no column {' and '.join(lacking)}: a row is a look of a run at a step")
        try:
            return [_evaluation_from_row(row) for row in reader]
        except ValueError as error:
            raise ValueError(f"{path.name}, line {reader.line_num}: {error}") from error


def _evaluation_from_row(row: Mapping[str, str]) -> Evaluation:
    named = {
        name: _number(value)
        for name, value in row.items()
        if name not in RESERVED_COLUMNS and not name.startswith(PARAM)
    }
    known = {name: value for name, value in named.items() if not math.isnan(value)}
    return Evaluation(
        run=row["run"],
        method=row.get("method") or "",
        step=int(row["step"]),
        loss=_number(row.get("loss")),
        alarms=int(row.get("alarms") or 0),
        values={name: value for name, value in known.items() if not name.endswith("_se")},
        errors={name.removesuffix("_se"): value for name, value in known.items() if name.endswith("_se")},
        settings={k.removeprefix(PARAM): v for k, v in row.items() if k.startswith(PARAM) and v},
    )


def _number(text: str | None) -> float:
    return float(text) if text else math.nan


def _evaluations_from_run(file: Path, *, name: str) -> list[Evaluation]:
    method, settings = _configured(file.with_name("config.yaml"))
    try:
        looks = [
            _evaluation_from_entry(entry, run=name, method=method, settings=settings) for entry in read_jsonl(file)
        ]
    except KeyError as error:
        raise ValueError(f"{file} is no record of a run: a line has no {error}") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is no record of a run: {error}") from error
    if not looks:
        raise ValueError(f"{file} has no look yet: wait for one, or move the run away")
    return looks


def _evaluation_from_entry(
    entry: Mapping[str, Any], *, run: str, method: str, settings: Mapping[str, str]
) -> Evaluation:
    measured = entry["measurements"]
    values = {k: m["value"] for k, m in measured.items() if m["value"] is not None}
    floors = {f"{k}_colour": m["details"].get("null_floor") for k, m in measured.items() if k == "linear_probe"}
    return Evaluation(
        run=run,
        method=method,
        step=entry["step"],
        loss=math.nan if entry["loss"] is None else entry["loss"],
        alarms=len(entry["alarms"]),
        values=values | {k: floor for k, floor in floors.items() if floor is not None},
        errors={k: m["standard_error"] for k, m in measured.items() if m["standard_error"] is not None},
        settings=settings,
        width=next((m["d"] for m in measured.values()), None),
    )


def _configured(file: Path) -> tuple[str, dict[str, str]]:
    """Method and settings of a run of `fmtrain fit`; nothing where there is no configuration."""
    if not file.is_file():
        return "", {}
    import yaml

    try:
        config = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not YAML: {error}") from error
    if not isinstance(config, Mapping):
        raise ValueError(f"{file} is no configuration: expected a mapping, got a {type(config).__name__}")
    leaves = dict(_leaves({key: config[key] for key in ("model", "data", "trainer") if key in config}))
    return leaves.get("model.class_path", "").rpartition(".")[2], leaves


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    for name, value in tree.items():
        key = f"{prefix}.{name}" if prefix else str(name)
        if isinstance(value, Mapping):
            yield from _leaves(value, key)
        elif value is not None:
            yield key, str(value)


def varying_settings(looks: Sequence[Evaluation]) -> list[str]:
    """Settings that differ between runs.

    Example:
        >>> a = Evaluation("a", "", 1, 0.0, 0, {}, {}, {"lr": "0.1", "wd": "0"})
        >>> varying_settings([a, a._replace(settings={"lr": "0.2", "wd": "0"})])
        ['lr']
    """
    names = dict.fromkeys(name for look in looks for name in look.settings)
    return [name for name in names if len({look.settings.get(name) for look in looks}) > 1]


def write_table(looks: Sequence[Evaluation], path: Path) -> None:
    """The looks as a table that :func:`read_runs` reads, beside its place and then in it."""
    changed = varying_settings(looks)
    rows = []
    for look in looks:
        row: dict[str, Any] = {"run": look.run, "method": look.method, "step": look.step}
        row |= {"loss": "" if math.isnan(look.loss) else f"{look.loss:.6g}", "alarms": look.alarms}
        row |= {f"{PARAM}{name}": look.settings.get(name, "") for name in changed}
        for name, value in look.values.items():
            row[name] = f"{value:.6g}"
            if name in look.errors:
                row[f"{name}_se"] = f"{look.errors[name]:.6g}"
        rows.append(row)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    with part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(rows)
    part.replace(path)
