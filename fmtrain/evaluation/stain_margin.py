"""Cross-stain margin: whether features follow the tissue of a patch or the stain of a slide."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from fmtrain.patches.stains import restain, stain_densities
from repmetrics.functional.ids import factorize
from repmetrics.measurement.result import Measurement
from repmetrics.probes.ridge import rowwise_measurement

DONORS = 5
"""Number of other slides whose stain each patch receives."""


class StainMoments(NamedTuple):
    """Mean and standard deviation of the density of hematoxylin and eosin, (…, 2) float64 each."""

    mean: Tensor
    std: Tensor


def patch_moments(images: Tensor) -> Tensor:
    """Mean and mean square of the densities of hematoxylin and eosin in each patch: (B, 2, 2) float64.

    Args:
        images: (B, 3, S, S), uint8 or floating in 0 … 1.
    """
    densities = stain_densities(images)[:, :2].flatten(2).double()
    return torch.stack([densities.mean(2), densities.square().mean(2)], dim=1)


def slide_moments(patches: Tensor, slides: Sequence[Hashable]) -> tuple[StainMoments, Tensor]:
    """Moments of each slide (G, 2), from those of its patches (N, 2, 2), and the slide (N,) of each patch."""
    index, names = factorize(slides)
    sums = patches.new_zeros(len(names), 2, 2).index_add_(0, index, patches)
    mean, square = (sums / torch.bincount(index)[:, None, None]).unbind(1)
    return StainMoments(mean, (square - mean.square()).clamp_min(0).sqrt()), index


def choose_donors(index: Tensor, *, seed: int = 0) -> Tensor:
    """Donor slides (N, K) of each patch: distinct random slides other than its own, K = min(5, G − 1)."""
    slides = int(index.max()) + 1
    if slides < 2:
        raise ValueError("the cross-stain margin needs patches of at least two slides, got one")
    order = torch.rand(len(index), slides, generator=torch.Generator().manual_seed(seed))
    order.scatter_(1, index[:, None], 2.0)
    return order.argsort(1)[:, : min(DONORS, slides - 1)]


def restain_as(images: Tensor, source: StainMoments, donor: StainMoments) -> Tensor:
    """Images with the stain of other slides: densities with the mean and the standard deviation of the donor.

    Args:
        images: (B, 3, S, S), uint8 or floating in 0 … 1.
        source: Moments of the slide of each image, (B, 2).
        donor: Moments of the slide to imitate, (B, 2).

    Returns:
        (B, 3, S, S) in the dtype of ``images``.
    """
    pixels = images.float() / 255 if images.dtype == torch.uint8 else images
    scale = donor.std / source.std.clamp_min(1e-6)
    shift = donor.mean - scale * source.mean
    ones, zeros = torch.ones_like(scale[:, :1]), torch.zeros_like(scale[:, :1])
    changed = restain(pixels, torch.cat([scale, ones], 1), torch.cat([shift, zeros], 1))
    return (changed * 255).round().to(torch.uint8) if images.dtype == torch.uint8 else changed


def stain_margin(
    features: Tensor, restained: Tensor, *, donors: Tensor, slides: Tensor, patients: Sequence[Hashable]
) -> Measurement:
    """Cross-stain margin: median over patches of (d_OS − d_SO)/(d_OS + d_SO), mean over donors.

    d_SO is the distance of a patch to its restained self, d_OS that of the restained self to the nearest true patch of
    the donor slide. Features that follow tissue have d_SO ≪ d_OS.

    Convention: cosine distance of features centered by the mean of the true patches.

    Args:
        features: (N, D) features of the patches.
        restained: (N, K, D) features of the patches in the stain of K other slides.
        donors: (N, K) these slides.
        slides: (N,) int64, the slide of each patch.
        patients: Patient of each patch.

    Returns:
        −1 … 1, higher is better; ``details["worst_tenth"]`` is the mean of the lowest tenth of patches.
    """
    count = restained.shape[1]
    center = features.double().mean(0)
    true, moved = (torch.nn.functional.normalize(x.double() - center, dim=-1).cpu() for x in (features, restained))
    to_self = 1 - (moved * true[:, None]).sum(2)
    to_donor = torch.empty_like(to_self)
    for slide in donors.unique().tolist():
        taken = donors == slide
        to_donor[taken] = 1 - (moved[taken] @ true[slides == slide].T).max(1).values
    total = to_donor + to_self
    margins = torch.where(total > 0, (to_donor - to_self) / total, 0.0).mean(1)
    measured = rowwise_measurement(
        "stain_margin",
        lambda kept: float(margins[kept].median()),
        features,
        groups=list(patients),
        direction="higher",
        convention=f"median of (d_OS − d_SO)/(d_OS + d_SO), {count} donor slides; centered, cosine",
        undefined="",
    )
    worst = margins.sort().values[: max(1, len(margins) // 10)].mean()
    return replace(measured, details={"worst_tenth": float(worst)})
