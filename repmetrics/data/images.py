"""Folders and CSV files of images, with labels and groups from columns of the CSV or names of sub-folders."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

from repmetrics.data.few_labels import is_label_table, labels_from
from repmetrics.data.labels import (
    GROUP_KEYS,
    LABEL_KEYS,
    UNLABELED,
    encode_labels,
    is_continuous,
    is_missing,
    label_notes,
    looks_like_classes,
)
from repmetrics.data.read_csv import read_csv
from repmetrics.data.source import Items, Source, Unreadable, file_digest, hash_strings

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp", ".ppm", ".gif", ".jp2")
FILE_KEYS = ("file", "path", "image", "filename", "filepath", "file_name", "image_path", "name")
LABELS_FILE = "labels.csv"


class Table(NamedTuple):
    """Columns of a CSV: files, and labels and groups where known."""

    files: list[str]
    labels: list[str] | None
    groups: list[str] | None
    notes: tuple[str, ...]


class ImageFiles(Dataset[Any]):
    """Image files as dicts: "image" (3, H, W) uint8 RGB, "group", "label"; `Unreadable` if a file cannot be read."""

    def __init__(
        self, root: Path, files: Sequence[str], *, labels: Tensor | None = None, groups: Sequence[str] | None = None
    ) -> None:
        self.root = root
        self.files = list(files)
        self.labels = labels
        self.groups = groups

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, Any] | Unreadable:
        try:
            image, several = read_first_frame(self.root / self.files[index])
        except (OSError, ValueError, SyntaxError, EOFError, MemoryError) as error:  # PIL raises all of these
            return Unreadable(self.files[index], (str(error).splitlines() or [type(error).__name__])[0])
        item: dict[str, Any] = {"image": image, "several_frames": several}
        if self.groups is not None:
            item["group"] = self.groups[index]
        if self.labels is not None:
            item["label"] = int(self.labels[index])
        return item

    def fingerprint(self) -> str:
        """Digest of the files' names and content, the labels and the groups, in order."""
        labels = [] if self.labels is None else [str(label) for label in self.labels.tolist()]
        contents = (file_digest(self.root / file) for file in self.files)
        return hash_strings([*self.files, *contents, *labels, *(self.groups or ())])


def read_image(path: Path) -> Tensor:
    """Image file as (3, H, W) uint8: see `read_first_frame`."""
    return read_first_frame(path)[0]


def read_first_frame(path: Path) -> tuple[Tensor, bool]:
    """First frame of an image file as (3, H, W) uint8, and whether the file has several.

    The image is turned upright by its EXIF orientation. Gray becomes three equal channels, transparency white, and 16
    bits 8.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            with Image.open(path) as image:
                several = bool(getattr(image, "is_animated", False))
                pixels = _rgb(ImageOps.exif_transpose(image))
        except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
            raise ValueError(f"{error}: cut it into patches first") from error
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous(), several


def _rgb(image: Image.Image) -> np.ndarray[Any, np.dtype[np.uint8]]:
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError(f"mode {image.mode} has no known range: convert it to 8 bits")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.array(image.convert("RGB"))


def image_folder(root: Path, *, labels: str | None = None, groups: str | None = None) -> Source:
    """Images under `root`, sorted by name.

    Labels are read from `root`/labels.csv if it exists. Otherwise the sub-folders are the labels, if there are at
    least two and every image is in one. With `groups="folder"` the sub-folders are slides instead.
    """
    files = list_images(root)
    if not files:
        raise ValueError(f"{root} holds no images: expected {' '.join(IMAGE_SUFFIXES)}")
    if is_label_table(labels):
        source = image_folder(root, labels="none", groups=groups)
        return _with_labels(source, Path(str(labels)), root=root)
    table = root / LABELS_FILE
    if table.is_file() and labels != "folder":
        return replace(image_csv(table, labels=labels, groups=groups, present=files), path=root)
    folders = [file.split("/")[0] for file in files if "/" in file]
    in_folders = len(folders) == len(files) and len(set(folders)) > 1
    for option, value in (("--labels", labels), ("--groups", groups)):
        if value not in (None, "none", "folder"):
            raise ValueError(f"{option} {value}: {root} has no {LABELS_FILE}; 'folder' takes the sub-folders' names")
        if value == "folder" and not in_folders:
            raise ValueError(f"{option} folder: the images of {root} are not sorted into sub-folders")
    labeled = in_folders and labels != "none" and groups != "folder"
    classes, label_ids = encode_labels(folders) if labeled else ((), None)
    dataset = ImageFiles(root, files, labels=label_ids, groups=folders if groups == "folder" else None)
    notes = (f"labels: the names of {len(classes)} sub-folders",) if classes else ()
    return _source(root, dataset, classes, notes)


def image_csv(
    path: Path, *, labels: str | None = None, groups: str | None = None, present: Sequence[str] | None = None
) -> Source:
    """Images that a CSV lists, with its columns of labels and groups; paths are relative to the CSV.

    Args:
        path: CSV with a header.
        labels: Column of labels; "none" for no labels.
        groups: Column of slides or patients; "none" for no groups, "folder" for the folder of each file.
        present: Images in the folder, each of which the CSV must list.
    """
    if is_label_table(labels):
        source = image_csv(path, labels="none", groups=groups, present=present)
        return _with_labels(source, Path(str(labels)), root=path.parent)
    table = read_table(path, labels=labels, groups=groups)
    missing = [file for file in table.files if not (path.parent / file).is_file()]
    if missing:
        raise ValueError(f"{path.name} lists {len(missing)} files that do not exist, first {missing[0]!r}")
    if present is not None and (unlisted := sorted(set(present) - {Path(file).as_posix() for file in table.files})):
        raise ValueError(
            f"{path.name} does not list {len(unlisted)} of {len(present)} images, first {unlisted[0]!r}: "
            "add them or move them away"
        )
    classes, label_ids = encode_labels(table.labels) if table.labels is not None else ((), None)
    dataset = ImageFiles(path.parent, table.files, labels=label_ids, groups=table.groups)
    more = [] if label_ids is None else label_notes(classes, label_ids)
    return _source(path, dataset, classes, (*table.notes, *more))


def _with_labels(source: Source, table: Path, *, root: Path) -> Source:
    """The source with the labels of a CSV that lists some of its images."""
    images = source.images
    assert isinstance(images, ImageFiles)
    classes, label_ids = encode_labels(labels_from(table, images.files, root=root))
    labeled = int((label_ids != UNLABELED).sum())
    note = f"labels: {labeled} of {len(images.files)} images, from {table.name}; probes use these alone"
    dataset = ImageFiles(images.root, images.files, labels=label_ids, groups=images.groups)
    return _source(source.path, dataset, classes, (*source.notes, note))


def _source(path: Path, images: ImageFiles, classes: tuple[str, ...], notes: tuple[str, ...]) -> Source:
    return Source(
        path,
        "image folder",
        images=images,
        classes=classes,
        resize=True,
        notes=notes,
        fingerprint=images.fingerprint,
        items=Items(images.files, images.groups),
    )


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


def list_images(root: Path) -> list[str]:
    """Sorted paths of the images under `root`, relative to it, without hidden files and folders."""
    relative = (file.relative_to(root) for file in root.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
    return sorted(
        path.as_posix()
        for path in relative
        if not any(part.startswith(".") for part in path.parts) and (root / path).is_file()
    )
