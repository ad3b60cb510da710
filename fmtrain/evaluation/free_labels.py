"""Free-label battery: what features tell of tissue, by labels that cost nothing, and of its laboratory.

A label that the augmentation destroys, such as color, would punish a good invariance. The labels are therefore
morphology, and their skill is that beyond color statistics.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fmtrain.methods.multicrop import YIQ, gaussian_blur
from fmtrain.patches.stains import stain_densities
from repmetrics.functional.hypersphere import centered_directions
from repmetrics.functional.ids import factorize
from repmetrics.measurement.result import Measurement
from repmetrics.probes.ridge import ridge_probe, rowwise_measurement

GRADIENT_SCALES_UM = (1.0, 4.0)
NEAR = 2.0
"""Sides of a patch within which the centers of two adjacent patches lie; from 1 on, patches do not overlap."""
FAR = 3.0
"""Sides of a patch beyond which two patches of a slide are far from each other."""
NEIGHBORS = 10


class Places(NamedTuple):
    """Origin of each patch.

    Attributes:
        patients: Patient of each patch.
        sites: Tissue source site of each patch.
        slides: Slide of each patch.
        centers: (N, 2) center in µm.
        mpp: (N,) micrometers per pixel.
        side_px: Side of the patches in pixels.
    """

    patients: Sequence[Hashable]
    sites: Sequence[Hashable]
    slides: Sequence[Hashable]
    centers: Tensor
    mpp: Tensor
    side_px: int


def image_labels(images: Tensor, *, mpp: Tensor) -> dict[str, Tensor]:
    """Free labels of patches, (B,) float64 each.

    - ``hematoxylin``, ``hematoxylin_sd``: mean and standard deviation of the density of hematoxylin;
    - ``gradient_1um``, ``gradient_4um``: log of the mean squared gradient of gray, smoothed by 1 and 4 µm;
    - ``magnification``: log of the micrometers per pixel.

    Args:
        images: (B, 3, S, S), uint8 or floating in 0 … 1.
        mpp: (B,) micrometers per pixel.
    """
    pixels = images.float() / 255 if images.dtype == torch.uint8 else images.float()
    density = stain_densities(pixels)[:, 0].flatten(1).double()
    labels = {"hematoxylin": density.mean(1), "hematoxylin_sd": density.std(1, correction=0)}
    gray = torch.einsum("bchw,c->bhw", pixels, YIQ[0].to(pixels))[:, None]
    for scale in GRADIENT_SCALES_UM:
        sigma = (scale / mpp).to(pixels)
        smooth = gaussian_blur(gray, sigma=sigma, radius=math.ceil(3 * float(sigma.max())))
        energy = sum(smooth.diff(dim=axis).square().mean((1, 2, 3)) for axis in (2, 3))
        assert isinstance(energy, Tensor)
        # per µm², so that patches of several magnifications compare
        labels[f"gradient_{scale:g}um"] = (energy.double() / mpp.to(energy).double().square()).clamp_min(1e-12).log()
    return labels | {"magnification": mpp.double().log()}


def free_label_battery(
    features: Tensor, labels: dict[str, Tensor], colors: Tensor, places: Places
) -> dict[str, Measurement]:
    """Skills beyond color, spatial adjacency, and leakage, with whole patients held out.

    Args:
        features: (N, D) features of the patches.
        labels: Result of :func:`image_labels`, concatenated.
        colors: (N, 6) result of :func:`repmetrics.probes.common.color_statistics`.
        places: Origin of each patch.

    Returns:
        By name: ``<label>_skill`` for each label that varies, ``adjacency``, ``site_leakage``. For leakage by slide and
        patient, see ``slide_leakage`` and ``neighbor_leakage`` of :data:`repmetrics.METRICS`.

    Raises:
        ValueError: Wrong shapes, NaN or Inf, or a single patient.
    """
    skills = [
        ridge_probe(features, label, name=f"{name}_skill", groups=list(places.patients), beyond=colors)
        for name, label in labels.items()
        if label.max() > label.min()
    ]
    others = [adjacency(features, places), site_leakage(features, places)]
    return {m.name: m for m in [*skills, *others]}


def adjacency(features: Tensor, places: Places) -> Measurement:
    """Spatial adjacency: P[d(anchor, adjacent patch) < d(anchor, far patch)] within a slide, by cosine distance.

    Slide and stain are the same for all patches of a comparison, and so cancel. Adjacent patches do not overlap: their
    centers are 1 to 2 sides apart, in the larger of both directions. Far patches are 3 sides apart or more. Both have
    the magnification of the anchor. Ties count half; anchors have equal weight.

    Returns:
        0.5 … 1, higher is better; NaN without such patches.
    """
    unit = centered_directions(features).cpu()
    shares = torch.full((len(unit),), math.nan, dtype=torch.float64)
    keys = list(zip(places.slides, places.mpp.tolist(), strict=True))
    index, names = factorize(keys)
    for number, (_, mpp) in enumerate(names):
        rows = (index == number).nonzero().flatten()
        centers = places.centers[rows].double()
        apart = (centers[:, None] - centers).abs().amax(2) / (places.side_px * mpp)
        near, far = (apart >= 1 - 1e-6) & (apart <= NEAR), apart >= FAR
        distances = 1 - unit[rows] @ unit[rows].T
        for anchor in (near.any(1) & far.any(1)).nonzero().flatten().tolist():
            to_near, to_far = distances[anchor, near[anchor]][:, None], distances[anchor, far[anchor]]
            shares[rows[anchor]] = ((to_near < to_far).double() + (to_near == to_far).double() / 2).mean()
    return rowwise_measurement(
        "adjacency",
        lambda kept: float(shares[kept].nanmean()),
        features,
        groups=list(places.patients),
        direction="higher",
        convention="P[d(anchor, patch 1–2 sides away) < d(anchor, patch ≥ 3 sides away)], one slide and mpp; cosine",
        undefined="no slide has an adjacent and a far patch of one magnification",
    )


def site_leakage(features: Tensor, places: Places) -> Measurement:
    """Rate at which the 10 nearest patches of *other patients* share the tissue source site, over chance.

    Chance of a patch is the share of its site among the patches of other patients. Patches whose site has no other
    patient are left out.

    Returns:
        ≥ 0; 1 is chance, lower is better; NaN if no site has two patients.
    """
    unit = centered_directions(features).cpu()
    patient, site = factorize(places.patients)[0], factorize(places.sites)[0]
    other = patient[:, None] != patient
    same_site = (site[:, None] == site) & other
    chance = same_site.double().sum(1) / other.double().sum(1)
    cosine = (unit @ unit.T).masked_fill(~other, -torch.inf)
    k = min(NEIGHBORS, int(other.sum(1).min()))
    rate = same_site.gather(1, cosine.topk(max(k, 1), dim=1).indices).double().mean(1)
    usable = chance > 0
    return rowwise_measurement(
        "site_leakage",
        lambda kept: float(rate[kept & usable].sum() / chance[kept & usable].sum()),
        features,
        groups=list(places.patients),
        direction="lower",
        convention=f"same-site rate among {NEIGHBORS} nearest patches of other patients ÷ chance; centered, cosine",
        undefined="no tissue source site has two patients",
    )
