"""One open slide: reading regions, patches and thumbnails. No torch.

OpenSlide opens every format and is the reference; `slides.tiles` reads plain tiled files faster, `slides.ome` reads
OME-TIFF. `SlideInfo` names the reader.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import openslide
from openslide.lowlevel import OpenSlideError
from PIL import Image

from fmtrain.slides.info import Region, SlideInfo
from fmtrain.slides.ome import OmeReader
from fmtrain.slides.resolution import coarsest_level
from fmtrain.slides.tiles import WHITE, SlideError, TiledLevel, TileReader, UnsupportedTiff, tiled_levels

Pixels = npt.NDArray[np.uint8]

BLOCK_PX = 1 << 24  # pixels in memory at once while a thumbnail is computed
_UNKNOWN_TILE = (1024, 1024)  # tiles of a slide that does not state them


class Slide:
    """An open slide. Open it in the process that reads it: handles do not pickle.

    Args:
        path: Slide file.
        info: Result of `inspect_slide`, which names the reader.
        cache: OpenSlide's tile cache, shared by all slides of a process; None for 32 MiB per slide.
        tiles: Result of an earlier `tiled_levels`, which saves parsing the file again.
    """

    def __init__(
        self,
        path: Path,
        info: SlideInfo,
        *,
        cache: openslide.OpenSlideCache | None = None,
        tiles: tuple[TiledLevel, ...] | None = None,
    ) -> None:
        self.info = info
        self.tiles = tiles
        self._reader: TileReader | OmeReader | None = None
        self._slide: openslide.OpenSlide | None = None
        try:
            if info.reader == "tiles":
                self.tiles = tiles or tiled_levels(path, dimensions=info.levels, vendor=info.vendor)
                self._reader = TileReader(path, self.tiles)
            elif info.reader == "tifffile":
                self._reader = OmeReader(path)
                self._check_levels(self._reader.levels)
            else:
                self._slide = openslide.OpenSlide(path)
                self._check_levels(self._slide.level_dimensions)
                if cache is not None:
                    self._slide.set_cache(cache)
            if self._reader is not None:
                self._reader.name = info.name
        except SlideError:
            raise
        except (OpenSlideError, UnsupportedTiff, OSError, ValueError) as error:
            raise SlideError(f"{info.name}: cannot be opened ({error})") from error

    def _check_levels(self, levels: Sequence[tuple[int, int]]) -> None:
        """Raise if levels are lost: a slide of several files opens with fewer, and its regions are blank."""
        if tuple(levels)[: len(self.info.levels)] != self.info.levels:
            self.close()
            expected, got = (" ".join(f"{w}×{h}" for w, h in sizes) for sizes in (self.info.levels, levels))
            raise SlideError(f"{self.info.name}: its levels have changed: expected {expected}, got {got}")

    def __enter__(self) -> Slide:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file. A second call has no effect."""
        for handle in (self._reader, self._slide):
            if handle is not None:
                handle.close()

    def read(self, level: int, x: int, y: int, size: tuple[int, int]) -> Pixels:
        """Region of `size` = (w, h) at (x, y), all in pixels of `level` → RGB (h, w, 3), white outside the slide.

        If the level's downsample is not an integer, OpenSlide reads at the nearest position of level 0. This is off by
        at most half a pixel of level 0.
        """
        pixels: Pixels = np.empty((size[1], size[0], 3), np.uint8)
        self.read_many(level, [(x, y)], size, outs=[pixels])
        return pixels

    def read_many(
        self, level: int, corners: Sequence[tuple[int, int]], size: tuple[int, int], *, outs: Sequence[Pixels]
    ) -> None:
        """Neighboring regions of one size, each as `read` returns it, at little more than the cost of one region.

        Args:
            level: Level to read; all positions are in its pixels.
            corners: (x, y) of each region.
            size: (w, h) of all regions.
            outs: Arrays (h, w, 3) to fill, one per region.
        """
        if self._reader is not None:
            try:
                self._reader.read(level, corners, size, outs=outs)
            except SlideError:
                raise
            except OSError as error:
                raise SlideError(f"{self.info.name}: {error.strerror}") from error
            return
        w, h = size
        left, top = min(x for x, _ in corners), min(y for _, y in corners)
        right, bottom = max(x for x, _ in corners) + w, max(y for _, y in corners) + h
        block = self._read_openslide(level, left, top, (right - left, bottom - top))
        for (x, y), out in zip(corners, outs, strict=True):
            out[...] = block[y - top : y - top + h, x - left : x - left + w]

    def _read_openslide(self, level: int, x: int, y: int, size: tuple[int, int]) -> Pixels:
        assert self._slide is not None
        downsample = self.info.downsample(level)
        try:
            return rgba_to_rgb(self._slide.read_region((round(x * downsample), round(y * downsample)), level, size))
        except (OpenSlideError, OSError) as error:
            raise SlideError(f"{self.info.name}: {error}") from error

    def read_patches(self, regions: Sequence[Region], *, outs: Sequence[Pixels]) -> None:
        """Square patches, resized (bilinear, antialiased) where their side is not that of the region.

        Args:
            regions: Regions to read, as `resolution.region` computes them; all of one level and one side.
            outs: RGB arrays (S, S, 3) to fill, one per region.
        """
        level, side = regions[0].level, regions[0].side
        sources = outs if len(outs[0]) == side else list(np.empty((len(regions), side, side, 3), np.uint8))
        self.read_many(level, [(region.x, region.y) for region in regions], (side, side), outs=sources)
        if sources is not outs:
            for source, out in zip(sources, outs, strict=True):
                out[...] = resize(source, len(out))

    def thumbnail(self, *, mpp: float, on_progress: Callable[[], None] = lambda: None) -> Pixels:
        """Whole slide at about `mpp`, from the coarsest level that is fine enough → RGB (h, w, 3).

        Args:
            mpp: Micrometers per pixel of the thumbnail.
            on_progress: Called after each block of at most `BLOCK_PX` pixels that was read.
        """
        size = tuple(max(1, round(side * self.info.mpp / mpp)) for side in self.info.size)
        return _shrink_level(self, coarsest_level(self.info, mpp), (size[0], size[1]), on_progress)


