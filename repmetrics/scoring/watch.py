"""Show scores as they come: a table that is drawn again in a terminal, lines elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from repmetrics.scoring.score import Score
from repmetrics.scoring.tables import conventions, footnotes, format_error, format_value, ranking_table

WAITING = "waiting for the next checkpoint; Ctrl-C ends"


def show_table(files: Iterable[Path], score_file: Callable[[Path], Iterable[Score]], console: Console) -> None:
    """One table of all scores, which stays when the files end or the user interrupts.

    It is removed while a file is scored, so that progress and messages have the terminal for themselves.

    Args:
        files: Files, each as soon as it is complete.
        score_file: Function that scores a file; empty if the file cannot be scored.
        console: A terminal.
    """
    scores: list[Score] = []
    live = Live(Text(WAITING), console=console, auto_refresh=False, transient=True)
    live.start(refresh=True)
    try:
        for file in files:
            live.stop()
            scores += score_file(file)
            live = Live(fitting_table(scores, console), console=console, auto_refresh=False, transient=True)
            live.start(refresh=True)
    finally:
        live.stop()
        if scores:
            console.print(ranking_table(scores))


def fitting_table(scores: Sequence[Score], console: Console) -> RenderableType:
    """Table of the newest scores that the height of the terminal has room for, at least one."""
    if not scores:
        return Text(WAITING)
    for first in range(len(scores)):
        earlier = f"{first} earlier scores are not shown; " if first else ""
        table = Group(ranking_table(scores[first:]), Text(earlier + WAITING, style="dim"))
        if len(console.render_lines(table, pad=False)) < console.height:
            break
    return table


def show_lines(
    files: Iterable[Path], score_file: Callable[[Path], Iterable[Score]], write: Callable[[str], None]
) -> None:
    """A line per score; conventions and warnings follow once each."""
    known: set[str] = set()
    for file in files:
        for score in score_file(file):
            write(score_line(score))
            notes = [note for note in (*conventions([score]), *footnotes(score)) if note not in known]
            known.update(notes)
            for note in notes:
                write(f"  {note}")


def score_line(score: Score) -> str:
    """Name, step and values with their standard errors."""
    values = [
        f"{m.name} {format_value(m)}{'' if m.standard_error is None else f' ± {format_error(m)}'}"
        for m in score.measurements.values()
    ]
    step = "" if score.step is None else f", step {score.step}"
    return f"{score.name}{step}: {', '.join(values)}"
