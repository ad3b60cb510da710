"""A source of held-out samples, and hashes of its content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch.utils.data import Dataset

from repmetrics.data.features import Features


@dataclass(frozen=True)
class Source:
    """Features, or images for an encoder to make them from. Exactly one of `features` and `images` is given.

    Attributes:
        path: what the user named.
        kind: two or three words for the reader: "image folder", "slides manifest".
        features: given directly, no encoder needed.
        images: a map-style dataset of dicts: "image" a uint8 tensor (3, H, W), and where known "group" a
            string (slide or patient) and "label" an int. An item that cannot be read is an `Unreadable`.
        classes: the names of the labels, by index; empty where there are no labels.
        resize: True: images of any size, to be brought to the encoder's. False: the source fixed the size.
        notes: what the reader should know: assumptions made, columns not used.
        fingerprint: a digest of everything the images depend on. Features are kept for a second run only of a
            source that has one.
    """

    path: Path
    kind: str
    features: Features | None = None
    images: Dataset[Any] | None = None
    classes: tuple[str, ...] = ()
    resize: bool = False
    notes: tuple[str, ...] = ()
    fingerprint: Callable[[], str] | None = None

    def __post_init__(self) -> None:
        if (self.features is None) == (self.images is None):
            raise ValueError("a Source holds either features or images: give exactly one")


class Unreadable(NamedTuple):
    """In place of an item that could not be read: it is skipped, counted and named."""

    name: str
    reason: str


def hash_strings(parts: Iterable[str]) -> str:
    """One name for a list of texts, in which no text runs into the next.

    Example:
        >>> hash_strings(["ab", "c"]) == hash_strings(["a", "bc"])
        False
    """
    return hashlib.sha256(json.dumps(list(parts)).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
