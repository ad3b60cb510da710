"""The measured value, its standard error, and paired differences."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from repmetrics.measurement.jackknife import Blocks, jackknife_error
from repmetrics.measurement.registry import Direction


def change_error(first: Measurement, second: Measurement) -> float | None:
    """Standard error of the change: paired where the rows are the same, else of the second, else None."""
    try:
        return difference(first, second).standard_error
    except ValueError:
        return second.standard_error


NO_GROUPS = "no group ids: rows of one slide are not independent, so no error is claimed"


@dataclass(frozen=True)
class Measurement:
    """One number about a representation, with its provenance.

    Attributes:
        name: its key in :data:`~repmetrics.measurement.registry.METRICS`, or of a probe.
        value: the number; NaN with a ``reason`` where it does not exist.
        standard_error: one standard deviation of ``value`` over redrawn groups, or None.
        reason: why there is no standard error, or no value.
        better: which direction is an improvement.
        n: rows measured (images, for patch tokens).
        d: columns measured.
        groups: number of distinct groups (slides, patients), or None.
        convention: what was and was not done to the features.
        dtype: of the features as they came.
        warnings: what a reader must know before trusting the value.
        details: further numbers, such as ODCorr's null floor.
        replicates: jackknife replicates, one a block of groups, for paired differences. Not part of the record.
        blocks: how the rows were dealt into them.
    """

    name: str
    value: float
    standard_error: float | None
    reason: str | None
    direction: Direction
    n: int
    d: int
    groups: int | None
    convention: str
    dtype: str
    warnings: tuple[str, ...] = ()
    details: Mapping[str, float] = field(default_factory=dict)
    replicates: tuple[float, ...] | None = field(default=None, repr=False, compare=False)
    blocks: Blocks | None = field(default=None, repr=False, compare=False)

    def to_json(self) -> dict[str, Any]:
        """Plain types for JSON; NaN becomes null, replicates are left out."""
        return {
            "name": self.name,
            "value": None if math.isnan(self.value) else self.value,
            "standard_error": self.standard_error,
            "reason": self.reason,
            "better": self.direction,
            "n": self.n,
            "d": self.d,
            "groups": self.groups,
            "convention": self.convention,
            "dtype": self.dtype,
            "warnings": list(self.warnings),
            "details": {k: None if math.isnan(v) else v for k, v in self.details.items()},
        }


class Difference(NamedTuple):
    """A paired difference between two measurements of the same rows.

    Attributes:
        value: second − first.
        standard_error: of that difference; smaller than the two errors suggest, because the slides are the same.
    """

    value: float
    standard_error: float


def difference(first: Measurement, second: Measurement) -> Difference:
    """How much the second measurement is above the first, with the paired jackknife's error.

    Raises:
        ValueError: different metrics, conventions or D, no replicates, or rows dealt differently.

    Example:
        >>> import torch
        >>> from repmetrics import measure
        >>> x = torch.randn(512, 8, generator=torch.Generator().manual_seed(0))
        >>> slides = [i // 16 for i in range(512)]
        >>> before, after = (measure(z, groups=slides)["rankme"] for z in (x, x * torch.arange(1, 9)))
        >>> change = difference(before, after)
        >>> change.value < -4 * change.standard_error
        True
    """
    for what, a, b in (
        ("metrics", first.name, second.name),
        ("conventions", first.convention, second.convention),
    ):
        if a != b:
            raise ValueError(f"a difference needs the same {what}, got {a!r} and {b!r}")
    if first.blocks is None or second.blocks is None or first.replicates is None or second.replicates is None:
        raise ValueError(f"a paired difference of {first.name} needs group ids in both measurements")
    if first.blocks.digest != second.blocks.digest:
        raise ValueError(f"a paired difference of {first.name} needs the same rows in the same order in both")
    value = second.value - first.value
    replicates = [b - a for a, b in zip(first.replicates, second.replicates, strict=True)]
    return Difference(value, jackknife_error(value, replicates, first.blocks.sizes))
