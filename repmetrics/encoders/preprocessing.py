"""Normalization of images: mean and standard deviation per channel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def normalize(images: Tensor, *, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Images for an encoder: uint8 (B, C, H, W) is divided by 255, then (x − mean)/std for each channel.

    Floating input is taken as already in 0 … 1 and only gets mean and std.

    Example:
        >>> normalize(torch.full((1, 3, 1, 1), 255, dtype=torch.uint8), mean=[0.5] * 3, std=[0.5] * 3).flatten()
        tensor([1., 1., 1.])
    """
    scaled = images.to(torch.float32).div(255) if images.dtype == torch.uint8 else images
    shape = (1, -1, 1, 1)
    centre = torch.tensor(mean, dtype=scaled.dtype, device=scaled.device).view(shape)
    return (scaled - centre) / torch.tensor(std, dtype=scaled.dtype, device=scaled.device).view(shape)
