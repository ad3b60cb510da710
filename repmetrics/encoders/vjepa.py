"""V-JEPA 2's encoder of videos, for images: an image is a video of one tubelet of equal frames."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from repmetrics.encoders.architecture import (
    Architecture,
    Choices,
    StateDict,
    activation,
    construct,
    norm,
    without_values,
)
from repmetrics.encoders.vit import default_heads

BASE = 10_000.0


class RotaryAttention(nn.Module):
    """Attention whose queries and keys are rotated by the row and the column of their patch, as in V-JEPA 2.

    The channels of a head are three equal parts, for frame, row and column, and a rest. The frame is 0, so that its
    part and the rest are not rotated. In a part of d channels, channel c turns by position / BASE^(2(c mod d/2)/d).

    Args:
        dimension: Width of the tokens.
        heads: Attention heads.
        bias: Whether queries, keys and values have a bias.
    """

    def __init__(self, dimension: int, *, heads: int, bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(dimension, 3 * dimension, bias=bias), nn.Linear(dimension, dimension)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Tokens (B, T, D) of a square of patches → tokens (B, T, D)."""
        batch, count, width = x.shape
        q, k, v = self.qkv(x).reshape(batch, count, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        angles = _angles(count, width // self.heads, like=q)
        q, k = _rotated(q, angles), _rotated(k, angles)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask, is_causal=is_causal)
        attended: Tensor = self.proj(out.transpose(1, 2).reshape(batch, count, width))
        return attended


def _angles(count: int, channels: int, *, like: Tensor) -> Tensor:
    """Angle of each channel of each patch, (T, channels)."""
    side, part = round(count**0.5), 2 * (channels // 3 // 2)
    frequencies = BASE ** -(torch.arange(part // 2, device=like.device, dtype=like.dtype) / (part / 2))
    patches = torch.arange(count, device=like.device)
    angles = torch.zeros(count, channels, device=like.device, dtype=like.dtype)
    for start, position in ((part, patches // side), (2 * part, patches % side)):
        angles[:, start : start + part] = (position[:, None] * frequencies).repeat(1, 2)
    return angles


def _rotated(x: Tensor, angles: Tensor) -> Tensor:
    pairs = x.unflatten(-1, (-1, 2))
    turned = torch.stack((-pairs[..., 1], pairs[..., 0]), dim=-1).flatten(-2)
    return x * angles.cos() + turned * angles.sin()


def is_video(raw: StateDict) -> bool:
    """Whether the raw weights of an encoder are those of an encoder of videos."""
    return any(key.endswith("proj.weight") and value.ndim == 5 for key, value in raw.items())


def infer_vjepa(state: StateDict, choices: Choices) -> Architecture:
    """V-JEPA 2's encoder with these weights in timm's names, its first layer summed over the frames of a tubelet."""
    if "pos_embed" in state or "blocks.0.attn.qkv.weight" not in state:
        raise ValueError(
            "an encoder of videos other than V-JEPA 2: it has positions for a number of frames, and images are not "
            "scored with it"
        )
    width, patch = state["norm.weight"].shape[0], state["patch_embed.proj.weight"].shape[-1]
    depth = 1 + max(int(match[1]) for key in state if (match := re.match(r"blocks\.(\d+)\.", key)))
    size = choices.take("img_size", 256, "images of {} px")
    default = 0 if choices.has("num_heads") else 16 if width == 1280 else default_heads(width)
    heads = choices.take("num_heads", default, "{} attention heads")
    if width % heads:
        raise ValueError(f"{heads} attention heads do not divide a width of {width}: pass --arch-kwargs")
    kwargs: dict[str, Any] = {
        "img_size": size, "patch_size": patch, "embed_dim": width, "depth": depth, "num_heads": heads,
        "mlp_ratio": (state["blocks.0.mlp.fc1.weight"].shape[0] + 0.5) / width, "class_token": False,
        "pos_embed": "none", "global_pool": "avg", "fc_norm": False, "num_classes": 0, "dynamic_img_size": True,
        "qkv_bias": "blocks.0.attn.qkv.bias" in state, "norm_layer": norm(choices.take("norm_eps", 1e-6, "epsilon {}")),
        "act_layer": activation(choices.take("act_layer", "gelu", "activation {}")),
    }  # fmt: skip
    build = partial(construct, _vjepa, kwargs, choices.given)
    note = (
        "an encoder of videos: each image is repeated for the frames of one tubelet; features averaged over the tokens"
    )
    return Architecture(f"vjepa2_{width}x{depth}", build, without_values(build), size, (*choices.notes(), note))


def _vjepa(**kwargs: Any) -> nn.Module:
    """ViT of timm without positions, whose attention is rotary."""
    model = VisionTransformer(**kwargs)
    for block in model.blocks:
        heads, bias = kwargs["num_heads"], kwargs["qkv_bias"]
        block.attn = RotaryAttention(kwargs["embed_dim"], heads=heads, bias=bias)
    return model
