"""One slide: what it is, its micrometres per pixel, and reading from it. No torch.

OpenSlide opens every format and is the reference; `fmtrain.tiles` reads plain tiled files faster. Which one reads
a slide is found once, by `inspect`, and kept with the reason in its `SlideInfo`.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import openslide
from openslide.lowlevel import OpenSlideError
from PIL import Image

from fmtrain.tiles import WHITE, NotPlain, SlideError, TiledLevel, TileReader, tiled_levels

Pixels = npt.NDArray[np.uint8]

__all__ = ["Region", "Slide", "SlideError", "SlideInfo", "fingerprint", "inspect", "region", "resolve_mpp"]

# Nothing that scans tissue is finer or coarser at its full resolution. Print resolutions (96 dpi = 264 µm) and
# slips of unit (0.005 for 0.5) fall outside.
BELIEVABLE_MPP = (0.05, 10.0)
LEVEL_TOLERANCE = 0.01  # a level this much coarser than asked for is still fine enough
UPSAMPLING_TOLERANCE = 0.1  # scanners called 40× have mpp .23 to .27: such gaps are bridged, larger ones are not
LARGEST_UM = 300_000  # larger than any glass: damage, or a false mpp
STRIP_PX = 1 << 24  # pixels in memory at once while a thumbnail is made
_MPP_KEYS = (("openslide.mpp-x", "openslide.mpp-y"), ("aperio.MPP", "aperio.MPP"))


@dataclass(frozen=True)
class SlideInfo:
    """What must be known to read a slide, without opening it."""

    name: str
    mpp: float
    mpp_source: str
    levels: tuple[tuple[int, int], ...]  # (width, height), finest first
    vendor: str
    reader: str  # "tiles" or "openslide"
    reader_reason: str  # why not "tiles"; empty where it is
    fingerprint: str
    tiles: tuple[tuple[int, int], ...] = ()  # (width, height) of each level's tiles, where the file tells

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) at level 0."""
        return self.levels[0]

    def downsample(self, level: int) -> float:
        """How much coarser a level is, as OpenSlide defines it: the mean of both directions."""
        (w0, h0), (w, h) = self.levels[0], self.levels[level]
        return (w0 / w + h0 / h) / 2


class Region(NamedTuple):
    """What to read for a patch: (x, y) and the side, in pixels of `level`."""

    level: int
    x: int
    y: int
    side: int


def resolve_mpp(properties: Mapping[str, str], *, fallback: float | None = None) -> tuple[float, str]:
    """Micrometres per pixel at level 0, and where the number comes from.

    Tried in turn: OpenSlide's mpp (from the vendor's keys, or the TIFF resolution), the vendor's own key, the
    objective (10 / magnification: nominal), the fallback. A value outside 0.05 … 10 is not believed.

    Args:
        properties: OpenSlide's.
        fallback: the user's word, for slides that do not say it themselves.

    Raises:
        ValueError: nothing believable, or pixels that are not square.

    Example:
        >>> resolve_mpp({"openslide.mpp-x": "0.4990", "openslide.mpp-y": "0.4990"})
        (0.499, 'openslide.mpp-x')
        >>> resolve_mpp({"openslide.mpp-x": "264.58", "openslide.mpp-y": "264.58"}, fallback=0.5)
        (0.5, 'given')
    """
    absurd = []
    for key_x, key_y in _MPP_KEYS:
        x, y = _number(properties.get(key_x)), _number(properties.get(key_y))
        if x is None or y is None:
            continue
        if not (believable(x) and believable(y)):
            absurd.append(f"{key_x} says {x:.6g}")
        elif abs(x - y) > 0.05 * max(x, y):
            raise ValueError(f"its pixels are not square: mpp {x:.4g} × {y:.4g}; such slides are not supported")
        else:
            return (x + y) / 2, key_x
    power = _number(properties.get("openslide.objective-power"))
    if power is not None and power > 0 and believable(10 / power):
        return 10 / power, "openslide.objective-power (nominal)"
    if fallback is not None:
        return fallback, "given"
    why = f"no believable mpp ({'; '.join(absurd)})" if absurd else "no mpp"
    raise ValueError(f"it has {why}: give the true micrometres per pixel with --mpp")


def believable(mpp: float) -> bool:
    """Whether micrometres per pixel can be those of a scan."""
    return BELIEVABLE_MPP[0] <= mpp <= BELIEVABLE_MPP[1]


def _number(text: str | None) -> float | None:
    try:
        value = float(text) if text is not None else None
    except ValueError:
        return None
    return value if value is not None and np.isfinite(value) else None


