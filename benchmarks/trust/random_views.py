"""Random views of a batch of images, computed on the images' device."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

GRAY = (0.299, 0.587, 0.114)


class ViewSettings(NamedTuple):
    """Strength of the augmentations.

    Attributes:
        min_area: Smallest area of a crop, as a share of the image; the largest is 1.
        jitter: Strength of the color jitter, relative to SimCLR's for CIFAR-10 (brightness, contrast and saturation
            ± 0.4, channels ± 0.15).
        grayscale: Probability of a gray view.
        quarter_turns: Whether views are also turned by multiples of 90° and mirrored upside down.
    """

    min_area: float = 0.2
    jitter: float = 1.0
    grayscale: float = 0.2
    quarter_turns: bool = False


def random_views(
    images: Tensor, settings: ViewSettings, *, size: int, area: tuple[float, float] | None = None
) -> Tensor:
    """One view (B, 3, size, size) in 0 … 1 of each image, drawn from the generator of the images' device.

    Args:
        images: Images (B, 3, H, W), uint8.
        settings: Strength of the augmentations.
        size: Side of the views.
        area: Range of a crop's area, in place of ``settings.min_area`` … 1.
    """
    views = images.to(torch.float32) / 255
    views = _crop(views, area or (settings.min_area, 1.0), size=size, quarter_turns=settings.quarter_turns)
    if settings.jitter or settings.grayscale:
        views = _recolor(views, settings)
    return views


def _crop(images: Tensor, area: tuple[float, float], *, size: int, quarter_turns: bool) -> Tensor:
    """Crops with an aspect ratio of exp(± 0.29), half of them mirrored."""
    count, device = len(images), images.device
    u = torch.rand(6, count, device=device)
    share = area[0] + (area[1] - area[0]) * u[0]
    ratio = torch.exp((2 * u[1] - 1) * 0.29)
    wide, high = (share * ratio).sqrt().clamp(max=1), (share / ratio).sqrt().clamp(max=1)
    x, y = (2 * u[2] - 1) * (1 - wide), (2 * u[3] - 1) * (1 - high)
    mirror = torch.where(u[4] < 0.5, -1.0, 1.0)
    turn = (u[5] * 4).floor() * (math.pi / 2) if quarter_turns else torch.zeros_like(x)
    cos, sin = turn.cos(), turn.sin()
    theta = torch.stack([mirror * wide * cos, -wide * sin, x, mirror * high * sin, high * cos, y], 1).view(-1, 2, 3)
    grid = F.affine_grid(theta, [count, 3, size, size], align_corners=False)
    return F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)


def _recolor(images: Tensor, settings: ViewSettings) -> Tensor:
    count, device = len(images), images.device
    u = torch.rand(8, count, 1, 1, 1, device=device)
    strength = settings.jitter * (u[0] < 0.8)
    brightness, contrast, saturation = (1 + strength * 0.4 * (2 * u[k] - 1) for k in (1, 2, 3))
    channels = 1 + strength * 0.15 * (2 * u[4:7, :, 0].permute(1, 0, 2, 3) - 1)
    images = images * brightness
    mean = images.mean((1, 2, 3), keepdim=True)
    images = mean + (images - mean) * contrast
    gray = sum(weight * images[:, c : c + 1] for c, weight in enumerate(GRAY))
    saturation = torch.where(u[7] < settings.grayscale, 0.0, saturation)
    return ((gray + (images - gray) * saturation) * torch.where(u[7] < settings.grayscale, 1.0, channels)).clamp(0, 1)
