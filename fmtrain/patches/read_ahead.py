"""Remote slides fetched before they are read. No torch."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import TypeVar

from fmtrain.manifest.manifest import SlideEntry
from fmtrain.slides.staging import stage
from fmtrain.slides.tiles import SlideError

T = TypeVar("T")
AHEAD = 8  # slides of a process that are fetched at the same time


def fetch_ahead(items: Iterable[T], entry_of: Callable[[T], SlideEntry | None]) -> Iterator[T]:
    """The items in their order, each when its slide is there; the slides of the next eight are fetched meanwhile.

    Args:
        items: What is read.
        entry_of: Slide of an item; None if it needs none. It is called in this thread.

    Raises:
        StorageError: The storage does not answer, or the cache has no space.
    """
    waiting: deque[tuple[T, Future[None]]] = deque()
    with ThreadPoolExecutor(AHEAD) as pool:
        for item in items:
            waiting.append((item, pool.submit(_fetch, entry_of(item))))
            if len(waiting) == AHEAD:
                yield _ready(*waiting.popleft())
        while waiting:
            yield _ready(*waiting.popleft())


def _fetch(entry: SlideEntry | None) -> None:
    if entry is not None:
        with suppress(SlideError):  # raised again where the slide is read, and quarantined there
            stage(entry.path, entry.info.files, digest=entry.info.fingerprint).close()


def _ready(item: T, fetched: Future[None]) -> T:
    fetched.result()
    return item
