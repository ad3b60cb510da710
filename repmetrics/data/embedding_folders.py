"""Folders of embedding files as other tools leave them: one file per slide, or one per image with a manifest."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from repmetrics.data.embedding_files import EMBEDDING_SUFFIXES, is_embeddings
from repmetrics.data.embeddings import parse_labels, read_rows
from repmetrics.data.features import Features
from repmetrics.data.labels import GROUP_KEYS, is_missing
from repmetrics.data.read_csv import read_csv
from repmetrics.data.source import Source

MANIFEST = "manifest.csv"
MANIFEST_COLUMNS = {"origin", "embeddings", "target"}
TWINS = ("h5_files", "pt_files")
"""Folders of CLAM with the same slides. The first also has their coordinates."""
INDEX_SUFFIX = ".index.npz"
"""Ending of slideflow's files of coordinates, beside its bags."""


def find_embeddings(folder: Path) -> Path | None:
    """The folder of embedding files, or the manifest, that a folder holds at any depth; None without either.

    Raises:
        ValueError: There are several of them.
    """
    manifests = [path for path in sorted(folder.rglob(MANIFEST)) if _is_manifest(path)]
    if manifests:
        return _only(folder, manifests)
    if embedding_files(folder):
        return folder
    folders = sorted({path.parent for path in folder.rglob("*") if _is_embedding_file(path)})
    without = {path.parent / TWINS[1] for path in folders if path.name == TWINS[0]}
    folders = [path for path in folders if path not in without and _holds_features(path)]
    return _only(folder, folders) if folders else None


def _only(folder: Path, places: Sequence[Path]) -> Path:
    if len(places) > 1:
        listed = ", ".join(path.relative_to(folder).as_posix() for path in places[:4])
        more = f" and {len(places) - 4} more" if len(places) > 4 else ""
        raise ValueError(f"{folder} holds several sets of embeddings: name one of {listed}{more}")
    return places[0]


def _holds_features(folder: Path) -> bool:
    """Whether the first file holds features, not coordinates or bounding boxes."""
    try:
        read_rows(embedding_files(folder)[0], labels="none", groups="none", vector=True)
    except ValueError:
        return False
    return True


def _is_embedding_file(path: Path) -> bool:
    hidden = path.name.startswith(".")
    return is_embeddings(path) and not hidden and not path.name.endswith(INDEX_SUFFIX)


def embedding_files(folder: Path) -> list[Path]:
    """The files of embeddings in a folder, by name; slideflow's files of coordinates are none."""
    return sorted(path for path in folder.iterdir() if _is_embedding_file(path))


def _is_manifest(path: Path) -> bool:
    try:
        return set(read_csv(path)[0]) >= MANIFEST_COLUMNS
    except ValueError:
        return False


def read_folder(folder: Path, *, labels: str | None = None, groups: str | None = None) -> Source:
    """Features of the embedding files in a folder or below it.

    Raises:
        ValueError: There is none, or there are several sets.
    """
    place = find_embeddings(folder)
    if place is None:
        raise ValueError(f"{folder} holds no embeddings: expected {' '.join(EMBEDDING_SUFFIXES)}")
    if place.name == MANIFEST:
        return read_manifest(place, folder=folder, labels=labels, groups=groups)
    return read_slides(place, folder=folder, labels=labels, groups=groups)


