"""Speed of views, of the trainer and of stochastic depth, each compared within one run; bytes that a resume reads.

Views are compared with lightly's DINOTransform, the trainer with a bare loop, blocks that compute only the samples they
keep with timm's, which compute all and drop afterwards.

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

from fmtrain.methods.backbone import set_uniform_drop_path_, skip_dropped_samples_, vit
from fmtrain.methods.dino import DINO
from fmtrain.methods.multicrop import MultiCrop
from fmtrain.methods.optim import update_teacher_
from fmtrain.methods.schedules import Schedules
from fmtrain.training.checkpoints import AtomicCheckpointIO
from fmtrain.training.resume import latest_checkpoint
from repmetrics.encoders.preprocessing import normalize

# Starting a fit takes about a tenth of one of these steps: less than 0.5 % of them.
BATCH, STEPS = 16, 24
TARGETS = {
    "views / lightly": 5.0, "views / lightly, memory kept": 5.0, "trainer / bare loop": 0.97,
    "trainer / bare loop that cuts the views": 0.97,
    # A subset computes 1 − rate of the samples: 1.43 and 1.67 times as fast, without the cost of cutting it.
    "drop path 0.3, subset / every sample": 1.2, "drop path 0.4, subset / every sample": 1.4,
}  # fmt: skip
RESUME_TARGET = 1.5  # of the size of one checkpoint
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


def bare_loop(data: list[Tensor] | Tensor) -> None:
    """Train the same networks, with the same loss, optimizer and moving average.

    Args:
        data: Views in memory, the same at each step; or patches, of which each step cuts the views of a batch.
    """
    model = make_model()
    optimizer = AdamW([p for p in model.student.parameters() if p.requires_grad], lr=1e-4, fused=True)
    for step in range(STEPS):
        if isinstance(data, Tensor):
            crops = model.augment(data[step * BATCH : (step + 1) * BATCH], step=step)
            views = [normalize(view.flatten(0, 1), mean=model.mean, std=model.std) for view in crops]
        else:
            views = data
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
    """Images per CPU-second of the trainer, and of a bare loop with views in memory and with cutting them."""
    views = [torch.randn(2 * BATCH, 3, 96, 96), torch.randn(4 * BATCH, 3, 48, 48)]
    batches = torch.randint(0, 256, (STEPS * BATCH, 3, 128, 128), dtype=torch.uint8)
    with tempfile.TemporaryDirectory() as folder:
        candidates = {
            "trainer": lambda: trainer(batches, folder),
            "bare loop": lambda: bare_loop(views),
            "bare loop that cuts the views": lambda: bare_loop(batches),
        }
        return images_per_cpu_second(candidates, count=STEPS * BATCH, repeats=repeats)


def stochastic_depth(repeats: int) -> dict[str, list[float]]:
    """Images per CPU-second of four blocks of a ViT-S, forward and backward, with and without subsets."""
    images = torch.randn(BATCH, 3, 112, 112)
    kwargs: dict[str, Any] = {"img_size": 112, "depth": 4, "embed_dim": 384, "num_heads": 6}

    def network(rate: float, *, subset: bool) -> Callable[[], None]:
        backbone = vit("vit_tiny_patch16_224", **kwargs).train()
        set_uniform_drop_path_(backbone, rate)
        if subset:
            skip_dropped_samples_(backbone)
        return lambda: backbone(images).sum().backward()

    candidates = {
        f"drop path {rate}, {kind}": network(rate, subset=kind == "subset")
        for rate in (0.3, 0.4)
        for kind in ("subset", "every sample")
    }
    candidates["no drop path"] = network(0.0, subset=False)
    return images_per_cpu_second(candidates, count=BATCH, repeats=repeats)


def bytes_read_on_resume() -> float:
    """Bytes read to find the newest good one of three checkpoints, as a share of the size of one. Linux only."""

    def read() -> int:
        return int(Path("/proc/self/io").read_text().split("rchar: ")[1].split()[0])

    with tempfile.TemporaryDirectory() as folder:
        files = AtomicCheckpointIO()
        for name, step in (("step-1.ckpt", 1), ("step-2.ckpt", 2), ("last.ckpt", 2)):
            state = {f"weight{i}": torch.zeros(1_000_000) for i in range(16)}
            files.save_checkpoint({"state_dict": state, "global_step": step}, Path(folder) / name)
        before = read()
        newest = latest_checkpoint(Path(folder), on_skipped=print)[0]
        return (read() - before) / newest.stat().st_size


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
    speeds |= training(arguments.repeats) | stochastic_depth(arguments.repeats)
    pairs = {
        "views / lightly": ("fmtrain", "lightly"),
        "views / lightly, memory kept": ("fmtrain, memory kept", "lightly, memory kept"),
        "trainer / bare loop": ("trainer", "bare loop"),
        "trainer / bare loop that cuts the views": ("trainer", "bare loop that cuts the views"),
    }
    for rate in (0.3, 0.4):
        name = f"drop path {rate}, subset"
        pairs[f"{name} / every sample"] = (name, f"drop path {rate}, every sample")
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
        "checkpoint bytes read on resume": {"share of one": bytes_read_on_resume(), "target": RESUME_TARGET},
    }
    arguments.out.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
