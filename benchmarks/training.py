"""How fast views are cut, beside lightly's DINOTransform, and how much the trainer adds to a bare loop.

    python benchmarks/training.py [--repeats 5] [--out benchmarks/results/training.json]

Counted per CPU-second on one core, so that a busy machine changes little; contenders take turns, ratios are taken
within each turn, and their median and range reported.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import torch
from lightly.transforms.dino_transform import DINOTransform
from lightning.pytorch import Trainer
from PIL import Image
from torch import Tensor
from torch.optim import AdamW
from torch.utils.data import DataLoader

from fmtrain.methods.dino import DINO
from fmtrain.methods.multicrop import MultiCrop
from fmtrain.methods.optim import update_teacher_
from fmtrain.methods.schedules import Schedules

BATCH, STEPS = 16, 12
TARGETS = {"views / lightly": 5.0, "views / lightly, memory kept": 5.0, "trainer / bare loop": 0.95}
# glibc gives freed memory back to the system when views are done, and a quarter of the time of cutting the next ones
# goes into page faults. Beside larger blocks that come and go, or told so, it keeps the memory.
KEEP_MEMORY = {"MALLOC_TRIM_THRESHOLD_": str(2**31), "MALLOC_MMAP_THRESHOLD_": str(2**31)}


def cpu_seconds(run: Callable[[], Any]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def augmentation(repeats: int) -> dict[str, list[float]]:
    """Images a CPU-second through 2 × 224 and 8 × 96, with the published colour jitter and blur."""
    patches = torch.randint(0, 256, (BATCH, 3, 256, 256), dtype=torch.uint8)
    images = [Image.fromarray(patch.permute(1, 2, 0).numpy()) for patch in patches]
    crops, transform = MultiCrop(stain_jitter=0.0), DINOTransform()
    ours, lightlys = lambda: crops(patches, step=0), lambda: [transform(image) for image in images]
    ours(), lightlys()
    found: dict[str, list[float]] = {"fmtrain": [], "lightly": []}
    for _ in range(repeats):
        found["fmtrain"].append(BATCH / cpu_seconds(ours))
        found["lightly"].append(BATCH / cpu_seconds(lightlys))
    return found


def augmentation_with_memory_kept(repeats: int) -> dict[str, list[float]]:
    """The same for both in a process whose malloc keeps what is freed."""
    command = [sys.executable, __file__, "--views", "--repeats", str(repeats)]
    found = subprocess.run(command, env=os.environ | KEEP_MEMORY, stdout=subprocess.PIPE, check=True)
    values: dict[str, list[float]] = json.loads(found.stdout)
    return {f"{name}, memory kept": value for name, value in values.items()}


def make_model() -> DINO:
    torch.manual_seed(0)
    arch_kwargs = {"img_size": 96, "patch_size": 16, "depth": 6}
    crops = MultiCrop(global_crops_size=96, local_crops_size=48, local_crops_number=4)
    return DINO(
        arch="vit_tiny_patch16_224", arch_kwargs=arch_kwargs, augment=crops, n_prototypes=4096, hidden_dim=512,
        schedules=Schedules(lr_warmup_steps=2, freeze_last_layer_steps=0), drop_path_rate=0.0,
    )  # fmt: skip


def bare_loop(views: list[Tensor]) -> None:
    """The same networks, loss, optimizer and average on tensors that are there already: nothing but arithmetic."""
    model = make_model()
    optimizer = AdamW([p for p in model.student.parameters() if p.requires_grad], lr=1e-4, fused=True)
    for _ in range(STEPS):
        with torch.no_grad():
            targets = model.teacher(views[0]).unflatten(0, (2, BATCH))
        outputs = [view for crop in views for view in model.student(crop).unflatten(0, (-1, BATCH))]
        loss = model.criterion(list(targets), outputs, teacher_temp=0.04)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        update_teacher_(model.teacher, model.student, momentum=0.996)


def trainer(batches: Tensor, folder: str) -> None:
    """`fmtrain`'s module in Lightning's Trainer on patches in memory: views, schedules, clipping, logging and all."""
    lightning = Trainer(
        max_steps=STEPS, max_epochs=-1, accelerator="cpu", default_root_dir=folder, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=10,
    )  # fmt: skip
    lightning.fit(make_model(), DataLoader(batches, batch_size=BATCH))  # type: ignore[arg-type]


def training(repeats: int) -> dict[str, list[float]]:
    """Images a CPU-second."""
    views = [torch.randn(2 * BATCH, 3, 96, 96), torch.randn(4 * BATCH, 3, 48, 48)]
    batches = torch.randint(0, 256, (STEPS * BATCH, 3, 128, 128), dtype=torch.uint8)
    found: dict[str, list[float]] = {"trainer": [], "bare loop": []}
    with tempfile.TemporaryDirectory() as folder:
        trainer(batches, folder), bare_loop(views)
        for _ in range(repeats):
            found["trainer"].append(STEPS * BATCH / cpu_seconds(lambda: trainer(batches, folder)))
            found["bare loop"].append(STEPS * BATCH / cpu_seconds(lambda: bare_loop(views)))
    return found


def summary(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "training.json")
    parser.add_argument("--views", action="store_true", help="measure only the views, and print every round")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    if arguments.views:
        print(json.dumps(augmentation(arguments.repeats)))
        return
    found = augmentation(arguments.repeats) | augmentation_with_memory_kept(arguments.repeats)
    found |= training(arguments.repeats)
    pairs = {
        "views / lightly": ("fmtrain", "lightly"),
        "views / lightly, memory kept": ("fmtrain, memory kept", "lightly, memory kept"),
        "trainer / bare loop": ("trainer", "bare loop"),
    }
    ratios = {
        name: [a / b for a, b in zip(found[ours], found[theirs], strict=True)] for name, (ours, theirs) in pairs.items()
    }
    report = {
        "hardware": {"processor": platform.machine(), "cores": os.cpu_count(), "threads": 1},
        "versions": {name: version(name) for name in ("torch", "lightning", "lightly", "timm")},
        "repeats": arguments.repeats,
        "images_per_cpu_second": {name: summary(values) for name, values in found.items()},
        "ratios": {name: summary(values) | {"target": TARGETS[name]} for name, values in ratios.items()},
    }
    arguments.out.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
