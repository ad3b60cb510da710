"""Networks of student and teacher: timm's ViTs, stochastic depth, compilation."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from types import MethodType
from typing import Any

import timm
import torch
from timm.layers.drop import DropPath
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from fmtrain.methods.heads import ProjectionHead

SUBSET_ABOVE = 0.1  # in DINOv2's code


class Branch(nn.Module):
    """Backbone with a head on its class token."""

    def __init__(self, backbone: nn.Module, head: ProjectionHead) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, images: Tensor) -> Tensor:
        """Normalized images (N, 3, H, W) → logits of the prototypes (N, K)."""
        logits: Tensor = self.head(self.backbone(images))
        return logits


def vit(arch: str, **kwargs: Any) -> nn.Module:
    """Create a timm ViT without a classifier.

    Raises:
        ValueError: timm has no model of that name, or the model does not take the arguments.
    """
    if ":" not in arch and not timm.is_model(arch):  # a colon marks a model on the hub
        near = get_close_matches(arch, timm.list_models("vit*"))
        raise ValueError(f"timm has no model {arch}" + (f": did you mean {', '.join(near)}?" if near else ""))
    try:
        return timm.create_model(arch, num_classes=0, **kwargs)
    except (TypeError, AssertionError) as error:
        raise ValueError(f"{arch} cannot be created as a ViT with {kwargs}: {error}") from error


def set_uniform_drop_path_(backbone: nn.Module, rate: float) -> None:
    """Set the same stochastic depth in all blocks of a ViT; timm's rates increase from block to block."""
    blocks: Any = backbone.blocks
    for block in blocks:
        block.drop_path1, block.drop_path2 = DropPath(rate), DropPath(rate)


def skip_dropped_samples_(backbone: nn.Module) -> None:
    """Let the blocks of a timm ViT compute only the samples that stochastic depth keeps, as in DINOv2.

    Blocks with a rate above `SUBSET_ABOVE` take an exact share of the batch, drawn from torch's generator. Others, and
    blocks that are not timm's ``Block``, keep their drop path: every sample is computed and dropped on its own.
    """
    blocks: Any = backbone.blocks
    for block in blocks:
        if type(block) is Block and getattr(block.drop_path1, "drop_prob", 0.0) > SUBSET_ABOVE:
            setattr(block, "forward", MethodType(_subset_forward, block))  # noqa: B010 - mypy takes it for a mistake


def _subset_forward(block: Any, x: Tensor, **options: Any) -> Tensor:
    """``Block.forward`` of timm that adds the residuals of a random subset of the batch, scaled to the same mean."""
    if not block.training:
        return Block.forward(block, x, **options)

    def attention(part: Tensor) -> Tensor:
        residual: Tensor = block.ls1(block.attn(block.norm1(part), **options))
        return residual

    def mlp(part: Tensor) -> Tensor:
        residual: Tensor = block.ls2(block.mlp(block.norm2(part)))
        return residual

    for branch, rate in ((attention, block.drop_path1.drop_prob), (mlp, block.drop_path2.drop_prob)):
        kept = torch.randperm(len(x), device=x.device)[: max(int(len(x) * (1 - rate)), 1)]
        residual = branch(x[kept])
        x = x.index_add(0, kept, residual.to(x.dtype), alpha=len(x) / len(kept))
    return x


def compile_blocks_(backbones: Iterable[nn.Module], *, backend: str = "inductor") -> None:
    """Compile ViTs block by block; names of parameters do not change.

    Equal blocks share one compilation, which serves every forward method of the ViT. Blocks with another drop path are
    compiled again, hence the limit. A block that cannot be compiled is an error.
    """
    blocks: list[Any] = [block for backbone in backbones for block in backbone.blocks]  # type: ignore[union-attr]
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 4 * len(blocks))
    for block in blocks:
        block.compile(fullgraph=True, backend=backend)
