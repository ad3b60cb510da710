"""Run by test_representation_monitor_ddp.py under torchrun: `OUT MODE`; each rank writes OUT/rank<r>.json."""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from small_runs import HeldOutImages, fit, loader, simclr

from repmetrics.callbacks.early_stopping import RepresentationEarlyStopping
from repmetrics.callbacks.model_checkpoint import LocalMaximaCheckpoint
from repmetrics.callbacks.representation_monitor import RepresentationMonitor
from repmetrics.monitoring.monitor import Monitor


def make_module(mode: str) -> Any:
    module = simclr(collapse=True, lr=0.1)
    if mode == "compiled":
        module.backbone.compile(backend="eager")
    return module


def main(out: Path, *, mode: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    options = {"devices": 2, "strategy": "ddp_find_unused_parameters_true", "logger": False, "max_epochs": 12}
    options |= {"val": loader(32, shuffle=False) if mode == "validation" else None}
    watch: dict[str, Any] = {"layers": ["backbone.1", "backbone.3"]} if mode == "compiled" else {}
    watch |= {"every_n_steps": 2} if mode == "steps" else {}
    monitor = RepresentationMonitor(HeldOutImages(33), batch_size=4, **watch)
    keys = [*Monitor(batch_size=4).measure(simclr(), HeldOutImages(33)).scalars(), "repmetrics/loss"]
    stops = [EarlyStopping(key, patience=99) for key in keys]
    keeps = [ModelCheckpoint(out / f"every/{i}", monitor=key) for i, key in enumerate(keys)]
    stopping: Any = EarlyStopping("repmetrics/rankme", mode="max", patience=3)
    keeper: Any = ModelCheckpoint(out / "kept", monitor="repmetrics/rankme", mode="max", filename="{step}")
    if mode == "steps":
        stopping, keeper = (
            RepresentationEarlyStopping("rankme", patience=3),
            LocalMaximaCheckpoint(out / "kept", metric="rankme"),
        )
    watched = make_module(mode)
    run = fit(out, watched, stopping, *stops, monitor, keeper, *keeps, **options)
    report = {
        "history": [record.to_json() for record in monitor.history],
        "stopped": stopping.stopped_step if mode == "steps" else stopping.stopped_epoch,
        "epochs": run.current_epoch,
        "best": str(list(keeper.kept.values())[-1] if mode == "steps" else keeper.best_model_path),
        "every": {
            s.monitor: [float(s.best_score), float(k.best_model_score)] for s, k in zip(stops, keeps, strict=True)
        },
        "reported": {key: float(value) for key, value in run.callback_metrics.items() if key.startswith("repmetrics/")},
    }

    alone = make_module(mode)
    fit(out, alone, **options | {"max_steps": run.global_step, "enable_checkpointing": False})
    on, off = watched.state_dict(), alone.state_dict()
    report["identical"] = all(torch.equal(on[key], off[key]) for key in on)
    (out / f"rank{os.environ['RANK']}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]), mode=sys.argv[2])
