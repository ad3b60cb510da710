"""Progress of a long operation as lines of text."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

FIRST_SECONDS = 3.0
"""Operations shorter than this print nothing."""
LONGEST_PAUSE = 60.0
"""Seconds between lines double up to this."""


def print_line(text: str) -> None:
    """Print a line to stderr; on a terminal, in place of a progress bar, which is drawn again below."""
    erase = "\r\x1b[K" if sys.stderr.isatty() else ""
    print(erase + text, file=sys.stderr, flush=True)


class ProgressLines:
    """Prints how many of a number of things are done: after 3 s, then at intervals that double up to 60 s.

    Args:
        title: Begin of each line.
        total: Number of things, or None if unknown.
        unit: Plural of a thing.
        write: Function that prints a line; None: nothing is printed.
        clock: Function that returns seconds.

    Example:
        >>> times = iter([0.0, 1.0, 4.0, 5.0, 11.0])
        >>> lines = ProgressLines("reading", total=256, write=print, clock=lambda: next(times))
        >>> for _ in range(4):
        ...     lines.advance(64)
        reading: 128 of 256 images after 4 s, 4 s left
        reading: 256 of 256 images after 11 s
    """

    def __init__(
        self,
        title: str,
        *,
        total: int | None,
        unit: str = "images",
        write: Callable[[str], None] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._title, self._total, self._unit, self._write, self._clock = title, total, unit, write, clock
        self._start = clock()
        self._count, self._pause = 0, FIRST_SECONDS
        self._next = self._start + FIRST_SECONDS

    def advance(self, count: int) -> None:
        """Count things that are done."""
        self._count += count
        now = self._clock()
        if self._write is None or now < self._next:
            return
        self._pause = min(2 * self._pause, LONGEST_PAUSE)
        self._next = now + self._pause
        seconds, of_total, left = now - self._start, "", ""
        if self._total is not None:
            of_total = f" of {self._total}"
            remaining = seconds * (self._total - self._count) / self._count
            left = f", {remaining:.0f} s left" if remaining > 0 else ""
        self._write(f"{self._title}: {self._count}{of_total} {self._unit} after {seconds:.0f} s{left}")

    def add(self, text: str) -> None:
        """Print what follows, if a line was printed before."""
        if self._write is not None and self._pause > FIRST_SECONDS:
            self._write(f"{self._title}: {text}")
