"""The fast path: tiles of a plain tiled TIFF or SVS, decoded straight from the file. No torch.

OpenSlide composes every region on a canvas, which costs more than decoding the JPEG tiles below it. For files
that are nothing but a grid of JPEG or JPEG 2000 tiles the pixels can be had without it, equal to the last bit.
What is not that plain is refused here, with the reason, and left to OpenSlide.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import imagecodecs
import numpy as np
import numpy.typing as npt
from tifffile import COMPRESSION, PHOTOMETRIC, TiffFile, TiffPage, TiffTag

Pixels = npt.NDArray[np.uint8]

PLAIN_VENDORS = ("aperio", "generic-tiff")  # the others stitch, or keep their tiles elsewhere
_JPEG, _APERIO_JPEG2000_RGB = 7, 33005
_COLOUR_SPACES = {2: "rgb", 6: "ycbcr"}  # TIFF's PhotometricInterpretation
_INTEGERS = {3: "u2", 4: "u4", 16: "u8"}  # TIFF's SHORT, LONG, LONG8
WHITE = 255  # what lies outside the slide


class SlideError(OSError):
    """A slide that cannot be opened, or pixels that cannot be had from it; the message begins with its name."""


class UnsupportedTiff(Exception):  # noqa: N818  # no error: OpenSlide reads such a file
    """A file that only OpenSlide reads; the message says why."""


class TiledLevel(NamedTuple):
    """Where the tiles of one level lie. A few hundred bytes: the offsets stay in the file until needed."""

    size: tuple[int, int]
    tile: tuple[int, int]
    offsets_at: int
    offsets_type: np.dtype[np.unsignedinteger]
    counts_at: int
    counts_type: np.dtype[np.unsignedinteger]
    colour_space: str | None  # None: JPEG 2000, which says it itself
    tables: bytes | None  # JPEG tables shared by all tiles of the level

    @property
    def columns(self) -> int:
        """Tiles in a row of the grid."""
        return -(-self.size[0] // self.tile[0])


def tiled_levels(path: Path, *, dimensions: Sequence[tuple[int, int]], vendor: str) -> tuple[TiledLevel, ...]:
    """Find the tiles of every level, as OpenSlide counts levels.

    Args:
        path: a TIFF file.
        dimensions: (width, height) of each level, OpenSlide's.
        vendor: OpenSlide's name of the format.

    Raises:
        UnsupportedTiff: if any level is more than a full grid of JPEG or RGB JPEG 2000 tiles.
    """
    if vendor not in PLAIN_VENDORS:
        raise UnsupportedTiff(f"format {vendor}")
    log = logging.getLogger("tifffile")
    was_disabled, log.disabled = log.disabled, True  # what it warns of is in the reason, or does not matter
    try:
        with TiffFile(path) as tif:
            pages = [page for page in tif.pages if isinstance(page, TiffPage) and page.is_tiled]
            return tuple(
                _plain_level(_page_of(pages, size), level, tif.byteorder) for level, size in enumerate(dimensions)
            )
    except UnsupportedTiff:
        raise
    except Exception as error:  # a parser of broken files fails in every way there is
        raise UnsupportedTiff(f"tifffile cannot parse it ({error})") from error
    finally:
        log.disabled = was_disabled


def _page_of(pages: Sequence[TiffPage], size: tuple[int, int]) -> TiffPage:
    found = [page for page in pages if (page.imagewidth, page.imagelength) == size]
    if len(found) != 1:
        raise UnsupportedTiff(f"{len(found)} tiled pages of {size[0]}×{size[1]}")
    return found[0]


def _plain_level(page: TiffPage, level: int, byteorder: str) -> TiledLevel:
    """One page as a `TiledLevel`; UnsupportedTiff where anything is unusual."""
    layout = (page.bitspersample, page.samplesperpixel, page.planarconfig, page.imagedepth, page.fillorder)
    if layout != (8, 3, 1, 1, 1) or page.predictor != 1:
        raise UnsupportedTiff(f"level {level}: not 8-bit RGB, three samples side by side")
    offsets, counts = page.tags[324], page.tags[325]
    size, tile = (page.imagewidth, page.imagelength), (page.tilewidth, page.tilelength)
    tiles = -(-size[0] // tile[0]) * -(-size[1] // tile[1])
    if offsets.count != tiles or counts.count != tiles:
        raise UnsupportedTiff(f"level {level}: {offsets.count} tiles listed for {tiles}")
    if min(page.databytecounts) == 0:
        raise UnsupportedTiff(f"level {level}: sparse, tiles are missing")
    tables = None
    if page.compression == _JPEG:
        colour_space = _COLOUR_SPACES.get(page.photometric)
        if colour_space is None:
            raise UnsupportedTiff(f"level {level}: JPEG in colour space {PHOTOMETRIC(page.photometric).name}")
        tables = page.jpegtables
        first = os.pread(page.parent.filehandle.fileno(), page.databytecounts[0], page.dataoffsets[0])
        if tables is None and not (b"\xff\xdb" in first and b"\xff\xc4" in first):
            raise UnsupportedTiff(f"level {level}: JPEG tables are missing")
    elif page.compression == _APERIO_JPEG2000_RGB and page.photometric == 2:
        colour_space = None
    else:
        raise UnsupportedTiff(f"level {level}: compression {COMPRESSION(page.compression).name}")
    return TiledLevel(
        size,
        tile,
        offsets.valueoffset,
        _integer(offsets, byteorder),
        counts.valueoffset,
        _integer(counts, byteorder),
        colour_space,
        tables,
    )


def _integer(tag: TiffTag, byteorder: str) -> np.dtype[np.unsignedinteger]:
    return np.dtype(byteorder + _INTEGERS[int(tag.dtype)])


def aligned_buffer(width: int, height: int) -> Pixels:
    """Memory (height, width, 3) to decode tiles into, begun 16 bytes past a multiple of 32.

    At a multiple of 32 libjpeg-turbo writes past the caches (AVX2 streaming stores), and decoding a tile that is
    read again at once takes about a fifth longer.
    """
    size = width * height * 3
    memory = np.empty(size + 32, np.uint8)
    start = (16 - memory.ctypes.data) % 32
    return memory[start : start + size].reshape(height, width, 3)


class TileReader:
    """Regions of the levels of one file. Opened where it is used: the handle does not travel between processes."""

    def __init__(self, path: Path, levels: Sequence[TiledLevel]) -> None:
        self.name = path.name
        self.levels = levels
        self._fd = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        # One tile is decoded after the other into the same memory: allocating costs a quarter of decoding.
        self._buffers = {level.tile: aligned_buffer(*level.tile) for level in levels}

    def close(self) -> None:
        """Close the file; closing twice is harmless."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def read(
        self, level: int, corners: Sequence[tuple[int, int]], size: tuple[int, int], *, outs: Sequence[Pixels]
    ) -> None:
        """Regions of one size: each tile that any of them touches is decoded once, whatever they share.

        Args:
            level: which; all positions are in its pixels.
            corners: (x, y) of each region.
            size: (w, h) of all of them.
            outs: where to put the pixels of each, (h, w, 3); white outside the slide.

        Raises:
            SlideError: a tile is cut off or broken.
        """
        of = self.levels[level]
        (tile_w, tile_h), (w, h) = of.tile, size
        touched: dict[int, dict[int, list[int]]] = {}  # row → column → regions
        for k, (x, y) in enumerate(corners):
            if x < 0 or y < 0 or x + w > of.size[0] or y + h > of.size[1]:
                outs[k].fill(WHITE)
            for row in range(max(y, 0) // tile_h, (min(y + h, of.size[1]) - 1) // tile_h + 1):
                columns = touched.setdefault(row, {})
                for column in range(max(x, 0) // tile_w, (min(x + w, of.size[0]) - 1) // tile_w + 1):
                    columns.setdefault(column, []).append(k)
        for row, columns in touched.items():
            if not columns:
                continue
            first, top = min(columns), row * tile_h
            bottom = min(top + tile_h, of.size[1])
            places = self._places(of, row * of.columns + first, max(columns) - first + 1)
            for column, regions in columns.items():
                tile, left = self._decode(of, *places[column - first]), column * tile_w
                right = min(left + tile_w, of.size[0])
                for k in regions:
                    x, y = corners[k]
                    u0, u1, v0, v1 = max(x, left), min(x + w, right), max(y, top), min(y + h, bottom)
                    outs[k][v0 - y : v1 - y, u0 - x : u1 - x] = tile[v0 - top : v1 - top, u0 - left : u1 - left]

    def _places(self, of: TiledLevel, first: int, n: int) -> list[tuple[int, int]]:
        """(offset, byte count) of n tiles in a row, from the file's own tables."""
        columns = []
        for start, kind in ((of.offsets_at, of.offsets_type), (of.counts_at, of.counts_type)):
            data = os.pread(self._fd, n * kind.itemsize, start + first * kind.itemsize)
            if len(data) != n * kind.itemsize:
                raise SlideError(f"{self.name}: the file ends within its table of tiles")
            columns.append(np.frombuffer(data, kind).tolist())
        return list(zip(*columns, strict=True))

    def _decode(self, of: TiledLevel, offset: int, count: int) -> Pixels:
        data = os.pread(self._fd, count, offset)
        if len(data) != count:
            raise SlideError(f"{self.name}: the file ends within a tile")
        buffer = self._buffers[of.tile]
        try:
            if of.colour_space is None:
                imagecodecs.jpeg2k_decode(data, out=buffer)
            else:
                imagecodecs.jpeg8_decode(
                    data, tables=of.tables, colorspace=of.colour_space, outcolorspace="rgb", out=buffer
                )
        except (RuntimeError, ValueError) as error:  # the codecs' own errors, or a tile of another size
            raise SlideError(f"{self.name}: a broken tile ({error})") from error
        return buffer
