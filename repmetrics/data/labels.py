"""Names of label and group columns, and labels as class indices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from repmetrics.functional.ids import factorize

GROUP_KEYS = ("groups", "group", "slides", "slide", "slide_id", "patients", "patient", "patient_id", "case_id")
LABEL_KEYS = ("labels", "label", "targets", "target", "class", "y")

UNLABELED = -1
"""Label of a sample without a label, which takes no part in a probe."""


def encode_labels(labels: Sequence[Any]) -> tuple[tuple[str, ...], Tensor]:
    """Class names and indices (N,) int64 of labels of any type. Names are in natural order: numbers by value.

    Example:
        >>> encode_labels(["10", "9", "10"])
        (('9', '10'), tensor([1, 0, 1]))
    """
    indices, names = factorize(map(str, labels), key=_natural_key)
    return tuple(names), indices


def _natural_key(name: str) -> tuple[int, float, str]:
    try:
        return (0, float(name), name)
    except ValueError:
        return (1, 0.0, name)
