"""OME-TIFF with tifffile: levels in SubIFDs and the physical size of a pixel. No torch.

OpenSlide opens some of these files, with level 0 alone and without the size in the OME-XML, and refuses the others.
"""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from tifffile import TiffPage, TiffPageSeries

from fmtrain.slides.tiles import WHITE, SlideError, open_tiff

Pixels = npt.NDArray[np.uint8]

VENDOR = "ome-tiff"
_UM = {"nm": 1e-3, "µm": 1.0, "um": 1.0, "μm": 1.0, "mm": 1e3, "cm": 1e4, "m": 1e6, "in": 25_400.0}


class NotBrightFieldError(ValueError):
    """An image that is not one plane of 8-bit RGB: fluorescence, a stack, a mask."""


class OmeImage(NamedTuple):
    """Levels of the largest image of a file, and what its XML says."""

    levels: tuple[tuple[int, int], ...]  # (width, height), finest first
    tiles: tuple[tuple[int, int], ...]
    properties: dict[str, str]  # named as those of OpenSlide


def read_ome(path: Path) -> OmeImage | None:
    """Facts about an OME-TIFF; None for any other file.

    Raises:
        NotBrightFieldError: The image is not one plane of 8-bit RGB.
    """
    with path.open("rb") as file:
        if file.read(2) not in (b"II", b"MM"):
            return None
    with open_tiff(path) as tif:
        if not tif.is_ome:
            return None
        number, series = max(enumerate(tif.series), key=lambda pair: pair[1].size)
        pages = _pages(series)
        levels = tuple((page.imagewidth, page.imagelength) for page in pages)
        chunks = tuple((page.chunks[1], page.chunks[0]) for page in pages)
        return OmeImage(levels, chunks, _properties(tif.ome_metadata or "", number))


def _pages(series: TiffPageSeries) -> list[TiffPage]:
    """One page per level, each 8-bit RGB."""
    pages = []
    for level in series.levels:
        page = level.keyframe
        if level.axes != "YXS" or page.dtype != np.uint8 or page.samplesperpixel != 3 or page.planarconfig != 1:
            shape = "×".join(map(str, level.shape))
            layout = f"{shape} ({level.axes}, {page.dtype})"
            raise NotBrightFieldError(f"an OME-TIFF of {layout}: only one plane of 8-bit RGB is a bright-field slide")
        pages.append(page)
    return pages


def _properties(xml: str, number: int) -> dict[str, str]:
    """Physical size in micrometers, and the nominal magnification if there is one objective."""
    root = ElementTree.fromstring(xml)
    images = [element for element in root.iter() if _tag(element) == "Image"]
    pixels = next((e for e in images[number].iter() if _tag(e) == "Pixels"), None) if number < len(images) else None
    properties: dict[str, str] = {}
    for side in "XY":
        value = None if pixels is None else pixels.get(f"PhysicalSize{side}")
        unit = _UM.get("µm" if pixels is None else pixels.get(f"PhysicalSize{side}Unit", "µm"))
        if value is not None and unit is not None:
            properties[f"ome.PhysicalSize{side}"] = repr(float(value) * unit)
    powers = {e.get("NominalMagnification") for e in root.iter() if _tag(e) == "Objective"} - {None}
    if len(powers) == 1:
        properties["openslide.objective-power"] = str(powers.pop())
    return properties


def _tag(element: ElementTree.Element) -> str:
    return element.tag.rpartition("}")[2]


class OmeReader:
    """Reader of regions from one OME-TIFF. Open it in the process that reads: the handle does not pickle."""

    def __init__(self, path: Path) -> None:
        self.name = path.name
        self._opened = ExitStack()
        tif = self._opened.enter_context(open_tiff(path))
        self._file = tif.filehandle
        self._pages = _pages(max(tif.series, key=lambda series: series.size))
        self.levels = tuple((page.imagewidth, page.imagelength) for page in self._pages)

    def close(self) -> None:
        """Close the file. A second call has no effect."""
        self._opened.close()

    def read(
        self, level: int, corners: Sequence[tuple[int, int]], size: tuple[int, int], *, outs: Sequence[Pixels]
    ) -> None:
        """Read regions of one size, as `TileReader.read` does; a tile that several regions share is decoded once."""
        page = self._pages[level]
        (width, height), (w, h) = self.levels[level], size
        tile_h, tile_w = page.chunks[:2]
        columns = -(-width // tile_w)
        touched: dict[int, list[int]] = {}  # tile → regions
        for k, (x, y) in enumerate(corners):
            if x < 0 or y < 0 or x + w > width or y + h > height:
                outs[k].fill(WHITE)
            for row in range(max(y, 0) // tile_h, (min(y + h, height) - 1) // tile_h + 1):
                for column in range(max(x, 0) // tile_w, (min(x + w, width) - 1) // tile_w + 1):
                    touched.setdefault(row * columns + column, []).append(k)
        for index in sorted(touched):
            top, left = index // columns * tile_h, index % columns * tile_w
            bottom, right = min(top + tile_h, height), min(left + tile_w, width)
            tile = self._decode(page, index)
            for k in touched[index]:
                x, y = corners[k]
                u0, u1, v0, v1 = max(x, left), min(x + w, right), max(y, top), min(y + h, bottom)
                outs[k][v0 - y : v1 - y, u0 - x : u1 - x] = tile[v0 - top : v1 - top, u0 - left : u1 - left]

    def _decode(self, page: TiffPage, index: int) -> Pixels:
        offset, count = page.dataoffsets[index], page.databytecounts[index]
        if count == 0:
            raise SlideError(f"{self.name}: a tile is missing")
        self._file.seek(offset)
        data = self._file.read(count)
        if len(data) != count:
            raise SlideError(f"{self.name}: the file ends within a tile")
        try:
            decoded = page.decode(data, index, jpegtables=page.jpegtables)[0]
        except Exception as error:  # codecs raise any exception
            raise SlideError(f"{self.name}: a broken tile ({error})") from error
        if decoded is None:
            raise SlideError(f"{self.name}: a broken tile")
        pixels: Pixels = np.asarray(decoded)[0]
        return pixels
