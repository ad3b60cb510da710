"""Options of the training patches. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fmtrain.patches.sampling import SlideChoice


@dataclass(frozen=True, kw_only=True)
class PatchOptions:
    """Options of the training patches, checked when they are created.

    Args:
        size_px: Side of the patches in pixels. Patches larger than the crops give these context.
        seed: Seed of the patches.
        mpp: Magnifications to draw from; default those of the manifest.
        mpp_weights: Weights of the magnifications; equal by default.
        continuous_mpp: Whether to draw mpp from the whole range between the smallest and the largest.
        slide_weighting: Weights of the slides. "slide": equal per slide; "patient": equal per patient; "area": by
            tissue area.
        slide_fraction: Fraction of the training slides; smaller fractions are subsets of larger ones.
        patches_per_slide: Number of distinct patches per slide; default unlimited.
        patches_in_total: Number of distinct patches, spread evenly over the slides; default unlimited.
        crops_per_block: Number of patches cut from each block of pixels that is read. 4 is about 4 times as fast as 1;
            `training_batches` puts patches of one block into different batches.
        min_tissue: Minimum share of tissue in a patch; default that of the manifest.
        min_stained: Minimum share of a patch's pixels in the hue of H&E, 0.6 in several models; default no filter.
        max_failed_fraction: Maximum fraction of the slides that may fail before the run stops.
        open_slides: Number of slides kept open per worker.
    """

    size_px: int
    seed: int
    mpp: Sequence[float] | None = None
    mpp_weights: Sequence[float] | None = None
    continuous_mpp: bool = False
    slide_weighting: SlideChoice = "slide"
    slide_fraction: float = 1.0
    patches_per_slide: int | None = None
    patches_in_total: int | None = None
    crops_per_block: int = 1
    min_tissue: float | None = None
    min_stained: float | None = None
    max_failed_fraction: float = 0.1
    open_slides: int = 32

    def __post_init__(self) -> None:
        if self.size_px < 1 or (self.mpp is not None and min(self.mpp, default=0) <= 0):
            raise ValueError(f"size_px and mpp must be positive, got {self.size_px} and {self.mpp}")
        counts = [n for n in (self.patches_per_slide, self.patches_in_total) if n is not None]
        if len(counts) > 1:
            raise ValueError("give patches_per_slide or patches_in_total, not both")
        if counts and counts[0] < 1:
            raise ValueError(f"the number of patches must be ≥ 1, got {counts[0]}")
        if self.crops_per_block < 1 or (counts and self.crops_per_block > 1):
            raise ValueError(
                f"crops_per_block must be ≥ 1, and 1 for a fixed number of patches, got {self.crops_per_block}"
            )