def resize(pixels: Pixels, size_px: int) -> Pixels:
    """Square → (size_px, size_px, 3), bilinear with antialiasing; unchanged if it has that size already."""
    if pixels.shape[0] == size_px:
        return pixels
    image = Image.fromarray(pixels)
    return np.array(image.resize((size_px, size_px), Image.Resampling.BILINEAR))


def _shrink_level(slide: Slide, level: int, size: tuple[int, int], on_progress: Callable[[], None]) -> Pixels:
    """Whole level, shrunk block by block: a level of gigabytes is never in memory at once, each tile is decoded once.

    The blocks lie on the grid of tiles. Each is shrunk by a power of two, and together they are shrunk to `size`.
    """
    w, h = slide.info.levels[level]
    tile_w, tile_h = slide.info.tiles[level] if slide.info.tiles else _UNKNOWN_TILE
    factor = 2 ** max(0, math.floor(math.log2(min(w / size[0], h / size[1]))) - 1)
    unit_w, unit_h = math.lcm(tile_w, factor), math.lcm(tile_h, factor)
    rows = max(1, min(math.isqrt(BLOCK_PX), BLOCK_PX // min(unit_w, w)) // unit_h) * unit_h
    columns = max(1, BLOCK_PX // (min(rows, h) * unit_w)) * unit_w
    shrunk = np.empty((-(-h // factor), -(-w // factor), 3), np.uint8)
    for top in range(0, h, rows):
        for left in range(0, w, columns):
            right, bottom = min(left + columns, w), min(top + rows, h)
            block = Image.fromarray(slide.read(level, left, top, (right - left, bottom - top)))
            part = np.asarray(block.reduce(factor))
            shrunk[top // factor : -(-bottom // factor), left // factor : -(-right // factor)] = part
            on_progress()
    box = (0, 0, w / factor, h / factor)  # the last row and column may stand for less than `factor` pixels
    return np.asarray(Image.fromarray(shrunk).resize(size, Image.Resampling.BOX, box=box))


def rgba_to_rgb(image: Image.Image) -> Pixels:
    """OpenSlide's RGBA → RGB. Transparent pixels lie outside the slide and become white."""
    rgba = np.asarray(image)
    rgb = rgba[..., :3].copy()
    rgb[rgba[..., 3] == 0] = WHITE
    return rgb
