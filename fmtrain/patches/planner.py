"""What every training patch is: (seed, index) → slide, magnification, place. No torch, and no slide is opened."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Container, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from fmtrain.manifest.manifest import Manifest, SlideEntry
from fmtrain.patches.sampling import SlideChoice, slide_shares, subset
from fmtrain.rng import choose, stable_hash, uniforms
from fmtrain.slides.info import Region
from fmtrain.slides.resolution import choose_mpp, mpp_range, region
from fmtrain.slides.tissue import EligibleCells, Mask

T = TypeVar("T")
_POOL, _CROP = 1, 2  # streams of random numbers, beside 0 for the draws themselves
_UNKNOWN_TILE = (256, 256)


class PatchSpec(NamedTuple):
    """What to read for one patch: the slide, the block of pixels at a level, and the crop in it."""

    slide: int
    mpp: float
    block: tuple[int, int, int, int]  # x, y, w, h, in pixels of the level
    crop: Region


class _Block(NamedTuple):
    """What the patches of one block have in common."""

    slide: int
    mpp: float
    cells: EligibleCells
    region: Region  # of the patch that the block was placed around
    block: tuple[int, int, int, int]
    candidates: npt.NDArray[np.int64]  # (M, 2), the cells a crop may be centred on


class Planner:
    """Draws patches from the training slides of a manifest; the options are those of `TrainingPatches`.

    Raises:
        ValueError: an option that cannot be, or no slide that serves it.
    """

    def __init__(
        self,
        manifest: Manifest,
        *,
        size_px: int,
        mpps: Sequence[float],
        seed: int,
        mpp_weights: Sequence[float] | None = None,
        continuous_mpp: bool = False,
        slide_weighting: SlideChoice = "slide",
        slide_fraction: float = 1.0,
        patches_per_slide: int | None = None,
        patches_in_total: int | None = None,
        crops_per_block: int = 1,
        min_tissue: float | None = None,
        cached_slides: int = 32,
    ) -> None:
        self.manifest = manifest
        self.size_px, self.mpps, self.seed = size_px, tuple(mpps), seed
        self.mpp_weights, self.continuous_mpp = mpp_weights, continuous_mpp
        self.crops_per_block = crops_per_block
        self.min_tissue = manifest.min_tissue if min_tissue is None else min_tissue
        self.cached_slides = cached_slides
        if size_px < 1 or not self.mpps or min(self.mpps) <= 0:
            raise ValueError(f"size_px and mpp must be positive, got {size_px} and {self.mpps}")
        if mpp_weights is not None and (len(mpp_weights) != len(self.mpps) or min(mpp_weights) < 0):
            raise ValueError(f"{len(self.mpps)} magnifications need as many weights ≥ 0, got {list(mpp_weights)}")
        if patches_per_slide is not None and patches_in_total is not None:
            raise ValueError("give patches_per_slide or patches_in_total, not both")
        finite = patches_per_slide is not None or patches_in_total is not None
        if crops_per_block < 1 or (finite and crops_per_block > 1):
            raise ValueError(f"crops_per_block must be ≥ 1, and 1 for a fixed number of patches: {crops_per_block}")
        train = manifest.slides_in("train")
        chosen = [train[k] for k in subset([slide.info.name for slide in train], slide_fraction, seed=seed)]
        self.slides = [slide for slide in chosen if self._mpp(0.0, slide) is not None]
        if not self.slides:
            raise ValueError(
                f"none of the {len(chosen)} training slides serves patches of {size_px} px at mpp "
                f"{', '.join(f'{value:g}' for value in self.mpps)}: too small, or too coarse"
            )
        shares = slide_shares([s.patient for s in self.slides], [s.tissue_mm2 for s in self.slides], by=slide_weighting)
        self._pool_sizes = self._pools(patches_per_slide, patches_in_total)
        if self._pool_sizes is not None:
            shares = shares * (np.asarray(self._pool_sizes) > 0)
        self._ends = np.cumsum(shares).tolist()
        self._masks: OrderedDict[int, Mask] = OrderedDict()
        self._cells: OrderedDict[tuple[int, float], EligibleCells] = OrderedDict()
        self._blocks: OrderedDict[tuple[int, int], _Block | None] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        """The caches stay behind."""
        return self.__dict__ | {name: OrderedDict() for name in ("_masks", "_cells", "_blocks")}

    def _pools(self, each: int | None, total: int | None) -> list[int] | None:
        """How many distinct patches each slide has; None for endlessly many."""
        if each is None and total is None:
            return None
        if (each or total or 0) < 1:
            raise ValueError(f"the number of patches must be ≥ 1, got {each if total is None else total}")
        n = len(self.slides)
        return [each] * n if each is not None else [(total or 0) // n + (k < (total or 0) % n) for k in range(n)]

    @property
    def distinct(self) -> int | None:
        """How many different patches there are; None: endlessly many."""
        return None if self._pool_sizes is None else sum(self._pool_sizes)

    def plan(self, index: int, *, attempt: int = 0, faulty: Container[int] = ()) -> PatchSpec | None:
        """What patch `index` is, at a given attempt.

        Args:
            index: which patch.
            attempt: 0, or more after as many failures.
            faulty: slides not to take.

        Returns:
            None where this attempt fails: it drew a faulty slide, or one with no tissue at this magnification.
        """
        number, _ = divmod(index, self.crops_per_block)
        block = _lru_get(self._blocks, (number, attempt), lambda: self._block(number, attempt), 1)
        if block is None or block.slide in faulty:
            return None
        where = block.region
        if self.crops_per_block == 1:
            return PatchSpec(block.slide, block.mpp, block.block, where)
        info = self.slides[block.slide].info
        u, v, w = uniforms(self.seed, index, attempt=attempt, stream=_CROP, n=3)
        if len(block.candidates):
            column, row = block.candidates[min(int(u * len(block.candidates)), len(block.candidates) - 1)].tolist()
            where = region(info, block.cells.corner(column, row, v, w), size_px=self.size_px, mpp=block.mpp)
        x, y, width, height = block.block
        inside = where._replace(
            x=min(max(where.x, x), x + width - where.side), y=min(max(where.y, y), y + height - where.side)
        )
        return PatchSpec(block.slide, block.mpp, block.block, inside)

    def _block(self, number: int, attempt: int) -> _Block | None:
        u = uniforms(self.seed, number, attempt=attempt, n=6)
        slide = choose(self._ends, u[0])
        entry = self.slides[slide]
        if self._pool_sizes is not None:
            of_pool = int(u[1] * self._pool_sizes[slide])
            u = uniforms(self.seed ^ stable_hash(entry.info.name), of_pool, attempt=attempt, stream=_POOL, n=6)
        mpp = self._mpp(u[2], entry)
        cells = self._cells_of(slide, mpp) if mpp is not None else ()
        if mpp is None or not isinstance(cells, EligibleCells) or len(cells) == 0:
            return None
        where = region(entry.info, cells.location(*u[3:6]), size_px=self.size_px, mpp=mpp)
        if self.crops_per_block == 1:
            return _Block(slide, mpp, cells, where, (where.x, where.y, where.side, where.side), np.empty((0, 2), int))
        tile = entry.info.tiles[where.level] if entry.info.tiles else _UNKNOWN_TILE
        around = aligned_block(where, entry.info.levels[where.level], tile)
        downsample = entry.info.downsample(where.level)
        x, y, w, h = around
        candidates = cells.within(
            (x + where.side / 2) * downsample,
            (y + where.side / 2) * downsample,
            (w - where.side) * downsample,
            (h - where.side) * downsample,
        )
        return _Block(slide, mpp, cells, where, around, candidates)

    def _mpp(self, u: float, entry: SlideEntry) -> float | None:
        finest, coarsest = mpp_range(entry.info, size_px=self.size_px)
        return choose_mpp(
            u, self.mpps, weights=self.mpp_weights, continuous_mpp=self.continuous_mpp, finest=finest, coarsest=coarsest
        )

    def _cells_of(self, slide: int, mpp: float) -> EligibleCells:
        entry = self.slides[slide]

        def make() -> EligibleCells:
            mask = _lru_get(self._masks, slide, lambda: self.manifest.mask(entry), self.cached_slides)
            extent = self.size_px * mpp / entry.info.mpp
            return EligibleCells(mask, size=entry.info.size, extent_px=extent, min_tissue=self.min_tissue)

        return _lru_get(self._cells, (slide, mpp), make, 4 * self.cached_slides)


def _lru_get(cache: OrderedDict[Any, T], key: Any, make: Callable[[], T], capacity: int) -> T:
    """The cached value, made if needed; the one longest unused is forgotten."""
    if key in cache:
        cache.move_to_end(key)
        return cache[key]
    value = cache[key] = make()
    while len(cache) > capacity:
        cache.popitem(last=False)
    return value


def aligned_block(where: Region, level: tuple[int, int], tile: tuple[int, int]) -> tuple[int, int, int, int]:
    """The tiles around a patch, about twice its side: (x, y, w, h), on the grid of tiles, within the level.

    Reading them costs what the patch alone costs, if that lies across four tiles.

    Example:
        >>> aligned_block(Region(0, 300, 700, 256), (4000, 3000), (256, 256))
        (256, 512, 512, 512)
    """
    starts, lengths = [], []
    for at, whole, step in zip((where.x, where.y), level, tile, strict=True):
        length = max(2, round(2 * where.side / step)) * step
        start = round((at + where.side / 2 - length / 2) / step) * step
        start = max(0, min(start, (whole - where.side) // step * step))
        starts.append(start)
        lengths.append(min(length, whole - start))
    return starts[0], starts[1], lengths[0], lengths[1]
