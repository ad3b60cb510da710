"""Tables from the user: patients, sites, labeled squares."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple, TypeVar

from fmtrain.manifest.patients import stem
from fmtrain.manifest.search import FoundSlide
from fmtrain.manifest.shown_names import examples, shown
from fmtrain.slides.resolution import is_plausible_mpp
from repmetrics.data.read_csv import read_csv

MANY_VALUES = 10  # more distinct numbers than this are amounts, not names of classes
SQUARE = ("file", "x", "y", "size")  # columns of a labeled square
T = TypeVar("T")
_COLUMNS = frozenset({"patient", "site", "mpp", "split"})


class SlideRow(NamedTuple):
    """Row of the user's table about one slide; None for an empty cell."""

    patient: str | None = None
    site: str | None = None
    mpp: float | None = None
    split: str | None = None


class LabeledRegion(NamedTuple):
    """A labeled square of a slide, in pixels of level 0."""

    x: float
    y: float
    size: float
    label: str


class SlideNames:
    """Finds the slide that a table means: by its name, its path, its file name, or that without suffix.

    Args:
        slides: All slides.
    """

    def __init__(self, slides: Sequence[FoundSlide]) -> None:
        self._slides: dict[str, set[str]] = {}
        for slide in slides:
            path = PurePosixPath(slide.relative)
            for key in {slide.name, slide.relative, path.name, stem(slide.name), path.stem}:
                self._slides.setdefault(key, set()).add(slide.name)
        self._exact = {slide.name for slide in slides}

    def find(self, key: str, *, table: Path) -> str | None:
        """Name of the slide; None if there is none.

        Raises:
            ValueError: The text means several slides.
        """
        if key in self._exact:
            return key
        names = sorted(self._slides.get(key, ()))
        if len(names) > 1:
            raise ValueError(
                f"{table.name}: {shown(key)} names {len(names)} slides, {examples(names)}: give the file or the path"
            )
        return names[0] if names else None

    def keyed(self, rows: Mapping[str, T], *, table: Path) -> tuple[dict[str, T], list[str]]:
        """Rows by the name of their slide, and the keys without a slide. Raises if two rows mean one slide."""
        by_name: dict[str, T] = {}
        absent = []
        for key, row in rows.items():
            name = self.find(key, table=table)
            if name is None:
                absent.append(key)
            elif name in by_name:
                raise ValueError(f"{table.name}: {shown(name)} is named twice")
            else:
                by_name[name] = row
        return by_name, absent


def not_squares(path: Path) -> str:
    """Why a file is no table of labeled squares; empty if it may be one."""
    try:
        missing = [name for name in SQUARE if name not in read_csv(path)[0]]
    except ValueError:
        return "it is not CSV in UTF-8"
    return f"it has no columns {', '.join(missing)}" if missing else ""


def read_table(path: Path) -> dict[str, SlideRow]:
    """Rows of a CSV about slides, by file: column `file`, and any of `patient`, `site`, `mpp`, `split`."""
    columns, lines = read_csv(path)
    if "file" not in columns or not _COLUMNS & set(columns):
        raise ValueError(f"{path.name} needs a column 'file' and one of {sorted(_COLUMNS)}, got {sorted(columns)}")
    rows: dict[str, SlideRow] = {}
    for line in lines:
        cells = {key: line[key].strip() or None for key in _COLUMNS & set(columns)}
        prefix, mpp, split = f"{path.name}: {shown(line['file'])}", cells.get("mpp"), cells.get("split")
        if line["file"] in rows:
            raise ValueError(f"{prefix} is named twice")
        if split not in (None, "train", "held_out"):
            raise ValueError(f"{prefix}: split must be train or held_out, got {shown(repr(split))}")
        value = None if mpp is None else _number(mpp)
        if value is not None and not is_plausible_mpp(value):
            raise ValueError(f"{prefix}: mpp must be micrometers per pixel, 0.05 to 10, got {shown(repr(mpp))}")
        rows[line["file"]] = SlideRow(cells.get("patient"), cells.get("site"), value, split)
    return rows


def _number(text: str) -> float:
    """A number; NaN for any other text."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def read_labeled_regions(path: Path, *, column: str | None = None) -> dict[str, list[LabeledRegion]]:
    """Labeled squares of a CSV, by file. Columns are file, x, y, size (pixels of level 0) and the label."""
    columns, lines = read_csv(path)
    missing = set(SQUARE) - set(columns)
    if missing:
        raise ValueError(f"{path.name} lacks {sorted(missing)}: labeled squares need file, x, y, size and a label")
    candidates = [name for name in columns if name not in {*SQUARE, "patient"}]
    column = column or ("label" if "label" in candidates else candidates[0] if len(candidates) == 1 else None)
    if column is None or column not in columns:
        raise ValueError(f"{path.name}: name the column of the label, one of {candidates}")
    lines = [line for line in lines if line[column]]
    squares: dict[str, list[LabeledRegion]] = {}
    for line, label in zip(lines, bin_tertiles([line[column] for line in lines]), strict=True):
        x, y, size = (_number(line[key]) for key in ("x", "y", "size"))
        if not (math.isfinite(x) and math.isfinite(y) and math.isfinite(size) and size > 0):
            cells = ", ".join(shown(line[key]) for key in ("x", "y", "size"))
            raise ValueError(f"{path.name}: {shown(line['file'])}: not a square: x, y, size = {cells}")
        squares.setdefault(line["file"], []).append(LabeledRegion(x, y, size, label))
    return squares


def bin_tertiles(labels: Sequence[str]) -> list[str]:
    """Labels unchanged; numbers with more than `MANY_VALUES` distinct values become the third that each lies in.

    A class per count of nuclei would have too few patches for a probe.

    Example:
        >>> bin_tertiles([str(count) for count in range(30)])[::10]
        ['1: up to 9', '2: up to 19', '3: above']
        >>> bin_tertiles(["lung", "12"])
        ['lung', '12']
    """
    values = [_number(label) for label in labels]
    if len(set(values)) <= MANY_VALUES or not all(map(math.isfinite, values)):
        return list(labels)
    order = sorted(values)
    first, second = (order[len(order) * k // 3 - 1] for k in (1, 2))
    names = (f"1: up to {first:g}", f"2: up to {second:g}", "3: above")
    return [names[(value > first) + (value > second)] for value in values]
