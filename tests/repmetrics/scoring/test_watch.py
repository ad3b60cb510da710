"""Scores as they come: one table in a terminal, lines elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from repmetrics.measurement.result import Measurement
from repmetrics.scoring.score import Score
from repmetrics.scoring.watch import WAITING, fitting_table, show_lines, show_table


def scored(step: int) -> Score:
    m = Measurement("rankme", 10.0 + step, 0.5, None, "higher", 100, 64, 8, "not centred", "float32")
    return Score(f"step={step}.ckpt", "vit", step, "images", {"rankme": m}, notes=("mean and std are assumed",))


def terminal(height: int = 40) -> tuple[Console, StringIO]:
    file = StringIO()
    return Console(file=file, force_terminal=True, width=80, height=height, color_system=None), file


def files(*, interrupt: bool) -> Iterator[Path]:
    yield from (Path("1"), Path("2"), Path("3"))
    if interrupt:
        raise KeyboardInterrupt


def score_file(path: Path) -> list[Score]:
    return [] if path.name == "2" else [scored(int(path.name))]  # the second cannot be scored


def test_the_table_stays_after_an_interruption() -> None:
    console, file = terminal()
    with pytest.raises(KeyboardInterrupt):
        show_table(files(interrupt=True), score_file, console)
    drawn = file.getvalue()
    earlier, _, final = drawn.rpartition(WAITING)
    assert "2 scores on images" in final
    assert all(f"step={step}.ckpt" in final for step in (1, 3))
    assert earlier.count("\x1b[2K") > len(final.splitlines())  # earlier tables are erased


def test_a_low_terminal_shows_the_newest() -> None:
    console, _ = terminal(height=14)
    scores = [scored(step) for step in range(1, 21)]
    with console.capture() as capture:
        console.print(fitting_table(scores, console))
    drawn = capture.get()
    assert len(drawn.splitlines()) < 14
    assert "step=20.ckpt" in drawn
    assert "step=1.ckpt" not in drawn
    assert "earlier scores are not shown" in drawn


def test_lines_elsewhere() -> None:
    lines: list[str] = []
    show_lines(files(interrupt=False), score_file, lines.append)
    assert [line for line in lines if not line.startswith("  ")] == [
        "step=1.ckpt, step 1: rankme 11.00 ± 0.50",
        "step=3.ckpt, step 3: rankme 13.00 ± 0.50",
    ]
    assert lines.count("  mean and std are assumed") == 1
    assert lines.count("  rankme: ↑ higher is better; not centred") == 1
