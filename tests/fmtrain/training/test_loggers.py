"""Logs of a resumed run continue those of the run: same id, no gap, nothing deleted."""

from __future__ import annotations

import csv
import json
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest
from fit_runs import SMALL, call
from small_runs import LIGHTNING_NOISE

pytestmark = [
    *(pytest.mark.filterwarnings(line) for line in LIGHTNING_NOISE),
    pytest.mark.filterwarnings("ignore:.*args parameter is intended to run.*"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of the loggers
    pytest.mark.filterwarnings("ignore:Experiment logs directory .* exists"),
]
STEPS = [1, 2, 3, 4, 5, 6]


def run_killed_after_step_4(
    manifest: Path, folder: Path, *loggers: str, between: Callable[[], object] = lambda: None
) -> Path:
    """Run six steps, forget what followed the checkpoint of step 2, and resume."""
    (folder / "small.yaml").write_text(SMALL)
    (folder / "loggers.yaml").write_text(f"trainer: {{logger: [{', '.join(loggers)}]}}")
    arguments = [
        *["fit", "--config", folder / "small.yaml", "--config", folder / "loggers.yaml", "--data.manifest", manifest],
        *["--out", folder / "run", "--trainer.log_every_n_steps", 1, "--checkpoint.save_top_k", -1],
    ]
    assert call(*arguments) == 0
    between()
    for path in (folder / "run" / "checkpoints").glob("*.ckpt"):
        if path.name != "step-00000002.ckpt":
            path.unlink()
    assert call(*arguments, "--resume") == 0
    return folder / "run"


def csv_logger(folder: Path) -> str:
    return json.dumps({"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": str(folder)}})


def test_csv_rows_continue_in_the_same_file(manifest: Path, tmp_path: Path) -> None:
    out = run_killed_after_step_4(manifest, tmp_path, csv_logger(tmp_path / "logs"))
    (file,) = (tmp_path / "logs").rglob("metrics.csv")
    with file.open(newline="") as text:
        rows = list(csv.DictReader(text))
    assert [int(row["step"]) for row in rows if row["train/loss"]] == STEPS
    assert [int(row["step"]) for row in rows if row["repmetrics/rankme"]] == [0, 2, 3, 6]  # 2: the resumed run's first
    assert (out / "config.yaml").is_file()
    assert "version: null" in (out / "config.yaml").read_text()  # usable for another run


def test_tensorboard_beside_another_logger_continues(manifest: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = {
        "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
        "init_args": {"save_dir": str(tmp_path / "b")},
    }
    run_killed_after_step_4(manifest, tmp_path, json.dumps(board), csv_logger(tmp_path / "logs"))
    (folder,) = {path.parent for path in (tmp_path / "b").rglob("events.out.tfevents.*")}
    events = EventAccumulator(str(folder))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == STEPS


def test_mlflow_keeps_its_run(manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    monkeypatch.chdir(tmp_path)
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    logger = {"class_path": "lightning.pytorch.loggers.MLFlowLogger", "init_args": {"tracking_uri": uri}}
    run_killed_after_step_4(manifest, tmp_path, json.dumps(logger))
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        runs = database.execute("select run_uuid from runs").fetchall()
        values = database.execute("select distinct step, value from metrics where key = 'train/loss'").fetchall()
    assert len(runs) == 1
    assert sorted(step for step, _ in values) == STEPS  # distinct: repeated steps have equal values


def test_wandb_offline_keeps_its_run(manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    init = {"save_dir": str(tmp_path), "offline": True, "project": "p"}
    logger = {"class_path": "lightning.pytorch.loggers.WandbLogger", "init_args": init}
    run_killed_after_step_4(manifest, tmp_path, json.dumps(logger), between=wandb.finish)
    wandb.finish()
    files = list((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(files) == 2, "one file per process, which `wandb sync` merges"
    assert len({path.name for path in files}) == 1, "one run id"
