"""Record: the result of one evaluation, as log keys, as a line of ``measurements.jsonl``, and in a checkpoint."""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from repmetrics.atomic_write import write_text
from repmetrics.decisions.alarms import RANK_METRIC, RETRIEVAL_METRICS, Alarm, AlarmInput, CollapseStats
from repmetrics.measurement.blocks import Blocks
from repmetrics.measurement.registry import METRICS, Direction
from repmetrics.measurement.result import Measurement, format_value
from repmetrics.monitoring import MEASUREMENTS

SPECTRUM_POINTS = 48
"""Largest number of singular values in a line of ``measurements.jsonl``."""


@dataclass(frozen=True)
class Record:
    """Result of one evaluation.

    Attributes:
        step: Optimizer steps taken before it.
        epoch: Epochs begun before it, from 0.
        seconds: Duration of the evaluation.
        measurements: Measurements by name; those of a named layer under "layer/name".
        nonfinite: Held-out samples whose features hold NaN or Inf; above 0, nothing could be measured.
        loss: Mean training loss since the previous evaluation, if the trainer reports one.
        alarms: Collapse alarms active after it.
        collapse_stats: Numbers that the alarms read in addition to the metrics, of the encoder's output.
        singular_values: Singular values of the encoder's centered features over √N, largest first; not recorded.
        spectrum: Some of them as (rank, value), at ranks with equal ratios; recorded, see :func:`sample_spectrum`.
        run: Id of the run, which all its records share, also after a resume. Runs may write to one file.
    """

    step: int
    epoch: int
    seconds: float
    measurements: Mapping[str, Measurement] = field(default_factory=dict)
    nonfinite: int = 0
    loss: float | None = None
    alarms: tuple[Alarm, ...] = ()
    collapse_stats: CollapseStats | None = None
    singular_values: tuple[float, ...] = field(default=(), repr=False, compare=False)
    spectrum: tuple[tuple[int, float], ...] = field(default=(), repr=False, compare=False)
    run: str = ""

    def __repr__(self) -> str:
        values = [f"{name} {format_value(m.value, m.standard_error)}" for name, m in self.measurements.items()]
        shown = ", ".join(values[:3]) + (f" and {len(values) - 3} more" if len(values) > 3 else "")
        broken = f"{self.nonfinite} samples with NaN or Inf" if self.nonfinite else ""
        alarms = "alarm: " + ", ".join(alarm.kind for alarm in self.alarms) if self.alarms else "no alarm"
        return f"<Record of step {self.step:,}: {'; '.join(part for part in (shown, broken, alarms) if part)}>"

    def scalars(self, *, prefix: str = "repmetrics") -> dict[str, float]:
        """Every finite number by its log key, see :func:`scalars`."""
        values = {"seconds": self.seconds, "nonfinite": float(self.nonfinite), "alarm": float(len(self.alarms))}
        if self.loss is not None:
            values["loss"] = self.loss
        logged = {f"{prefix}/{key}": value for key, value in values.items()}
        logged |= scalars(self.measurements, prefix=prefix)
        return {key: value for key, value in logged.items() if math.isfinite(value)}

    def published(self, *, prefix: str = "repmetrics", previous: Mapping[str, float] | None = None) -> dict[str, float]:
        """:meth:`scalars`, and NaN for keys without a value now, for callbacks that decide by the keys.

        Keys without a value are those of a metric that is NaN, and those of ``previous``, the values published before.
        """
        keys = [*(previous or ()), *metric_keys(self.measurements, prefix=prefix)]
        return dict.fromkeys(keys, math.nan) | self.scalars(prefix=prefix)

    def to_json(self) -> dict[str, Any]:
        """Plain types, one line of ``measurements.jsonl``."""
        return {
            "run": self.run,
            "step": self.step,
            "epoch": self.epoch,
            "seconds": self.seconds,
            "nonfinite": self.nonfinite,
            "loss": None if self.loss is None or not math.isfinite(self.loss) else self.loss,
            "alarms": [list(alarm) for alarm in self.alarms],
            "vitals": None if self.collapse_stats is None else self.collapse_stats._asdict(),
            "measurements": {name: m.to_json() for name, m in self.measurements.items()},
            "spectrum": [list(point) for point in self.spectrum],
        }

    def to_state(self) -> dict[str, Any]:
        """:meth:`to_json` and the data for paired differences, for a checkpoint."""
        state = self.to_json()
        for name, m in self.measurements.items():
            if m.replicates is not None and m.blocks is not None:
                blocks = {
                    "sizes": list(m.blocks.sizes),
                    "groups": m.blocks.groups,
                    "digest": m.blocks.digest,
                    "variances": list(m.blocks.variances),
                }
                state["measurements"][name] |= {"replicates": list(m.replicates), "blocks": blocks}
        return state

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Record:
        """Inverse of :meth:`to_state` and :meth:`to_json`."""
        fields = dict(state)
        stats = fields.pop("vitals")  # key in files, older than the name
        fields["collapse_stats"] = None if stats is None else CollapseStats(**stats)
        fields["alarms"] = tuple(Alarm(*alarm) for alarm in state["alarms"])
        fields["spectrum"] = tuple((rank, value) for rank, value in state.get("spectrum", ()))
        fields["measurements"] = {name: _measurement(m) for name, m in state["measurements"].items()}
        return cls(**fields)

    def alarm_input(self) -> AlarmInput:
        """Input of :func:`repmetrics.decisions.alarms.alarms`."""
        retrieval = tuple(
            m
            for name in RETRIEVAL_METRICS
            if (m := self.measurements.get(name)) is not None and not math.isnan(m.value)
        )
        if len(retrieval) < len(RETRIEVAL_METRICS):
            retrieval = ()
        rank = self.measurements.get(RANK_METRIC)
        return AlarmInput(self.step, rank, self.collapse_stats, self.nonfinite, retrieval)


