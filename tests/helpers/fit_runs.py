"""`fmtrain fit` from the command line with a tiny configuration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fmtrain.cli import main
from fmtrain.slides.synthetic import write_slides

HALF = ("--held-out-fraction", 0.5)
SMALL = """
trainer: {accelerator: cpu, max_steps: 6}
model:
  class_path: fmtrain.methods.DINO
  init_args:
    arch: vit_tiny_patch16_224
    arch_kwargs: {img_size: 32, patch_size: 8, embed_dim: 32, depth: 2, num_heads: 2}
    augment: {global_crops_size: 32, local_crops_size: 16, local_crops_number: 2}
    schedules: {lr_warmup_steps: 2, freeze_last_layer_steps: 1}
    n_prototypes: 64
    hidden_dim: 32
    bottleneck_dim: 16
data: {size_px: 40, batch_size: 8}
monitor: {every_n_steps: 3}
checkpoint: {every_n_train_steps: 2}
"""


def write_manifest(folder: Path) -> Path:
    """Write eight synthetic slides and their manifest."""
    write_slides(folder / "slides", count=8, size_px=1024, mpp=0.5, seed=0)
    path = folder / "manifest.json"
    assert call("manifest", folder / "slides", "--out", path, "--held-out", 60, "--size-px", 32, *HALF) == 0
    return path


def call(*args: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(arg) for arg in args])
    assert isinstance(ended.value.code, int | None)
    return ended.value.code or 0


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "measurements.jsonl").read_text().splitlines()]


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return bool(a == b)
