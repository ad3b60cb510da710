"""Cost of monitoring and speed of the trainer on one GPU, with exact resume and a check on two processes.

    python benchmarks/gpu.py [--device cuda] [--minutes 8] [--only SECTION …] [--out benchmarks/results/gpu.json]
    python benchmarks/gpu.py --device cpu --tiny     # the same code in seconds, without a GPU

Sections:

- `peak`: speed of an 8192³ bf16 product, the limit of the others;
- `metrics`: everything but the encoder, as a ratio to one float64 SVD;
- `evaluation`: seconds of one evaluation, and its share of training at the default interval;
- `training`: images per second of DINO in Lightning's Trainer, from device memory and from slides;
- `resume`: a run of 8 steps against one that is stopped after 4 and resumed;
- `ranks`: two processes with gloo on one device.

Each section writes the result file when it ends. A section that would begin after --minutes is left out, and the file
names it.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.flop_counter import FlopCounterMode

from fmtrain.manifest.build import build_manifest
from fmtrain.methods.dino import DINO
from fmtrain.methods.multicrop import MultiCrop
from fmtrain.methods.schedules import Schedules
from fmtrain.patches.dataset import TrainingPatches
from fmtrain.patches.loader import training_batches
from fmtrain.slides.synthetic import write_slides
from repmetrics.atomic_write import write_text
from repmetrics.monitoring.interval import default_interval
from repmetrics.monitoring.monitor import Monitor

OUT = Path(__file__).resolve().parent / "results" / "gpu.json"


@dataclass(frozen=True)
class Size:
    """What is measured: published sizes, or tiny ones for a test of this script."""

    archs: dict[str, int]  # architecture → batch size
    image_px: int
    local_px: int
    steps: int
    held_out: int
    features: tuple[tuple[int, int], ...]
    matrix: int
    workers: int


FULL = Size(
    archs={"vit_small_patch16_224": 128, "vit_base_patch16_224": 64}, image_px=224, local_px=96, steps=24,
    held_out=4096, features=((4096, 384), (4096, 1024), (25600, 1024)), matrix=8192, workers=12,
)  # fmt: skip
TINY = Size(
    archs={"vit_tiny_patch16_224": 4}, image_px=32, local_px=16, steps=4, held_out=32, features=((128, 16),), matrix=64,
    workers=1,
)  # fmt: skip


class StepTimer(Callback):
    """Records the time after each training step, when the device has finished it."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        synchronize(pl_module.device)
        self.times.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Seconds of each step of the second half, which has no start-up cost."""
        half = len(self.times) // 2
        return [after - before for before, after in zip(self.times[half - 1 :], self.times[half:], strict=False)]


class StepBatches:
    """Batches as a function of the step, in device memory; a resumed run continues at its step."""

    def __init__(self, batches: Tensor) -> None:
        self.batches = batches
        self.first = 0

    def __iter__(self) -> Iterator[Tensor]:
        for step in range(self.first, 10**9):
            yield self.batches[step % len(self.batches)]


def synchronize(device: torch.device | str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def timed(function: Callable[[], Any], *, repeats: int, device: str) -> list[float]:
    """Wall seconds of each call, after a warm-up call."""
    seconds = []
    for index in range(repeats + 1):
        synchronize(device)
        start = time.perf_counter()
        function()
        synchronize(device)
        if index:
            seconds.append(time.perf_counter() - start)
    return seconds


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def make_model(size: Size, arch: str) -> DINO:
    """DINO with its published defaults; smaller images and heads in the tiny size."""
    torch.manual_seed(0)
    tiny = size is TINY
    small = {"img_size": size.image_px, "patch_size": 8, "depth": 1, "embed_dim": 32, "num_heads": 2} if tiny else {}
    crops = MultiCrop(global_crops_size=size.image_px, local_crops_size=size.local_px, local_crops_number=8)
    head = {"n_prototypes": 256, "hidden_dim": 64} if tiny else {}
    return DINO(
        arch=arch, arch_kwargs=small if tiny else {}, augment=crops, schedules=Schedules(lr_warmup_steps=2), **head
    )


def fit(model: DINO, batches: Any, *, device: str, steps: int, folder: Path, **options: Any) -> StepTimer:
    timer = StepTimer()
    checkpoint = {"enable_checkpointing": False} if "callbacks" not in options else {}
    trainer = Trainer(
        accelerator="gpu" if device == "cuda" else "cpu", devices=1, max_epochs=-1, max_steps=steps, logger=False,
        default_root_dir=folder, enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=10**9,
        precision="bf16-mixed" if device == "cuda" else "32-true",
        callbacks=[timer, *options.pop("callbacks", [])], **checkpoint,
    )  # fmt: skip
    trainer.fit(model, batches, **options)
    return timer


def peak(size: Size, device: str) -> dict[str, Any]:
    """bf16 matrix product, in TFLOP/s."""
    a, b = (torch.randn(size.matrix, size.matrix, device=device, dtype=torch.bfloat16) for _ in range(2))
    seconds = timed(lambda: a @ b, repeats=20, device=device)
    return {"matrix": size.matrix, "tflops": spread([2 * size.matrix**3 / each / 1e12 for each in seconds])}


def step_flops(model: DINO, batch: Tensor) -> int:
    """Floating-point operations of the forward and backward passes of one step."""
    model = model.to(batch.device)
    views = model.augment(batch, step=0, rank=0, world_size=1)
    crops = [model._normalize(view.flatten(0, 1)) for view in views if len(view)]
    with FlopCounterMode(display=False) as counter:
        with torch.no_grad():
            model.teacher(crops[0])
        sum(model.student(crop).float().mean() for crop in crops).backward()  # type: ignore[union-attr]
    model.zero_grad(set_to_none=True)
    return int(counter.get_total_flops())


def training(size: Size, device: str) -> dict[str, Any]:
    """Images per second of the trainer, with batches in memory and with patches from slides."""
    result: dict[str, Any] = {}
    limit = peak(size, device)["tflops"]["median"]
    patch_px = size.image_px * 8 // 7
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        manifest = _make_manifest(folder, size)
        for arch, batch_size in size.archs.items():
            shape = (2, batch_size, 3, patch_px, patch_px)
            batches = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
            flops = step_flops(make_model(size, arch), batches[0])
            memory = StepBatches(batches)
            in_memory = fit(make_model(size, arch), memory, device=device, steps=size.steps, folder=folder).seconds()
            patches = TrainingPatches(manifest, size_px=patch_px, seed=0)
            reader = training_batches(
                patches, batch_size=batch_size, rank=0, world=1, start_step=0, num_workers=size.workers,
                pin_memory=device == "cuda",
            )  # fmt: skip
            from_slides = fit(make_model(size, arch), reader, device=device, steps=size.steps, folder=folder).seconds()
            step = statistics.median(in_memory)
            result[arch] = {
                "batch_size": batch_size,
                "step_seconds": spread(in_memory),
                "images_per_second": batch_size / step,
                "images_per_second_from_slides": batch_size / statistics.mean(from_slides),
                "workers": size.workers,
                "step_tflop": flops / 1e12,
                "share_of_bf16_peak": flops / 1e12 / step / limit,
                "peak_memory_gib": torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else None,
            }
    return result


def _make_manifest(folder: Path, size: Size) -> Path:
    slides = 8 if size is TINY else 32
    write_slides(folder / "slides", count=slides, size_px=1024 if size is TINY else 4096, mpp=0.5, seed=0)
    build_manifest(folder / "slides", folder / "manifest.json", held_out=16, size_px=size.image_px)
    return folder / "manifest.json"


def held_out(count: int, px: int) -> TensorDataset:
    """Images in memory, 64 groups, four classes."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, px, px), dtype=torch.uint8, generator=generator)
    index = torch.arange(count)
    return TensorDataset(images, index % 4, index * min(64, count // 4) // count)


def evaluation(size: Size, device: str) -> dict[str, Any]:
    """Seconds of one evaluation on images in memory, and its share of training at the default interval."""
    result: dict[str, Any] = {}
    data = DataLoader(held_out(size.held_out, size.image_px), 256)
    for arch, batch_size in size.archs.items():
        model = make_model(size, arch).to(device)
        monitor = Monitor()

        def evaluate(model: DINO = model, monitor: Monitor = monitor) -> None:
            with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
                monitor.measure(model, data)

        seconds = timed(evaluate, repeats=3, device=device)
        batches = StepBatches(
            torch.randint(0, 256, (1, batch_size, 3, size.image_px * 8 // 7, size.image_px * 8 // 7), dtype=torch.uint8)
        )
        with tempfile.TemporaryDirectory() as name:
            timer = fit(make_model(size, arch), batches, device=device, steps=size.steps, folder=Path(name))
        step, once = statistics.median(timer.seconds()), statistics.median(seconds)
        steps = default_interval(samples=size.held_out, batch_size=batch_size, total_steps=float("inf"))
        result[arch] = {
            "held_out": size.held_out,
            "evaluation_seconds": spread(seconds),
            "step_seconds": step,
            "default_interval_steps": steps,
            "share_of_training": once / (once + steps * step),
        }
    return result


def metrics(size: Size, device: str) -> dict[str, Any]:
    """An evaluation with an identity encoder over features in memory, and one float64 SVD of the same features."""
    result: dict[str, Any] = {}
    for n, d in size.features:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(n, d, generator=generator) * torch.arange(1, d + 1) ** -0.5
        index = torch.arange(n)
        data, on_device = [(x, index % 4, (index * 64 // n).tolist())], x.to(device)
        monitor, encoder = Monitor(), nn.Identity()
        seconds = timed(lambda m=monitor, e=encoder, b=data: m.measure(e, b, device=device), repeats=3, device=device)
        svd = timed(lambda y=on_device: torch.linalg.svdvals(y.double()), repeats=3, device=device)
        cpu = timed(lambda y=x: torch.linalg.svdvals(y.double()), repeats=1, device=device)
        result[f"{n} × {d}"] = {
            "evaluation_seconds": spread(seconds),
            "svdvals_float64_seconds": spread(svd),
            "svdvals_float64_cpu_seconds": spread(cpu),
            "ratio_to_svdvals": statistics.median(seconds) / statistics.median(svd),
            "ratio_to_svdvals_on_cpu": statistics.median(seconds) / statistics.median(cpu),
        }
    return result


def resume(size: Size, device: str) -> dict[str, Any]:
    """Largest difference of weights between a run of 8 steps and one that is stopped after 4 and resumed."""
    arch, batch_size = next(iter(size.archs.items()))
    px = size.image_px * 8 // 7
    generator = torch.Generator().manual_seed(0)
    batches = torch.randint(0, 256, (8, min(batch_size, 16), 3, px, px), dtype=torch.uint8, generator=generator)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        states = []
        for run in ("whole", "repeated"):  # two equal runs show whether the device itself repeats its bits
            model = make_model(size, arch)
            saver = ModelCheckpoint(folder / run, every_n_train_steps=4, save_top_k=-1)
            fit(model, StepBatches(batches), device=device, steps=8, folder=folder, callbacks=[saver])
            states.append({key: value.cpu() for key, value in model.state_dict().items()})
        saved = next((folder / "whole").glob("*step=4.ckpt"))
        model, rest = make_model(size, arch), StepBatches(batches)
        rest.first = 4
        fit(model, rest, device=device, steps=8, folder=folder, ckpt_path=saved, weights_only=True, callbacks=[])
        states.append({key: value.cpu() for key, value in model.state_dict().items()})
    return {
        "repeated": _largest_difference(states[0], states[1]),
        "resumed": _largest_difference(states[0], states[2]),
        "bit_identical": all(torch.equal(states[0][key], states[2][key]) for key in states[0]),
    }


def _largest_difference(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    return max(float((first[key].double() - second[key].double()).abs().max()) for key in first if first[key].numel())


def ranks(size: Size, device: str) -> dict[str, Any]:
    """Values of one process and of two on the same device; all must be equal up to the order of float64 sums."""
    with tempfile.TemporaryDirectory() as name:
        arguments = (2, Path(name), size.image_px, device)
        mp.start_processes(_rank, args=arguments, nprocs=2, start_method="forkserver")  # type: ignore[attr-defined]
        both = [json.loads(Path(name, f"{rank}.json").read_text()) for rank in range(2)]
    alone = _values(size.image_px, device)
    worst = max(abs(both[0][key] - alone[key]) / max(abs(alone[key]), 1e-12) for key in alone)
    return {"equal_on_both_ranks": both[0] == both[1], "largest_relative_difference_to_one_process": worst}


def _rank(rank: int, world: int, folder: Path, px: int, device: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    write_text(folder / f"{rank}.json", json.dumps(_values(px, device)))
    dist.destroy_process_group()


def _values(px: int, device: str) -> dict[str, float]:
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.AvgPool2d(px // 8), nn.Flatten(), nn.Linear(192, 32)).to(device).double()
    images = held_out(256, px)
    data = DataLoader(TensorDataset(images.tensors[0].double() / 255, *images.tensors[1:]), 32)
    record = Monitor().measure(encoder, data)
    return {name: m.value for name, m in record.measurements.items()}


SECTIONS: dict[str, Callable[[Size, str], dict[str, Any]]] = {
    "peak": peak, "metrics": metrics, "evaluation": evaluation, "training": training, "resume": resume, "ranks": ranks,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="sizes for a test of this script; no figure to report")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device: use --device cpu --tiny to test the script")
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    start = time.perf_counter()
    size = TINY if options.tiny else FULL
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if options.device == "cuda" else platform.machine(),
        "cpu_cores": os.cpu_count(),
        "versions": {name: version(name) for name in ("torch", "timm", "lightning")},
        "tiny": options.tiny,
        "left_out": [],
    }
    for name in options.only:
        if time.perf_counter() - start > 60 * options.minutes:
            report["left_out"].append(name)
            continue
        began = time.perf_counter()
        report[name] = SECTIONS[name](size, options.device) | {"section_seconds": time.perf_counter() - began}
        print(json.dumps({name: report[name]}, indent=1), flush=True)
        write_text(options.out, json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
