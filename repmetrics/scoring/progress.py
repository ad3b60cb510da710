"""Progress of an embedding on stderr: images, images per second, time left."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

LINE_SECONDS = 30.0
"""Time between lines where stderr is no terminal."""


class Meter:
    """Images that are done, their rate, and the time left.

    The rate leaves out the first count: the time before it includes reading the checkpoint and building the network.

    Args:
        total: Number of images.
        on_change: Function called with the meter after each change.
        clock: Function that returns seconds.
    """

    def __init__(
        self,
        total: int = 0,
        *,
        on_change: Callable[[Meter], None] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.total, self.done = total, 0
        self._on_change, self._clock = on_change, clock
        self._first: float | None = None
        self._last, self._timed = 0.0, 0

    def advance(self, count: int) -> None:
        """Add images that were computed."""
        self._last = self._clock()
        if self._first is None:
            self._first = self._last
        else:
            self._timed += count
        self.skip(count)

    def skip(self, count: int) -> None:
        """Add images that need not be computed."""
        self.done += count
        if self._on_change is not None:
            self._on_change(self)

    @property
    def rate(self) -> float | None:
        """Images per second; None before the second count."""
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
            parts += [f"{self.rate:.3g} images/s", f"{format_duration(left)} left"]
        return " · ".join(parts)


def format_duration(seconds: float) -> str:
    """Format seconds as minutes or hours.

    Example:
        >>> format_duration(75), format_duration(7384)
        ('1:15', '2:03:04')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


@contextmanager
def progress(text: str, *, total: int, clock: Callable[[], float] = time.perf_counter) -> Iterator[Meter]:
    """Meter that is shown on stderr: a bar in a terminal, elsewhere a line from time to time."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[state]}"))
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task, next_line = bar.add_task(text, total=total, state=""), clock() + LINE_SECONDS

        def show(meter: Meter) -> None:
            nonlocal next_line
            bar.update(task, completed=meter.done, state=str(meter))
            if not console.is_terminal and clock() >= next_line:
                print(f"{text}: {meter}", file=sys.stderr, flush=True)
                next_line = clock() + LINE_SECONDS

        yield Meter(total, on_change=show, clock=clock)
