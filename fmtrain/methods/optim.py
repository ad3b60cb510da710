"""Parameter groups of the optimizer, gradient clipping, and the moving average of the teacher."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim.swa_utils import get_ema_multi_avg_fn

from fmtrain.methods.schedules import StepValues
from fmtrain.methods.sharding import local, whole


def lr_scale(name: str, *, depth: int, layerwise_decay: float = 1.0, patch_embed_lr_mult: float = 1.0) -> float:
    """Factor on the learning rate of one parameter of a ViT (DINOv2, arXiv 2304.07193).

    The factor is layerwise_decay ** (depth + 1 − layer). The layer is 0 for the embeddings, i + 1 for block i, and
    depth + 1 after the blocks. `patch_embed_lr_mult` multiplies the factor of the patch embedding. timm's own grouping
    counts the final norm with the last block and has no factor for the patch embedding alone.

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
    multiplier = patch_embed_lr_mult if name.startswith("patch_embed.") else 1.0
    return layerwise_decay ** (depth + 1 - layer) * multiplier


def parameter_groups(
    student: nn.Module,
    *,
    layerwise_decay: float = 1.0,
    patch_embed_lr_mult: float = 1.0,
    separate_last_layer: bool = False,
    sums: Iterable[nn.Parameter] = (),
) -> list[dict[str, Any]]:
    """Optimizer groups with equal `lr_scale`, `decays` and `freezes`.

    Biases, norms and other vectors have no weight decay. Parameters outside ``student.backbone``, except its mask
    token, belong to a head and have the full learning rate. With `separate_last_layer`, prototypes have groups of their
    own, which :func:`apply_step_values` can freeze.

    A parameter in `sums` is trained as if it were the sum of two, each with this gradient. AdamW takes the same step in
    both, and decays both: the sum has twice the learning rate and half the weight decay.
    """
    doubled = {id(parameter) for parameter in sums}
    blocks: Any = getattr(student.backbone, "blocks", ())
    groups: dict[tuple[float, float, bool], list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in student.named_parameters():
        scale = 1.0
        if name.startswith(("backbone.", "mask_token")):
            inner = name.removeprefix("backbone.")
            scale = lr_scale(
                inner, depth=len(blocks), layerwise_decay=layerwise_decay, patch_embed_lr_mult=patch_embed_lr_mult
            )
        freezes = separate_last_layer and ".last_layer." in f".{name}"
        decays: float = parameter.ndim > 1
        if id(parameter) in doubled:
            scale, decays = 2 * scale, decays / 2
        groups.setdefault((scale, decays, freezes), []).append((name, parameter))
    trainable = {key: [pair for pair in pairs if pair[1].requires_grad] for key, pairs in groups.items()}
    return [
        {
            "params": [parameter for _, parameter in pairs],
            "names": [name for name, _ in pairs],  # for a later stage
            "lr_scale": scale,
            "decays": decays,
            "freezes": freezes,
        }
        for (scale, decays, freezes), pairs in trainable.items()
        if pairs
    ]


def apply_step_values(groups: Iterable[dict[str, Any]], values: StepValues, *, freeze: bool = False) -> None:
    """Write the learning rate and weight decay of one step into the optimizer groups.

    Args:
        groups: Groups of :func:`parameter_groups`.
        values: Values of the step.
        freeze: Whether the groups that freeze have a learning rate of 0.
    """
    for group in groups:
        frozen = freeze and group.get("freezes", False)  # earlier checkpoints have no such key
        group["lr"] = 0.0 if frozen else values.lr * group["lr_scale"]
        group["weight_decay"] = values.weight_decay * group["decays"]


def clip_groups_(groups: Iterable[Iterable[nn.Parameter]], *, max_norm: float | None) -> Tensor:
    """Clip the gradient of each group to `max_norm`, and return the norm of all gradients before clipping.

    DINO clips parameter by parameter; DINOv2 clips the backbone and each head. `max_norm=None` only measures. A
    parameter that a group holds twice counts twice in its norm.
    """
    clipped, norms = [], []
    for group in groups:
        trained = [p for p in group if p.grad is not None]
        if not trained:
            continue
        gradients = [p.grad for p in trained if p.grad is not None]
        single = len(gradients) == 1
        norms.append(whole(torch.linalg.vector_norm(gradients[0]) if single else get_total_norm(gradients)))
        clipped.append(trained)
    if max_norm is not None and norms:
        # All factors at once: DINO has a group per parameter, and one call for each would take three times as long.
        factors = (max_norm / (torch.stack(norms) + 1e-6)).clamp(max=1.0).unbind()
        for trained, norm, factor in zip(clipped, norms, factors, strict=True):
            if len(trained) == 1 and trained[0].grad is not None:
                trained[0].grad.mul_(factor)
            else:
                clip_grads_with_norm_(dict.fromkeys(trained), max_norm, norm)
    return get_total_norm(norms)


@torch.no_grad()
def update_teacher_(teacher: nn.Module, student: nn.Module, *, momentum: float) -> None:
    """Update every parameter: teacher ← momentum·teacher + (1 − momentum)·student."""
    average = get_ema_multi_avg_fn(momentum)
    average(local(teacher.parameters()), local(student.parameters()), 0)
