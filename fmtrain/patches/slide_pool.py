"""The slides that a process has open: few at a time, cheap to reopen, patient with slow storage. No torch."""

from __future__ import annotations

import errno
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import TypeVar

import openslide

from fmtrain.manifest.manifest import SlideEntry, check_unchanged
from fmtrain.slides.slide import Slide
from fmtrain.slides.tiles import TiledLevel

T = TypeVar("T")

_TRANSIENT = {errno.EIO, errno.EAGAIN, errno.EINTR, errno.ETIMEDOUT, errno.ESTALE, errno.ECONNRESET, errno.EBUSY}
_RETRIES, _FIRST_WAIT_SECONDS = 4, 0.1


def with_retries(action: Callable[[], T], *, wait: Callable[[float], None] = time.sleep) -> T:
    """Do it, and once more after 0.1, 0.4, 1.6 and 6.4 s, where the storage stumbled and may recover.

    Faults of the file itself (broken, missing, forbidden) come at once.
    """
    for attempt in range(_RETRIES):
        try:
            return action()
        except OSError as error:
            cause = error.__cause__ if isinstance(error.__cause__, OSError) else error
            if cause.errno not in _TRANSIENT:
                raise
            wait(_FIRST_WAIT_SECONDS * 4**attempt)
    return action()


class SlidePool:
    """The slides that one process has open: the last ones used, sharing one cache of OpenSlide's tiles.

    Args:
        capacity: how many stay open.
        cache_mib: OpenSlide's tile cache, for all of them together.
    """

    def __init__(self, *, capacity: int = 32, cache_mib: int = 16) -> None:
        self.capacity = capacity
        self._open: OrderedDict[str, Slide] = OrderedDict()
        # Parsed once: where the tiles lie is a few hundred bytes a slide, even when its handle is long closed.
        self._tiles: dict[str, tuple[TiledLevel, ...]] = {}
        self._checked: set[str] = set()
        self._cache = openslide.OpenSlideCache(cache_mib * 2**20)

    def get(self, entry: SlideEntry) -> Slide:
        """The open slide.

        Raises:
            SlideError: it cannot be opened, or is not the file that the manifest describes.
        """
        name = entry.info.name
        slide = self._open.get(name)
        if slide is not None:
            self._open.move_to_end(name)
            return slide
        if name not in self._checked:
            check_unchanged(entry)
            self._checked.add(name)
        slide = Slide(entry.path, entry.info, cache=self._cache, tiles=self._tiles.get(name))
        if slide.tiles is not None:
            self._tiles[name] = slide.tiles
        self._open[name] = slide
        while len(self._open) > self.capacity:
            self._open.popitem(last=False)[1].close()
        return slide

    def close(self, name: str) -> None:
        """Close one slide, if it is open."""
        slide = self._open.pop(name, None)
        if slide is not None:
            slide.close()