def sample_spectrum(singular_values: Sequence[float]) -> tuple[tuple[int, float], ...]:
    """Largest and smallest singular value and those between, at most :data:`SPECTRUM_POINTS`, as (rank, value).

    Example:
        >>> sample_spectrum([4.0, 2.0, 1.0])
        ((1, 4.0), (2, 2.0), (3, 1.0))
    """
    if not singular_values:
        return ()
    ranks = np.unique(np.geomspace(1, len(singular_values), SPECTRUM_POINTS).round().astype(int))
    return tuple((int(rank), float(f"{singular_values[rank - 1]:.4g}")) for rank in ranks)


def _measurement(state: Mapping[str, Any]) -> Measurement:
    fields = {**state, "warnings": tuple(state["warnings"])}
    fields["direction"] = fields.pop("better")  # key in files, older than the name
    if state["value"] is None:
        fields["value"] = math.nan
    fields["details"] = {key: math.nan if value is None else value for key, value in state["details"].items()}
    if "replicates" in state:
        blocks = state["blocks"]
        index = torch.empty(0, dtype=torch.int64)  # the block of each row is not recorded, only the digest
        fields["replicates"] = tuple(state["replicates"])
        mean_rows = sum(blocks["sizes"]) / blocks["groups"]  # of a group; older states assume groups of equal size
        variances = tuple(blocks.get("variances") or (mean_rows / size for size in blocks["sizes"]))
        fields["blocks"] = Blocks(index, tuple(blocks["sizes"]), blocks["groups"], blocks["digest"], variances)
    return Measurement(**fields)


def scalars(measurements: Mapping[str, Measurement], *, prefix: str) -> dict[str, float]:
    """Numbers by log key: ``prefix/name``, and where known ``…_null``, ``…_se``, ``…_lower``, ``…_upper``.

    The bounds are those of the 95 % interval.
    """
    values: dict[str, float] = {}
    for name, m in measurements.items():
        key = f"{prefix}/{name}"
        values[key] = m.value
        if "null_floor" in m.details:
            values[f"{key}_null"] = m.details["null_floor"]
        if m.standard_error is not None:
            values[f"{key}_se"] = m.standard_error
        if m.interval is not None:
            values[f"{key}_lower"], values[f"{key}_upper"] = m.interval
    return values


def metric_keys(measurements: Mapping[str, Measurement], *, prefix: str) -> list[str]:
    """Keys of :func:`scalars`, also those of a metric that has no value yet."""
    errors = any(m.standard_error is not None for m in measurements.values())
    keys = []
    for name, m in measurements.items():
        metric = METRICS.get(name.rpartition("/")[2])
        floor = not math.isnan(m.details.get("null_floor", math.nan))
        if math.isnan(m.value) and metric is not None:
            floor = metric.null_floor is not None
        suffixes = ("", *(("_null",) if floor else ()), *(("_se", "_lower", "_upper") if errors else ()))
        keys += [f"{prefix}/{name}{suffix}" for suffix in suffixes]
    return keys


