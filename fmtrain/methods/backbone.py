"""Networks of student and teacher: timm's ViTs, stochastic depth, compilation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from types import MethodType
from typing import Any, NamedTuple

import timm
import torch
import torch.nn.functional as F
from timm.layers.drop import DropPath
from timm.layers.mlp import SwiGLUPacked
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from repmetrics.encoders.architecture import check_arch_kwargs

SUBSET_ABOVE = 0.1  # in DINOv2's code


class Resampling(NamedTuple):
    """How positions are resampled for crops of another size; the defaults are those of DINO and DINOv2.

    Attributes:
        offset: Number added to the tokens of a side before the scale is computed. It shifts the grid slightly.
        antialias: Whether the bicubic filter is widened when the grid shrinks.
    """

    offset: float = 0.1
    antialias: bool = False


class Branch(nn.Module):
    """Backbone with a head on its class token.

    Args:
        backbone: ViT of timm.
        head: Head on the representation.
        resampling: How positions are resampled for crops of another size than the backbone's.
    """

    def __init__(self, backbone: nn.Module, head: nn.Module, resampling: Resampling = Resampling()) -> None:  # noqa: B008 - immutable
        super().__init__()
        self.backbone = backbone
        self.head: Any = head
        self.resampling = resampling

    def forward(self, images: Tensor) -> Tensor:
        """Normalized images (N, 3, H, W) → logits of the prototypes (N, K)."""
        with self.resampled_positions():
            logits: Tensor = self.head(self.backbone(images))
        return logits

    def features(self, images: Tensor) -> Tensor:
        """Normalized images (N, 3, H, W) → representations (N, D), as everyone computes them who has the weights."""
        features: Tensor = self.backbone(images)
        return features

    def tokens(self, images: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Representations (N, D), pooled as the encoder pools, and patch tokens (N, H, W, D) after the last norm.

        Args:
            images: Normalized images (N, 3, …).
            mask: Positions (N, H, W) whose embedding is replaced by the branch's mask token, or None.
        """
        backbone: Any = self.backbone

        def replace(module: nn.Module, inputs: Any, embedded: Tensor) -> Tensor:
            assert mask is not None
            token: Any = self.mask_token
            return torch.where(mask.reshape(*embedded.shape[:-1], 1), token.to(embedded.dtype), embedded)

        handle = None if mask is None else backbone.patch_embed.register_forward_hook(replace)
        try:
            with self.resampled_positions():
                features = backbone.forward_features(images)
        finally:
            if handle is not None:
                handle.remove()
        tokens = backbone.fc_norm(features[:, backbone.num_prefix_tokens :])  # the last norm of a ViT with mean pooling
        return backbone.forward_head(features, pre_logits=True), tokens.unflatten(1, self.grid(images))

    def grid(self, images: Tensor) -> tuple[int, int]:
        """Height and width of images in tokens."""
        backbone: Any = self.backbone
        height, width = backbone.patch_embed.patch_size
        return images.shape[-2] // height, images.shape[-1] // width

    @contextmanager
    def resampled_positions(self) -> Iterator[None]:
        """Let the backbone resample its positions as in training. Outside of the block it does so as in timm.

        The encoder that is measured and exported runs outside: everyone who loads its weights has timm's resampling.
        """
        backbone: Any = self.backbone
        if (
            getattr(type(backbone), "_pos_embed", None) is not VisionTransformer._pos_embed
            or backbone.pos_embed is None
        ):
            yield
            return
        backbone._pos_embed = lambda embedded: _add_positions(backbone, embedded, self.resampling)
        try:
            yield
        finally:
            del backbone._pos_embed