def fingerprint(path: Path) -> str:
    """A hash of the size and of three pieces of 64 KiB: start, middle, end. Cheap on slides of gigabytes."""
    piece = 1 << 16
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for start in sorted({0, max(0, size // 2 - piece // 2), max(0, size - piece)}):
            file.seek(start)
            digest.update(file.read(piece))
    return digest.hexdigest()[:32]


def inspect(path: Path, *, name: str | None = None, mpp: float | None = None) -> SlideInfo:
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
            except NotPlain as why:
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
    """Hold the first, the middle and the last tile of every level against OpenSlide's; NotPlain if they differ."""
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
                theirs = _opaque(slide.read_region(location, number, level.tile))  # raises where the tile is broken
                ours = np.empty_like(theirs)
                reader.read(number, [(x, y)], level.tile, outs=[ours])
                if not np.array_equal(ours, theirs):
                    raise NotPlain(f"level {number}: tile {tile} differs from OpenSlide's")
    except SlideError as error:
        raise NotPlain(str(error).removeprefix(f"{path.name}: ")) from error
    finally:
        reader.close()


def region(info: SlideInfo, location: tuple[int, int], *, size_px: int, mpp: float) -> Region:
    """Where to read a patch: the coarsest level that is fine enough, snapped to that level's own grid.

    A read that is not snapped is interpolated by OpenSlide, and differs by tens of grey levels.

    Args:
        info: the slide.
        location: (x, y) of the upper left corner at level 0.
        size_px: side of the patch that will come out.
        mpp: resolution of the patch.

    Raises:
        ValueError: the slide is too coarse, or smaller than the patch.

    Example:
        >>> slide = SlideInfo("a", 0.25, "", ((4000, 4000), (1000, 1000)), "", "tiles", "", "")
        >>> region(slide, (401, 800), size_px=256, mpp=1.0)
        Region(level=1, x=100, y=200, side=256)
        >>> region(slide, (401, 800), size_px=256, mpp=0.5)
        Region(level=0, x=401, y=800, side=512)
    """
    if info.mpp > mpp * (1 + UPSAMPLING_TOLERANCE):
        raise ValueError(f"{info.name} has mpp {info.mpp:.4g}: too coarse for patches of mpp {mpp:.4g}")
    fine_enough = [k for k in range(len(info.levels)) if info.mpp * info.downsample(k) <= mpp * (1 + LEVEL_TOLERANCE)]
    level = fine_enough[-1] if fine_enough else 0
    downsample = info.downsample(level)
    side = max(1, round(size_px * mpp / (info.mpp * downsample)))
    w, h = info.levels[level]
    if side > min(w, h):
        raise ValueError(
            f"{info.name} is smaller than a patch: {info.size[0]}×{info.size[1]} pixels of mpp {info.mpp:.4g}, "
            f"asked for {size_px} of mpp {mpp:.4g}"
        )
    # Rounding may push a patch at the border over it by a pixel of the level: move it back in.
    x, y = (round(value / downsample) for value in location)
    return Region(level, min(max(x, 0), w - side), min(max(y, 0), h - side), side)


class Slide:
    """An open slide. Opened in the process that reads it: handles do not pickle.

    Args:
        path: the file.
        info: what `inspect` found; it decides who reads.
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
        except (OpenSlideError, NotPlain, OSError) as error:
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
            return _opaque(self._slide.read_region((round(x * downsample), round(y * downsample)), level, size))
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
        return _whole(self, level, (size[0], size[1]))


def resize(pixels: Pixels, size_px: int) -> Pixels:
    """A square → (size_px, size_px, 3), bilinear with antialiasing; untouched where the size is right already."""
    if pixels.shape[0] == size_px:
        return pixels
    image = Image.fromarray(pixels)
    return np.array(image.resize((size_px, size_px), Image.Resampling.BILINEAR))


def _whole(slide: Slide, level: int, size: tuple[int, int]) -> Pixels:
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


def _opaque(image: Image.Image) -> Pixels:
    """OpenSlide's RGBA → RGB: what it leaves transparent lies outside the slide, and becomes white."""
    rgba = np.asarray(image)
    rgb = rgba[..., :3].copy()
    rgb[rgba[..., 3] == 0] = WHITE
    return rgb


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether a path names something that is not on this machine: `s3://…`, `https://…`, `gs:/…`."""
    head, colon, _ = os.fspath(path).partition(":/")
    return bool(colon) and len(head) > 1 and head.replace("+", "").replace("-", "").isalnum()
