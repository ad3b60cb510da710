"""Folders and CSV files of images, with labels and groups from columns of the CSV or names of sub-folders."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

from repmetrics.data.few_labels import is_label_table, labels_from
from repmetrics.data.image_table import read_table
from repmetrics.data.labels import (
    UNLABELED,
    encode_labels,
    label_notes,
)
from repmetrics.data.source import Items, Source, Unreadable, file_digest, hash_strings

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp", ".ppm", ".gif", ".jp2")
LABELS_FILE = "labels.csv"


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


def list_images(root: Path) -> list[str]:
    """Sorted paths of the images under `root`, relative to it, without hidden files and folders."""
    relative = (file.relative_to(root) for file in root.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
    return sorted(
        path.as_posix()
        for path in relative
        if not any(part.startswith(".") for part in path.parts) and (root / path).is_file()
    )
