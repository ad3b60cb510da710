"""Parameter groups, gradient clipping and the teacher's moving average."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from fmtrain.methods.schedules import StepValues


def lr_scale(name: str, *, depth: int, layerwise_decay: float = 1.0, patch_embed_lr_mult: float = 1.0) -> float:
    """Factor on the learning rate of a ViT's parameter (DINOv2, arXiv 2304.07193).

    layerwise_decay ** (depth + 1 − layer), where layer is 0 for the embeddings, i + 1 for block i and depth + 1 after the
    blocks. The patch embedding is slowed by a further `patch_embed_lr_mult`. timm's own grouping counts the final norm with
    the last block and cannot slow the patch embedding alone.

    Example:
        >>> lr_scale("blocks.11.norm1.weight", depth=12, layerwise_decay=0.5), lr_scale("norm.weight", depth=12)
        (0.5, 1.0)
        >>> lr_scale("patch_embed.proj.weight", depth=1, layerwise_decay=0.5, patch_embed_lr_mult=0.2)
        0.05
    """
    block = re.match(r"blocks\.(\d+)\.", name)
    if block:
        layer = int(block[1]) + 1
    elif re.match(r"(patch_embed|pos_embed|cls_token|reg_token|mask_token)", name):
        layer = 0
    else:
        layer = depth + 1
    slow = patch_embed_lr_mult if name.startswith("patch_embed.") else 1.0
    return layerwise_decay ** (depth + 1 - layer) * slow


def parameter_groups(
    student: nn.Module, *, layerwise_decay: float = 1.0, patch_embed_lr_mult: float = 1.0
) -> list[dict[str, Any]]:
    """Optimiser groups of equal `lr_scale` and `decays`; biases, norms and other vectors do not decay.

    What is not under ``student.backbone``, or is not its mask token, is a head and learns at the full rate.
    """
    blocks: Any = getattr(student.backbone, "blocks", ())
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in student.named_parameters():
        scale = 1.0
        if name.startswith(("backbone.", "mask_token")):
            inner = name.removeprefix("backbone.")
            scale = lr_scale(
                inner, depth=len(blocks), layerwise_decay=layerwise_decay, patch_embed_lr_mult=patch_embed_lr_mult
            )
        groups.setdefault((scale, parameter.ndim > 1), []).append(parameter)
    learning = {key: [p for p in params if p.requires_grad] for key, params in groups.items()}
    return [
        {"params": params, "lr_scale": scale, "decays": decays}
        for (scale, decays), params in learning.items()
        if params
    ]


def apply_setting(groups: Iterable[dict[str, Any]], setting: StepValues) -> None:
    """Write a step's learning rate and weight decay into the optimiser's groups."""
    for group in groups:
        group["lr"] = setting.lr * group["lr_scale"]
        group["weight_decay"] = setting.weight_decay if group["decays"] else 0.0


def clip_groups_(groups: Iterable[Iterable[nn.Parameter]], *, max_norm: float | None) -> Tensor:
    """Shorten the gradient of every group to `max_norm`, each on its own, and return the norm of all before that.

    DINO clips parameter by parameter, DINOv2 backbone and heads each as a whole. `max_norm=None` only measures.
    """
    norms = []
    for group in groups:
        gradients = [p.grad for p in group if p.grad is not None]
        if not gradients:
            continue
        norms.append(torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in gradients])))
        if max_norm is not None:
            factor = (max_norm / (norms[-1] + 1e-6)).clamp(max=1)
            for gradient in gradients:
                gradient.mul_(factor)
    return torch.linalg.vector_norm(torch.stack(norms))


@torch.no_grad()
def update_teacher_(teacher: nn.Module, student: nn.Module, *, momentum: float) -> None:
    """Teacher ← momentum·teacher + (1 − momentum)·student, parameter by parameter."""
    average = get_ema_multi_avg_fn(momentum)
    average(list(teacher.parameters()), list(student.parameters()), 0)
