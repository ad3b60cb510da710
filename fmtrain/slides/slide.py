"""One slide: what it is, its micrometres per pixel, and reading from it. No torch.

OpenSlide opens every format and is the reference; `slides.tiles` reads plain tiled files faster. Which one reads
a slide is found once, by `inspect_slide`, and kept with the reason in its `SlideInfo`.
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
from fmtrain.slides.resolution import LEVEL_TOLERANCE, region, resolve_mpp
from fmtrain.slides.tiles import WHITE, SlideError, TiledLevel, TileReader, UnsupportedTiff, tiled_levels

Pixels = npt.NDArray[np.uint8]

__all__ = ["Region", "Slide", "SlideError", "SlideInfo", "fingerprint", "inspect_slide", "region", "resolve_mpp"]

LARGEST_UM = 300_000  # larger than any glass: damage, or a false mpp
STRIP_PX = 1 << 24  # pixels in memory at once while a thumbnail is made


def inspect_slide(path: Path, *, name: str | None = None, mpp: float | None = None) -> SlideInfo:
    """Open a slide, find its mpp and its levels, and decide who reads it.

    The fast path is chosen only after tiles of every level were compared with OpenSlide's pixels.

    Args:
        path: the file.
        name: what to call it; default its file name.
        mpp: micrometres per pixel, for a slide that does not say it believably itself.

    Raises:
        SlideError: not a slide, broken, no permission, or without a believable mpp; the message names it.
    """
    name = name or path.name
    try:
        print_ = fingerprint(path)
        with openslide.OpenSlide(path) as slide:
            vendor = slide.properties.get(openslide.PROPERTY_NAME_VENDOR, "unknown")
            levels = tuple((int(w), int(h)) for w, h in slide.level_dimensions)
            (w, h), (value, source) = levels[0], resolve_mpp(slide.properties, fallback=mpp)
            if max(w, h) * value > LARGEST_UM:
                raise ValueError(f"{w}×{h} pixels of mpp {value:.4g} cannot be a slide's: give the true one with --mpp")
            tiles = _tile_sizes(slide.properties, len(levels))
            reason = ""
            try:
                _compare(path, slide, tiled_levels(path, dimensions=levels, vendor=vendor))
            except UnsupportedTiff as why:
                reason = str(why)
    except PermissionError as error:
        raise SlideError(f"{name}: no permission to read it") from error
    except openslide.OpenSlideUnsupportedFormatError as error:
        raise SlideError(f"{name}: not a slide that OpenSlide knows, or cut off") from error
    except SlideError:
        raise
    except (OpenSlideError, ValueError, OSError) as error:
        raise SlideError(f"{name}: {error}") from error
    reader = "openslide" if reason else "tiles"
    return SlideInfo(name, value, source, levels, vendor, reader, reason, print_, tiles)


def _tile_sizes(properties: Mapping[str, str], levels: int) -> tuple[tuple[int, int], ...]:
    keys = [[f"openslide.level[{level}].tile-{side}" for side in ("width", "height")] for level in range(levels)]
    if not all(key in properties for pair in keys for key in pair):
        return ()
    return tuple((int(properties[w]), int(properties[h])) for w, h in keys)


def _compare(path: Path, slide: openslide.OpenSlide, levels: tuple[TiledLevel, ...]) -> None:
    """Hold the first, the middle and the last tile of every level against OpenSlide's; UnsupportedTiff if they differ."""
    reader = TileReader(path, levels)
    try:
        for number, level in enumerate(levels):
            rows = -(-level.size[1] // level.tile[1])
            for tile in {0, level.columns * rows // 2, level.columns * rows - 1}:
                x, y = (tile % level.columns) * level.tile[0], (tile // level.columns) * level.tile[1]
                downsample = slide.level_downsamples[number]
                location = (round(x * downsample), round(y * downsample))
                if max(abs(a / downsample - b) for a, b in zip(location, (x, y), strict=True)) > 1 / 1024:
                    continue  # OpenSlide would interpolate here: nothing to compare with
                theirs = _rgba_to_rgb(
                    slide.read_region(location, number, level.tile)
                )  # raises where the tile is broken
                ours = np.empty_like(theirs)
                reader.read(number, [(x, y)], level.tile, outs=[ours])
                if not np.array_equal(ours, theirs):
                    raise UnsupportedTiff(f"level {number}: tile {tile} differs from OpenSlide's")
    except SlideError as error:
        raise UnsupportedTiff(str(error).removeprefix(f"{path.name}: ")) from error
    finally:
        reader.close()


class Slide:
    """An open slide. Opened in the process that reads it: handles do not pickle.

    Args:
        path: the file.
        info: what `inspect_slide` found; it decides who reads.
        cache: OpenSlide's tile cache, to be shared by all slides of a process: 32 MiB each otherwise.
        tiles: the levels as `tiled_levels` found them earlier, to spare parsing the file again.

    Raises:
        SlideError: the file is gone, broken, or not the one that was inspected.
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
        """Close the file; closing twice is harmless."""
        for handle in (self._reader, self._slide):
            if handle is not None:
                handle.close()

    def read(self, level: int, x: int, y: int, size: tuple[int, int]) -> Pixels:
        """The region of `size` = (w, h) at (x, y), all in pixels of `level` → RGB (h, w, 3), white outside.

        Through OpenSlide a level whose downsample is no integer is read at the nearest position of level 0, off
        by at most half a pixel of that.

        Raises:
            SlideError: broken pixels. OpenSlide gives no more from such a slide: close it.
        """
        if self._reader is None:
            return self._through_openslide(level, x, y, size)
        pixels: Pixels = np.empty((size[1], size[0], 3), np.uint8)
        self._reader.read(level, [(x, y)], size, outs=[pixels])
        return pixels

    def read_many(
        self, level: int, corners: Sequence[tuple[int, int]], size: tuple[int, int], *, outs: Sequence[Pixels]
    ) -> None:
        """Neighbouring regions of one size, as `read` gives each, for little more than the price of one.

        Args:
            level: which; all positions are in its pixels.
            corners: (x, y) of each region.
            size: (w, h) of all of them.
            outs: where to put the pixels of each, (h, w, 3).
        """
        if self._reader is not None:
            self._reader.read(level, corners, size, outs=outs)
            return
        w, h = size
        left, top = min(x for x, _ in corners), min(y for _, y in corners)
        right, bottom = max(x for x, _ in corners) + w, max(y for _, y in corners) + h
        around = self._through_openslide(level, left, top, (right - left, bottom - top))
        for (x, y), out in zip(corners, outs, strict=True):
            out[...] = around[y - top : y - top + h, x - left : x - left + w]

    def _through_openslide(self, level: int, x: int, y: int, size: tuple[int, int]) -> Pixels:
        assert self._slide is not None
        downsample = self.info.downsample(level)
        try:
            return _rgba_to_rgb(self._slide.read_region((round(x * downsample), round(y * downsample)), level, size))
        except (OpenSlideError, OSError) as error:
            raise SlideError(f"{self.info.name}: {error}") from error

    def patch(self, location: tuple[int, int], *, size_px: int, mpp: float) -> Pixels:
        """A square patch of `mpp`, its upper left corner at `location` of level 0 → RGB (size_px, size_px, 3).

        Read from the coarsest level that is fine enough, then resized (bilinear, antialiased) where the
        level's own mpp is another.

        Raises:
            ValueError: the slide is too coarse, or smaller than the patch.
            SlideError: broken pixels.
        """
        where = region(self.info, location, size_px=size_px, mpp=mpp)
        return resize(self.read(where.level, where.x, where.y, (where.side, where.side)), size_px)

    def thumbnail(self, *, mpp: float) -> Pixels:
        """The whole slide at about `mpp`, from the coarsest level that is fine enough → RGB (h, w, 3)."""
        scale = self.info.mpp / mpp
        level = max(
            (
                k
                for k in range(len(self.info.levels))
                if self.info.downsample(k) * self.info.mpp <= mpp * (1 + LEVEL_TOLERANCE)
            ),
            default=0,
        )
        size = tuple(max(1, round(side * scale)) for side in self.info.size)
        return _read_level(self, level, (size[0], size[1]))


def resize(pixels: Pixels, size_px: int) -> Pixels:
    """A square → (size_px, size_px, 3), bilinear with antialiasing; untouched where the size is right already."""
    if pixels.shape[0] == size_px:
        return pixels
    image = Image.fromarray(pixels)
    return np.array(image.resize((size_px, size_px), Image.Resampling.BILINEAR))


def _read_level(slide: Slide, level: int, size: tuple[int, int]) -> Pixels:
    """A whole level, shrunk strip by strip: a level of gigabytes is never in memory at once."""
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
    """OpenSlide's RGBA → RGB: what it leaves transparent lies outside the slide, and becomes white."""
    rgba = np.asarray(image)
    rgb = rgba[..., :3].copy()
    rgb[rgba[..., 3] == 0] = WHITE
    return rgb
