"""Speed of cutting views, compared with lightly's DINOTransform, and cost of the trainer, compared with a bare loop.

    python benchmarks/training.py [--repeats 5] [--out benchmarks/results/training.json]

Images per CPU-second on one core, which depends little on other load of the machine. The candidates alternate, ratios
are computed within each round, and their median and range are reported.
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
# glibc returns freed memory to the system after each batch of views; page faults then take a quarter of the time of the
# next batch. It keeps the memory if larger blocks are also allocated and freed, or with these variables.
KEEP_MEMORY = {"MALLOC_TRIM_THRESHOLD_": str(2**31), "MALLOC_MMAP_THRESHOLD_": str(2**31)}


def images_per_cpu_second(
    candidates: dict[str, Callable[[], Any]], *, count: int, repeats: int
) -> dict[str, list[float]]:
    """Speed of each candidate, which processes `count` images, in each round; a first round is not counted."""
    speeds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(repeats + 1):
        for name, run in candidates.items():
            start = time.process_time()
            run()
            speeds[name].append(count / (time.process_time() - start))
    return {name: values[1:] for name, values in speeds.items()}


def augmentation(repeats: int) -> dict[str, list[float]]:
    """Images per CPU-second for views of 2 × 224 and 8 × 96 px, with the published color jitter and blur."""
    patches = torch.randint(0, 256, (BATCH, 3, 256, 256), dtype=torch.uint8)
    images = [Image.fromarray(patch.permute(1, 2, 0).numpy()) for patch in patches]
    crops, transform = MultiCrop(stain_jitter=0.0), DINOTransform()
    candidates = {"fmtrain": lambda: crops(patches, step=0), "lightly": lambda: [transform(image) for image in images]}
    return images_per_cpu_second(candidates, count=BATCH, repeats=repeats)


def augmentation_with_memory_kept(repeats: int) -> dict[str, list[float]]:
    """Result of :func:`augmentation` in a process whose malloc keeps freed memory."""
    command = [sys.executable, __file__, "--views", "--repeats", str(repeats)]
    result = subprocess.run(command, env=os.environ | KEEP_MEMORY, stdout=subprocess.PIPE, check=True)
    values: dict[str, list[float]] = json.loads(result.stdout)
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
    """Train the same networks, with the same loss, optimizer and moving average, on views in memory."""
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
    """Train `fmtrain`'s module in Lightning's Trainer on patches in memory, with views, schedules and logs."""
    lightning = Trainer(
        max_steps=STEPS, max_epochs=-1, accelerator="cpu", default_root_dir=folder, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=10,
    )  # fmt: skip
    lightning.fit(make_model(), DataLoader(batches, batch_size=BATCH))  # type: ignore[arg-type]


def training(repeats: int) -> dict[str, list[float]]:
    """Images per CPU-second of the trainer and of a bare loop."""
    views = [torch.randn(2 * BATCH, 3, 96, 96), torch.randn(4 * BATCH, 3, 48, 48)]
    batches = torch.randint(0, 256, (STEPS * BATCH, 3, 128, 128), dtype=torch.uint8)
    with tempfile.TemporaryDirectory() as folder:
        candidates = {"trainer": lambda: trainer(batches, folder), "bare loop": lambda: bare_loop(views)}
        return images_per_cpu_second(candidates, count=STEPS * BATCH, repeats=repeats)


def summary(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "training.json")
    parser.add_argument("--views", action="store_true", help="measure only the views, and print each round")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    if arguments.views:
        print(json.dumps(augmentation(arguments.repeats)))
        return
    speeds = augmentation(arguments.repeats) | augmentation_with_memory_kept(arguments.repeats)
    speeds |= training(arguments.repeats)
    pairs = {
        "views / lightly": ("fmtrain", "lightly"),
        "views / lightly, memory kept": ("fmtrain, memory kept", "lightly, memory kept"),
        "trainer / bare loop": ("trainer", "bare loop"),
    }
    ratios = {
        name: [a / b for a, b in zip(speeds[first], speeds[second], strict=True)]
        for name, (first, second) in pairs.items()
    }
    report = {
        "hardware": {"processor": platform.machine(), "cores": os.cpu_count(), "threads": 1},
        "versions": {name: version(name) for name in ("torch", "lightning", "lightly", "timm")},
        "repeats": arguments.repeats,
        "images_per_cpu_second": {name: summary(values) for name, values in speeds.items()},
        "ratios": {name: summary(values) | {"target": TARGETS[name]} for name, values in ratios.items()},
    }
    arguments.out.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
