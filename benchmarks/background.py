"""Wall time of a run with evaluations between steps, with evaluations in the background, and without any.

    [OMP_NUM_THREADS=2] python benchmarks/background.py [--repeats 5] [--steps 200] [--every 25] [--out FILE]

A multilayer perceptron of 384 features trains on the CPU with one thread, or as many as the environment says. The
monitor measures 4,096 held-out rows in 64 groups of 4 classes every --every steps, much more often than by default.
The three take turns; ratios are taken within a round.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported
os.environ["OPENBLAS_NUM_THREADS"] = os.environ["OMP_NUM_THREADS"]

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from metrics import machine
from torch import Tensor, nn
from torch.utils.data import DataLoader

from repmetrics.atomic_write import write_text
from repmetrics.callbacks.representation_monitor import RepresentationMonitor
from repmetrics.measurement.registry import DEFAULT_METRICS

N, D, GROUPS, CLASSES, BATCH = 4096, 384, 64, 4, 512


class Autoencoder(LightningModule):
    """Encoder and decoder of rows."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Sequential(
            nn.Linear(D, 2048), nn.GELU(), nn.Linear(2048, 2048), nn.GELU(), nn.Linear(2048, D)
        )
        self.decoder = nn.Linear(D, D)

    def forward(self, rows: Tensor) -> Tensor:
        features: Tensor = self.encoder(rows)
        return features

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return (self.decoder(self(batch)) - batch).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


def held_out() -> list[dict[str, Any]]:
    rows = torch.randn(N, D, generator=torch.Generator().manual_seed(1))
    labels = (torch.arange(N) % CLASSES).tolist()
    return [
        {"image": rows[i : i + BATCH], "label": labels[i : i + BATCH],
         "group": [f"slide {j * GROUPS // N}" for j in range(i, i + BATCH)]}
        for i in range(0, N, BATCH)
    ]  # fmt: skip


def fit(monitor: RepresentationMonitor | None, *, steps: int, folder: str) -> tuple[float, Tensor]:
    """Seconds of a run, from its first step to its last, and its weights."""
    seconds = Stopwatch()
    trainer = Trainer(
        max_steps=steps, max_epochs=-1, accelerator="cpu", default_root_dir=folder, enable_checkpointing=False,
        logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[*([] if monitor is None else [monitor]), seconds],
    )  # fmt: skip
    module = Autoencoder()
    rows = torch.randn(64 * BATCH, D, generator=torch.Generator().manual_seed(2))
    trainer.fit(module, DataLoader(rows, batch_size=BATCH))  # type: ignore[arg-type]
    return seconds.end - seconds.start, torch.cat([p.detach().flatten() for p in module.parameters()])


class Stopwatch(Callback):
    """Times of the first step's begin and of the last step's end, after the monitor's work at it."""

    start = end = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.start = time.perf_counter()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.end = time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--every", type=int, default=25)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "background.json")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    data = held_out()
    rounds: list[dict[str, float]] = []
    for _ in range(options.repeats + 1):
        rounds.append({})
        weights = []
        for name in ("none", "between steps", "background"):
            monitor = None
            if name != "none":
                monitor = RepresentationMonitor(
                    data, metrics=DEFAULT_METRICS, every_n_steps=options.every, pictures=False, jsonl=False,
                    background=name == "background",
                )  # fmt: skip
            with tempfile.TemporaryDirectory() as folder:
                rounds[-1][name], final = fit(monitor, steps=options.steps, folder=folder)
            weights.append(final)
        assert all(torch.equal(weights[0], each) for each in weights[1:])
    share = {name: [each[name] / each["none"] - 1 for each in rounds[1:]] for name in ("between steps", "background")}
    result = {
        "machine": machine(), "threads": torch.get_num_threads(), "steps": options.steps, "every": options.every,
        "seconds without evaluations": statistics.median(each["none"] for each in rounds[1:]),
        "added share of the time": {
            name: {"median": statistics.median(values), "low": min(values), "high": max(values)}
            for name, values in share.items()
        },
        "background over between steps": statistics.median(
            b / a for a, b in zip(share["between steps"], share["background"], strict=True)
        ),
        "weights identical": True,
    }  # fmt: skip
    write_text(options.out, json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
