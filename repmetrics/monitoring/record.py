"""Record: the result of one evaluation, as log keys, as a line of ``measurements.jsonl``, and in a checkpoint."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from repmetrics.atomic_write import write_text
from repmetrics.decisions.alarms import RANK_METRIC, Alarm, AlarmInput, CollapseStats
from repmetrics.measurement.jackknife import Blocks
from repmetrics.measurement.result import Measurement

Z_95 = 1.96
"""Distance of ``_lower`` and ``_upper`` from the value, in standard errors."""


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

    def scalars(self, *, prefix: str = "repmetrics") -> dict[str, float]:
        """Every finite number by its log key, see :func:`scalars`."""
        values = {"seconds": self.seconds, "nonfinite": float(self.nonfinite), "alarm": float(len(self.alarms))}
        if self.loss is not None:
            values["loss"] = self.loss
        logged = {f"{prefix}/{key}": value for key, value in values.items()}
        logged |= scalars(self.measurements, prefix=prefix)
        return {key: value for key, value in logged.items() if math.isfinite(value)}

    def to_json(self) -> dict[str, Any]:
        """Plain types, one line of ``measurements.jsonl``."""
        return {
            "step": self.step,
            "epoch": self.epoch,
            "seconds": self.seconds,
            "nonfinite": self.nonfinite,
            "loss": None if self.loss is None or not math.isfinite(self.loss) else self.loss,
            "alarms": [list(alarm) for alarm in self.alarms],
            "vitals": None if self.collapse_stats is None else self.collapse_stats._asdict(),
            "measurements": {name: m.to_json() for name, m in self.measurements.items()},
        }

    def to_state(self) -> dict[str, Any]:
        """:meth:`to_json` and the data for paired differences, for a checkpoint."""
        state = self.to_json()
        for name, m in self.measurements.items():
            if m.replicates is not None and m.blocks is not None:
                blocks = {"sizes": list(m.blocks.sizes), "groups": m.blocks.groups, "digest": m.blocks.digest}
                state["measurements"][name] |= {"replicates": list(m.replicates), "blocks": blocks}
        return state

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Record:
        """Inverse of :meth:`to_state` and :meth:`to_json`."""
        fields = dict(state)
        stats = fields.pop("vitals")  # key in files, older than the name
        fields["collapse_stats"] = None if stats is None else CollapseStats(**stats)
        fields["alarms"] = tuple(Alarm(*alarm) for alarm in state["alarms"])
        fields["measurements"] = {name: _measurement(m) for name, m in state["measurements"].items()}
        return cls(**fields)

    def alarm_input(self) -> AlarmInput:
        """Input of :func:`repmetrics.decisions.alarms.alarms`."""
        return AlarmInput(self.step, self.measurements.get(RANK_METRIC), self.collapse_stats, self.nonfinite)


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
        fields["blocks"] = Blocks(index, tuple(blocks["sizes"]), blocks["groups"], blocks["digest"])
    return Measurement(**fields)


def scalars(measurements: Mapping[str, Measurement], *, prefix: str) -> dict[str, float]:
    """Numbers by log key: ``prefix/name``, and where known ``…_null``, ``…_se``, ``…_lower``, ``…_upper``.

    The bounds are value ± 1.96 standard errors.
    """
    values: dict[str, float] = {}
    for name, m in measurements.items():
        key = f"{prefix}/{name}"
        values[key] = m.value
        if "null_floor" in m.details:
            values[f"{key}_null"] = m.details["null_floor"]
        if m.standard_error is not None:
            values[f"{key}_se"] = m.standard_error
            values[f"{key}_lower"] = m.value - Z_95 * m.standard_error
            values[f"{key}_upper"] = m.value + Z_95 * m.standard_error
    return values


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
    """Entries of the complete lines of ``measurements.jsonl``: the last line of a growing file may be incomplete."""
    return [json.loads(line) for line in content[: content.rfind(b"\n") + 1].splitlines()]


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Entries of ``measurements.jsonl`` by step; the last entry of a step that a resumed run measured again."""
    latest = {entry["step"]: entry for entry in parse_lines(path.read_bytes())}
    return [latest[step] for step in sorted(latest)]


def truncate_after(path: Path, step: int) -> None:
    """Remove entries after a step: a run resumed from that step's checkpoint measures them again."""
    if path.exists():
        content = path.read_bytes()
        kept = "".join(json.dumps(entry) + "\n" for entry in parse_lines(content) if entry["step"] <= step)
        if kept.encode() != content:
            write_text(path, kept)
