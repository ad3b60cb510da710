"""Options of the training patches. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fmtrain.domains import check_domain
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
        for name in ("size_px", "crops_per_block", "open_slides", "patches_per_slide", "patches_in_total"):
            check_domain(name, getattr(self, name), minimum=1)
        check_domain("seed", self.seed, minimum=0)
        check_domain("mpp", self.mpp, above=0)
        check_domain("mpp_weights", self.mpp_weights, minimum=0)
        if self.mpp_weights is not None and not any(self.mpp_weights):
            raise ValueError("mpp_weights must have a value above 0: with zeros alone, no magnification is drawn")
        check_domain("slide_fraction", self.slide_fraction, above=0, maximum=1)
        for name in ("min_tissue", "min_stained", "max_failed_fraction"):
            check_domain(name, getattr(self, name), minimum=0, maximum=1)
        if self.mpp is not None and not self.mpp:
            raise ValueError("mpp must have a value: leave it out to use those of the manifest")
        fixed = [n for n in (self.patches_per_slide, self.patches_in_total) if n is not None]
        if len(fixed) > 1:
            raise ValueError("give patches_per_slide or patches_in_total, not both")
        if fixed and self.crops_per_block > 1:
            raise ValueError(f"crops_per_block must be 1 for a fixed number of patches, got {self.crops_per_block}")
