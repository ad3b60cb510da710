"""The CSV that lists images: its columns of files, labels and groups."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from repmetrics.data.labels import GROUP_KEYS, LABEL_KEYS, is_continuous, is_missing, looks_like_classes
from repmetrics.data.read_csv import read_csv

FILE_KEYS = ("file", "path", "image", "filename", "filepath", "file_name", "image_path", "name")


class Table(NamedTuple):
    """Columns of a CSV: files, and labels and groups where known."""

    files: list[str]
    labels: list[str] | None
    groups: list[str] | None
    notes: tuple[str, ...]


def read_table(path: Path, *, labels: str | None = None, groups: str | None = None) -> Table:
    """Read a CSV and detect by name its columns of files, labels, and slides or patients."""
    header, rows = read_csv(path)
    if not rows:
        raise ValueError(f"{path.name} has no rows: expected a header and one row per image")
    columns = [column for column in header if column]
    named = {column.lower(): column for column in reversed(columns)}
    file_column = next((named[key] for key in FILE_KEYS if key in named), None)
    if file_column is None:
        raise ValueError(f"{path.name} has no column of files ({', '.join(FILE_KEYS)}): found {', '.join(columns)}")
    group_column = _choose(path, columns, groups, GROUP_KEYS, option="--groups") if groups != "folder" else None
    label_column = _choose(path, columns, labels, LABEL_KEYS, option="--labels")
    rest = [c for c in columns if c not in (file_column, group_column) and c.lower() not in GROUP_KEYS]
    notes = []
    if label_column is not None and is_continuous(texts := _cells(path, rows, label_column)):
        reason = (
            f"column {label_column!r} of {path.name} has {len(set(texts))} numbers in {len(texts)} rows, not classes"
        )
        if labels is not None:
            raise ValueError(f"--labels {labels}: {reason}: group them into classes, or pass --labels none")
        label_column = None
        notes.append(f"no labels: {reason}")
    elif label_column is None and labels is None and rest:
        if len(rest) == 1 and looks_like_classes([row[rest[0]] for row in rows]):
            label_column = rest[0]
        else:
            notes.append(f"no labels taken from {path.name}: choose one of {', '.join(rest)} with --labels")
    if label_column is not None:
        notes.append(f"labels: column {label_column!r} of {path.name}")
    if group_column is not None:
        notes.append(f"groups: column {group_column!r} of {path.name}")
    files = _cells(path, rows, file_column)
    folders = [Path(file).parent.as_posix() for file in files] if groups == "folder" else None
    return Table(
        files,
        _cells(path, rows, label_column) if label_column else None,
        _cells(path, rows, group_column) if group_column else folders,
        (*notes, *_duplicates(path, files)),
    )


def _duplicates(path: Path, files: Sequence[str]) -> tuple[str, ...]:
    """A note if a file is listed more than once: its rows count as several samples."""
    repeated = [file for file, count in Counter(files).items() if count > 1]
    if not repeated:
        return ()
    more = len(files) - len(set(files))
    return (f"{path.name} lists {len(repeated)} files more than once ({more} rows too many), first {repeated[0]!r}",)


def _choose(path: Path, columns: Sequence[str], wanted: str | None, known: Sequence[str], *, option: str) -> str | None:
    if wanted == "none":
        return None
    if wanted is not None and wanted not in columns:
        raise ValueError(f"{option} {wanted}: {path.name} has the columns {', '.join(columns)}")
    named = {column.lower(): column for column in reversed(columns)}
    return wanted or next((named[key] for key in known if key in named), None)


def _cells(path: Path, rows: Sequence[dict[str, str]], column: str) -> list[str]:
    for number, row in enumerate(rows, start=2):
        if is_missing(row.get(column)):
            text = f" but {row[column]!r}" if row.get(column) else ""
            raise ValueError(
                f"{path.name}: line {number} has no {column!r}{text}: remove the row, or leave the column out"
            )
    return [row[column].strip() for row in rows]
