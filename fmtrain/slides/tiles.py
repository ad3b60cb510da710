"""Direct reader: tiles of a plain tiled TIFF or SVS, decoded straight from the file. No torch.

OpenSlide composes every region on a canvas, which costs more than decoding the JPEG tiles. A file that is only a grid
of JPEG or JPEG 2000 tiles can be read without OpenSlide; the pixels are equal to the last bit. Any other file is
rejected here, with the reason, and read with OpenSlide.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import imagecodecs
import numpy as np
import numpy.typing as npt
from tifffile import COMPRESSION, PHOTOMETRIC, TiffFile, TiffPage, TiffTag

from fmtrain.slides.retries import may_pass

Pixels = npt.NDArray[np.uint8]

PLAIN_VENDORS = ("aperio", "generic-tiff", "ome-tiff")  # other formats stitch tiles, or store them outside the TIFF
_JPEG, _APERIO_JPEG2000_RGB = 7, 33005
_COLOR_SPACES = {2: "rgb", 6: "ycbcr"}  # TIFF's PhotometricInterpretation
_INTEGERS = {3: "u2", 4: "u4", 16: "u8"}  # TIFF's SHORT, LONG, LONG8
WHITE = 255  # of pixels outside the slide


class SlideError(OSError):
    """A slide that cannot be opened or read; the message starts with its name."""


class UnsupportedTiff(Exception):  # noqa: N818  # not an error: OpenSlide reads such a file
    """A file that only OpenSlide reads; the message is the reason.

    The manifest records the message as `reader_reason`, and its hash covers it: a new wording changes hashes.
    """


class TiledLevel(NamedTuple):
    """Locations of one level's tiles, in a few hundred bytes: the offsets are read from the file when needed."""

    size: tuple[int, int]
    tile: tuple[int, int]
    offsets_at: int
    offsets_type: np.dtype[np.unsignedinteger]
    counts_at: int
    counts_type: np.dtype[np.unsignedinteger]
    color_space: str | None  # None for JPEG 2000, whose tiles contain it
    tables: bytes | None  # JPEG tables shared by all tiles of the level

    @property
    def columns(self) -> int:
        """Number of tiles in a row of the grid."""
        return -(-self.size[0] // self.tile[0])


def tiled_levels(path: Path, *, dimensions: Sequence[tuple[int, int]], vendor: str) -> tuple[TiledLevel, ...]:
    """Locate the tiles of every level of OpenSlide.

    Args:
        path: TIFF file.
        dimensions: (width, height) of each level, from OpenSlide, or of an OME-TIFF.
        vendor: OpenSlide's name of the format, or "ome-tiff".
    """
    if vendor not in PLAIN_VENDORS:
        raise UnsupportedTiff(f"format {vendor}")
    try:
        with open_tiff(path) as tif:
            pages = [page for page in tif.pages if isinstance(page, TiffPage)]
            if vendor == "ome-tiff":  # its levels are in SubIFDs
                pages += [sub for page in pages for sub in page.pages or () if isinstance(sub, TiffPage)]
            pages = [page for page in pages if page.is_tiled]
            return tuple(
                _plain_level(_page_of(pages, size), level, tif.byteorder) for level, size in enumerate(dimensions)
            )
    except UnsupportedTiff:
        raise
    except Exception as error:  # a parser of broken files raises any exception
        if isinstance(error, OSError) and may_pass(error):
            raise  # says nothing of the file
        raise UnsupportedTiff(f"tifffile cannot parse it ({error})") from error


@contextmanager
def open_tiff(path: Path) -> Iterator[TiffFile]:
    """Open a TIFF with tifffile, whose warnings are off: what matters raises.

    tifffile gets a handle. From a path it would follow links, and its errors would show a name that a link conceals.
    """
    log = logging.getLogger("tifffile")
    was_disabled, log.disabled = log.disabled, True
    try:
        with path.open("rb") as file, TiffFile(file) as tif:
            yield tif
    finally:
        log.disabled = was_disabled


def _page_of(pages: Sequence[TiffPage], size: tuple[int, int]) -> TiffPage:
    matches = [page for page in pages if (page.imagewidth, page.imagelength) == size]
    if len(matches) != 1:
        raise UnsupportedTiff(f"{len(matches)} tiled pages of {size[0]}×{size[1]}")
    return matches[0]


def _plain_level(page: TiffPage, level: int, byteorder: str) -> TiledLevel:
    """One page as a `TiledLevel`; UnsupportedTiff if anything is unusual."""
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
        color_space = _COLOR_SPACES.get(page.photometric)
        if color_space is None:
            raise UnsupportedTiff(f"level {level}: JPEG in colour space {PHOTOMETRIC(page.photometric).name}")
        tables = page.jpegtables
        first = os.pread(page.parent.filehandle.fileno(), page.databytecounts[0], page.dataoffsets[0])
        if tables is None and not (b"\xff\xdb" in first and b"\xff\xc4" in first):
            raise UnsupportedTiff(f"level {level}: JPEG tables are missing")
    elif page.compression == _APERIO_JPEG2000_RGB and page.photometric == 2:
        color_space = None
    else:
        raise UnsupportedTiff(f"level {level}: compression {COMPRESSION(page.compression).name}")
    return TiledLevel(
        size,
        tile,
        offsets.valueoffset,
        _integer(offsets, byteorder),
        counts.valueoffset,
        _integer(counts, byteorder),
        color_space,
        tables,
    )


def _integer(tag: TiffTag, byteorder: str) -> np.dtype[np.unsignedinteger]:
    return np.dtype(byteorder + _INTEGERS[int(tag.dtype)])


def aligned_buffer(width: int, height: int) -> Pixels:
    """Memory (height, width, 3) for decoded tiles, which starts 16 bytes past a multiple of 32.

    At a multiple of 32, libjpeg-turbo bypasses the caches (AVX2 streaming stores). Decoding a tile that is read
    immediately then takes about a fifth longer.
    """
    size = width * height * 3
    memory = np.empty(size + 32, np.uint8)
    start = (16 - memory.ctypes.data) % 32
    return memory[start : start + size].reshape(height, width, 3)


class TileReader:
    """Reader of regions from one file. Open it in the process that reads: the handle does not pickle."""

    def __init__(self, path: Path, levels: Sequence[TiledLevel]) -> None:
        self.name = path.name
        self.levels = levels
        self._fd = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        # All tiles of a size are decoded into the same memory: allocating costs a quarter of decoding.
        self._buffers = {level.tile: aligned_buffer(*level.tile) for level in levels}

    def close(self) -> None:
        """Close the file. A second call has no effect."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def read(
        self, level: int, corners: Sequence[tuple[int, int]], size: tuple[int, int], *, outs: Sequence[Pixels]
    ) -> None:
        """Read regions of one size. A tile that several regions share is decoded once.

        Args:
            level: Level to read; all positions are in its pixels.
            corners: (x, y) of each region.
            size: (w, h) of all regions.
            outs: Arrays (h, w, 3) to fill, one per region; white outside the slide.
        """
        grid = self.levels[level]
        (tile_w, tile_h), (w, h) = grid.tile, size
        touched: dict[int, list[int]] = {}  # number of a tile → regions
        for k, (x, y) in enumerate(corners):
            if x < 0 or y < 0 or x + w > grid.size[0] or y + h > grid.size[1]:
                outs[k].fill(WHITE)
            columns = range(max(x, 0) // tile_w, (min(x + w, grid.size[0]) - 1) // tile_w + 1)
            for row in range(max(y, 0) // tile_h, (min(y + h, grid.size[1]) - 1) // tile_h + 1):
                for column in columns:
                    touched.setdefault(row * grid.columns + column, []).append(k)
        if not touched:
            return
        first = min(touched)
        offsets, counts = self._table(grid, first, max(touched) - first + 1)
        for number in sorted(touched):
            tile = self._decode(grid, int(offsets[number - first]), int(counts[number - first]))
            row, column = divmod(number, grid.columns)
            left, top = column * tile_w, row * tile_h
            right, bottom = min(left + tile_w, grid.size[0]), min(top + tile_h, grid.size[1])
            for k in touched[number]:
                x, y = corners[k]
                u0, u1, v0, v1 = max(x, left), min(x + w, right), max(y, top), min(y + h, bottom)
                outs[k][v0 - y : v1 - y, u0 - x : u1 - x] = tile[v0 - top : v1 - top, u0 - left : u1 - left]

    def _table(self, grid: TiledLevel, first: int, n: int) -> list[npt.NDArray[np.unsignedinteger]]:
        """Offsets and byte counts of n tiles, from the tables in the file."""
        columns = []
        for start, kind in ((grid.offsets_at, grid.offsets_type), (grid.counts_at, grid.counts_type)):
            data = os.pread(self._fd, n * kind.itemsize, start + first * kind.itemsize)
            if len(data) != n * kind.itemsize:
                raise SlideError(f"{self.name}: the file ends within its table of tiles")
            columns.append(np.frombuffer(data, kind))
        return columns

    def _decode(self, grid: TiledLevel, offset: int, count: int) -> Pixels:
        data = os.pread(self._fd, count, offset)
        if len(data) != count:
            raise SlideError(f"{self.name}: the file ends within a tile")
        buffer = self._buffers[grid.tile]
        try:
            if grid.color_space is None:
                imagecodecs.jpeg2k_decode(data, out=buffer)
            else:
                imagecodecs.jpeg8_decode(
                    data, tables=grid.tables, colorspace=grid.color_space, outcolorspace="rgb", out=buffer
                )
        except (RuntimeError, ValueError) as error:  # errors of the codecs, or a tile of another size
            raise SlideError(f"{self.name}: a broken tile ({error})") from error
        return buffer
