"""Facts about one slide file, and its fingerprint."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from fmtrain.slides.remote import range_reader, size


@dataclass(frozen=True)
class SlideInfo:
    """Facts needed to read a slide, known without opening it."""

    name: str
    mpp: float
    mpp_source: str
    levels: tuple[tuple[int, int], ...]  # (width, height), finest first
    vendor: str
    reader: str  # "tiles" or "openslide"
    reader_reason: str  # why not "tiles"; empty for "tiles"
    fingerprint: str
    tiles: tuple[tuple[int, int], ...] = ()  # (width, height) of each level's tiles; empty if unknown
    files: tuple[str, ...] = ()  # all files of a slide that has several, sorted, relative to the folder of its path
    warnings: tuple[str, ...] = ()  # doubts about mpp and levels

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) at level 0."""
        return self.levels[0]

    def downsample(self, level: int) -> float:
        """Factor by which a level is coarser than level 0. OpenSlide's definition: the mean of both directions."""
        (w0, h0), (w, h) = self.levels[0], self.levels[level]
        return (w0 / w + h0 / h) / 2


class Region(NamedTuple):
    """Square to read for a patch: (x, y) of the upper left corner and the side, in pixels of `level`."""

    level: int
    x: int
    y: int
    side: int


def fingerprint(path: Path, files: Sequence[str] = ()) -> str:
    """Hash of the file size and of three pieces of 64 KiB: start, middle, end. Cheap for slides of gigabytes.

    Args:
        path: File that is opened, here or on remote storage.
        files: All files of a slide that has several, relative to the folder of `path`; their names are not hashed.
    """
    if files:
        parts = "".join(fingerprint(path.parent / name) for name in files)
        return hashlib.sha256(parts.encode()).hexdigest()[:32]
    piece, length = 1 << 16, size(path)
    digest = hashlib.sha256(str(length).encode())
    with range_reader(path) as read:
        for start in sorted({0, max(0, length // 2 - piece // 2), max(0, length - piece)}):
            digest.update(read(start, min(start + piece, length)))
    return digest.hexdigest()[:32]
