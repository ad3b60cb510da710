"""What became of the images of a source: their features, and those that could not be read."""

from __future__ import annotations

from typing import NamedTuple

from repmetrics.data.batches import ReadReport
from repmetrics.data.features import Features


class Embedded(NamedTuple):
    """Features of a source's images, or of a part of them.

    Attributes:
        features: Features of the images that could be read.
        report: What became of each image.
        from_cache: Whether the cache has all of them.
        key: Digest of everything that the features depend on; empty if that is not known.
    """

    features: Features
    report: ReadReport
    from_cache: bool = False
    key: str = ""
