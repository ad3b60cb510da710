"""SimCLR as a plain LightningModule: RankMe stops the run and selects the checkpoint, without validation or labels.

python docs/examples/simclr.py runs/simclr
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset
from torchvision.datasets import FakeData
from torchvision.models import resnet18
from torchvision.transforms import v2

from repmetrics import RepresentationEarlyStopping, RepresentationMonitor

augment = v2.Compose([v2.RandomResizedCrop(32, (0.3, 1.0), antialias=True), v2.RandomHorizontalFlip()])


class SimCLR(LightningModule):
    def __init__(self, temperature: float = 0.5) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.backbone = resnet18(num_classes=64)
        self.projector = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32))
        self.temperature = temperature

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, _ = batch
        views = torch.cat([augment(images), augment(images)])
        z = F.normalize(self.projector(self.backbone(views)), dim=1)
        logits = (z @ z.T / self.temperature).fill_diagonal_(-torch.inf)
        return F.cross_entropy(logits, torch.arange(len(z), device=z.device).roll(len(images)))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def main(root: Path, epochs: int = 3) -> RepresentationMonitor:
    to_tensor = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
    images = FakeData(384, (3, 32, 32), transform=to_tensor)  # replace by your data
    monitor = RepresentationMonitor(Subset(images, range(256, 384)), encoder="backbone")
    trainer = Trainer(
        default_root_dir=root,
        max_epochs=epochs,
        accelerator="auto",
        log_every_n_steps=1,
        callbacks=[
            monitor,
            RepresentationEarlyStopping("rankme", patience=5),
            ModelCheckpoint(monitor="repmetrics/rankme", mode="max", save_last=True),
        ],
    )
    trainer.fit(SimCLR(), DataLoader(Subset(images, range(256)), 64, shuffle=True))
    return monitor


if __name__ == "__main__":
    main(Path(sys.argv[1]))
