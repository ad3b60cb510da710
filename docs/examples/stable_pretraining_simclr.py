"""stable-pretraining's Module with the monitor: no validation loader, EarlyStopping on every rank.

It needs an environment with that package (benchmarks/peers/install.py makes one):

    build/peers/bin/python docs/examples/stable_pretraining_simclr.py runs/spt [devices]
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from repmetrics import RepresentationMonitor


class Images(Dataset[dict[str, Tensor]]):
    """Replace by your data."""

    def __init__(self, size: int, seed: int) -> None:
        self.images = torch.randn(size, 3, 8, 8, generator=torch.Generator().manual_seed(seed))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"image": self.images[index]}


def forward(self: Any, batch: dict[str, Tensor], stage: str) -> dict[str, Tensor]:
    views = [self.projector(self.backbone(batch["image"] + 0.1 * torch.randn_like(batch["image"]))) for _ in range(2)]
    return {"loss": self.simclr_loss(*views)}


def main(root: Path, devices: int = 1, epochs: int = 3) -> RepresentationMonitor:
    import stable_pretraining as spt

    module = spt.Module(
        forward=forward,
        backbone=nn.Sequential(nn.Flatten(), nn.Linear(192, 64), nn.ReLU(), nn.Linear(64, 32)),
        projector=nn.Linear(32, 16),
        simclr_loss=spt.losses.NTXEntLoss(temperature=0.5),
        optim={"optimizer": {"type": "AdamW", "lr": 1e-3}, "scheduler": {"type": "ConstantLR"}},
    )
    monitor = RepresentationMonitor(Images(130, seed=1), encoder="backbone")
    trainer = Trainer(
        default_root_dir=root,
        max_epochs=epochs,
        accelerator="cpu",
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        log_every_n_steps=1,
        enable_progress_bar=False,
        callbacks=[
            monitor,
            EarlyStopping("repmetrics/rankme", mode="max", patience=2),
            ModelCheckpoint(root / "kept", monitor="repmetrics/rankme", mode="max"),
        ],
    )
    trainer.fit(module, DataLoader(Images(128, seed=0), 32, shuffle=True))
    print(f"rank {trainer.global_rank}: RankMe {float(trainer.callback_metrics['repmetrics/rankme']):.6f}")
    return monitor


if __name__ == "__main__":
    main(Path(sys.argv[1]), devices=int(sys.argv[2]) if len(sys.argv) > 2 else 1)
