"""A healthy SimCLR whose RankMe falls before it rises: stock EarlyStopping ends it, our rule does not."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping
from small_runs import LIGHTNING_NOISE, HeldOutImages, fit, simclr, trainer
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from repmetrics.callbacks.early_stopping import RepresentationEarlyStopping
from repmetrics.callbacks.key_readers import KeyReader, describe_wrong_modes
from repmetrics.callbacks.representation_monitor import RepresentationMonitor

pytestmark = [pytest.mark.filterwarnings(line) for line in LIGHTNING_NOISE]
STEPS, PER_EPOCH = 640, 16


def clusters(size: int, *, seed: int) -> TensorDataset:
    """Eight clusters with noise of 0.3 in 48 dimensions, which a linear probe tells apart without error."""
    prototypes = torch.randn(8, 48, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(size) % 8
    noise = torch.randn(size, 48, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(prototypes[labels] + 0.3 * noise, labels)


class SimCLR(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Sequential(nn.Linear(48, 64), nn.ReLU(), nn.Linear(64, 32))
        self.head = nn.Linear(32, 16)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        views = [self.head(self.backbone(batch[0] + 0.5 * torch.randn_like(batch[0]))) for _ in range(2)]
        z = nn.functional.normalize(torch.cat(views), dim=1)
        logits = (z @ z.T / 0.07).fill_diagonal_(-torch.inf)
        return nn.functional.cross_entropy(logits, torch.arange(len(z)).roll(len(z) // 2))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)

        def rate(step: int) -> float:
            return min(1.0, (step + 1) / 128) * (1 + math.cos(math.pi * step / STEPS)) / 2

        return [optimizer], [{"scheduler": LambdaLR(optimizer, rate), "interval": "step"}]


def run(root: Path, stopping: Any) -> tuple[int, RepresentationMonitor]:
    data = clusters(256, seed=2)
    pl.seed_everything(0, verbose=False)
    batches = DataLoader(data, 48, sampler=RandomSampler(data, num_samples=48 * PER_EPOCH), drop_last=True)
    monitor = RepresentationMonitor(clusters(256, seed=3), encoder="backbone", jsonl=False, on_alarm="log")
    done = trainer(root, callbacks=[monitor, stopping], max_epochs=STEPS // PER_EPOCH, logger=False,
                   enable_checkpointing=False)  # fmt: skip
    done.fit(SimCLR(), batches)
    return done.global_step, monitor


@pytest.mark.slow
def test_the_stock_callback_ends_it_and_our_rule_does_not(tmp_path: Path) -> None:
    stopped, _ = run(tmp_path, EarlyStopping("repmetrics/rankme", mode="max", patience=5))
    assert stopped < STEPS // 3
    ours = RepresentationEarlyStopping("rankme", patience=5)
    reached, monitor = run(tmp_path, ours)
    assert (reached, ours.stopped_step) == (STEPS, None)
    ranks = [record.measurements["rankme"].value for record in monitor.history]
    lowest = min(range(len(ranks)), key=ranks.__getitem__)
    assert 1 < lowest < 20
    assert ranks[-1] > 1.05 * ranks[lowest]
    assert monitor.history[-1].measurements["linear_probe"].value == 1.0


# ── modes that contradict a metric ──────────────────────────────────────────────────────────────────────────────────


def test_a_mode_that_contradicts_the_metric_is_named(tmp_path: Path) -> None:
    stopping = EarlyStopping("repmetrics/rankme", patience=9)
    message = "EarlyStopping reads 'repmetrics/rankme' with mode='min', but higher is better: give mode='max'"
    with pytest.warns(UserWarning, match=message):
        fit(tmp_path, simclr(), RepresentationMonitor(HeldOutImages()), stopping, max_epochs=1)


def test_right_modes_are_not_named(tmp_path: Path) -> None:
    class Scheduled(type(simclr())):  # type: ignore[misc]
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), 0.01)
            scheduler = ReduceLROnPlateau(optimizer, mode="max")
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "repmetrics/rankme"}}

    stops = [EarlyStopping("repmetrics/odcorr", patience=9), EarlyStopping("repmetrics/loss", patience=9)]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*mode=.*")
        fit(tmp_path, Scheduled(), RepresentationMonitor(HeldOutImages()), *stops, max_epochs=1, logger=False)


@pytest.mark.parametrize(
    ("mode", "direction", "named"),
    [("min", "higher", True), ("max", "lower", True), ("max", "higher", False), ("min", "lower", False),
     ("min", "neither", True), ("auto", "higher", False), (None, "higher", False), ("min", None, False)],
)  # fmt: skip
def test_every_mode_with_every_direction(mode: Any, direction: Any, named: bool) -> None:
    reader = KeyReader("Stop", "key", mode=mode)
    assert bool(describe_wrong_modes([reader], {} if direction is None else {"key": direction})) == named
