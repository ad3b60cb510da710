"""Screenshots of the board at three stages of a run: its loss loses its negatives after 160 steps.

    python docs/board_stages.py docs/images

Images and losses are those of docs/gallery.py. Some three minutes on a core.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

import lightning as L
import torch
from gallery import BATCH, WIDTH, attraction, contrastive, draw, normalize, view
from lightning.pytorch.loggers import TensorBoardLogger
from screenshot import BROWSERS, board_picture
from torch import Tensor, nn
from torch.utils.data import DataLoader

from repmetrics import RepresentationMonitor

HEALTHY_STEPS = 160
STAGES = {"healthy": 160, "collapsing": 240, "collapsed": 640}


class SimCLR(L.LightningModule):
    """SimCLR without a projector; from `HEALTHY_STEPS` on, views attract each other, and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        layers = [nn.Conv2d(3, 32, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, stride=2, padding=1)]
        self.backbone = nn.Sequential(*layers, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, WIDTH))

    def training_step(self, images: Tensor, index: int) -> Tensor:
        loss = contrastive if self.global_step < HEALTHY_STEPS else attraction
        return loss(*(self.backbone(normalize(view(images, jitter=0.6))) for _ in range(2)))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def train(folder: Path, *, steps: int) -> None:
    L.seed_everything(0)
    images, labels, slides = draw(16, 32, seed=2)
    images = normalize(images)
    held_out = [
        {"image": image, "label": int(label), "group": f"slide {slide}"}
        for image, label, slide in zip(images, labels, slides, strict=True)
    ]
    monitor = RepresentationMonitor(DataLoader(held_out, 64), encoder="backbone", every_n_steps=20)
    trainer = L.Trainer(
        max_steps=steps, accelerator="cpu", callbacks=[monitor], enable_checkpointing=False, log_every_n_steps=10,
        logger=TensorBoardLogger(folder.parent, name="", version=folder.name),
    )  # fmt: skip
    trainer.fit(SimCLR(), DataLoader(draw(64, 32, seed=1)[0], BATCH, shuffle=True))


def main(pictures: Path) -> None:
    browser = next(filter(shutil.which, BROWSERS))
    with tempfile.TemporaryDirectory() as folder:
        for stage, steps in STAGES.items():
            train(Path(folder, stage), steps=steps)
            board_picture(Path(folder, stage), pictures / f"board-{stage}.png", browser=browser, height_px=1150)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
