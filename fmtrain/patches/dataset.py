"""Patches for PyTorch: endless random ones for training, frozen ones to measure on. uint8, (3, S, S)."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from fmtrain.manifest.manifest import FORMAT, Manifest, check_all_unchanged
from fmtrain.patches.planner import PatchSpec, Planner
from fmtrain.patches.sampling import MAX_ATTEMPTS, SlideChoice
from fmtrain.patches.slide_pool import SlidePool, with_retries
from fmtrain.slides.slide import SlideError, resize
from fmtrain.slides.tissue import stained_share
from repmetrics.data.source import Source

Pixels = npt.NDArray[np.uint8]
log = logging.getLogger(__name__)
_NEVER = 2**63 - 1


class TooManyFailedSlidesError(RuntimeError):  # reads as the sentence it is
    """So many slides failed that the run no longer trains on what was meant."""

    def __init__(self, message: str) -> None:
        # From a worker, torch passes on a message that is a whole traceback: its last line is ours.
        super().__init__(message.rstrip().splitlines()[-1].rpartition("TooManyFailedSlidesError: ")[2])


class TrainingPatches(Dataset[Tensor]):
    """Endless random patches of random slides. Item i is a pure function of the seed and i.

    Handles are opened in the worker that reads. A slide that fails is closed, quarantined by name for all
    workers, and its patch drawn anew, by the same function.

    Args:
        manifest: what `fmtrain manifest` wrote.
        size_px: side of the patches; larger than the crops made of them gives these context.
        mpp: magnifications to draw from; default those of the manifest.
        seed: of the patches.
        mpp_weights: how often each magnification; equal by default.
        continuous: draw mpp from the whole range between the smallest and the largest.
        slide_weighting: "slide": all alike; "patient": all patients alike; "area": by tissue area.
        fraction: of the training slides; smaller fractions lie within larger ones.
        patches_per_slide: so many distinct patches of each slide; default endlessly many.
        patches_in_total: so many distinct patches, spread evenly over the slides.
        crops_per_block: patches cut from each block of pixels that is read: 4 read about 4 times as fast, and
            `training_batches` keeps them out of each other's batches.
        min_tissue: share of a patch that is tissue; default the manifest's.
        min_stained: share of a patch's pixels in the hue of H&E, 0.6 in several models; default no such filter.
        max_failed_fraction: share of the slides that may fail before the run stops.
        open_slides: handles kept open in each worker.

    Raises:
        ValueError: an option that cannot be, or no slide that serves it.
    """

    def __init__(
        self,
        manifest: Path,
        *,
        size_px: int,
        mpp: Sequence[float] | None = None,
        seed: int,
        mpp_weights: Sequence[float] | None = None,
        continuous_mpp: bool = False,
        slide_weighting: SlideChoice = "slide",
        slide_fraction: float = 1.0,
        patches_per_slide: int | None = None,
        patches_in_total: int | None = None,
        crops_per_block: int = 1,
        min_tissue: float | None = None,
        min_stained: float | None = None,
        max_failed_fraction: float = 0.1,
        open_slides: int = 32,
    ) -> None:
        self.manifest = Manifest.load(manifest)
        self.planner = Planner(
            self.manifest,
            size_px=size_px,
            mpps=self.manifest.mpps if mpp is None else mpp,
            seed=seed,
            mpp_weights=mpp_weights,
            continuous_mpp=continuous_mpp,
            slide_weighting=slide_weighting,
            slide_fraction=slide_fraction,
            patches_per_slide=patches_per_slide,
            patches_in_total=patches_in_total,
            crops_per_block=crops_per_block,
            min_tissue=min_tissue,
            cached_slides=open_slides,
        )
        self.slides = self.planner.slides
        self.size_px, self.crops_per_block = size_px, crops_per_block
        self.min_stained, self.max_failed_fraction, self.open_slides = min_stained, max_failed_fraction, open_slides
        # Of each slide the first block it failed at. Shared: what one worker found faulty no other tries again.
        self._faulty_from = torch.full((len(self.slides),), _NEVER).share_memory_()
        self._clear_cache()

    def _clear_cache(self) -> None:
        """What belongs to one process: opened anew in each."""
        self._pid = -1
        self._open = SlidePool(capacity=self.open_slides)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in {"_open", "_pid"}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._clear_cache()

    @property
    def distinct(self) -> int | None:
        """How many different patches there are; None: endlessly many."""
        return self.planner.distinct

    @property
    def quarantined(self) -> dict[str, int]:
        """The slides that failed, in any worker of this rank, by name; and from which block of patches on."""
        failed = ((self.slides[k].info.name, since) for k, since in enumerate(self._faulty_from.tolist()))
        return {name: since for name, since in failed if since != _NEVER}

    def quarantine(self, since: Mapping[str, int]) -> None:
        """Take up the quarantine of an earlier run, as its `quarantined` told it."""
        for k, slide in enumerate(self.slides):
            self._faulty_from[k] = since.get(slide.info.name, _NEVER)

    def check_unchanged(self) -> None:
        """Compare the training slides with what they were when the manifest was written.

        Raises:
            SlideError: one has changed, is gone, or cannot be read.
        """
        check_all_unchanged(self.slides)

    def plan(self, index: int, *, attempt: int = 0) -> PatchSpec | None:
        """What patch `index` is, at a given attempt; see `Planner.plan`."""
        faulty = (self._faulty_from <= index // self.crops_per_block).nonzero().ravel().tolist()
        return self.planner.plan(index, attempt=attempt, faulty=faulty)

    def __getitem__(self, index: int) -> Tensor:
        """Patch `index`: uint8 (3, size_px, size_px).

        Raises:
            TooManyFailedSlidesError: more than `max_failed_fraction` of the slides failed.
        """
        out = np.empty((self.size_px, self.size_px, 3), np.uint8)
        self._draw([(index, out)])
        return torch.from_numpy(out).permute(2, 0, 1)

    def read_into(self, indices: Sequence[int], out: Pixels) -> None:
        """Many patches at once, (N, size_px, size_px, 3): of each block the tiles are decoded once."""
        order = sorted(range(len(indices)), key=indices.__getitem__)
        for _, places in groupby(order, key=lambda place: indices[place] // self.crops_per_block):
            self._draw([(indices[place], out[place]) for place in places])

    def _draw(self, wanted: Sequence[tuple[int, Pixels]]) -> None:
        """Read patches of one block, each into its place; what fails is drawn again, by itself."""
        if self._pid != os.getpid():  # forked: handles, and what they have cached, stay with the parent
            self._clear_cache()
            self._pid = os.getpid()
        for attempt in range(MAX_ATTEMPTS):
            plans = [self.plan(index, attempt=attempt) for index, _ in wanted]
            planned = [plan for plan in plans if plan is not None]  # all or none: they share their block
            if planned:
                try:
                    with_retries(lambda: self._read(planned, [out for _, out in wanted]))  # noqa: B023  # called at once
                except SlideError as error:
                    self._quarantine(planned[0].slide, wanted[0][0] // self.crops_per_block, error)
                else:
                    wanted = [one for one in wanted if not self._passes(one[1])]
            if not wanted:
                return
        raise TooManyFailedSlidesError(
            f"patch {wanted[0][0]} could not be drawn in {MAX_ATTEMPTS} attempts: "
            f"{len(self.quarantined)} of {len(self.slides)} slides are quarantined; check min_tissue and min_stained"
        )

    def _passes(self, pixels: Pixels) -> bool:
        return self.min_stained is None or stained_share(pixels) >= self.min_stained

    def _read(self, plans: Sequence[PatchSpec], outs: Sequence[Pixels]) -> None:
        """The pixels of plans that share their block."""
        slide = self._open.get(self.slides[plans[0].slide])
        crops = [plan.crop for plan in plans]
        corners, side = [(crop.x, crop.y) for crop in crops], crops[0].side
        if side == self.size_px:
            slide.read_many(crops[0].level, corners, (side, side), outs=outs)
            return
        sources = np.empty((len(crops), side, side, 3), np.uint8)
        slide.read_many(crops[0].level, corners, (side, side), outs=list(sources))
        for source, out in zip(sources, outs, strict=True):
            out[...] = resize(source, self.size_px)

    def _quarantine(self, slide: int, block: int, error: Exception) -> None:
        """Quarantine a slide from a block on; stop the run if that makes too many."""
        self._open.close(self.slides[slide].info.name)
        known = int(self._faulty_from[slide])
        self._faulty_from[slide] = min(known, block)
        if known != _NEVER:
            return
        names = list(self.quarantined)
        log.warning("slide quarantined (%d of %d): %s", len(names), len(self.slides), error)
        if len(names) > max(self.max_failed_fraction * len(self.slides), 1):
            raise TooManyFailedSlidesError(
                f"{len(names)} of {len(self.slides)} slides failed, more than {self.max_failed_fraction:.0%}: "
                f"{', '.join(names[:5])}{', …' if len(names) > 5 else ''}; the last: {error}"
            ) from error


class HeldOutPatches(Dataset[dict[str, Any]]):
    """The frozen patches of a manifest, in its order: dicts with `image`, `group` and, if labelled, `label`.

    `image` is uint8 (3, S, S), `group` the patient, `label` an index into `classes`.

    Args:
        manifest: what `fmtrain manifest` wrote.

    Raises:
        SlideError: the slides are not what they were; at reading too: a frozen set with holes would be another set.
    """

    def __init__(self, manifest: Path) -> None:
        self.manifest = Manifest.load(manifest)
        self.manifest.check_held_out()
        self.classes = self.manifest.classes
        self._entries = {slide.info.name: slide for slide in self.manifest.slides}
        self._open: SlidePool | None = None
        self._pid = -1

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": None}

    def __len__(self) -> int:
        return len(self.manifest.held_out)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Patch `index`."""
        if self._open is None or self._pid != os.getpid():
            self._open, self._pid = SlidePool(capacity=64), os.getpid()  # its order takes slides in turn
        patch = self.manifest.held_out[index]
        entry = self._entries[patch.slide]
        slides = self._open
        pixels = with_retries(
            lambda: slides.get(entry).patch((patch.x, patch.y), size_px=self.manifest.size_px, mpp=patch.mpp)
        )
        item: dict[str, Any] = {"image": torch.from_numpy(pixels).permute(2, 0, 1).contiguous(), "group": entry.patient}
        if patch.label is not None:
            item["label"] = self.classes.index(patch.label)
        return item


def manifest_source(path: Path) -> Source | None:
    """A manifest as something `repmetrics score` can read; None if the path is none."""
    file = path / "manifest.json" if path.is_dir() else path
    if file.suffix.lower() != ".json" or not file.is_file():
        return None
    with file.open("rb") as head:
        if f'"{FORMAT}"'.encode() not in head.read(4096):
            return None
    images = HeldOutPatches(file)
    slides = {patch.slide for patch in images.manifest.held_out}
    note = f"{len(images)} frozen patches of {len(slides)} held-out slides; groups are patients"
    return Source(
        path,
        "slides manifest",
        images=images,
        classes=images.classes,
        notes=(note,),
        fingerprint=images.manifest.content_hash,
    )
