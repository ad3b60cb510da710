"""Plan of every training patch: (seed, index) → slide, magnification, location. No torch, and opens no slide."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Set
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from fmtrain.manifest.manifest import Manifest, SlideEntry
from fmtrain.patches.options import PatchOptions
from fmtrain.patches.sampling import slide_shares, subset
from fmtrain.rng import choose, stable_hash, uniforms
from fmtrain.slides.info import Region
from fmtrain.slides.resolution import choose_mpp, mpp_range, region
from fmtrain.slides.tissue import EligibleCells, Mask

T = TypeVar("T")
_POOL, _CROP, _MPP = 1, 2, 3  # streams of random numbers; stream 0 is for the blocks
_MAGNIFICATIONS = 64  # maximum number of magnifications that are tried on a slide
_DEFAULT_TILE = (256, 256)  # of a slide whose tiles are unknown


class PatchSpec(NamedTuple):
    """Pixels of one patch: the slide, the block of pixels at a level, and the crop in it."""

    slide: int
    mpp: float
    block: tuple[int, int, int, int]  # x, y, w, h in pixels of the level
    crop: Region


class _Block(NamedTuple):
    """Properties shared by the patches of one block."""

    slide: int
    mpp: float
    cells: EligibleCells
    region: Region  # patch around which the block lies
    block: tuple[int, int, int, int]
    candidates: npt.NDArray[np.int64]  # (M, 2), cells that a crop may be centered on


class Planner:
    """Draws patches from the training slides of a manifest.

    Args:
        manifest: Manifest of the slides.
        options: Options of the patches.
    """

    def __init__(self, manifest: Manifest, options: PatchOptions) -> None:
        self.manifest, self.options = manifest, options
        self.mpps = manifest.mpps if options.mpp is None else tuple(options.mpp)
        weights, seed = options.mpp_weights, options.seed
        if weights is not None and (len(weights) != len(self.mpps) or min(weights) < 0):
            raise ValueError(f"{len(self.mpps)} magnifications need as many weights ≥ 0, got {list(weights)}")
        train = manifest.slides_in("train")
        chosen = [train[k] for k in subset([slide.info.name for slide in train], options.slide_fraction, seed=seed)]
        self.slides = [slide for slide in chosen if self._mpp(0.0, slide) is not None]
        if not self.slides:
            raise ValueError(
                f"none of the {len(chosen)} training slides serves patches of {options.size_px} px at mpp "
                f"{', '.join(f'{value:g}' for value in self.mpps)}: too small, or too coarse"
            )
        self._pool_sizes = self._pools()
        by = options.slide_weighting
        shares = slide_shares([s.patient for s in self.slides], [s.tissue_mm2 for s in self.slides], by=by)
        if self._pool_sizes is not None:
            shares = shares * (np.asarray(self._pool_sizes) > 0)
        self._ends = np.cumsum(shares).tolist()
        self._masks: OrderedDict[int, Mask] = OrderedDict()
        self._cells: OrderedDict[tuple[int, float], EligibleCells] = OrderedDict()
        self._blocks: OrderedDict[tuple[int, int], _Block | None] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        """State without the caches."""
        return self.__dict__ | {name: OrderedDict() for name in ("_masks", "_cells", "_blocks")}

    def _pools(self) -> list[int] | None:
        """Number of distinct patches of each slide; None if unlimited."""
        each, total, n = self.options.patches_per_slide, self.options.patches_in_total, len(self.slides)
        if total is not None:
            return [total // n + (k < total % n) for k in range(n)]
        return None if each is None else [each] * n

    @property
    def distinct(self) -> int | None:
        """Number of distinct patches; None if unlimited."""
        return None if self._pool_sizes is None else sum(self._pool_sizes)

    def plan(self, index: int, *, attempt: int = 0) -> PatchSpec | None:
        """Plan of patch `index`, at a given attempt.

        Args:
            index: Number of the patch.
            attempt: Number of earlier attempts that failed.

        Returns:
            None if this attempt fails: it drew a slide without tissue at this magnification.
        """
        crops, size_px = self.options.crops_per_block, self.options.size_px
        number = index // crops
        block = _lru_get(self._blocks, (number, attempt), lambda: self._block(number, attempt), 1)
        if block is None:
            return None
        crop = block.region
        if crops == 1:
            return PatchSpec(block.slide, block.mpp, block.block, crop)
        info = self.slides[block.slide].info
        u, v, w = uniforms(self.options.seed, index, attempt=attempt, stream=_CROP, n=3)
        if len(block.candidates):
            ends = np.cumsum(block.cells.weights_at(block.candidates))
            drawn = int(np.searchsorted(ends, u * ends[-1], side="right"))
            column, row = block.candidates[min(drawn, len(ends) - 1)].tolist()
            crop = region(info, block.cells.corner(column, row, v, w), size_px=size_px, mpp=block.mpp)
        x, y, width, height = block.block
        inside = crop._replace(
            x=min(max(crop.x, x), x + width - crop.side), y=min(max(crop.y, y), y + height - crop.side)
        )
        return PatchSpec(block.slide, block.mpp, block.block, inside)

    def _block(self, number: int, attempt: int) -> _Block | None:
        u = uniforms(self.options.seed, number, attempt=attempt, n=6)
        slide = choose(self._ends, u[0])
        entry = self.slides[slide]
        if self._pool_sizes is not None:
            member = int(u[1] * self._pool_sizes[slide])
            seed = self.options.seed ^ stable_hash(entry.info.name)
            u = uniforms(seed, member, attempt=attempt, stream=_POOL, n=6)
        mpp = self._served_mpp(u[2], slide, number, attempt)
        if mpp is None:
            return None
        cells = self._cells_of(slide, mpp)
        patch = region(entry.info, cells.location(*u[3:6]), size_px=self.options.size_px, mpp=mpp)
        if self.options.crops_per_block == 1:
            return _Block(slide, mpp, cells, patch, (patch.x, patch.y, patch.side, patch.side), np.empty((0, 2), int))
        tile = entry.info.tiles[patch.level] if entry.info.tiles else _DEFAULT_TILE
        x, y, w, h = block = aligned_block(patch, entry.info.levels[patch.level], tile)
        downsample = entry.info.downsample(patch.level)
        candidates = cells.within(
            (x + patch.side / 2) * downsample,
            (y + patch.side / 2) * downsample,
            (w - patch.side) * downsample,
            (h - patch.side) * downsample,
        )
        return _Block(slide, mpp, cells, patch, block, candidates)

    def _served_mpp(self, u: float, slide: int, number: int, attempt: int) -> float | None:
        """Magnification at which the slide's tissue has room for a patch; None if there is none.

        Those without room are excluded one by one: the others keep their proportions, and the slide its share.
        """
        entry, excluded = self.slides[slide], set[float]()
        for draw in range(1, _MAGNIFICATIONS):
            mpp = self._mpp(u, entry, excluded=excluded)
            if mpp is None or len(self._cells_of(slide, mpp)):
                return mpp
            if self.manifest.sampling == 1:
                return None
            excluded.add(mpp)
            u = uniforms(self.options.seed, number, attempt=attempt, stream=_MPP, n=draw)[-1]
        return None

    def _mpp(self, u: float, entry: SlideEntry, *, excluded: Set[float] = frozenset()) -> float | None:
        options = self.options
        finest, coarsest = mpp_range(entry.info, size_px=options.size_px)
        weights = options.mpp_weights or [1.0] * len(self.mpps)
        if not options.continuous_mpp:
            weights = [0.0 if mpp in excluded else weight for mpp, weight in zip(self.mpps, weights, strict=True)]
        elif excluded:  # of coarser ones there is less room
            coarsest = min(coarsest, *excluded) * (1 - 1e-9)
        continuous = options.continuous_mpp
        return choose_mpp(u, self.mpps, weights=weights, continuous_mpp=continuous, finest=finest, coarsest=coarsest)

    def _cells_of(self, slide: int, mpp: float) -> EligibleCells:
        entry, options = self.slides[slide], self.options
        min_tissue = self.manifest.min_tissue if options.min_tissue is None else options.min_tissue

        def make() -> EligibleCells:
            mask = _lru_get(self._masks, slide, lambda: self.manifest.mask(entry), options.open_slides)
            extent = options.size_px * mpp / entry.info.mpp
            return EligibleCells(
                mask,
                size=entry.info.size,
                extent_px=extent,
                min_tissue=min_tissue,
                sampling=self.manifest.sampling,
            )

        return _lru_get(self._cells, (slide, mpp), make, 4 * options.open_slides)


def _lru_get(cache: OrderedDict[Any, T], key: Any, make: Callable[[], T], capacity: int) -> T:
    """Cached value, created if missing; evicts the least recently used."""
    if key in cache:
        cache.move_to_end(key)
        return cache[key]
    value = cache[key] = make()
    while len(cache) > capacity:
        cache.popitem(last=False)
    return value


def aligned_block(patch: Region, level: tuple[int, int], tile: tuple[int, int]) -> tuple[int, int, int, int]:
    """Tiles around a patch, about twice its side: (x, y, w, h), on the grid of tiles, within the level.

    Reading them costs as much as a patch that lies across four tiles.

    Example:
        >>> aligned_block(Region(0, 300, 700, 256), (4000, 3000), (256, 256))
        (256, 512, 512, 512)
    """
    starts, lengths = [], []
    for at, extent, step in zip((patch.x, patch.y), level, tile, strict=True):
        length = max(2, round(2 * patch.side / step)) * step
        start = round((at + patch.side / 2 - length / 2) / step) * step
        start = max(0, min(start, (extent - patch.side) // step * step))
        starts.append(start)
        lengths.append(min(length, extent - start))
    return starts[0], starts[1], lengths[0], lengths[1]
