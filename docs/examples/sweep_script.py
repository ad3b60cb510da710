"""A training script for `fmtrain sweep` with `command`: plain Lightning and the monitor.

python docs/examples/sweep_script.py --out runs/one --lr 0.1
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from repmetrics import RepresentationMonitor


class SimCLR(LightningModule):
    def __init__(self, lr: float) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Flatten(), nn.Linear(192, 64), nn.ReLU(), nn.Linear(64, 32))
        self.projector = nn.Linear(32, 16)
        self.lr = lr

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        (images,) = batch
        views = torch.cat([images + 0.3 * torch.randn_like(images) for _ in range(2)])
        z = F.normalize(self.projector(self.backbone(views)), dim=1)
        logits = (z @ z.T / 0.5).fill_diagonal_(-torch.inf)
        return F.cross_entropy(logits, torch.arange(len(z), device=z.device).roll(len(images)))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def main(out: Path, *, lr: float, seed: int = 0, epochs: int = 4) -> None:
    images = torch.randn(384, 3, 8, 8, generator=torch.Generator().manual_seed(0))  # replace by your data
    samples = [{"image": image, "group": f"slide {i // 8}"} for i, image in enumerate(images[256:])]
    held_out = DataLoader(samples, 64)  # type: ignore[arg-type]  # a list is a dataset
    train = DataLoader(TensorDataset(images[:256]), 64, shuffle=True)
    module = SimCLR(lr)

    # The lines that a sweep needs
    seed_everything(seed)
    saved = sorted(out.glob("*.ckpt"), key=lambda file: file.stat().st_mtime)  # of a trial that was interrupted
    monitor = RepresentationMonitor(held_out, encoder="backbone", every_n_steps=8)  # writes measurements.jsonl
    saving = [ModelCheckpoint(out, every_n_train_steps=8), OnExceptionCheckpoint(out, "stopped")]
    trainer = Trainer(default_root_dir=out, logger=False, callbacks=[monitor, *saving], max_epochs=epochs)
    trainer.fit(module, train, ckpt_path=saved[-1] if saved else None)
    # End of these lines


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--lr", type=float, required=True)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    main(options.out, lr=options.lr, seed=options.seed)
