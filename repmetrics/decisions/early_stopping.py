"""The stopping rule of a run, and the choice of its local maxima, as pure functions of measurements."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median
from typing import NamedTuple

from repmetrics.measurement.registry import METRICS
from repmetrics.measurement.result import Measurement, change_error

WINDOW = 3
"""Number of values in each median of the stopping rule."""
MIN_DELTA_ERRORS = 2.0
"""Smallest improvement, in (paired) standard errors of the change."""
PATIENCE = 5
"""Measurements without improvement before a stop."""
MAX_FALL = 0.5
"""Smallest share of its first value to which a metric that reads a spectrum may fall before it counts as stalled."""
KEEP = 3
"""Number of local maxima to keep."""


class Decision(NamedTuple):
    """Whether to stop, and the reason in words."""

    stop: bool
    reason: str


def should_stop(
    measurements: Sequence[Measurement],
    *,
    patience: int = PATIENCE,
    min_delta_errors: float = MIN_DELTA_ERRORS,
) -> Decision:
    """Stop if the median of the last three values has not improved on its best for ``patience`` measurements.

    The direction is that of the measurements. A metric that reads a spectrum is high for an untrained network, and
    falls before it rises. For such a metric the best is taken since the lowest value: a fall is not yet a plateau, and
    the patience starts where the fall ends. It also starts where the metric has lost half of its first value.

    Args:
        measurements: Measurements of one metric after the warm-up, oldest first.
        patience: Measurements without improvement before a stop.
        min_delta_errors: Smallest improvement, in standard errors of the change. Without an error, any improvement
            counts.

    Example:
        >>> import torch
        >>> x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
        >>> from repmetrics import measure
        >>> flat = [measure(x)["rankme"]] * 9
        >>> should_stop(flat, patience=5).stop, should_stop(flat[:5], patience=5).stop
        (True, False)
    """
    valid = [m for m in measurements if not math.isnan(m.value)]
    if not valid:
        return Decision(False, "nothing measured yet")
    name, direction = valid[0].name, valid[0].direction
    if direction == "neither":
        raise ValueError(f"{name} has no better direction: stop on another metric")
    sign, verb = (1.0, "risen") if direction == "higher" else (-1.0, "fallen")
    smooth = [median(m.value for m in valid[max(0, i - WINDOW + 1) : i + 1]) for i in range(len(valid))]
    falls_first = name in METRICS and METRICS[name].reads_spectrum and min(smooth) > 0
    best = lowest = 0
    for i in range(1, len(valid)):
        if sign * (smooth[i] - smooth[best]) > min_delta_errors * (change_error(valid[best], valid[i]) or 0.0):
            best = i
        fall = sign * (smooth[lowest] - smooth[i])
        low, high = sorted((smooth[0], smooth[i]))
        if (
            falls_first
            and low > MAX_FALL * high
            and fall > min_delta_errors * (change_error(valid[lowest], valid[i]) or 0.0)
        ):
            best = lowest = i
    waited = len(valid) - 1 - best
    since = f"{name} has not {verb} beyond {smooth[best]:.4g} by more than {min_delta_errors:g} standard errors"
    if waited >= patience:
        return Decision(True, f"{since} in {waited} measurements (now {smooth[-1]:.4g})")
    return Decision(False, f"{name} is at {smooth[-1]:.4g}; {waited} of {patience} measurements without improvement")


def local_maxima(values: Sequence[float]) -> list[int]:
    """Return the indices of values higher than the previous and not lower than the next; ends have one neighbor.

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
    """Return the indices of the ``k`` best local maxima, and of the last measurement, which may still become one.

    For a metric whose direction is "lower", they are minima.
    """
    sign = -1.0 if measurements and measurements[0].direction == "lower" else 1.0
    values = [-math.inf if math.isnan(m.value) else sign * m.value for m in measurements]
    best = sorted(local_maxima(values), key=lambda i: -values[i])[:k]
    return sorted({*best, *([len(values) - 1] if values else [])})
