"""Labels of a few images, from a CSV of their own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from repmetrics.data.image_table import read_table
from repmetrics.data.labels import UNLABELED


def is_label_table(labels: str | None) -> bool:
    """Whether `--labels` names a CSV of labels, rather than a column."""
    return labels is not None and Path(labels).suffix.lower() == ".csv"


def count_labels(table: Path) -> int:
    """Number of images that a CSV of labels labels."""
    return len(_labels_by_file(table))


def labels_from(table: Path, files: Sequence[str], *, root: Path) -> list[str]:
    """Label of each image; :data:`~repmetrics.data.labels.UNLABELED` for images that the CSV does not list.

    Args:
        table: CSV with a column of files, as the images are named, absolute or relative to the images' folder, and a
            column of labels.
        files: Names of the images, relative to `root`.
        root: Folder of the images.

    Raises:
        ValueError: The CSV lists an image twice, or one that is not among the files.
    """
    labels = _labels_by_file(table)
    names = {(root / file).resolve(): file for file in files}
    labeled = {names.get((root / file).resolve(), file): label for file, label in labels.items()}
    known = set(files)
    if unknown := [file for file in labeled if file not in known]:
        raise ValueError(
            f"--labels {table}: {len(unknown)} of its {len(labels)} files are not among the {len(files)} images, "
            f"first {unknown[0]!r}: name them relative to {root}"
        )
    return [labeled.get(file, str(UNLABELED)) for file in files]


def _labels_by_file(table: Path) -> dict[str, str]:
    if not table.is_file():
        raise FileNotFoundError(f"--labels {table} does not exist")
    read = read_table(table, groups="none")
    if read.labels is None:
        raise ValueError(f"--labels {table}: it has no column of classes: expected a header like file,label")
    if twice := [file for file, count in Counter(read.files).items() if count > 1]:
        raise ValueError(f"--labels {table}: it lists {twice[0]!r} {read.files.count(twice[0])} times: keep one row")
    return dict(zip(read.files, read.labels, strict=True))
