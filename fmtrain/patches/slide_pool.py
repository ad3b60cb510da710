"""Open slides of a process: a bounded number, cheap to reopen. No torch."""

from __future__ import annotations

import os
from collections import OrderedDict
from pathlib import Path

import openslide

from fmtrain.manifest.manifest import SlideEntry, check_unchanged
from fmtrain.slides.remote import is_remote
from fmtrain.slides.slide import Slide
from fmtrain.slides.staging import StagedSlide, stage
from fmtrain.slides.tiles import TiledLevel

_CACHE_BYTES = 16 * 2**20  # of OpenSlide's tiles, per pool


class SlidePool:
    """Open slides of one process: the last ones used, which share one cache of OpenSlide's tiles.

    Of remote slides, one is open: the cache of staged slides removes none that a process holds.

    A copy in another process, forked or unpickled, starts empty: handles and caches stay in the process that opened
    them.

    Args:
        capacity: Number of slides kept open.
    """

    def __init__(self, capacity: int = 32) -> None:
        self.capacity = capacity
        self._clear()

    def _clear(self) -> None:
        self._pid = os.getpid()
        self._open: OrderedDict[str, Slide] = OrderedDict()
        # Parsed once: the locations of the tiles take a few hundred bytes per slide, and stay when a slide is closed.
        self._tiles: dict[str, tuple[TiledLevel, ...]] = {}
        self._checked: set[str] = set()
        self._staged: dict[str, StagedSlide] = {}
        self._cache = openslide.OpenSlideCache(_CACHE_BYTES)

    def __reduce__(self) -> tuple[type[SlidePool], tuple[int]]:
        return SlidePool, (self.capacity,)

    def get(self, entry: SlideEntry) -> Slide:
        """The open slide of an entry."""
        if self._pid != os.getpid():
            self._clear()
        name = entry.info.name
        slide = self._open.get(name)
        if slide is not None:
            self._open.move_to_end(name)
            return slide
        slide = Slide(self._local(entry), entry.info, cache=self._cache, tiles=self._tiles.get(name))
        if slide.tiles is not None:
            self._tiles[name] = slide.tiles
        self._open[name] = slide
        while len(self._open) > self.capacity:
            self.close(next(iter(self._open)))
        return slide

    def _local(self, entry: SlideEntry) -> Path:
        """Local file of a slide, whose fingerprint is that of the manifest."""
        name = entry.info.name
        if is_remote(entry.path):
            for other in list(self._staged):
                self.close(other)
            self._staged[name] = stage(entry.path, entry.info.files, digest=entry.info.fingerprint)
            return self._staged[name].path
        if name not in self._checked:
            check_unchanged(entry)
            self._checked.add(name)
        return entry.path

    def close(self, name: str) -> None:
        """Close one slide if it is open."""
        slide, staged = self._open.pop(name, None), self._staged.pop(name, None)
        if slide is not None:
            slide.close()
        if staged is not None:
            staged.close()
