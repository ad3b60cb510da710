"""Measurement: a value with its standard error, and the difference between two of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from repmetrics.measurement.blocks import Blocks
from repmetrics.measurement.registry import METRICS, PROBES, Direction


def change_error(first: Measurement, second: Measurement) -> float | None:
    """Standard error of the change: paired if the rows are the same, else that of the second, or None."""
    try:
        return difference(first, second).standard_error
    except ValueError:
        return second.standard_error


def format_value(value: float, error: float | None) -> str:
    """Format a value with its standard error to two significant digits, or alone to four; NaN is a dash.

    Example:
        >>> format_value(45.1234, 0.518), format_value(45.1234, None), format_value(float("nan"), None)
        ('45.12 ± 0.52', '45.12', '–')
        >>> format_value(8.0, 0.0), format_value(1234.5, 45.6)
        ('8 ± 0', '1234 ± 46')
    """
    if math.isnan(value):
        return "–"
    if error is None or math.isnan(error):
        return f"{value:.4g}"
    if error == 0:
        return f"{value:.4g} ± 0"
    places = min(max(1 - int(f"{error:.1e}".partition("e")[2]), 0), 12)
    return f"{value:.{places}f} ± {error:.{places}f}"


NO_GROUPS = "no group ids: rows of one group are not independent, so no error is claimed"


def each_its_own_group(samples: int) -> str:
    """Reason for no error where no two samples share a group, as with file names for ids."""
    return (
        f"each of the {samples} samples is a group of its own, as with file names for ids: samples may have a "
        "common source, so no error is claimed; if they have none, declare it with groups='independent'"
    )


@dataclass(frozen=True)
class Measurement:
    """One number about a representation, with its error and its provenance.

    ``float(m)`` is the value, and ``f"{m:.2f}"`` formats it.

    Attributes:
        name: Key in :data:`~repmetrics.measurement.registry.METRICS`, or name of a probe.
        value: The number; NaN with a ``reason`` if it does not exist.
        standard_error: Standard deviation of ``value`` over redrawn groups, or None.
        reason: Reason why there is no standard error, or no value.
        direction: Direction of an improvement.
        n: Number of rows (images, for patch tokens).
        d: Number of columns.
        groups: Number of distinct groups (slides, patients), or None.
        convention: What was and was not done to the features.
        dtype: Dtype of the features before any conversion.
        warnings: Limits of the value that a reader must know.
        details: Further numbers, such as ODCorr's null floor.
        margin: Half-width of the 95 % interval of ``value`` over redrawn groups, or None.
        degrees_of_freedom: Degrees of freedom of the margin; None without one.
        replicates: Jackknife replicates, one per block of groups, for paired differences. Not part of the record.
        blocks: Assignment of the rows to the blocks.
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
    margin: float | None = None
    degrees_of_freedom: float | None = None
    replicates: tuple[float, ...] | None = field(default=None, repr=False, compare=False)
    blocks: Blocks | None = field(default=None, repr=False, compare=False)

    def __repr__(self) -> str:
        size = f"N = {self.n}, D = {self.d}" + ("" if self.groups is None else f", {self.groups} groups")
        return f"<{self.name} {format_value(self.value, self.standard_error)} ({size})>"

    def __float__(self) -> float:
        return self.value

    def __format__(self, spec: str) -> str:
        return format(self.value, spec) if spec else str(self)

    @property
    def interval(self) -> tuple[float, float] | None:
        """Ends of the 95 % interval, within [0, 1] for probes and metrics that are shares; None without a margin.

        Example:
            >>> Measurement("linear_probe", 0.97, 0.02, None, "higher", 64, 8, 9, "", "", margin=0.05).interval[1]
            1.0
        """
        if self.margin is None:
            return None
        low, high = self.value - self.margin, self.value + self.margin
        name = self.name.rpartition("/")[2]
        share = name in PROBES or (name in METRICS and METRICS[name].share)
        return (max(low, 0.0), min(high, 1.0)) if share else (low, high)

    def to_json(self) -> dict[str, Any]:
        """Plain types for JSON. NaN becomes null, and replicates are left out."""
        return {
            "name": self.name,
            "value": None if math.isnan(self.value) else self.value,
            "standard_error": self.standard_error,
            "margin": self.margin,
            "degrees_of_freedom": self.degrees_of_freedom,
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
    """Paired difference between two measurements of the same rows.

    Attributes:
        value: Second − first.
        standard_error: Standard error of the difference. It is smaller than the two errors suggest, because the slides
            are the same.
        margin: Half-width of the 95 % interval of the difference.
        degrees_of_freedom: Degrees of freedom of the margin.
    """

    value: float
    standard_error: float
    margin: float
    degrees_of_freedom: float


def difference(first: Measurement, second: Measurement) -> Difference:
    """Compute the difference of the second measurement to the first, with the error of the paired jackknife.

    Raises:
        ValueError: Different metrics, conventions or rows, or no group ids.

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
    from repmetrics.measurement.jackknife import jackknife_error, margin

    for kind, a, b in (("metric", first.name, second.name), ("convention", first.convention, second.convention)):
        if a != b:
            raise ValueError(f"a difference needs the same {kind}, got {a!r} and {b!r}")
    if first.blocks is None or second.blocks is None or first.replicates is None or second.replicates is None:
        raise ValueError(f"a paired difference of {first.name} needs group ids in both measurements")
    if first.blocks.digest != second.blocks.digest:
        raise ValueError(f"a paired difference of {first.name} needs the same rows in the same order in both")
    value = second.value - first.value
    replicates = [b - a for a, b in zip(first.replicates, second.replicates, strict=True)]
    return Difference(
        value,
        jackknife_error(value, replicates, first.blocks.sizes),
        margin(value, replicates, first.blocks),
        first.blocks.degrees_of_freedom,
    )
