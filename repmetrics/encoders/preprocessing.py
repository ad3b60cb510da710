"""Normalize images by mean and standard deviation per channel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def normalize(images: Tensor, *, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Scale uint8 images (B, C, H, W) by 1/255, and compute (x − mean)/std per channel.

    Floating images are expected in 0 … 1 and are not scaled.

    Example:
        >>> normalize(torch.full((1, 3, 1, 1), 255, dtype=torch.uint8), mean=[0.5] * 3, std=[0.5] * 3).flatten()
        tensor([1., 1., 1.])
    """
    scaled = images.to(torch.float32).div(255) if images.dtype == torch.uint8 else images
    shape = (1, -1, 1, 1)
    center = torch.tensor(mean, dtype=scaled.dtype, device=scaled.device).view(shape)
    return (scaled - center) / torch.tensor(std, dtype=scaled.dtype, device=scaled.device).view(shape)
