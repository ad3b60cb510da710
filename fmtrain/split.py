"""Who is held out, and which of their patches: pure functions from tables to tables. No torch."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fmtrain.sampling import choose_mpp, stable_hash, uniforms
from fmtrain.slides import UPSAMPLING_TOLERANCE, SlideInfo, believable
from fmtrain.tissue import Cells, Mask

_BARCODE = re.compile(r"(TCGA-([A-Z0-9]{2})-[A-Z0-9]{4})\b")
JACKKNIFE_GROUPS = 32  # what the standard errors of repmetrics take, where there are so many
MANY_VALUES = 10  # more different numbers than this are amounts, not names of classes
_STREAM = 0x4E1D  # of random numbers, for held-out patches
_COLUMNS = frozenset({"patient", "site", "mpp", "split"})


class Row(NamedTuple):
    """What the user says about one slide; None where nothing is said."""

    patient: str | None = None
    site: str | None = None
    mpp: float | None = None
    split: str | None = None


class Square(NamedTuple):
    """A labelled square of a slide, in pixels of level 0."""

    x: float
    y: float
    size: float
    label: str


class HeldOutPatch(NamedTuple):
    """One frozen patch: which slide (by name), its upper left corner at level 0, its mpp and label."""

    slide: str
    x: int
    y: int
    mpp: float
    label: str | None = None


def patient_of(name: str) -> tuple[str, str]:
    """Patient and site of a slide by its name: TCGA's barcode, or else every slide is a patient of its own.

    Example:
        >>> patient_of("TCGA-18-5592-01Z-00-DX1.derived.svs"), patient_of("CMU-1.svs")
        (('TCGA-18-5592', '18'), ('CMU-1', ''))
    """
    barcode = _BARCODE.match(name)
    return (barcode[1], barcode[2]) if barcode else (Path(name).stem, "")


def read_table(path: Path) -> dict[str, Row]:
    """A CSV about slides: column `file`, and any of `patient`, `site`, `mpp`, `split` (train or held_out).

    Raises:
        ValueError: no `file` column, nothing else to read, a file named twice, or a value that cannot be.
    """
    lines, columns = _read_csv(path)
    if "file" not in columns or not _COLUMNS & set(columns):
        raise ValueError(f"{path.name} needs a column 'file' and one of {sorted(_COLUMNS)}, got {sorted(columns)}")
    rows: dict[str, Row] = {}
    for line in lines:
        said = {key: line[key].strip() or None for key in _COLUMNS & set(columns)}
        where, mpp, split = f"{path.name}: {line['file']}", said.get("mpp"), said.get("split")
        if line["file"] in rows:
            raise ValueError(f"{where} is named twice")
        if split not in (None, "train", "held_out"):
            raise ValueError(f"{where}: split must be train or held_out, got {split!r}")
        value = None if mpp is None else _number(mpp)
        if value is not None and not believable(value):
            raise ValueError(f"{where}: mpp must be micrometres per pixel, 0.05 to 10, got {mpp!r}")
        rows[line["file"]] = Row(said.get("patient"), said.get("site"), value, split)
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


def read_squares(path: Path, *, column: str | None = None) -> dict[str, list[Square]]:
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
    squares: dict[str, list[Square]] = {}
    for line, label in zip(lines, in_thirds([line[column] for line in lines]), strict=True):
        x, y, size = (_number(line[key]) for key in ("x", "y", "size"))
        if not (math.isfinite(x) and math.isfinite(y) and math.isfinite(size) and size > 0):
            raise ValueError(
                f"{path.name}: {line['file']}: no square at x, y, size = {line['x']}, {line['y']}, {line['size']}"
            )
        squares.setdefault(line["file"], []).append(Square(x, y, size, label))
    return squares


def in_thirds(labels: Sequence[str]) -> list[str]:
    """Labels as they are; numbers of more than `MANY_VALUES` values as the third of them that each lies in.

    A probe tells classes apart, and a class for every count of nuclei would have no patches to learn from.

    Example:
        >>> in_thirds([str(count) for count in range(30)])[::10]
        ['1: up to 9', '2: up to 19', '3: above']
        >>> in_thirds(["lung", "12"])
        ['lung', '12']
    """
    values = [_number(label) for label in labels]
    if len(set(values)) <= MANY_VALUES or not all(map(math.isfinite, values)):
        return list(labels)
    order = sorted(values)
    first, second = (order[len(order) * k // 3 - 1] for k in (1, 2))
    names = (f"1: up to {first:g}", f"2: up to {second:g}", "3: above")
    return [names[(value > first) + (value > second)] for value in values]


def hold_out(units: Sequence[str], *, fraction: float, seed: int) -> set[str]:
    """Which patients (or sites) are held out: a fraction, yet a quarter where that makes up to 32 of them.

    Decided by a hash of each name, so new slides move nobody who was there from one side to the other, but for
    the few that keep the fraction.

    Args:
        units: the names; repeats do not count.
        fraction: of them.
        seed: another choice.

    Raises:
        ValueError: fewer than two: nobody would be left on one of the sides.

    Example:
        >>> len(hold_out([f"patient {k}" for k in range(100)], fraction=0.1, seed=0))
        25
    """
    order = sorted(set(units), key=lambda name: stable_hash(f"{seed}/{name}"))
    if len(order) < 2:
        raise ValueError(f"only one patient or site ({order[0] if order else 'none'}): a split needs at least two")
    if not 0 < fraction < 1:
        raise ValueError(f"the held-out fraction must lie between 0 and 1, got {fraction}")
    count = max(round(fraction * len(order)), min(JACKKNIFE_GROUPS, len(order) // 4), 1)
    return set(order[: min(count, len(order) - 1)])


def check_split(patients: Mapping[str, str], splits: Mapping[str, str]) -> None:
    """Refuse a split with a patient on both sides, or with nobody on one of them.

    Args:
        patients: slide → patient.
        splits: slide → "train" or "held_out".
    """
    sides: dict[str, dict[str, str]] = {}
    for slide, patient in patients.items():
        sides.setdefault(patient, {}).setdefault(splits[slide], slide)
    for patient, by_split in sides.items():
        if len(by_split) > 1:
            raise ValueError(
                f"patient {patient} is on both sides of the split: {by_split['train']} in train, "
                f"{by_split['held_out']} in held_out; what the encoder has seen must not be measured on"
            )
    for side in ("train", "held_out"):
        if side not in splits.values():
            raise ValueError(f"the split leaves no slide in {side}")


def servable(info: SlideInfo, *, size_px: int) -> tuple[float, float]:
    """The finest and the coarsest mpp at which a slide holds patches of a size."""
    return info.mpp / (1 + UPSAMPLING_TOLERANCE), min(info.size) * info.mpp / size_px * (1 + 1e-9)


def sampled_patches(
    info: SlideInfo,
    mask: Mask,
    *,
    size_px: int,
    mpps: Sequence[float],
    min_tissue: float,
    seed: int,
) -> Iterator[HeldOutPatch]:
    """Patches of one slide in random order, no two centred on the same cell at the same mpp, until they run out."""
    finest, coarsest = servable(info, size_px=size_px)
    key = stable_hash(info.name)
    cells = {
        mpp: Cells(mask, size=info.size, extent_px=size_px * mpp / info.mpp, min_tissue=min_tissue)
        for mpp in mpps
        if finest <= mpp <= coarsest
    }
    orders = {
        mpp: np.random.Generator(np.random.Philox(key=np.array([seed, key], np.uint64), counter=k)).permutation(len(c))
        for k, (mpp, c) in enumerate(cells.items())
    }
    taken = dict.fromkeys(cells, 0)
    for number in range(sum(map(len, cells.values()))):
        u, v, w = uniforms(seed ^ key, number, stream=_STREAM, n=3)
        mpp = choose_mpp(u, [mpp for mpp, c in cells.items() if taken[mpp] < len(c)])
        if mpp is None:
            return
        rank = (int(orders[mpp][taken[mpp]]) + 0.5) / len(cells[mpp])
        taken[mpp] += 1
        yield HeldOutPatch(info.name, *cells[mpp].location(rank, v, w), mpp)


def labelled_patches(
    info: SlideInfo, squares: Sequence[Square], *, size_px: int, mpps: Sequence[float], seed: int
) -> Iterator[HeldOutPatch]:
    """Labelled squares of one slide as patches, in random order: same centre, the mpp nearest in extent.

    A patch that sticks out over the slide's border is moved in; one that this takes half its side away is left out.
    """
    finest, coarsest = servable(info, size_px=size_px)
    served = [mpp for mpp in mpps if finest <= mpp <= coarsest]
    if not served:
        return
    order = sorted(range(len(squares)), key=lambda k: stable_hash(f"{seed}/{info.name}/{squares[k].x}/{squares[k].y}"))
    for k in order:
        square = squares[k]
        mpp = min(served, key=lambda value: abs(np.log(value * size_px / (square.size * info.mpp))))
        extent = size_px * mpp / info.mpp
        centre = (square.x + square.size / 2, square.y + square.size / 2)
        wanted = [value - extent / 2 for value in centre]
        corner = [min(max(value, 0), side - extent) for value, side in zip(wanted, info.size, strict=True)]
        if max(abs(a - b) for a, b in zip(corner, wanted, strict=True)) < square.size / 2:
            yield HeldOutPatch(info.name, round(corner[0]), round(corner[1]), mpp, square.label)


def in_turns(streams: Sequence[Iterator[HeldOutPatch]], *, count: int) -> list[HeldOutPatch]:
    """One of each slide in turn, until there are enough or all have run out: as many slides as possible."""
    chosen: list[HeldOutPatch] = []
    alive = list(streams)
    while alive and len(chosen) < count:
        still = []
        for stream in alive:
            patch = next(stream, None)
            if patch is not None:
                still.append(stream)
                chosen.append(patch)
                if len(chosen) == count:
                    break
        alive = still
    return chosen
