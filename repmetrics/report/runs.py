"""Runs of a report: from ``measurements.jsonl``, or from the ``--json`` of `repmetrics score`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from repmetrics.decisions.alarms import alarms
from repmetrics.measurement.result import Measurement
from repmetrics.monitoring import MEASUREMENTS
from repmetrics.monitoring.pictures import Pictures, pictures_name
from repmetrics.monitoring.record import Record, is_record_file, record_files, record_name
from repmetrics.monitoring.record import read_runs as read_records
from repmetrics.report.settings import find_settings


class Run(NamedTuple):
    """Evaluations of one run, or of the checkpoints of one folder.

    Attributes:
        name: Name, which no other run of the report has.
        records: Records in the order of their steps.
        steps: False if the checkpoints have no steps: each is then a run with one record.
        method: Training method, or "".
        settings: Settings by name.
        notes: What could not be read, or is assumed.
        pictures_file: File of the pictures, which may be those of another run with records in the same folder.
        id: Id of the run in its records.
    """

    name: str
    records: Sequence[Record]
    steps: bool = True
    method: str = ""
    settings: Mapping[str, str] = {}
    notes: tuple[str, ...] = ()
    pictures_file: Path | None = None
    id: str = ""

    def pictures(self) -> Pictures | None:
        """Pictures of the run, or None.

        Raises:
            ValueError: The file is damaged.
        """
        if self.pictures_file is None or not self.pictures_file.is_file():
            return None
        pictures = Pictures.load(self.pictures_file)
        return pictures if pictures.run == self.id and pictures.stages else None

    def values(self, metric: str) -> list[tuple[int, Measurement]]:
        """Step and measurement of each evaluation that measured a metric."""
        return [(record.step, m) for record in self.records if (m := record.measurements.get(metric)) is not None]

    @property
    def metrics(self) -> list[str]:
        """Names of everything measured, in the order of the records."""
        return list(dict.fromkeys(name for record in self.records for name in record.measurements))


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """All runs under folders, in ``measurements.jsonl`` files, and in JSON files of `repmetrics score`.

    A run is named by its folder, as far as folders differ, and by its monitor where that has a prefix of its own. Of
    several runs in one file, the id follows.

    Raises:
        ValueError: A path holds no run, or no evaluation.
    """
    files = list(dict.fromkeys(file.resolve() for path in paths for file in _find(path)))
    folders = [record_name(file) if is_record_file(file) else file.with_suffix("") for file in files]
    runs = []
    for file, name in zip(files, _short_names(folders), strict=True):
        runs += _from_records(file, name) if is_record_file(file) else _from_scores(file, name, alone=len(files) == 1)
    return runs


def _find(path: Path) -> list[Path]:
    if path.is_dir():
        files = record_files(path)
        if not files:
            raise ValueError(
                f"{path} holds no {MEASUREMENTS}: name a folder that RepresentationMonitor or fmtrain fit wrote"
            )
        return files
    if not is_record_file(path) and path.suffix.lower() != ".json":
        raise ValueError(
            f"{path} is no run: expected a folder with {MEASUREMENTS}, or a .json file of `repmetrics score --json`"
        )
    return [path]


def _short_names(folders: Sequence[Path]) -> list[str]:
    """Paths without the part that all share; a single one is named by its last part.

    Example:
        >>> _short_names([Path("/runs/a/run"), Path("/runs/b/run")]), _short_names([Path("/runs/a")])
        (['a/run', 'b/run'], ['a'])
    """
    if len(folders) == 1:
        return [_printable(folders[0].name)]
    shared = 0
    while all(len(f.parts) > shared + 1 for f in folders) and len({f.parts[shared] for f in folders}) == 1:
        shared += 1
    return [_printable("/".join(folder.parts[shared:])) for folder in folders]


def _printable(name: str) -> str:
    """A name of a file system for a page: bytes that are no UTF-8, and control characters, become one sign."""
    text = name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    return "".join(sign if sign.isprintable() else "\N{REPLACEMENT CHARACTER}" for sign in text)


def _from_records(file: Path, name: str) -> list[Run]:
    notes: tuple[str, ...] = ()
    method, settings = "", dict[str, str]()
    try:
        method, settings = find_settings(file, root=file.parent)
    except ValueError as error:
        notes = (f"the settings of {name} are not known: {error}",)
    try:
        by_id = {run: [Record.from_state(entry) for entry in entries] for run, entries in read_records(file).items()}
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise ValueError(f"{file} is no record of a run: {type(error).__name__}: {error}") from error
    if not by_id:
        raise ValueError(f"{file} contains no evaluation yet: wait for the first, or leave this run out")
    names = [name] if len(by_id) == 1 else [f"{name} ({run or 'no id'})" for run in by_id]
    return [
        Run(full, records, method=method, settings=settings, notes=notes, id=run,
            pictures_file=file.with_name(pictures_name(file.name)))
        for full, (run, records) in zip(names, by_id.items(), strict=True)
    ]  # fmt: skip


def _from_scores(file: Path, name: str, *, alone: bool) -> list[Run]:
    """Runs of a JSON file: the checkpoints of a folder are one run if each has a step of its own."""
    try:
        scores = json.loads(file.read_text(encoding="utf-8"))["scores"]
        records = [_record(score) for score in scores]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{file} is no output of `repmetrics score --json`: {type(error).__name__}: {error}"
        ) from error
    if not records:
        raise ValueError(f"{file} holds no score: give the output of `repmetrics score --json`")
    runs = []
    for folder in dict.fromkeys(score["run"] for score in scores):
        members = _without_copies([k for k, score in enumerate(scores) if score["run"] == folder], records)
        steps = [scores[k]["step"] for k in members]
        prefix = "" if alone else f"{name}/"
        if None in steps or len(set(steps)) < len(steps):
            runs += [Run(f"{prefix}{scores[k]['name']}", [records[k]], steps=False) for k in members]
            continue
        ordered = sorted((records[k] for k in members), key=lambda record: record.step)
        note = "alarms are those that the scores allow: training statistics are in a run's record only"
        runs.append(Run(prefix + folder if folder else name, list(_with_alarms(ordered)), notes=(note,)))
    return runs


def _without_copies(members: Sequence[int], records: Sequence[Record]) -> list[int]:
    """Positions of the records without those that repeat another: "last.ckpt" copies another checkpoint."""
    kept: list[int] = []
    for k in members:
        if not any(replace(records[k], seconds=records[other].seconds) == records[other] for other in kept):
            kept.append(k)
    return kept


def _record(score: Mapping[str, Any]) -> Record:
    state = {"step": score["step"] or 0, "epoch": 0, "seconds": score["seconds"], "vitals": None, "alarms": []}
    return Record.from_state(state | {"measurements": score["measurements"]})


def _with_alarms(records: Sequence[Record]) -> Iterable[Record]:
    inputs = [record.alarm_input() for record in records]
    for k, record in enumerate(records):
        yield replace(record, alarms=alarms(inputs[: k + 1]))
