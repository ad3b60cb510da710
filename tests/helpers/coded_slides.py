"""Slides whose pixels code their position, so that a wrong location, level or channel is detected."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tifffile import TiffWriter


def coded(width: int, height: int, level: int = 0) -> npt.NDArray[np.uint8]:
    """Pixel (x, y) of a level → (x mod 256, y mod 256, x div 256 + 8·(y div 256) + 64·level)."""
    y, x = np.mgrid[:height, :width]
    assert max(x.max() // 256, y.max() // 256) < 8
    assert level < 4
    return np.stack([x & 255, y & 255, (x >> 8) + 8 * (y >> 8) + 64 * level], -1).astype(np.uint8)


def decode(pixels: npt.NDArray[np.uint8]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Pixels of a coded slide → x, y, level of each."""
    r, g, b = np.moveaxis(pixels.astype(np.int64), -1, 0)
    return r + 256 * (b & 7), g + 256 * (b >> 3 & 7), b >> 6


def write_coded(
    path: Path,
    sizes: Sequence[tuple[int, int]],
    *,
    mpp: float | None = 0.25,
    tile: int = 128,
    lossless: str = "jpeg2000",
) -> Path:
    """Write a lossless slide with the given levels, (width, height) each, whose pixels code their coordinates.

    "jpeg2000" writes Aperio's variant for the direct reader. "deflate" writes a generic TIFF, read with OpenSlide.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with TiffWriter(path) as tif:
        for level, (w, h) in enumerate(sizes):
            text = f"Aperio Image Library v0 \r\n{w}x{h} ({tile}x{tile}) J2K" + (f"|MPP = {mpp}" if mpp else "")
            per_cm = 1e4 / ((mpp or 1) * sizes[0][0] / w)
            tif.write(
                coded(w, h, level),
                photometric="rgb",
                tile=(tile, tile),
                compression="APERIO_JP2000_RGB" if lossless == "jpeg2000" else "zlib",
                compressionargs={"level": 0, "reversible": True} if lossless == "jpeg2000" else None,
                description=text if lossless == "jpeg2000" else None,
                resolution=(per_cm, per_cm) if mpp and lossless == "deflate" else None,
                resolutionunit="CENTIMETER" if mpp and lossless == "deflate" else None,
                subfiletype=int(level > 0 and lossless == "deflate"),
                metadata=None,
                software=False,
            )
    return path
