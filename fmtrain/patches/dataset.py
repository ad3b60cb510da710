"""Patches for PyTorch, uint8 (3, S, S): endless random ones for training, and the frozen held-out ones."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import fields
from functools import lru_cache, partial
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fmtrain.manifest.held_out_patches import HeldOutPatch
from fmtrain.manifest.manifest import FORMAT, Manifest, SlideEntry, check_all_unchanged
from fmtrain.patches.held_out_cache import build_cache, open_cache
from fmtrain.patches.options import PatchOptions
from fmtrain.patches.planner import PatchSpec, Planner
from fmtrain.patches.read_ahead import fetch_ahead
from fmtrain.patches.slide_pool import SlidePool
from fmtrain.slides.info import Region
from fmtrain.slides.remote import is_remote
from fmtrain.slides.resolution import region
from fmtrain.slides.retries import with_retries
from fmtrain.slides.tiles import SlideError
from fmtrain.slides.tissue import is_blank, stained_share
from repmetrics.data.source import Items, Source
from repmetrics.executor import in_order
from repmetrics.progress import ProgressLines

Pixels = npt.NDArray[np.uint8]
log = logging.getLogger(__name__)
MAX_ATTEMPTS = 64
CACHE_BATCH = 16
_NEVER = 2**63 - 1


class TooManyFailedSlidesError(RuntimeError):
    """So many slides failed that the run no longer trains on the intended data."""

    def __init__(self, message: str) -> None:
        # torch re-raises a worker's exception with its whole traceback as the message: keep the last line.
        super().__init__(message.rstrip().splitlines()[-1].rpartition("TooManyFailedSlidesError: ")[2])


class _Planned(NamedTuple):
    """A patch to read: its number, its plan at the present attempt, and the array to fill."""

    number: int
    plan: PatchSpec | None
    out: Pixels


class TrainingPatches(Dataset[Tensor]):
    """Endless random patches of random slides. Item i is a pure function of the seed and i.

    Each worker opens its own handles. A slide that fails is closed and quarantined for all workers, and its patch is
    redrawn by the same function.

    Args:
        manifest: Manifest, or its file, as `fmtrain manifest` writes it.
        size_px: Side of the patches in pixels. Patches larger than the crops give these context.
        seed: Seed of the patches.
        options: Options of `PatchOptions`.
    """

    def __init__(self, manifest: Path | Manifest, *, size_px: int, seed: int, **options: Any) -> None:
        self.manifest = manifest if isinstance(manifest, Manifest) else Manifest.load(manifest)
        self.options = PatchOptions(size_px=size_px, seed=seed, **options)
        self.planner = Planner(self.manifest, self.options)
        self.slides = self.planner.slides
        self.size_px, self.crops_per_block = size_px, self.options.crops_per_block
        # First block at which each slide failed, in shared memory: a slide that failed in one worker is read by none.
        self._faulty_from = torch.full((len(self.slides),), _NEVER).share_memory_()
        self._pool = SlidePool(self.options.open_slides)
        self._remote = any(is_remote(slide.path) for slide in self.slides)

    @property
    def distinct(self) -> int | None:
        """Number of distinct patches; None if unlimited."""
        return self.planner.distinct

    @property
    def quarantined(self) -> dict[str, int]:
        """Slides that failed in any worker of this rank: name → first block of patches that avoids the slide."""
        failed = ((self.slides[k].info.name, since) for k, since in enumerate(self._faulty_from.tolist()))
        return {name: since for name, since in failed if since != _NEVER}

    def quarantine(self, since: Mapping[str, int]) -> None:
        """Restore the quarantine of an earlier run from its `quarantined`."""
        for k, slide in enumerate(self.slides):
            self._faulty_from[k] = since.get(slide.info.name, _NEVER)

    def check_unchanged(self) -> None:
        """Compare the training slides with their fingerprints in the manifest."""
        check_all_unchanged(self.slides)

    def before_extension(self, content_hash: str) -> TrainingPatches | None:
        """Patches of the manifest as it was when it had a hash, before its extensions; None if it never had it."""
        manifest = self.manifest.before_extension(content_hash)
        if manifest is None:
            return None
        return TrainingPatches(
            manifest, **{field.name: getattr(self.options, field.name) for field in fields(self.options)}
        )

    def plan(self, index: int, *, attempt: int = 0) -> PatchSpec | None:
        """Plan of patch `index`, at a given attempt; see `Planner.plan`. None also if its slide is quarantined."""
        plan = self.planner.plan(index, attempt=attempt)
        return None if plan is None or self._is_quarantined(plan.slide, index) else plan

    def _is_quarantined(self, slide: int, index: int) -> bool:
        """Whether patch `index` avoids a slide."""
        return int(self._faulty_from.numpy()[slide]) <= index // self.crops_per_block

    def name_of(self, index: int) -> str | None:
        """Name of the slide of patch `index`; None if its first attempt fails."""
        plan = self.plan(index)
        return None if plan is None else self.slides[plan.slide].info.name

    def __getitem__(self, index: int) -> Tensor:
        """Patch `index`: uint8 (3, size_px, size_px)."""
        out = np.empty((self.size_px, self.size_px, 3), np.uint8)
        self.read_into([index], out[None])
        return torch.from_numpy(out).permute(2, 0, 1)

    def read_into(self, indices: Sequence[int], out: Pixels) -> None:
        """Read many patches into `out` (N, size_px, size_px, 3). The tiles of each block are decoded once.

        All patches are planned before the first is read: between decoded tiles, the code that plans runs at half the
        speed, since it has left the caches.
        """
        order = sorted(range(len(indices)), key=indices.__getitem__)
        planned = [_Planned(indices[row], self.planner.plan(indices[row]), out[row]) for row in order]
        blocks: Iterable[list[_Planned]] = (
            list(block) for _, block in groupby(planned, key=lambda patch: patch.number // self.crops_per_block)
        )
        if self._remote:
            blocks = fetch_ahead(blocks, self._entry_of)
        for block in blocks:
            self._draw(block)

    def _entry_of(self, block: Sequence[_Planned]) -> SlideEntry | None:
        """Slide of a block at the first attempt."""
        number, plan, _ = block[0]
        return None if plan is None or self._is_quarantined(plan.slide, number) else self.slides[plan.slide]

    def _draw(self, pending: Sequence[_Planned]) -> None:
        """Read patches of one block, each into its array; patches that fail are redrawn."""
        for attempt in range(MAX_ATTEMPTS):
            if attempt:
                pending = [p._replace(plan=self.planner.plan(p.number, attempt=attempt)) for p in pending]
            plans = [plan for _, plan, _ in pending if plan is not None]  # all or none: they share their block
            first = pending[0].number
            if plans and not self._is_quarantined(plans[0].slide, first):
                try:
                    with_retries(partial(self._read, plans, [out for _, _, out in pending]))
                except SlideError as error:
                    self._quarantine(plans[0].slide, first // self.crops_per_block, error)
                else:
                    pending = [patch for patch in pending if not self._passes(patch.out)]
            if not pending:
                return
        raise TooManyFailedSlidesError(
            f"patch {pending[0].number} could not be drawn in {MAX_ATTEMPTS} attempts: "
            f"{len(self.quarantined)} of {len(self.slides)} slides are quarantined; check min_tissue and min_stained"
        )

    def _read(self, plans: Sequence[PatchSpec], outs: Sequence[Pixels]) -> None:
        read(self._pool, self.slides[plans[0].slide], [plan.crop for plan in plans], outs, tissue=True)

    def _passes(self, pixels: Pixels) -> bool:
        return self.options.min_stained is None or stained_share(pixels) >= self.options.min_stained

    def _quarantine(self, slide: int, block: int, error: Exception) -> None:
        """Quarantine a slide from a block on."""
        self._pool.close(self.slides[slide].info.name)
        since = int(self._faulty_from[slide])
        self._faulty_from[slide] = min(since, block)
        if since != _NEVER:
            return
        names, limit = list(self.quarantined), self.options.max_failed_fraction
        log.warning("slide quarantined (%d of %d): %s", len(names), len(self.slides), error)
        if len(names) > max(limit * len(self.slides), 1):
            raise TooManyFailedSlidesError(
                f"{len(names)} of {len(self.slides)} slides failed, more than {limit:.0%}: "
                f"{', '.join(names[:5])}{', …' if len(names) > 5 else ''}; the last: {error}"
            ) from error


def read(
    pool: SlidePool, entry: SlideEntry, regions: Sequence[Region], outs: Sequence[Pixels], *, tissue: bool
) -> None:
    """Read patches of one slide. A slide that fails is closed: errors of OpenSlide latch, a retry opens it anew.

    Args:
        pool: Open slides.
        entry: Slide.
        regions: Regions of the patches.
        outs: Arrays of the patches.
        tissue: Whether all patches lie on tissue: a blank one is a fault then.
    """
    try:
        pool.get(entry).read_patches(regions, outs=outs)
        if tissue and (number := next((k for k, out in enumerate(outs) if is_blank(out)), None)) is not None:
            x, y = regions[number].x, regions[number].y
            raise SlideError(
                f"{entry.info.name}: blank at ({x}, {y}) of level {regions[number].level}, which has tissue"
            )
    except SlideError:
        pool.close(entry.info.name)
        raise


class HeldOutPatches(Dataset[dict[str, Any]]):
    """Frozen patches of a manifest, in its order: dicts with `image`, `group` and, if labeled, `label`.

    `image` is uint8 (3, S, S), `group` the patient, `label` an index into `classes`. Patches are read from the file
    beside the manifest, if `build_cache` wrote it, and otherwise decoded from their slides.

    Args:
        manifest: Manifest, as `fmtrain manifest` writes it.
        cache: Whether to read and to write that file.
    """

    def __init__(self, manifest: Path, *, cache: bool = True) -> None:
        self.manifest = Manifest.load(manifest)
        self.manifest.check_held_out()
        self.cache = cache
        self._cached: Pixels | None = None
        self.classes = self.manifest.classes
        self._entries = {slide.info.name: slide for slide in self.manifest.slides}
        self._pool = SlidePool(64)  # the order of the patches takes slides in turn

    def __len__(self) -> int:
        return len(self.manifest.held_out)

    def __getstate__(self) -> dict[str, Any]:
        """State for another process, which maps the file itself."""
        return {**vars(self), "_cached": None}

    def build_cache(
        self, *, num_workers: int = 0, executor: Executor | None = None, write: Callable[[str], None] | None = None
    ) -> None:
        """Decode all patches once, with lines of progress, unless the file exists or there is to be none.

        Args:
            num_workers: Number of processes of a loader, where there is no executor.
            executor: Where the patches are decoded.
            write: Function that prints a line of progress.
        """
        if not self.cache:
            return
        patches = self.manifest.held_out
        order = sorted(range(len(self)), key=lambda index: patches[index].slide)  # a remote slide is fetched once
        lines = ProgressLines("decoding held-out patches", total=len(self), unit="patches", write=write)

        def read() -> Iterable[Pixels]:
            if executor is None:
                return DataLoader(self, CACHE_BATCH, sampler=order, num_workers=num_workers, collate_fn=_images)
            spans = [order[k : k + CACHE_BATCH] for k in range(0, len(order), CACHE_BATCH)]
            return in_order(executor, partial(_decode_span, self.manifest.path), spans, died=_died)

        build_cache(self.manifest, read, order=order, on_batch=lines.advance)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Patch `index`."""
        patch = self.manifest.held_out[index]
        if self.cache and self._cached is None:
            self._cached = open_cache(self.manifest)
        image = self._decode(patch) if self._cached is None else torch.from_numpy(self._cached[index].copy())
        item: dict[str, Any] = {"image": image, "group": self._entries[patch.slide].patient}
        if patch.label is not None:
            item["label"] = self.classes.index(patch.label)
        return item

    def _decode(self, patch: HeldOutPatch) -> Tensor:
        entry, size_px = self._entries[patch.slide], self.manifest.size_px
        pixels = np.empty((size_px, size_px, 3), np.uint8)
        where = region(entry.info, (patch.x, patch.y), size_px=size_px, mpp=patch.mpp)
        with_retries(partial(read, self._pool, entry, [where], [pixels], tissue=patch.label is None))
        return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def _images(items: Sequence[dict[str, Any]]) -> Pixels:
    return torch.stack([item["image"] for item in items]).numpy()


