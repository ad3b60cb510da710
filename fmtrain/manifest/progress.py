"""Progress of a scan: a bar in a terminal, lines in a log. No torch."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fmtrain.manifest.scan import ScanResult

SECONDS_PER_LINE = 30.0
Report = Callable[[int, int, ScanResult], None]


@contextmanager
def scan_progress(console: Console | None = None) -> Iterator[Report]:
    """A function that reports each scanned slide, on stderr by default."""
    console = console or Console(stderr=True)
    if not console.is_terminal:
        lines = ProgressLines()

        def report(done: int, total: int, result: ScanResult) -> None:
            line = lines.line(done, total)
            if line:
                console.print(line, soft_wrap=True, highlight=False, markup=False)

        yield report
        return
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"), TimeRemainingColumn())
    with Progress(TextColumn("slides"), *columns, console=console, transient=True) as bar:
        task = bar.add_task("slides", rate="")
        start = time.monotonic()

        def show(done: int, total: int, result: ScanResult) -> None:
            bar.update(
                task, completed=done, total=total, rate=f"{done / (time.monotonic() - start + 1e-9):.3g} slides/s"
            )

        yield show


class ProgressLines:
    """Lines of a log: at the first and the last slide, at each tenth of them, and every half minute.

    Args:
        clock: Function that returns seconds.

    Example:
        >>> seconds = iter([0.0, 1.0, 50.0])
        >>> lines = ProgressLines(clock=lambda: next(seconds))
        >>> lines.line(1, 100), lines.line(50, 100)
        ('slides: 1 of 100 (1 %), 1 slides/s, 1m 39s left', 'slides: 50 of 100 (50 %), 1 slides/s, 50s left')
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._start = self._last = clock()
        self._tenths = -1

    def line(self, done: int, total: int) -> str:
        """Line to write after a slide; empty if it is too early for another one."""
        now, tenths = self._clock(), 10 * done // total
        if tenths == self._tenths and done < total and now - self._last < SECONDS_PER_LINE:
            return ""
        self._last, self._tenths = now, tenths
        rate = done / max(now - self._start, 1e-9)
        left = round((total - done) / rate)
        minutes = f"{left // 60}m " if left >= 60 else ""
        return f"slides: {done} of {total} ({100 * done // total} %), {rate:.3g} slides/s, {minutes}{left % 60}s left"
