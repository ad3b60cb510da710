"""Names of label and group columns, and labels as class codes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

GROUP_KEYS = ("groups", "group", "slides", "slide", "slide_id", "patients", "patient", "patient_id", "case_id")


LABEL_KEYS = ("labels", "label", "targets", "target", "class", "y")


def factorize(targets: Sequence[Any]) -> tuple[tuple[str, ...], Tensor]:
    """Labels of any type → (class names, indices (N,) int64). Names in natural order: numbers by value.

    Example:
        >>> factorize(["10", "9", "10"])
        (('9', '10'), tensor([1, 0, 1]))
    """
    names = sorted({str(target) for target in targets}, key=_natural)
    index = {name: i for i, name in enumerate(names)}
    return tuple(names), torch.tensor([index[str(target)] for target in targets])


def _natural(name: str) -> tuple[int, float, str]:
    try:
        return (0, float(name), name)
    except ValueError:
        return (1, 0.0, name)
