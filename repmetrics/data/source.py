"""A source of held-out samples, and digests of its content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch.utils.data import Dataset

from repmetrics.data.features import Features


class Items(NamedTuple):
    """What is known of the images of a source without reading them.

    Attributes:
        ids: Name of each image, each once.
        slides: Slide of each image; None where they are not known.
        coordinates: Upper left corners (x, y) in pixels at level 0, if the images are patches of slides.
        mpp: Micrometers per pixel of each patch.
    """

    ids: Sequence[str]
    slides: Sequence[str] | None = None
    coordinates: Sequence[tuple[int, int]] | None = None
    mpp: Sequence[float] | None = None


@dataclass(frozen=True)
class Source:
    """Features, or images for an encoder. Exactly one of `features` and `images` is given.

    Attributes:
        path: Path that the user gave.
        kind: Two or three words for the reader: "image folder", "slides manifest".
        features: Features, which need no encoder.
        images: A map-style dataset of dicts: "image" a uint8 tensor (3, H, W), and where known "group" a string
            (slide or patient) and "label" an int. "several_frames" tells whether its file has more
            frames than the one read. An item that cannot be read is an `Unreadable`.
        classes: Names of the labels, by index; empty without labels.
        resize: True if images have any size and must be resized to the encoder's; False if the source fixes the size.
        view_set: Name of the view set that suits the images.
        independent: Whether the user declared that no two images have a common source; they then have no groups.
        notes: Notes for the reader: assumptions, unused columns.
        fingerprint: Function that returns a digest of everything the images depend on. Without it, features are not
            cached.
        items: What is known of the images without reading them, in their order.
    """

    path: Path
    kind: str
    features: Features | None = None
    images: Dataset[Any] | None = None
    classes: tuple[str, ...] = ()
    resize: bool = False
    view_set: str = "geometry"
    independent: bool = False
    notes: tuple[str, ...] = ()
    fingerprint: Callable[[], str] | None = None
    items: Items | None = None

    def __post_init__(self) -> None:
        if (self.features is None) == (self.images is None):
            raise ValueError("a Source holds either features or images: give exactly one")


class Unreadable(NamedTuple):
    """Takes the place of an item that could not be read; it is skipped, counted and named."""

    name: str
    reason: str


def hash_strings(parts: Iterable[str]) -> str:
    """Digest of a list of strings; it depends on where each string ends.

    Example:
        >>> hash_strings(["ab", "c"]) == hash_strings(["a", "bc"])
        False
    """
    return hashlib.sha256(json.dumps(list(parts)).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
