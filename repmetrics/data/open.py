"""Open a path as a source: a folder of images, a file of embeddings, or a kind that another package registers.

A package adds a kind of source with an entry point in the group ``repmetrics.sources``: a function that takes a path
and returns a `Source`, or None for a path of another kind.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import entry_points
from pathlib import Path

from repmetrics.data.read_csv import read_csv
from repmetrics.data.source import Source
from repmetrics.measurement.blocks import declared_independent

ENTRY_POINT_GROUP = "repmetrics.sources"


def open_data(path: Path, *, labels: str | None = None, groups: str | None = None) -> Source:
    """Detect what `path` is and open it.

    Args:
        path: A folder of images, a CSV of files, an embeddings file, or a path that a plugin recognizes.
        labels: Column (or key) of the labels; "none" for no labels. Default: detected by name.
        groups: Column (or key) of the slides or patients; "folder" for the sub-folders; "none" for no groups;
            "independent" declares that no two images have a common source, so that errors need no groups.

    Raises:
        FileNotFoundError: The path does not exist.
        ValueError: The kind is not supported; the message lists those that are.
    """
    source = _open(path, labels=labels, groups=groups)
    return replace(source, independent=True) if declared_independent(groups) else source


def _open(path: Path, *, labels: str | None, groups: str | None) -> Source:
    from repmetrics.data.embedding_files import EMBEDDING_SUFFIXES, embedding_columns, is_embeddings
    from repmetrics.data.embedding_folders import find_embeddings, read_folder
    from repmetrics.data.embeddings import read_embeddings

    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    columns = "none" if declared_independent(groups) else groups
    if is_embeddings(path):
        return read_embeddings(path, labels=labels, groups=columns)
    if path.is_file() and path.suffix.lower() == ".csv":
        if embedding_columns(read_csv(path)[0]):
            return read_embeddings(path, labels=labels, groups=columns)
        from repmetrics.data.images import image_csv

        return image_csv(path, labels=labels, groups=columns)
    source, errors = _from_plugins(path)
    if source is not None:
        for option, value in (("--labels", labels), ("--groups", groups)):
            if value not in (None, "none"):
                raise ValueError(f"{option} {value}: a {source.kind} defines its own labels and groups: leave it out")
        return source
    from repmetrics.data.images import image_folder, list_images

    if path.is_dir() and not list_images(path) and find_embeddings(path) is not None:
        return read_folder(path, labels=labels, groups=columns)
    if path.is_dir():
        return image_folder(path, labels=labels, groups=columns)
    raise ValueError(
        f"{path.name} is no source of images or features: expected an image folder, a .csv of files, "
        f"embeddings ({' '.join(EMBEDDING_SUFFIXES)}) or a manifest.json" + "".join(f"; {error}" for error in errors)
    )


def _from_plugins(path: Path) -> tuple[Source | None, list[str]]:
    """Source from the first plugin that recognizes the path, and the errors of plugins that cannot be imported."""
    errors = []
    for point in entry_points(group=ENTRY_POINT_GROUP):
        try:
            opener: Callable[[Path], Source | None] = point.load()
        except (ImportError, AttributeError) as error:
            errors.append(f"the source {point.name!r} could not be loaded ({error})")
            continue
        source = opener(path)
        if source is not None:
            return source, errors
    return None, errors