def _add_positions(backbone: Any, embedded: Tensor, resampling: Resampling) -> Tensor:
    """``VisionTransformer._pos_embed`` with another resampling: patches (N, H, W, D) → all tokens (N, T, D)."""
    size, native = (embedded.shape[1], embedded.shape[2]), tuple(backbone.patch_embed.grid_size)
    if size == native:
        return VisionTransformer._pos_embed(backbone, embedded)
    prefix = backbone.pos_embed.shape[1] - native[0] * native[1]
    positions = resample_positions(backbone.pos_embed[:, prefix:], native, size, resampling)
    tokens = [
        token.expand(len(embedded), -1, -1) for token in (backbone.cls_token, backbone.reg_token) if token is not None
    ]
    patches = embedded.flatten(1, 2)
    if prefix:
        tokens = [torch.cat(tokens, 1) + backbone.pos_embed[:, :prefix]]
    result: Tensor = backbone.pos_drop(torch.cat([*tokens, patches + positions], 1))
    return result


def resample_positions(
    positions: Tensor, grid: tuple[int, int], new_grid: tuple[int, int], resampling: Resampling
) -> Tensor:
    """Bicubic resampling of positions (1, h·w, D) to another grid, (1, h'·w', D), as in DINO and DINOv2.

    The scale is (h' + offset) / h, and coordinates follow the scale: they are not aligned to the new grid.
    """
    planes = positions.to(torch.promote_types(positions.dtype, torch.float32)).unflatten(1, grid).permute(0, 3, 1, 2)
    options: dict[str, Any] = {"size": new_grid}
    if resampling.offset:
        scale = [(new + resampling.offset) / old for new, old in zip(new_grid, grid, strict=True)]
        options = {"scale_factor": scale}
    resized = F.interpolate(planes, mode="bicubic", antialias=resampling.antialias, **options)
    return resized.flatten(2).mT.to(positions.dtype)


def swiglu_kwargs(width: int, mlp_ratio: float = 4.0) -> dict[str, Any]:
    """Arguments of a timm ViT for DINOv2's SwiGLU: two thirds of the MLP's width, rounded up to a multiple of 8.

    Example:
        >>> 1024 * swiglu_kwargs(1024)["mlp_ratio"] // 2
        2736.0
    """
    hidden = (int(int(width * mlp_ratio) * 2 / 3) + 7) // 8 * 8
    return {"mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU, "mlp_ratio": (2 * hidden + 0.5) / width}


def vit(arch: str, *, ffn_layer: str = "mlp", **kwargs: Any) -> nn.Module:
    """Create a timm ViT without a classifier.

    Args:
        arch: Name of the ViT in timm.
        ffn_layer: "mlp" as `arch` has it, or "swiglu" as in DINOv2's recipes of ViT-L and ViT-g.
        kwargs: Arguments of ``timm.create_model``.

    Raises:
        ValueError: timm has no model of that name, the model does not take the arguments, or they name files.
    """
    check_arch_kwargs(kwargs)  # those of a checkpoint arrive here too, by `load_from_checkpoint`
    if ":" not in arch and not timm.is_model(arch):  # a colon marks a model on the hub
        near = get_close_matches(arch, timm.list_models("vit*"))
        raise ValueError(f"timm has no model {arch}" + (f": did you mean {', '.join(near)}?" if near else ""))
    try:
        if ffn_layer == "swiglu":
            with torch.device("meta"):
                width: Any = timm.create_model(arch, num_classes=0, **kwargs).embed_dim
            kwargs |= swiglu_kwargs(width, kwargs.get("mlp_ratio", 4.0))
        return timm.create_model(arch, num_classes=0, **kwargs)
    except (TypeError, AssertionError) as error:
        raise ValueError(f"{arch} cannot be created as a ViT with {kwargs}: {error}") from error


def lacks_class_token_position(backbone: nn.Module) -> bool:
    """Whether a ViT has a class token and positions, but none for the class token: timm's networks with registers."""
    vit: Any = backbone
    positions = getattr(vit, "pos_embed", None)
    return getattr(vit, "cls_token", None) is not None and positions is not None and bool(vit.no_embed_class)


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
    # torch types attributes of modules as Tensor | Module.
    blocks: list[Any] = [block for backbone in backbones for block in backbone.blocks]  # type: ignore[union-attr]
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 4 * len(blocks))
    for block in blocks:
        block.compile(fullgraph=True, backend=backend)
