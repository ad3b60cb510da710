"""Stains of tissue: densities of hematoxylin and eosin, and views that change them."""

from __future__ import annotations

import torch
from torch import Tensor

from repmetrics.data.views import ViewSet

# Rows: optical density of hematoxylin, eosin and DAB in R, G, B (Ruifrok & Johnston 2001), of unit length.
STAINS = torch.nn.functional.normalize(
    torch.tensor([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]]), dim=1
)
SCALE, SHIFT = 0.2, 0.05  # half-widths of the view set's factor on densities, around 1, and of its added density
DARKEST = 1 / 255  # a density needs a positive intensity


def stain_densities(images: Tensor) -> Tensor:
    """Densities of hematoxylin, eosin and a residual (DAB): (B, 3, H, W), natural logarithm.

    Args:
        images: (B, 3, H, W), uint8 or floating in 0 … 1.

    Example:
        >>> pixel = torch.exp(-2 * STAINS[0])[None, :, None, None]  # two units of hematoxylin
        >>> [round(density, 3) + 0.0 for density in stain_densities(pixel).flatten().tolist()]
        [2.0, 0.0, 0.0]
    """
    pixels = images.float() / 255 if images.dtype == torch.uint8 else images
    density = -pixels.clamp(DARKEST, 1).log()
    return torch.einsum("bchw,cs->bshw", density, torch.linalg.inv(STAINS).to(density))


def stain_map(scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Change of densities as an affine map of log-intensities (= −density): matrices (N, 3, 3), offsets (N, 3, 1).

    Args:
        scale: Factor of each stain's density, (N, 3).
        shift: Density added to each stain, (N, 3).
    """
    stains = STAINS.to(scale)
    matrix = stains.T @ (scale[..., None] * torch.linalg.inv(stains.T))
    return matrix, -(shift @ stains)[..., None]


def restain(images: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Images with changed densities of their stains.

    Args:
        images: (B, 3, H, W), floating in 0 … 1.
        scale: Factor of each stain's density, (B, 3).
        shift: Density added to each stain, (B, 3).
    """
    matrix, offset = stain_map(scale.to(images), shift.to(images))
    changed = torch.baddbmm(offset, matrix, images.clamp(DARKEST, 1).log().flatten(2)).exp_().clamp_(max=1)
    return changed.unflatten(2, images.shape[2:])


def jitter_stains(views: Tensor, uniform: Tensor) -> Tensor:
    """Views (B, 3, H, W) with other densities of hematoxylin and eosin, from uniform numbers (B, ≥ 4)."""
    centered = 2 * uniform[:, :4] - 1
    zero = torch.zeros_like(centered[:, :1])
    scale = 1 + torch.cat([SCALE * centered[:, :2], zero], 1)
    return restain(views, scale, torch.cat([SHIFT * centered[:, 2:], zero], 1))


STAIN = ViewSet(
    "stain",
    symmetries=True,
    recolor=jitter_stains,
    summary=f"density of hematoxylin and of eosin × 1 ± {SCALE:g}, + ± {SHIFT:g}",
)
"""Views of stained tissue: geometry in any orientation, and stain jitter. What differs between laboratories may be
ignored; the ratio of the stains within an image may not."""
