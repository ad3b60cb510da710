"""Options of a manifest, and what cannot be. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from fmtrain.slides.resolution import is_plausible_mpp
from fmtrain.slides.tissue import MIN_TISSUE

SplitBy = Literal["patient", "site"]
DEFAULT_MPPS = (0.5,)


@dataclass(frozen=True)
class ManifestOptions:
    """What a manifest is built from besides the slides.

    Attributes:
        mpp: Micrometers per pixel of slides without a plausible value.
        mpp_override: Micrometers per pixel by pattern of names; they replace the file's.
        held_out: Number of held-out patches.
        held_out_fraction: Fraction of the patients or sites that is held out.
        split_by: Unit that is held out as a whole.
        size_px: Side of the held-out patches.
        mpps: Magnifications of the held-out patches.
        min_tissue: Minimum share of tissue in a patch.
        table: CSV of slides with patient, site, mpp, split.
        labels: CSV of labeled squares.
        label: Column of the label.
        patient: Regular expression of the patient in a path, or "folder".
        include: Patterns of names to use.
        exclude: Patterns of names to leave out.
        masks: Folder of tissue masks.
        pseudonyms: File of the key for pseudonyms.
        overwrite: Whether to build anew what exists; else it is extended.
        seed: Seed of the split and of the patches.
    """

    mpp: float | None = None
    mpp_override: Mapping[str, float] = field(default_factory=dict)
    held_out: int = 3840
    held_out_fraction: float = 0.2
    split_by: SplitBy = "patient"
    size_px: int = 256
    mpps: Sequence[float] = DEFAULT_MPPS
    min_tissue: float = MIN_TISSUE
    table: Path | None = None
    labels: Path | None = None
    label: str | None = None
    patient: str | None = None
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    masks: Path | None = None
    pseudonyms: Path | None = None
    overwrite: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.mpp is not None and not is_plausible_mpp(self.mpp):
            raise ValueError(f"mpp must be micrometers per pixel, 0.05 to 10, got {self.mpp:g}")
        if not self.mpps or len(set(self.mpps)) < len(self.mpps) or not all(map(is_plausible_mpp, self.mpps)):
            raise ValueError(f"mpps must be different magnifications, 0.05 to 10 µm per pixel, got {list(self.mpps)}")
        if not 0 < self.held_out_fraction < 1:
            raise ValueError(f"the held-out fraction must lie between 0 and 1, got {self.held_out_fraction}")
        if self.held_out < 2:
            raise ValueError(f"held_out must be 2 or more: a measurement needs at least 2 patches, got {self.held_out}")
