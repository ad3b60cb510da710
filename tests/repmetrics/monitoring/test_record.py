"""Files of records: complete lines, repeated steps, and log keys."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from repmetrics.measurement.measure import measure
from repmetrics.monitoring.record import Record, append_jsonl, parse_lines, read_jsonl, scalars
from repmetrics.monitoring.sink import send


def test_the_last_entry_of_a_step_counts_and_an_incomplete_line_does_not(tmp_path: Path) -> None:
    path = tmp_path / "new" / "measurements.jsonl"
    for step, seconds in ((0, 1.0), (6, 2.0), (3, 3.0), (6, 4.0)):
        append_jsonl(path, Record(step, 0, seconds))
    with path.open("a") as file:
        file.write('{"step": 9')
    assert [(entry["step"], entry["seconds"]) for entry in read_jsonl(path)] == [(0, 1.0), (3, 3.0), (6, 4.0)]
    assert parse_lines(b'{"step": 9') == []


def test_a_record_survives_its_state_and_logs_every_number_under_one_key() -> None:
    x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    record = Record(3, 1, 0.5, measure(x, groups=[i // 4 for i in range(64)]), loss=2.0)
    restored = Record.from_state(json.loads(json.dumps(record.to_state())))
    assert restored == record
    assert restored.measurements["rankme"].replicates == record.measurements["rankme"].replicates
    m = record.measurements["odcorr"]
    assert m.standard_error is not None
    assert m.margin is not None
    logged = scalars({"odcorr": m}, prefix="p")
    assert logged == {
        "p/odcorr": m.value,
        "p/odcorr_null": m.details["null_floor"],
        "p/odcorr_se": m.standard_error,
        "p/odcorr_lower": max(m.value - m.margin, 0.0),
        "p/odcorr_upper": min(m.value + m.margin, 1.0),
    }
    assert logged.items() <= record.scalars(prefix="p").items()


def test_wandb_gets_the_step_as_a_value() -> None:
    """wandb.log drops values whose step is below its own count of calls."""
    calls: list[tuple[dict[str, float], int | None]] = []

    def log(data: dict[str, float], step: int | None = None) -> None:
        calls.append((data, step))

    send(log, Record(5, 0, 0.5), prefix="r")
    log.__module__ = "wandb.sdk.wandb_run"
    send(log, Record(5, 0, 0.5), prefix="r")
    assert [step for _, step in calls] == [5, None]
    assert [data.get("r/step") for data, _ in calls] == [None, 5]
