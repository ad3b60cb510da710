"""Run by test_representation_monitor_ddp.py on each rank, which writes its results to `out`."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from small_runs import HeldOutImages, fit, loader, simclr
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, IterableDataset

from repmetrics.callbacks.early_stopping import RepresentationEarlyStopping
from repmetrics.callbacks.model_checkpoint import LocalMaximaCheckpoint
from repmetrics.callbacks.representation_monitor import RepresentationMonitor
from repmetrics.monitoring.monitor import Monitor

METRICS = ["rankme", "odcorr", "view_retrieval"]


def make_module(mode: str) -> Any:
    module = simclr(collapse=True, lr=0.1)
    if mode == "compiled":
        module.backbone.compile(backend="eager")
    return module


def fit_monitored(out: Path, mode: str) -> None:
    """Train with and without a monitor, and write rank<r>.json."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    options = {"devices": 2, "strategy": "ddp_find_unused_parameters_true", "logger": False, "max_epochs": 12}
    options |= {"val": loader(32, shuffle=False) if mode == "validation" else None}
    watch: dict[str, Any] = {"layers": ["backbone.1", "backbone.3"]} if mode == "compiled" else {}
    watch |= {"every_n_steps": 2} if mode == "steps" else {}
    monitor = RepresentationMonitor(HeldOutImages(33), batch_size=4, metrics=METRICS, **watch)
    keys = [*Monitor(batch_size=4, metrics=METRICS).measure(simclr(), HeldOutImages(33)).scalars(), "repmetrics/loss"]
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


def fit_in_background(out: Path) -> None:
    """Train with evaluations between steps and in the background, and compare weights and records on each rank."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    options: dict[str, Any] = {"devices": 2, "strategy": "ddp_find_unused_parameters_true", "logger": False}
    options |= {"val": None, "max_epochs": 2}
    weights, records = [], []
    for background in (False, True):
        module = simclr()
        monitor = RepresentationMonitor(HeldOutImages(33), every_n_steps=2, metrics=METRICS, background=background)
        fit(out / str(background), module, monitor, **options)
        weights.append(module.state_dict())
        states = [record.to_state() for record in monitor.history]
        records.append([{k: v for k, v in state.items() if k not in ("seconds", "run")} for state in states])
    report = {
        "identical": all(torch.equal(value, weights[1][name]) for name, value in weights[0].items()),
        "equal": json.dumps(records[0]) == json.dumps(records[1]),
        "steps": [record["step"] for record in records[1]],
    }
    (out / f"rank{os.environ['RANK']}.json").write_text(json.dumps(report))


class Share(IterableDataset[torch.Tensor]):
    """Rows of this rank, by its own choice."""

    def __iter__(self) -> Iterator[torch.Tensor]:
        rows = torch.randn(12, 5, generator=torch.Generator().manual_seed(0))
        return iter(rows[dist.get_rank() :: 2])


def measure_uneven(out: Path) -> None:
    """Measure fewer batches than ranks, a data set that shares its rows, and a batch that one rank cannot read."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo")
    encoder = torch.nn.Flatten()
    images = torch.arange(24.0).reshape(4, 3, 1, 2).sin()
    counts = [
        Monitor(metrics=["rankme"]).measure(encoder, data).measurements["rankme"].n
        for data in ([images], DataLoader(Share(), 2))
    ]
    try:
        Monitor(metrics=["rankme"]).measure(encoder, [images, {}])
    except Exception as error:
        report = {"n": counts, "error": f"{type(error).__name__} {error}"}
        (out / f"rank{dist.get_rank()}.json").write_text(json.dumps(report))
    dist.destroy_process_group()


def make_encoder() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.Linear(8, 6))


def measure_sharded(out: Path) -> None:
    """Measure and train a module whose parameters FSDP2 shards, and its equal."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo")
    whole, sharded = make_encoder(), make_encoder()
    mesh = init_device_mesh("cpu", (2,))
    for part in (sharded[1], sharded):
        fully_shard(part, mesh=mesh)
    batches = [torch.randn(8, 3, 2, 2, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    options: dict[str, Any] = {"metrics": ["rankme", "alignment"], "views": 2, "augmentation": torch.relu}
    report: dict[str, Any] = {}
    for name, encoder in (("whole", whole), ("sharded", sharded)):
        monitor, report[name] = Monitor(layers=["1"], **options), []
        for step in range(2):
            record = monitor.measure(encoder, batches, step=step)
            report[name].append({key: m.value for key, m in record.measurements.items()})
            encoder(batches[0]).square().mean().backward()
            torch.optim.SGD(encoder.parameters(), 0.1).step()
            encoder.zero_grad()
    pairs = zip(whole.parameters(), sharded.parameters(), strict=True)
    report["identical"] = all(torch.equal(a, cast("DTensor", b).full_tensor()) for a, b in pairs)
    try:
        Monitor(metrics=["rankme"]).measure(sharded, batches, path="1")
    except ValueError as error:
        report["error"] = str(error)
    (out / f"rank{dist.get_rank()}.json").write_text(json.dumps(report))
    dist.destroy_process_group()