def read_slides(place: Path, *, folder: Path, labels: str | None = None, groups: str | None = None) -> Source:
    """All rows of a folder with one file of patch embeddings per slide.

    Groups are the files, or a column that all files have, as `score --features-out` writes it. So are labels.
    """
    by_file = groups in (None, "folder")
    paths = embedding_files(place)
    files = [read_rows(path, labels=labels, groups=None if by_file else groups, vector=True) for path in paths]
    notes = [] if place == folder else [f"embeddings: {place.relative_to(folder).as_posix()}"]
    ids: list[Any] | None = None
    if groups != "folder" and (columns := [file.groups[1] for file in files if file.groups[1] is not None]):
        _check_complete(folder, "groups", len(columns), len(files))
        ids = [value for column in columns for value in column]
        notes.append(f"groups: {files[0].groups[0]!r} of the {len(files)} files")
    elif by_file:
        ids = [path.stem for path, file in zip(paths, files, strict=True) for _ in file.values]
        notes.append(f"groups: the {len(files)} files")
    targets = [file.labels[1] for file in files if file.labels[1] is not None]
    if targets:
        _check_complete(folder, "labels", len(targets), len(files))
    rows = [value for column in targets for value in column] if targets else None
    classes, label_ids, more = parse_labels(folder, files[0].labels[0], rows, explicit=labels is not None)
    values = _join(folder, [(path.stem, file.values) for path, file in zip(paths, files, strict=True)])
    features = Features(values, None if ids is None else tuple(map(str, ids)), label_ids)
    return Source(folder, "embeddings", features=features, classes=classes, notes=(*notes, *more))


def _check_complete(folder: Path, kind: str, count: int, files: int) -> None:
    if count < files:
        raise ValueError(f"{folder}: only {count} of {files} files have {kind}: leave them out with --{kind} none")


def read_manifest(path: Path, *, folder: Path, labels: str | None = None, groups: str | None = None) -> Source:
    """Embeddings that a manifest of kaiko's eva lists, with its targets as labels.

    A file of several rows is a slide, and its rows are one group. A file of one row is an image: its group is known
    only from a column.
    """
    columns, rows = read_csv(path)
    files = [read_rows(path.parent / row["embeddings"], labels="none", groups="none", vector=True) for row in rows]
    parts = [(row["embeddings"], file.values) for row, file in zip(rows, files, strict=True)]
    sizes = [len(part) for _, part in parts]
    notes = [f"embeddings: {len(parts)} files of {path.relative_to(folder).as_posix()}"]

    def repeat(cells: Iterable[str]) -> list[str]:
        return [cell for cell, size in zip(cells, sizes, strict=True) for _ in range(size)]

    known = {column.lower(): column for column in columns}
    key = groups if groups != "none" else None
    if groups is None:
        key = next((known[name] for name in GROUP_KEYS if name in known), None)
    if key is not None and key not in columns:
        raise ValueError(f"--groups {key}: {path.name} has the columns {', '.join(columns)}")
    ids: list[str] | None = None
    if key is not None:
        ids = repeat(row[key] for row in rows)
        if missing := sum(map(is_missing, ids)):
            raise ValueError(f"{path.name}: {key!r} is missing for {missing} of {len(ids)} rows: pass --groups none")
        notes.append(f"groups: column {key!r} of {path.name}")
    elif groups is None and max(sizes, default=0) > 1:
        ids = repeat(name for name, _ in parts)
        notes.append(f"groups: the {len(parts)} files")
    column = "target" if labels is None else labels
    if column not in (*columns, "none"):
        raise ValueError(f"--labels {column}: {path.name} has the columns {', '.join(columns)}")
    texts = None if column == "none" else repeat(row[column] for row in rows)
    classes, label_ids, more = parse_labels(path, column, texts, explicit=labels is not None)
    features = Features(_join(folder, parts), None if ids is None else tuple(ids), label_ids)
    return Source(folder, "embeddings", features=features, classes=classes, notes=(*notes, *more))


def _join(folder: Path, parts: Sequence[tuple[str, Tensor]]) -> Tensor:
    if not parts:
        raise ValueError(f"{folder} lists no embeddings")
    widths = {values.shape[1]: name for name, values in parts}
    if len(widths) > 1:
        listed = ", ".join(f"{d} in {name}" for d, name in widths.items())
        raise ValueError(f"{folder} holds features of different D: {listed}")
    return torch.cat([values for _, values in parts])
