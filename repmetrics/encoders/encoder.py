"""An encoder: a frozen network with its preprocessing and its pooling."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from repmetrics.encoders.architecture import Architecture, StateDict
from repmetrics.encoders.preprocessing import normalize

TokenPool = Literal["cls", "mean", "cls+mean"]


class Pooler(NamedTuple):
    """Weights of an `AttentionPooler`, and its number of heads."""

    state: StateDict
    heads: int

    def build(self) -> nn.Module:
        """The module with its weights."""
        from repmetrics.encoders.components import AttentionPooler

        queries, dimension = self.state["query"].shape
        tokens = self.state["ln_k.weight"].shape[0]
        module = AttentionPooler(dimension, tokens=tokens, heads=self.heads, queries=queries)
        module.load_state_dict(self.state, strict=True)
        return module


@dataclass(frozen=True, eq=False)
class IdentifiedEncoder:
    """An encoder in a checkpoint file, before its network is built.

    Attributes:
        file: Name of the file.
        prefix: Prefix of the weights in the file, with its dot.
        state: Weights in timm's names and float32.
        architecture: Architecture that the weights belong to.
        image_size: Side of the images in pixels.
        mean, std: Normalization per channel, on the scale 0…1.
        notes: What was stated, inferred, assumed or left aside.
        step: Training step recorded in the file, if any.
        inputs: Digests and arguments that determine all of this; None if the file was read without digests.
        pool: Pooling of the tokens; None: the network's own.
        pooler: Attention pooling in the file that is part of the encoder.
    """

    file: str
    prefix: str
    state: StateDict
    architecture: Architecture
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    notes: tuple[str, ...]
    step: int | None
    inputs: tuple[str, ...] | None
    pool: TokenPool | None = None
    pooler: Pooler | None = None

    @property
    def arch(self) -> str:
        """Name of the architecture."""
        return self.architecture.name

    @property
    def source(self) -> str:
        """Name of the file, and prefix of the weights in it."""
        prefix = self.prefix.removeprefix("state_dict.").rstrip(".")
        return f"{self.file}:{prefix}" if prefix else self.file

    @cached_property
    def encoder(self) -> Encoder:
        """The encoder, built at first use."""
        return build(self)


class Encoder(nn.Module):
    """Frozen weights with their preprocessing: images (B, 3, H, W), uint8 or float in 0…1 → features (B, D).

    The features are those of `pool`. Without it, they are the class token after the final norm if the model has one,
    else its own pooling.

    Attributes:
        model: Model of timm, in eval mode.
        arch: Name of the architecture.
        arch_kwargs: Arguments of ``timm.create_model`` beside `arch`; None if inferred from shapes.
        image_size, mean, std, source, notes, step, pool: As in `IdentifiedEncoder`.
    """

    def __init__(self, model: nn.Module, identified: IdentifiedEncoder) -> None:
        super().__init__()
        self.model = model
        self.pooler = identified.pooler.build() if identified.pooler else None
        self.arch, self.arch_kwargs = identified.arch, identified.architecture.kwargs
        self.image_size, self.mean, self.std = identified.image_size, identified.mean, identified.std
        self.source, self.notes, self.step = identified.source, identified.notes, identified.step
        self.pool = identified.pool
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """Normalize images (B, 3, H, W) and apply the model: features (B, D)."""
        patch_embed: Any = getattr(self.model, "patch_embed", None)
        if getattr(patch_embed, "strict_img_size", False) and images.shape[-2:] != patch_embed.img_size:
            raise ValueError(
                f"{self.arch} takes images of {patch_embed.img_size}, got {tuple(images.shape[-2:])}: pass --image-size"
            )
        inputs, model = normalize(images, mean=self.mean, std=self.std), self.model
        if self.pooler is None and self.pool is None:
            features: Tensor = model(inputs)
            return features
        tokens: Tensor = model.forward_features(inputs)  # type: ignore[operator]
        if self.pooler is not None:
            return self.pooler(tokens)
        return _pooled(model, tokens, self.pool)


def _pooled(model: Any, tokens: Tensor, pool: TokenPool | None) -> Tensor:
    """Class token, mean of the patch tokens, or both concatenated, of (B, T, D)."""
    parts = []
    if pool in ("cls", "cls+mean"):
        parts.append(tokens[:, 0])
    if pool in ("mean", "cls+mean"):
        parts.append(tokens[:, model.num_prefix_tokens :].mean(1))
    return torch.cat([model.fc_norm(part) for part in parts], dim=1)


def build(identified: IdentifiedEncoder) -> Encoder:
    """Build the network of an identified encoder and load its weights strictly."""
    model = identified.architecture.construct()
    model.load_state_dict(identified.state, strict=True)
    return Encoder(model, identified)
