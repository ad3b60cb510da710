"""A training loop of Lightning Fabric; the values go to its loggers.

python docs/examples/fabric_loop.py runs/fabric
"""

from __future__ import annotations

import sys
from pathlib import Path

import timm
import torch
from lightning.fabric import Fabric
from lightning.fabric.loggers import CSVLogger
from torch.utils.data import DataLoader
from torchvision.datasets import FakeData
from torchvision.transforms import v2

from repmetrics import Monitor


def main(root: Path, steps: int = 12, devices: int = 1) -> Monitor:
    to_tensor = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
    train = DataLoader(FakeData(192, (3, 32, 32), transform=to_tensor), 16, shuffle=True)  # replace by your data
    held_out = DataLoader(FakeData(128, (3, 32, 32), transform=to_tensor, random_offset=1000), 64)

    fabric = Fabric(accelerator="cpu", devices=devices, loggers=CSVLogger(root))
    fabric.launch()
    encoder = timm.create_model("vit_tiny_patch16_224", num_classes=0, depth=2, img_size=32)
    encoder, optimizer = fabric.setup(encoder, torch.optim.AdamW(encoder.parameters(), lr=1e-4))
    train = fabric.setup_dataloaders(train)  # not the held-out data
    monitor = Monitor(sink=fabric.log_dict, layers=["blocks.0"], pool="cls")
    for step, (images, _) in zip(range(steps), train, strict=False):
        if step % 4 == 0:
            monitor.measure(encoder, held_out, step=step)  # on every process
        loss = (
            1
            - torch.nn.functional.cosine_similarity(
                encoder(images + 0.1 * torch.randn_like(images)), encoder(images).detach()
            ).mean()
        )  # replace by your loss
        optimizer.zero_grad()
        fabric.backward(loss)
        optimizer.step()
    for logger in fabric.loggers:
        logger.finalize("success")
    return monitor


if __name__ == "__main__":
    main(Path(sys.argv[1]))
