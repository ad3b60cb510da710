"""All free-label signals of an encoder on the held-out patches of a manifest."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from fmtrain.evaluation.free_labels import Places, free_label_battery, image_labels
from fmtrain.evaluation.stain_margin import (
    StainMoments,
    choose_donors,
    patch_moments,
    restain_as,
    slide_moments,
    stain_margin,
)
from fmtrain.manifest.manifest import Manifest
from fmtrain.patches.dataset import HeldOutPatches
from repmetrics.measurement.measure import measure
from repmetrics.measurement.result import Measurement
from repmetrics.probes.common import color_statistics


def measure_free_labels(
    encoder: Callable[[Tensor], Tensor],
    manifest: Path,
    *,
    batch_size: int = 64,
    num_workers: int = 0,
    device: torch.device | str = "cpu",
    on_batch: Callable[[int], None] | None = None,
) -> dict[str, Measurement]:
    """Skills beyond color, adjacency, cross-stain margin, and leakage of slide, patient and site.

    The patches pass through the encoder six times: once as they are, and once in the stain of each of five slides.

    Args:
        encoder: Function: uint8 patches (B, 3, S, S) → features (B, D). It is called as it is.
        manifest: Manifest, as `fmtrain manifest` writes it.
        batch_size: Patches per batch.
        num_workers: Processes that read patches.
        device: Device of the patches.
        on_batch: Function called with the number of patches of each batch, to show progress.

    Raises:
        ValueError: The held-out patches are of one patient or of one slide.
    """
    dataset = HeldOutPatches(manifest)
    places = places_of(dataset.manifest)

    def batches() -> Iterator[Tensor]:
        for batch in DataLoader(dataset, batch_size=batch_size, num_workers=num_workers):
            yield batch["image"].to(device)
            if on_batch is not None:
                on_batch(len(batch["image"]))

    features: list[Tensor] = []
    colors: list[Tensor] = []
    moments: list[Tensor] = []
    labels: list[dict[str, Tensor]] = []
    start = 0
    with torch.no_grad():
        for images in batches():
            mpp = places.mpp[start : start + len(images)].to(images.device)
            start += len(images)
            features.append(encoder(images).cpu())
            colors.append(color_statistics(images).cpu())
            moments.append(patch_moments(images).cpu())
            labels.append({name: label.cpu() for name, label in image_labels(images, mpp=mpp).items()})
        stains, slides = slide_moments(torch.cat(moments), places.slides)
        donors = choose_donors(slides)
        restained = _restained_features(encoder, batches(), stains, slides, donors)
    values = torch.cat(features)
    joined = {name: torch.cat([label[name] for label in labels]) for name in labels[0]}
    patients = list(places.patients)
    leakage = measure(values, groups=patients, metrics=["slide_leakage", "neighbor_leakage"], jackknife="none")
    return {
        **free_label_battery(values, joined, torch.cat(colors), places),
        "stain_margin": stain_margin(values, restained, donors=donors, slides=slides, patients=patients),
        **leakage,
    }


def _restained_features(
    encoder: Callable[[Tensor], Tensor],
    batches: Iterator[Tensor],
    stains: StainMoments,
    slides: Tensor,
    donors: Tensor,
) -> Tensor:
    """Features (N, K, D) of the patches in the stain of their donor slides."""
    parts, start = [], 0
    for images in batches:
        rows = slice(start, start + len(images))
        source = StainMoments(*(part[slides[rows]].to(images.device) for part in stains))
        views = []
        for donor in donors[rows].T:
            target = StainMoments(*(part[donor].to(images.device) for part in stains))
            views.append(encoder(restain_as(images, source, target)).cpu())
        parts.append(torch.stack(views, dim=1))
        start += len(images)
    return torch.cat(parts)


def places_of(manifest: Manifest) -> Places:
    """Origin of each held-out patch of a manifest."""
    entries = {slide.info.name: slide for slide in manifest.slides}
    owners = [entries[patch.slide] for patch in manifest.held_out]
    half = torch.tensor([manifest.size_px * patch.mpp / 2 for patch in manifest.held_out])
    corners = [(p.x * o.info.mpp, p.y * o.info.mpp) for p, o in zip(manifest.held_out, owners, strict=True)]
    return Places(
        patients=[owner.patient for owner in owners],
        sites=[owner.site for owner in owners],
        slides=[patch.slide for patch in manifest.held_out],
        centers=torch.tensor(corners, dtype=torch.float64) + half[:, None],
        mpp=torch.tensor([patch.mpp for patch in manifest.held_out], dtype=torch.float64),
        side_px=manifest.size_px,
    )
