"""When to stop a run, and which local maxima to keep: pure functions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median
from typing import NamedTuple

from repmetrics.measurement.result import Measurement, change_error

WINDOW = 3
"""Stopping looks at the median of so many values."""


MIN_DELTA_ERRORS = 2.0
"""An improvement is one by more than so many (paired) standard errors."""


PATIENCE = 5
"""Measurements without improvement before a stop."""


KEEP = 3
"""Local maxima worth keeping."""


class Decision(NamedTuple):
    """Whether to stop, and why or why not, in words."""

    stop: bool
    reason: str


def should_stop(
    measurements: Sequence[Measurement],
    *,
    patience: int = PATIENCE,
    window: int = WINDOW,
    min_delta_errors: float = MIN_DELTA_ERRORS,
) -> Decision:
    """Stop when the median of the last values has not improved on its best for ``patience`` measurements.

    An improvement is one by more than ``min_delta_errors`` standard errors of the change. The direction is the
    measurement's own.

    Args:
        measurements: of one metric, oldest first, those after warm-up only.
        patience: measurements without improvement.
        window: values in each median.
        min_delta_errors: see above; without an error, any improvement counts.

    Raises:
        ValueError: the metric has no direction.

    Example:
        >>> import torch
        >>> x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
        >>> from repmetrics import measure
        >>> flat = [measure(x)["rankme"]] * 9
        >>> should_stop(flat, patience=5).stop, should_stop(flat[:5], patience=5).stop
        (True, False)
    """
    found = [m for m in measurements if not math.isnan(m.value)]
    if not found:
        return Decision(False, "nothing measured yet")
    if found[0].direction == "neither":
        raise ValueError(f"{found[0].name} has no better direction: stop on another metric")
    sign = 1.0 if found[0].direction == "higher" else -1.0
    smooth = [median(m.value for m in found[max(0, i - window + 1) : i + 1]) for i in range(len(found))]
    best = 0
    for i in range(1, len(found)):
        error = change_error(found[best], found[i]) or 0.0
        if sign * (smooth[i] - smooth[best]) > min_delta_errors * error:
            best = i
    waited = len(found) - 1 - best
    name, word = found[0].name, "risen" if sign > 0 else "fallen"
    since = f"{name} has not {word} beyond {smooth[best]:.4g} by more than {min_delta_errors:g} standard errors"
    if waited >= patience:
        return Decision(True, f"{since} in {waited} measurements (now {smooth[-1]:.4g})")
    return Decision(False, f"{name} is at {smooth[-1]:.4g}; {waited} of {patience} measurements without improvement")


def local_maxima(values: Sequence[float]) -> list[int]:
    """Indices of values higher than the one before and not lower than the one after; ends have one neighbour.

    Example:
        >>> local_maxima([1, 3, 2, 2, 5])
        [1, 4]
    """
    return [
        i
        for i, value in enumerate(values)
        if (i == 0 or value > values[i - 1]) and (i == len(values) - 1 or value >= values[i + 1])
    ]


def best_local_maxima(measurements: Sequence[Measurement], *, k: int = KEEP) -> list[int]:
    """Indices of the ``k`` best local maxima, and of the last measurement, which may yet become one.

    For a metric that is better low, minima are meant.
    """
    sign = -1.0 if measurements and measurements[0].direction == "lower" else 1.0
    values = [-math.inf if math.isnan(m.value) else sign * m.value for m in measurements]
    best = sorted(local_maxima(values), key=lambda i: -values[i])[:k]
    return sorted({*best, *([len(values) - 1] if values else [])})
