"""Tiny DINO runs on gratings; they take seconds on a CPU."""

from __future__ import annotations

import math
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from fmtrain.methods.dino import DINO
from fmtrain.methods.multicrop import MultiCrop
from fmtrain.methods.schedules import Schedules

STEPS = 40
SCHEDULES = Schedules(
    lr=2e-3, scaling_rule="none", lr_warmup_steps=4, freeze_last_layer_steps=3, momentum_teacher=0.9,
    teacher_temp_warmup_steps=4, warmup_teacher_temp=0.03,
)  # fmt: skip
CROPS = MultiCrop(global_crops_size=16, local_crops_size=8, local_crops_number=2, blur=(0.0, 0.0, 0.0))


def tiny(*, seed: int = 0, **changes: Any) -> DINO:
    torch.manual_seed(seed)
    arch_kwargs = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}
    defaults: dict[str, Any] = {
        "arch": "vit_tiny_patch16_224", "arch_kwargs": arch_kwargs, "augment": CROPS, "schedules": SCHEDULES,
        "n_prototypes": 64, "hidden_dim": 48, "bottleneck_dim": 16,
    }  # fmt: skip
    return DINO(**(defaults | changes))


def patches(count: int, *, seed: int = 0) -> Tensor:
    """Gratings of random direction, frequency and colors, so that there is something to learn."""
    generator = torch.Generator().manual_seed(seed)
    angle, frequency, phase = torch.rand((3, count, 1, 1), generator=generator) * math.pi
    y, x = torch.meshgrid(torch.arange(20.0), torch.arange(20.0), indexing="ij")
    wave = torch.sin(phase * 2 + (0.2 + frequency / 4) * (x * angle.cos() + y * angle.sin()))[:, None]
    colors = torch.rand((2, count, 3, 1, 1), generator=generator)
    return ((wave + 1) / 2 * (colors[0] - colors[1]) + colors[1]).mul(255).byte()


def fit(model: DINO, *, steps: int = STEPS, callbacks: tuple[Any, ...] = (), **options: Any) -> Trainer:
    trainer = Trainer(
        max_steps=steps, max_epochs=-1, accelerator="cpu", callbacks=list(callbacks), enable_progress_bar=False,
        enable_model_summary=False, **({"logger": False, "enable_checkpointing": False} | options),
    )  # fmt: skip
    trainer.fit(model, DataLoader(patches(steps * 16), batch_size=16))
    return trainer
