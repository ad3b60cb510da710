"""One slide: inspecting the file, and reading regions, patches and thumbnails. No torch.

OpenSlide opens every format and is the reference; `slides.tiles` reads plain tiled files faster. `inspect_slide`
chooses the reader once per slide and records it in `SlideInfo`, with the reason.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import openslide
from openslide.lowlevel import OpenSlideError
from PIL import Image

from fmtrain.slides.info import Region, SlideInfo, fingerprint
from fmtrain.slides.resolution import coarsest_level, resolve_mpp
from fmtrain.slides.tiles import WHITE, SlideError, TiledLevel, TileReader, UnsupportedTiff, tiled_levels

Pixels = npt.NDArray[np.uint8]

MAX_SIDE_UM = 300_000  # wider than any glass: the file is damaged, or its mpp is wrong
STRIP_PX = 1 << 24  # pixels in memory at once while a thumbnail is computed


def inspect_slide(path: Path, *, mpp: float | None = None) -> SlideInfo:
    """Open a slide, determine its mpp and its levels, and choose its reader.

    The direct tile reader is chosen only if tiles of every level equal OpenSlide's pixels.

    Args:
        path: Slide file.
        mpp: Micrometers per pixel of a slide without a plausible value.
    """
    name = path.name
    try:
        digest = fingerprint(path)
        with openslide.OpenSlide(path) as slide:
            vendor = slide.properties.get(openslide.PROPERTY_NAME_VENDOR, "unknown")
            levels = tuple((int(w), int(h)) for w, h in slide.level_dimensions)
            (w, h), (value, source) = levels[0], resolve_mpp(slide.properties, fallback=mpp)
            if max(w, h) * value > MAX_SIDE_UM:
                raise ValueError(f"{w}×{h} pixels of mpp {value:.4g} cannot be a slide: give the true mpp with --mpp")
            tiles = _tile_sizes(slide.properties, len(levels))
            reason = ""
            try:
                _compare(path, slide, tiled_levels(path, dimensions=levels, vendor=vendor))
            except UnsupportedTiff as error:
                reason = str(error)
    except PermissionError as error:
        raise SlideError(f"{name}: no permission to read the file") from error
    except openslide.OpenSlideUnsupportedFormatError as error:
        raise SlideError(f"{name}: not a slide in a format of OpenSlide, or truncated") from error
    except SlideError:
        raise
    except (OpenSlideError, ValueError, OSError) as error:
        raise SlideError(f"{name}: {error}") from error
    reader = "openslide" if reason else "tiles"
    return SlideInfo(name, value, source, levels, vendor, reader, reason, digest, tiles)


def _tile_sizes(properties: Mapping[str, str], levels: int) -> tuple[tuple[int, int], ...]:
    keys = [[f"openslide.level[{level}].tile-{side}" for side in ("width", "height")] for level in range(levels)]
    if not all(key in properties for pair in keys for key in pair):
        return ()
    return tuple((int(properties[w]), int(properties[h])) for w, h in keys)


def _compare(path: Path, slide: openslide.OpenSlide, levels: tuple[TiledLevel, ...]) -> None:
    """Compare the first, the middle and the last tile of every level with OpenSlide's pixels."""
    reader = TileReader(path, levels)
    try:
        for number, level in enumerate(levels):
            rows = -(-level.size[1] // level.tile[1])
            for tile in {0, level.columns * rows // 2, level.columns * rows - 1}:
                x, y = (tile % level.columns) * level.tile[0], (tile // level.columns) * level.tile[1]
                downsample = slide.level_downsamples[number]
                location = (round(x * downsample), round(y * downsample))
                if max(abs(a / downsample - b) for a, b in zip(location, (x, y), strict=True)) > 1 / 1024:
                    continue  # OpenSlide would interpolate: no comparison is possible
                expected = _rgba_to_rgb(slide.read_region(location, number, level.tile))  # raises for a broken tile
                pixels = np.empty_like(expected)
                reader.read(number, [(x, y)], level.tile, outs=[pixels])
                if not np.array_equal(pixels, expected):
                    raise UnsupportedTiff(f"level {number}: tile {tile} differs from OpenSlide's")
    except SlideError as error:
        raise UnsupportedTiff(str(error).removeprefix(f"{path.name}: ")) from error
    finally:
        reader.close()


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
        self._reader: TileReader | None = None
        self._slide: openslide.OpenSlide | None = None
        try:
            if info.reader == "tiles":
                self.tiles = tiles or tiled_levels(path, dimensions=info.levels, vendor=info.vendor)
                self._reader = TileReader(path, self.tiles)
            else:
                self._slide = openslide.OpenSlide(path)
                if cache is not None:
                    self._slide.set_cache(cache)
        except (OpenSlideError, UnsupportedTiff, OSError) as error:
            raise SlideError(f"{info.name}: cannot be opened ({error})") from error

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
            self._reader.read(level, corners, size, outs=outs)
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
            return _rgba_to_rgb(self._slide.read_region((round(x * downsample), round(y * downsample)), level, size))
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

    def thumbnail(self, *, mpp: float) -> Pixels:
        """Whole slide at about `mpp`, from the coarsest level that is fine enough → RGB (h, w, 3)."""
        w, h = (max(1, round(side * self.info.mpp / mpp)) for side in self.info.size)
        return _read_level(self, coarsest_level(self.info, mpp), (w, h))


def resize(pixels: Pixels, size_px: int) -> Pixels:
    """Square → (size_px, size_px, 3), bilinear with antialiasing; unchanged if it has that size already."""
    if pixels.shape[0] == size_px:
        return pixels
    image = Image.fromarray(pixels)
    return np.array(image.resize((size_px, size_px), Image.Resampling.BILINEAR))


def _read_level(slide: Slide, level: int, size: tuple[int, int]) -> Pixels:
    """Whole level, shrunk strip by strip: a level of gigabytes is never in memory at once."""
    w, h = slide.info.levels[level]
    strips = []
    rows = max(1, int(size[1] * STRIP_PX / (w * h)))  # of the result
    for top in range(0, size[1], rows):
        bottom = min(top + rows, size[1])
        y0, y1 = round(top * h / size[1]), max(round(bottom * h / size[1]), round(top * h / size[1]) + 1)
        strip = Image.fromarray(slide.read(level, 0, y0, (w, y1 - y0)))
        strips.append(np.asarray(strip.resize((size[0], bottom - top), Image.Resampling.BOX)))
    return np.concatenate(strips)


def _rgba_to_rgb(image: Image.Image) -> Pixels:
    """OpenSlide's RGBA → RGB. Transparent pixels lie outside the slide and become white."""
    rgba = np.asarray(image)
    rgb = rgba[..., :3].copy()
    rgb[rgba[..., 3] == 0] = WHITE
    return rgb