def _decode_span(manifest: Path, span: Sequence[int]) -> Pixels:
    """Held-out patches of some indices, in a process of an executor."""
    patches = _without_cache(manifest)
    return _images([patches[index] for index in span])


@lru_cache(maxsize=1)
def _without_cache(manifest: Path) -> HeldOutPatches:
    return HeldOutPatches(manifest, cache=False)


def _died(span: Sequence[int]) -> Pixels:
    raise OSError(f"the process that decoded held-out patches {span[0]} to {span[-1]} died twice")


def manifest_source(path: Path) -> Source | None:
    """Held-out patches of a manifest as a source for `repmetrics score`; None if the path is not a manifest."""
    file = path / "manifest.json" if path.is_dir() else path
    if file.suffix.lower() != ".json" or not file.is_file():
        return None
    with file.open("rb") as head:
        if f'"{FORMAT}"'.encode() not in head.read(4096):
            return None
    images = HeldOutPatches(file)
    patches = images.manifest.held_out
    slides = {patch.slide for patch in patches}
    note = f"{len(images)} frozen patches of {len(slides)} held-out slides; groups are patients"
    items = Items(
        ids=[f"{patch.slide}:{patch.x}:{patch.y}:{patch.mpp:g}" for patch in patches],
        slides=[patch.slide for patch in patches],
        coordinates=[(patch.x, patch.y) for patch in patches],
        mpp=[patch.mpp for patch in patches],
    )
    return Source(
        path,
        "slides manifest",
        images=images,
        classes=images.classes,
        view_set="stain",
        notes=(note,),
        fingerprint=images.manifest.content_hash,
        items=items,
    )
