"""Measure the cost of `repmetrics score` above a bare forward loop over the same files, and its start-up time.

    python benchmarks/score.py [--images 256] [--repeats 5] [--out benchmarks/results/score.json]

Both decode the same PNG files in sequence, in batches of 64, with the same encoder. They alternate, and CPU seconds are
counted, so that other load on the machine changes little. The benchmark reports median and range of the ratios of
adjacent runs. The bare loop only opens, stacks and normalizes images and runs the model.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from torch import nn

from repmetrics.data.open import open_data
from repmetrics.encoders.checkpoint import identify
from repmetrics.encoders.files import read_checkpoint_file
from repmetrics.scoring.embed import embed_source
from repmetrics.scoring.settings import EmbedSettings

RESULTS = Path(__file__).resolve().parent / "results" / "score.json"
BATCH = 64
TARGETS = {"throughput over a bare loop": 0.95, "seconds of --help": 0.4}


def write_images(folder: Path, count: int, side: int) -> list[Path]:
    """Noise with some structure, as PNG."""
    generator = np.random.default_rng(0)
    files = []
    for i in range(count):
        coarse = generator.integers(0, 256, (side // 8, side // 8, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)
        files.append(folder / f"{i:05}.png")
        image.save(files[-1])
    return files


@torch.no_grad()
def bare_loop(files: list[Path], model: nn.Module, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """Features of these files, with the least code."""
    features = []
    for start in range(0, len(files), BATCH):
        pixels = [
            torch.from_numpy(np.array(Image.open(file).convert("RGB"))).permute(2, 0, 1)
            for file in files[start : start + BATCH]
        ]
        features.append(model((torch.stack(pixels).float().div(255) - mean) / std))
    return torch.cat(features)


def cpu_seconds(call: Callable[[], Any]) -> tuple[float, Any]:
    """CPU seconds of all threads of this process, and the result of the call."""
    start = time.process_time()
    result = call()
    return time.process_time() - start, result


def start_up(repeats: int) -> list[float]:
    """Wall seconds of `repmetrics --help`."""
    command = [str(Path(sys.executable).with_name("repmetrics")), "--help"]
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        taken.append(time.perf_counter() - start)
    return taken


def main() -> None:
    """Run the benchmark and write its results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--arch", default="vit_tiny_patch16_224")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)  # waiting threads spin, and their time would be counted
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = write_images(folder, args.images, 224)
        torch.save(timm.create_model(args.arch, num_classes=0).state_dict(), folder / "model.pth")
        identified = identify(read_checkpoint_file(folder / "model.pth"), arch=args.arch)
        encoder = identified.encoder
        mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (encoder.mean, encoder.std))
        source = open_data(folder)
        cache = EmbedSettings(cache=folder / "cache")
        turns = []
        for _ in range(args.repeats + 1):
            bare, expected = cpu_seconds(lambda: bare_loop(files, encoder.model, mean, std))
            ours, embedded = cpu_seconds(lambda: embed_source(source, encoder, EmbedSettings()))
            assert torch.equal(embedded.features.values, expected), "the two compute different features"
            turns.append((bare, ours))
        embed_source(source, identified, cache)
        second_run, embedded = cpu_seconds(lambda: embed_source(source, identified, cache))
        assert embedded.from_cache
    turns = turns[1:]  # the first warms the page cache and the allocator
    ratios = [bare / ours for bare, ours in turns]
    helps = start_up(args.repeats)
    results = {
        "environment": {
            "cpu": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "timm", "pillow")},
        },
        "images": args.images,
        "arch": args.arch,
        "repeats": args.repeats,
        "bare loop, CPU seconds": [bare for bare, _ in turns],
        "repmetrics, CPU seconds": [ours for _, ours in turns],
        "throughput over a bare loop": {"median": statistics.median(ratios), "range": [min(ratios), max(ratios)]},
        "second run from the cache, CPU seconds": second_run,
        "seconds of --help": {"median": statistics.median(helps), "range": [min(helps), max(helps)]},
        "targets": TARGETS,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
