"""Record: what one look at an encoder saw; as log keys, as a line of JSON, as part of a checkpoint."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from repmetrics.decisions.alarms import Alarm, AlarmInput, CollapseStats
from repmetrics.measurement.jackknife import Blocks
from repmetrics.measurement.result import Measurement

Z_95 = 1.96
"""Standard errors to either side of the value that ``_lower`` and ``_upper`` lie."""


@dataclass(frozen=True)
class Record:
    """What one look saw.

    Attributes:
        step: optimizer steps taken before it.
        epoch: epochs begun before it, from 0.
        seconds: what the look cost.
        measurements: by name; those of a named layer under "layer/name".
        nonfinite: held-out samples whose features hold NaN or Inf; above 0, nothing could be measured.
        loss: mean training loss since the look before, where the trainer gives one.
        alarms: the collapse alarms that stand after it.
        vitals: what the alarms look at beside the metrics, of the encoder's own output.
        singular_values: of the encoder's centred features over √N, largest first; not part of the record.
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
        """Every finite number under its log key: ``prefix/name``, ``…_se``, ``…_lower``, ``…_upper``.

        The bounds are value ± 1.96 standard errors, and stand only where an error is known.
        """
        values: dict[str, float] = {"seconds": self.seconds, "nonfinite": float(self.nonfinite)}
        values["alarm"] = float(len(self.alarms))
        if self.loss is not None:
            values["loss"] = self.loss
        for name, m in self.measurements.items():
            values[name] = m.value
            if "null_floor" in m.details:
                values[f"{name}_null"] = m.details["null_floor"]
            if m.standard_error is not None:
                values[f"{name}_se"] = m.standard_error
                values[f"{name}_lower"] = m.value - Z_95 * m.standard_error
                values[f"{name}_upper"] = m.value + Z_95 * m.standard_error
        return {f"{prefix}/{key}": value for key, value in values.items() if math.isfinite(value)}

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
        """:meth:`to_json` and what paired differences need, for a checkpoint."""
        state = self.to_json()
        for name, m in self.measurements.items():
            if m.replicates is not None and m.blocks is not None:
                dealt = {"sizes": list(m.blocks.sizes), "groups": m.blocks.groups, "digest": m.blocks.digest}
                state["measurements"][name] |= {"replicates": list(m.replicates), "blocks": dealt}
        return state

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Record:
        """Back from :meth:`to_state` or :meth:`to_json`."""
        revived = {
            "alarms": tuple(Alarm(*alarm) for alarm in state["alarms"]),
            "vitals": None if state["vitals"] is None else CollapseStats(**state["vitals"]),
            "measurements": {name: _from_state(m) for name, m in state["measurements"].items()},
        }
        return cls(**{**state, **revived})

    def alarm_input(self) -> AlarmInput:
        """What :func:`repmetrics.decisions.alarms.alarms` needs of it."""
        return AlarmInput(self.step, self.measurements.get("rankme_centered"), self.collapse_stats, self.nonfinite)


def _from_state(state: Mapping[str, Any]) -> Measurement:
    found = {**state, "warnings": tuple(state["warnings"])}
    if state["value"] is None:
        found["value"] = math.nan
    found["details"] = {key: math.nan if value is None else value for key, value in state["details"].items()}
    if "replicates" in state:
        dealt = state["blocks"]
        no_rows = torch.empty(0, dtype=torch.int64)  # which row was where is not kept, only that all were
        found["replicates"] = tuple(state["replicates"])
        found["blocks"] = Blocks(no_rows, tuple(dealt["sizes"]), dealt["groups"], dealt["digest"])
    return Measurement(**found)


def append_jsonl(path: Path, record: Record) -> None:
    """Add a record to a file of one JSON object a line: a whole line, or, where the disk is full, none of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    before = path.stat().st_size if path.exists() else 0
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record.to_json(), allow_nan=False) + "\n")
    except OSError:
        os.truncate(path, before)
        raise


def truncate_after(path: Path, step: int) -> None:
    """Leave out what a killed run measured after the checkpoint from which it goes on: it will be measured again."""
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
    if len(kept) < len(lines):
        beside = path.with_name(f"{path.name}.part")
        beside.write_text("".join(kept), encoding="utf-8")
        beside.replace(path)


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of ``measurements.jsonl``, the last one where a resumed run measured a step again."""
    latest = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        latest[entry["step"]] = entry
    yield from (latest[step] for step in sorted(latest))
