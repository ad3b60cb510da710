"""A timm encoder in a plain PyTorch loop, without Lightning.

python docs/examples/own_loop.py runs/own
"""

from __future__ import annotations

import sys
from pathlib import Path

import timm
import torch
from torch.utils.data import DataLoader
from torchvision.datasets import FakeData
from torchvision.transforms import v2

from repmetrics import Monitor
from repmetrics.monitoring.record import append_jsonl


def main(root: Path, steps: int = 12) -> Monitor:
    to_tensor = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
    train = DataLoader(FakeData(192, (3, 32, 32), transform=to_tensor), 16, shuffle=True)  # replace by your data
    held_out = DataLoader(FakeData(128, (3, 32, 32), transform=to_tensor, random_offset=1000), 64)

    encoder = timm.create_model("vit_tiny_patch16_224", num_classes=0, depth=2, img_size=32)
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=1e-3)
    monitor = Monitor(layers=["blocks.0"], pool="cls")
    for step, (images, _) in zip(range(steps), train, strict=False):
        if step % 4 == 0:
            record = monitor.measure(encoder, held_out, step=step)
            append_jsonl(root / "measurements.jsonl", record)
            rank = record.measurements["rankme"]
            print(f"step {step}: RankMe {rank.value:.2f} of {rank.d}, {record.seconds:.2f} s")
            for alarm in record.alarms:
                print(f"  {alarm.kind}: {alarm.reason}")
        noisy = images + 0.1 * torch.randn_like(images)
        loss = torch.nn.functional.mse_loss(encoder(noisy), encoder(images).detach())  # collapses; replace by your loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return monitor


if __name__ == "__main__":
    main(Path(sys.argv[1]))
