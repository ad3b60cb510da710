"""Parts of networks that timm lacks: convolutional stems of ViTs, stems for small images, CoCa's pooling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers.patch_embed import PatchEmbed
from torch import Tensor, nn


class ConvStem(PatchEmbed):
    """Patch embedding by 3 × 3 convolutions of stride 2 and one of 1 × 1, as in CTransPath and MoCo v3.

    Args:
        args: Arguments of timm's PatchEmbed.
        widths: Channels after each convolution of stride 2.
        kwargs: Arguments of timm's PatchEmbed.
    """

    def __init__(self, *args: Any, widths: Sequence[int], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        dimension, channels, device = self.proj.out_channels, self.proj.in_channels, self.proj.weight.device
        layers: list[nn.Module] = []
        for width in widths:
            conv = nn.Conv2d(channels, width, kernel_size=3, stride=2, padding=1, bias=False, device=device)
            layers += [conv, nn.BatchNorm2d(width, device=device), nn.ReLU(inplace=True)]
            channels = width
        layers.append(nn.Conv2d(channels, dimension, kernel_size=1, device=device))
        self.proj = nn.Sequential(*layers)  # type: ignore[assignment]


class AttentionPooler(nn.Module):
    """Embedding of CoCa and CONCH: one learned query attends to all tokens; then a norm.

    Args:
        dimension: Width of the embedding.
        tokens: Width of the tokens.
        heads: Attention heads.
        queries: Number of queries, of which the first gives the embedding.
    """

    def __init__(self, dimension: int, *, tokens: int, heads: int, queries: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.zeros(queries, dimension))
        self.attn = nn.MultiheadAttention(dimension, heads, kdim=tokens, vdim=tokens, batch_first=True)
        self.ln_q, self.ln_k = nn.LayerNorm(dimension), nn.LayerNorm(tokens)
        self.norm = nn.LayerNorm(dimension)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (B, T, D) → embeddings (B, dimension)."""
        tokens = self.ln_k(tokens)
        queries = self.ln_q(self.query).expand(len(tokens), -1, -1)
        pooled: Tensor = self.attn(queries, tokens, tokens, need_weights=False)[0]
        return self.norm(pooled[:, 0])
