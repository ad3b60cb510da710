"""Tables given by the user: patients, sites, labelled squares."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from fmtrain.slides.resolution import is_plausible_mpp

_BARCODE = re.compile(r"(TCGA-([A-Z0-9]{2})-[A-Z0-9]{4})\b")


MANY_VALUES = 10  # more different numbers than this are amounts, not names of classes


_COLUMNS = frozenset({"patient", "site", "mpp", "split"})


class SlideRow(NamedTuple):
    """What the user says about one slide; None where nothing is said."""

    patient: str | None = None
    site: str | None = None
    mpp: float | None = None
    split: str | None = None


class LabeledRegion(NamedTuple):
    """A labelled square of a slide, in pixels of level 0."""

    x: float
    y: float
    size: float
    label: str


def patient_of(name: str) -> tuple[str, str]:
    """Patient and site of a slide by its name: TCGA's barcode, or else every slide is a patient of its own.

    Example:
        >>> patient_of("TCGA-18-5592-01Z-00-DX1.derived.svs"), patient_of("CMU-1.svs")
        (('TCGA-18-5592', '18'), ('CMU-1', ''))
    """
    barcode = _BARCODE.match(name)
    return (barcode[1], barcode[2]) if barcode else (Path(name).stem, "")


def read_table(path: Path) -> dict[str, SlideRow]:
    """A CSV about slides: column `file`, and any of `patient`, `site`, `mpp`, `split` (train or held_out).

    Raises:
        ValueError: no `file` column, nothing else to read, a file named twice, or a value that cannot be.
    """
    lines, columns = _read_csv(path)
    if "file" not in columns or not _COLUMNS & set(columns):
        raise ValueError(f"{path.name} needs a column 'file' and one of {sorted(_COLUMNS)}, got {sorted(columns)}")
    rows: dict[str, SlideRow] = {}
    for line in lines:
        said = {key: line[key].strip() or None for key in _COLUMNS & set(columns)}
        where, mpp, split = f"{path.name}: {line['file']}", said.get("mpp"), said.get("split")
        if line["file"] in rows:
            raise ValueError(f"{where} is named twice")
        if split not in (None, "train", "held_out"):
            raise ValueError(f"{where}: split must be train or held_out, got {split!r}")
        value = None if mpp is None else _number(mpp)
        if value is not None and not is_plausible_mpp(value):
            raise ValueError(f"{where}: mpp must be micrometres per pixel, 0.05 to 10, got {mpp!r}")
        rows[line["file"]] = SlideRow(said.get("patient"), said.get("site"), value, split)
    return rows


def _read_csv(path: Path) -> tuple[list[dict[str, str]], list[str]]:
    """The rows of a CSV with a header, and the names of its columns."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            columns = list(reader.fieldnames or ())
            return [{name: row[name] or "" for name in columns} for row in reader], columns
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is no CSV in UTF-8 ({error})") from error


def _number(text: str) -> float:
    """A number, or NaN for what is none."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def read_labeled_regions(path: Path, *, column: str | None = None) -> dict[str, list[LabeledRegion]]:
    """A CSV of labelled squares: columns file, x, y, size (pixels of level 0) and the label. By file.

    Args:
        path: as `tcga_labels/patches250.csv`, or the `labels.csv` of the procedural slides.
        column: which column is the label; default `label`, or the only one that can be. Rows without a label
            are left out. Numbers of many values, such as counts of nuclei, become thirds: few, some and many.

    Raises:
        ValueError: a column is missing, or a place that cannot be.
    """
    lines, columns = _read_csv(path)
    missing = {"file", "x", "y", "size"} - set(columns)
    if missing:
        raise ValueError(f"{path.name} lacks {sorted(missing)}: labelled squares need file, x, y, size and a label")
    candidates = [name for name in columns if name not in {"file", "x", "y", "size", "patient"}]
    column = column or ("label" if "label" in candidates else candidates[0] if len(candidates) == 1 else None)
    if column is None or column not in columns:
        raise ValueError(f"{path.name}: say which column is the label, one of {candidates}")
    lines = [line for line in lines if line[column]]
    squares: dict[str, list[LabeledRegion]] = {}
    for line, label in zip(lines, bin_tertiles([line[column] for line in lines]), strict=True):
        x, y, size = (_number(line[key]) for key in ("x", "y", "size"))
        if not (math.isfinite(x) and math.isfinite(y) and math.isfinite(size) and size > 0):
            raise ValueError(
                f"{path.name}: {line['file']}: no square at x, y, size = {line['x']}, {line['y']}, {line['size']}"
            )
        squares.setdefault(line["file"], []).append(LabeledRegion(x, y, size, label))
    return squares


def bin_tertiles(labels: Sequence[str]) -> list[str]:
    """Labels as they are; numbers of more than `MANY_VALUES` values as the third of them that each lies in.

    A probe tells classes apart, and a class for every count of nuclei would have no patches to learn from.

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
