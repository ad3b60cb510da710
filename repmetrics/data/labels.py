"""Names of label and group columns, and labels as class indices."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from repmetrics.functional.ids import factorize

GROUP_KEYS = (
    "groups",
    "group",
    "slides",
    "slide",
    "slide_id",
    "patients",
    "patient",
    "patient_id",
    "case_id",
    "wsi_id",
    "wsi",
)
LABEL_KEYS = ("labels", "label", "targets", "target", "class", "y")

UNLABELED = -1
"""Label of a sample without a label, which takes no part in a probe."""


MISSING = frozenset(("", "nan", "-nan", "<na>", "n/a", "#n/a", "na", "null", "none"))
"""Texts, in lower case, that programs write for a value that is absent."""

MAX_NUMBERS = 20
"""Most classes of a column of numbers that is taken for labels without being named."""


def is_missing(value: Any) -> bool:
    """Whether a label or an id is absent: None, NaN, or a text that stands for it. "none" in lower case is a name.

    Example:
        >>> [is_missing(value) for value in (None, float("nan"), "NaN", " ", "none", "0")]
        [True, True, True, True, False, False]
    """
    if isinstance(value, bytes):
        value = value.decode(errors="replace")
    if not isinstance(value, str):
        return value is None or value != value
    text = value.strip()
    return text.lower() in MISSING and text != "none"


def is_continuous(labels: Sequence[Any]) -> bool:
    """Whether labels are measurements rather than classes: numbers with fractions, on most rows another one.

    Example:
        >>> is_continuous(["0.5", "0.25", "0.7"]), is_continuous(["1.0", "2.0", "3.0"]), is_continuous(["a", "b"])
        (True, False, False)
    """
    numbers = _numbers(labels)
    if numbers is None or all(number.is_integer() for number in numbers):
        return False
    return len(set(numbers)) > MAX_NUMBERS or 2 * len(set(numbers)) > len(numbers)


def looks_like_classes(labels: Sequence[Any]) -> bool:
    """Whether a column without a known name can be labels: few numbers, or texts that occur twice on average."""
    distinct = len(set(map(_canonical, labels)))
    if _numbers(labels) is not None and distinct > MAX_NUMBERS:
        return False
    return not is_continuous(labels) and distinct <= max(2, len(labels) // 2)


def encode_labels(labels: Sequence[Any]) -> tuple[tuple[str, ...], Tensor]:
    """Class names and indices (N,) int64 of labels of any type. Names are in natural order: numbers by value.

    Numbers are compared by value, and spaces around a text do not count. −1 is no class, but ``UNLABELED``.

    Example:
        >>> encode_labels(["10", "9", "10.0", " 9", "-1"])
        (('9', '10'), tensor([ 1,  0,  1,  0, -1]))
    """
    texts = [_canonical(label) for label in labels]
    unlabeled = torch.tensor([text == str(UNLABELED) for text in texts], dtype=torch.bool)
    codes, names = factorize([text for text in texts if text != str(UNLABELED)], key=_natural_key)
    indices = torch.full((len(texts),), UNLABELED)
    indices[~unlabeled] = codes
    return tuple(names), indices


def label_notes(classes: Sequence[str], indices: Tensor) -> list[str]:
    """Notes if classes differ only in upper and lower case, or if samples have no label."""
    first: dict[str, str] = {}
    notes = [
        f"labels {first[name.casefold()]!r} and {name!r} differ only in case: they are two classes"
        for name in classes
        if first.setdefault(name.casefold(), name) != name
    ]
    if count := int((indices == UNLABELED).sum()):
        notes.append(f"{count} of {len(indices)} labels are −1, which stands for no label: rename it if it is a class")
    return notes


def _canonical(label: Any) -> str:
    text = str(label).strip()
    number = _number(text)
    return text if number is None else f"{number:.0f}" if number.is_integer() else repr(number)


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _numbers(labels: Sequence[Any]) -> list[float] | None:
    """Labels as numbers, or None if one is not a number."""
    numbers = [_number(str(label).strip()) for label in labels]
    known = [number for number in numbers if number is not None]
    return known if len(known) == len(numbers) else None


def _natural_key(name: str) -> tuple[int, float, str]:
    number = _number(name)
    return (1, 0.0, name) if number is None else (0, number, name)
