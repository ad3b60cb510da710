"""Progress of long operations on stderr: lines at growing intervals, or a bar with rate and time left. No torch."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

FIRST_SECONDS = 3.0
"""Operations shorter than this print nothing."""
LONGEST_PAUSE = 60.0
"""Seconds between lines double up to this."""
LINE_SECONDS = 30.0
"""Time between lines where stderr is no terminal."""


def format_duration(seconds: float) -> str:
    """Format seconds as minutes or hours.

    Example:
        >>> format_duration(75), format_duration(7384)
        ('1:15', '2:03:04')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def parse_duration(text: str) -> float:
    """Seconds of a duration like 11h30m.

    Example:
        >>> parse_duration("11h30m"), parse_duration("1d"), parse_duration("90s")
        (41400.0, 86400.0, 90.0)
    """
    match = re.fullmatch(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", text)
    if match is None or not any(match.groups()):
        raise ValueError(f"a duration is written like 1d, 11h30m, 90m or 45s, got {text!r}")
    days, hours, minutes, seconds = (float(part or 0) for part in match.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


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


class Meter:
    """Images or slides that are done, their rate, and the time left.

    The rate leaves out the first count: the time before it includes reading the checkpoint and building the network.

    Args:
        total: Number of things; it may be set later.
        unit: Plural of a thing.
        on_change: Function called with the meter after each change.
        clock: Function that returns seconds.
    """

    def __init__(
        self,
        total: int = 0,
        *,
        unit: str = "images",
        on_change: Callable[[Meter], None] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.total, self.done, self._unit = total, 0, unit
        self._on_change, self._clock = on_change, clock
        self._first: float | None = None
        self._last, self._timed = 0.0, 0

    def advance(self, count: int) -> None:
        """Add things that were computed."""
        self._last = self._clock()
        if self._first is None:
            self._first = self._last
        else:
            self._timed += count
        self.skip(count)

    def skip(self, count: int) -> None:
        """Add things that need not be computed."""
        self.done += count
        if self._on_change is not None:
            self._on_change(self)

    @property
    def rate(self) -> float | None:
        """Things per second; None before the second count."""
        if self._first is None or self._last <= self._first:
            return None
        return self._timed / (self._last - self._first)

    def __str__(self) -> str:
        """Rate and time left.

        Example:
            >>> meter = Meter(100, clock=iter([0.0, 2.0]).__next__)
            >>> meter.advance(10), meter.advance(30), str(meter)
            (None, None, '40/100 · 15 images/s · 0:04 left')
        """
        parts = [f"{self.done}/{self.total}"]
        if self.rate:
            left = max(self.total - self.done, 0) / self.rate
            parts += [f"{self.rate:.3g} {self._unit}/s", f"{format_duration(left)} left"]
        return " · ".join(parts)


@contextmanager
def progress(
    text: str,
    *,
    total: int = 0,
    unit: str = "images",
    tenths: bool = False,
    clock: Callable[[], float] = time.perf_counter,
) -> Iterator[Meter]:
    """Meter that is shown on stderr: a bar in a terminal, elsewhere a line every 30 s.

    Args:
        text: Begin of each line.
        total: Number of things; 0 if it is set later.
        unit: Plural of a thing.
        tenths: Whether there is also a line at the first thing and at each tenth of all.
        clock: Function that returns seconds.
    """
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[state]}"))
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task, next_line, tenth = bar.add_task(text, total=total, state=""), clock() + LINE_SECONDS, -1

        def show(meter: Meter) -> None:
            nonlocal next_line, tenth
            bar.update(task, completed=meter.done, total=meter.total, state=str(meter))
            before, tenth = tenth, 10 * meter.done // max(meter.total, 1)
            if not console.is_terminal and (clock() >= next_line or (tenths and tenth > before)):
                print(f"{text}: {meter}", file=sys.stderr, flush=True)
                next_line = clock() + LINE_SECONDS

        yield Meter(total, unit=unit, on_change=show, clock=clock)
