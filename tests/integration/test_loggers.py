"""TensorBoard, CSV, W&B offline and MLflow on SQLite in one trainer, through a resume."""

from __future__ import annotations

import csv
import json
import struct
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger
from small_runs import HeldOutImages, loader, simclr, trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from repmetrics.callbacks.remote_loggers import leaves_machine
from repmetrics.callbacks.representation_monitor import RepresentationMonitor
from repmetrics.tensorboard.sheets import contact_sheet

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # the loggers' packages warn
Scalars = dict[str, dict[int, float]]


def of_tensorboard(root: Path) -> Scalars:
    events = EventAccumulator(str(root))
    events.Reload()
    tags = [tag for tag in events.Tags()["scalars"] if tag.startswith("repmetrics/")]
    return {tag: {point.step: point.value for point in events.Scalars(tag)} for tag in tags}


def of_csv(root: Path) -> Scalars:
    values: Scalars = defaultdict(dict)
    for file in sorted(root.rglob("metrics.csv")):
        with file.open() as rows:
            for row in csv.DictReader(rows):
                for key, value in row.items():
                    if key.startswith("repmetrics/") and value:
                        values[key][int(row["step"])] = float(value)
    return dict(values)


def log_records(content: bytes) -> Iterator[bytes]:
    """Records of a file in LevelDB's log format, as W&B writes offline runs: 7 bytes, then blocks of 32 KiB."""
    position, parts = 7, b""
    while position + 7 <= len(content):
        if (left := 32768 - position % 32768) < 7:
            position += left
            continue
        length, kind = struct.unpack_from("<HB", content, position + 4)  # after a checksum
        parts += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


def read_wandb(file: Path, *, seconds: float = 120) -> list[Any]:
    """All records of an offline run, once W&B's own process has written the last one."""
    from wandb.proto.wandb_internal_pb2 import Record

    end = time.monotonic() + seconds
    while True:
        records = []
        for data in log_records(file.read_bytes()):
            record = Record()
            record.ParseFromString(data)
            records.append(record)
        if any(record.WhichOneof("record_type") == "exit" for record in records):
            return records
        if time.monotonic() > end:
            raise TimeoutError(f"{file} has no end after {seconds} s")
        time.sleep(0.1)


def of_wandb(root: Path) -> tuple[Scalars, dict[str, set[int]]]:
    """Numbers and media by key and step, from the files of offline runs."""
    values: Scalars = defaultdict(dict)
    media: dict[str, set[int]] = defaultdict(set)
    for file in sorted(root.rglob("*.wandb")):
        for record in read_wandb(file):
            items = {tuple([i.key] if i.key else i.nested_key): json.loads(i.value_json) for i in record.history.item}
            step = items.get(("trainer/global_step",))
            for (key, *field), value in items.items():
                if key.startswith("repmetrics/") and (field or isinstance(value, dict)):
                    media[key].add(step)
                elif key.startswith("repmetrics/"):
                    values[key][step] = value
    return dict(values), dict(media)


def of_mlflow(logger: Any) -> Scalars:
    keys = [key for key in logger.experiment.get_run(logger.run_id).data.metrics if key.startswith("repmetrics/")]
    history = {key: logger.experiment.get_metric_history(logger.run_id, key) for key in keys}
    return {key: {point.step: point.value for point in points} for key, points in history.items()}


def test_all_loggers_get_the_same_keys_at_the_same_steps_through_a_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb", reason="wandb is not installed: pip install wandb")
    pytest.importorskip("mlflow", reason="mlflow is not installed: pip install mlflow-skinny")
    for name, value in {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "MLFLOW_DISABLE_TELEMETRY": "true"}.items():
        monkeypatch.setenv(name, value)
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    run_id = None
    checkpoint = None
    for epochs in (2, 4):
        loggers = [
            TensorBoardLogger(tmp_path / "tb", name="", version=""),
            CSVLogger(tmp_path / "csv"),
            WandbLogger(project="ssl", save_dir=tmp_path / "wandb", offline=True, id="one", resume="allow"),
            MLFlowLogger("ssl", tracking_uri=uri, artifact_location=str(tmp_path / "artifacts"), run_id=run_id),
        ]
        (tmp_path / "wandb").mkdir(exist_ok=True)
        monitor = RepresentationMonitor(HeldOutImages(), projector=5, remote_images=epochs == 4)
        torch.manual_seed(0)
        run = trainer(tmp_path, logger=loggers, callbacks=[monitor], max_epochs=epochs)
        run.fit(simclr(), loader(), ckpt_path=checkpoint)
        checkpoint = run.checkpoint_callback.best_model_path
        run_id = loggers[3].run_id
        wandb.finish()  # the run in progress; the logger's own would begin another
        if epochs == 2:
            names = ("held_out", "neighbors", "map", "farthest", "tokens")
            folders = (tmp_path / "wandb", tmp_path / "artifacts")
            assert not [
                file for folder in folders for name in names for file in folder.rglob(f"*{name}*")
            ]  # no picture of a held-out image leaves without remote_images
    assert [record.step for record in monitor.history] == [0, 6, 12, 18, 24]
    shares = "repmetrics/overhead", "repmetrics/overhead_total"  # of time, which the first evaluation of a run lacks
    expected: Scalars = defaultdict(dict)
    for record in monitor.history:
        for key, value in record.scalars().items():
            expected[key][record.step] = value
    wandb_values, wandb_media = of_wandb(tmp_path / "wandb")
    logged = {
        "tensorboard": of_tensorboard(tmp_path / "tb"),
        "csv": of_csv(tmp_path / "csv"),
        "wandb": wandb_values,
        "mlflow": of_mlflow(loggers[3]),
    }
    for name, values in logged.items():
        for share in shares:
            values.pop(share)
        assert set(values) == set(expected), name
        for key, points in values.items():
            assert points == pytest.approx(expected[key], rel=1e-6), (name, key)  # event files hold float32
    summaries = {"repmetrics/card", "repmetrics/log10_singular_values", "repmetrics/spectrum_over_time"}
    assert all(wandb_media[key] == {0, 6, 12, 18, 24} for key in summaries)
    assert wandb_media["repmetrics/held_out"] == {24}
    names = {path.name for path in (tmp_path / "artifacts").rglob("*") if path.is_file()}
    assert {"card.md", "spectrum_over_time.png", "held_out.png", "neighbors.png", "map.png"} <= names
    assert wandb_media["repmetrics/neighbors"] == {18, 24}


def test_directories_that_are_uploaded() -> None:
    assert leaves_machine("s3://bucket/run")
    assert not leaves_machine("/data/run")


def test_a_contact_sheet_has_one_cell_per_image() -> None:
    images = torch.arange(2.0).repeat(3)[:5, None, None, None] * torch.eye(8).expand(5, 3, 8, 8)
    sheet = contact_sheet(images)
    assert sheet is not None
    cells = sheet.reshape(3, 2, 32, 3, 32).transpose(1, 3, 0, 2, 4).reshape(6, -1)
    assert [bool(cell.any()) for cell in cells] == [False, True, False, True, False, False]
    assert contact_sheet(torch.zeros(4, 12)) is None
