"""A table that shows every column at any width of the terminal: columns that do not fit continue in a further table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions
from rich.table import Table
from rich.text import Text

MIN_KEY_WIDTH = 12  # columns; names in key columns are folded to no less
FRAME = 3  # columns of the frame and the padding per column
PIPE_WIDTH = 400  # columns if the output is not a terminal; tables are only as wide as their content


def results_console() -> Console:
    """Console of standard output; wide if it is not a terminal, so that a pipe or file gets complete lines."""
    console = Console()
    return console if console.is_terminal else Console(width=PIPE_WIDTH)


@dataclass(frozen=True)
class FittedTable:
    """Rows of cells for Rich, in as many tables as the width of the console needs.

    Attributes:
        headings: Headings of the columns.
        rows: Cells, as many as headings.
        keys: Number of first columns that identify a row. Each table repeats them; only they are folded.
    """

    headings: Sequence[str]
    rows: Sequence[Sequence[str | Text]]
    keys: int = 1

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Table]:
        """Yield the tables."""
        for columns in self.split_columns(options.max_width):
            table = Table()
            for position in columns:
                is_key = position < self.keys
                justify: Literal["left", "right"] = "left" if position == 0 or self._is_words(position) else "right"
                table.add_column(
                    self.headings[position], justify=justify, no_wrap=not is_key, overflow="fold", min_width=1
                )
            for row in self.rows:
                table.add_row(*(row[position] for position in columns))
            yield table

    def split_columns(self, width: int) -> list[list[int]]:
        """Positions of the columns of each table, with the keys in front."""
        widths = [self._width(position) for position in range(len(self.headings))]
        keys = list(range(self.keys))
        key_width = 1 + sum(min(widths[k], max(MIN_KEY_WIDTH, width // 3)) + FRAME for k in keys)
        parts: list[list[int]] = [[]]
        left = width - key_width
        for position in range(self.keys, len(widths)):
            if parts[-1] and widths[position] + FRAME > left:
                parts.append([])
                left = width - key_width
            parts[-1].append(position)
            left -= widths[position] + FRAME
        return [[*keys, *part] for part in parts]

    def _width(self, position: int) -> int:
        cells = (self.headings[position], *(row[position] for row in self.rows))
        return max(cell.cell_len if isinstance(cell, Text) else cell_len(cell) for cell in cells)

    def _is_words(self, position: int) -> bool:
        return position >= self.keys and any(str(row[position])[:1].isalpha() for row in self.rows)
