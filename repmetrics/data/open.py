"""What can be scored: a folder of images, a file of embeddings, or what another package registers.

A package adds a kind of source with an entry point in the group ``repmetrics.sources``: a function that takes
a path and returns a `Source`, or None where the path is not its own.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path

from repmetrics.data.source import Source

ENTRY_POINT_GROUP = "repmetrics.sources"


def open_data(path: Path, *, labels: str | None = None, groups: str | None = None) -> Source:
    """Find out what `path` is and open it.

    Args:
        path: a folder of images, a CSV of files, an embeddings file, or what a plugin knows.
        labels: column (or key) with the labels; "none" to use none. Default: found by name.
        groups: column (or key) with the slide or patient; "folder" for the sub-folder; "none" to use none.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: nobody knows what this is; the message says what was found and what is supported.
    """
    from repmetrics.data.embeddings import SUFFIXES as EMBEDDINGS
    from repmetrics.data.embeddings import read_embeddings, read_slides
    from repmetrics.data.images import image_csv, image_folder, list_images

    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    suffix = path.suffix.lower()
    if path.is_file() and suffix in EMBEDDINGS:
        return read_embeddings(path, labels=labels, groups=groups)
    if path.is_file() and suffix == ".csv":
        return image_csv(path, labels=labels, groups=groups)
    source, faults = _from_plugins(path)
    if source is not None:
        for option, value in (("--labels", labels), ("--groups", groups)):
            if value not in (None, "none"):
                raise ValueError(f"{option} {value}: a {source.kind} says itself what its labels and groups are")
        return source
    if path.is_dir() and any(f.suffix.lower() in EMBEDDINGS for f in path.iterdir()) and not list_images(path):
        return read_slides(path, labels=labels)
    if path.is_dir():
        return image_folder(path, labels=labels, groups=groups)
    raise ValueError(
        f"{path.name} is no source of images or features: expected an image folder, a .csv of files, "
        f"embeddings ({' '.join(EMBEDDINGS)}) or a manifest.json" + "".join(f"; {fault}" for fault in faults)
    )


def _from_plugins(path: Path) -> tuple[Source | None, list[str]]:
    """Ask each registered package. One that cannot be imported is named only if nobody else knows the path."""
    faults = []
    for point in entry_points(group=ENTRY_POINT_GROUP):
        try:
            opener: Callable[[Path], Source | None] = point.load()
        except (ImportError, AttributeError) as error:
            faults.append(f"the source {point.name!r} could not be loaded ({error})")
            continue
        source = opener(path)
        if source is not None:
            return source, faults
    return None, faults