def directions(measurements: Mapping[str, Measurement], *, prefix: str) -> dict[str, Direction]:
    """Direction of an improvement by log key, of each metric, its bounds and the loss."""
    keys: dict[str, Direction] = {f"{prefix}/loss": "lower"}
    for name, m in measurements.items():
        keys |= {f"{prefix}/{name}{suffix}": m.direction for suffix in ("", "_lower", "_upper")}
    return keys


def append_jsonl(path: Path, record: Record) -> None:
    """Add a record to a file of one JSON object per line: a complete line, or nothing if the disk is full."""
    path.parent.mkdir(parents=True, exist_ok=True)
    before = path.stat().st_size if path.exists() else 0
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record.to_json(), allow_nan=False) + "\n")
    except OSError:
        os.truncate(path, before)
        raise


def parse_lines(content: bytes) -> list[dict[str, Any]]:
    """Entries of the complete lines of ``measurements.jsonl``: the last line of a growing file may be incomplete.

    Lines that are not JSON, as a power cut leaves them, are left out with a warning.

    Raises:
        ValueError: No line is JSON.
    """
    lines = [line for line in content[: content.rfind(b"\n") + 1].splitlines() if line]
    entries, error = [], None
    for line in lines:
        try:
            entries.append(json.loads(line))
        except ValueError as cause:
            error = cause
    if error is not None and not entries:
        raise error
    if error is not None:
        warnings.warn(
            f"{len(lines) - len(entries)} of {len(lines)} lines of measurements are not JSON and left out, as after a "
            "power cut",
            stacklevel=2,
        )
    return entries


def record_files(folder: Path) -> list[Path]:
    """Files of records at any depth: ``measurements.jsonl``, or ``measurements-<prefix>.jsonl`` of further monitors."""
    return sorted(file for file in folder.rglob("measurements*.jsonl") if is_record_file(file))


def is_record_file(path: Path) -> bool:
    """Whether a file has the name of a monitor's records."""
    return path.name == MEASUREMENTS or (path.name.startswith("measurements-") and path.suffix == ".jsonl")


def record_name(file: Path) -> Path:
    """Path by which a run is named: its folder, with the prefix of the monitor below it unless that is the default.

    Example:
        >>> record_name(Path("runs/a/measurements.jsonl")).as_posix()
        'runs/a'
        >>> record_name(Path("runs/a/measurements-teacher.jsonl")).as_posix()
        'runs/a/teacher'
    """
    return file.parent if file.name == MEASUREMENTS else file.parent / file.stem.removeprefix("measurements-")


def read_runs(path: Path) -> dict[str, list[dict[str, Any]]]:
    """Entries of each run in ``measurements.jsonl`` by its id, in the order in which the runs wrote last.

    The entries of a run are in the order of their steps; the last entry of a step that was measured again counts. Lines
    of earlier versions, without an id, are one run, "".
    """
    runs: dict[str, dict[int, dict[str, Any]]] = {}
    for entry in parse_lines(path.read_bytes()):
        entries = runs.pop(entry.get("run", ""), {})
        entries[entry["step"]] = entry
        runs[entry.get("run", "")] = entries
    return {run: [entries[step] for step in sorted(entries)] for run, entries in runs.items()}


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Entries of the newest run in ``measurements.jsonl``, see :func:`read_runs`; empty if there is none."""
    return next(reversed(list(read_runs(path).values())), [])


def write_history(path: Path, history: Sequence[Record]) -> None:
    """Write the history of a resumed run in place of all that the run had written to ``measurements.jsonl``.

    Entries after the checkpoint are measured again. The file may be new, and may hold other runs, which remain.
    """
    content = path.read_bytes() if path.exists() else b""
    run = history[-1].run
    others = [json.dumps(entry) for entry in parse_lines(content) if entry.get("run", "") != run]
    lines = [*others, *(json.dumps(record.to_json(), allow_nan=False) for record in history)]
    if (written := "".join(f"{line}\n" for line in lines)).encode() != content:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, written)
