"""The stopping rule of a run, and the choice of its local maxima, as pure functions of measurements."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from repmetrics.decisions.slide_draws import draw_values, format_share
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
    """Whether to stop, and the reason in words.

    Attributes:
        stop: Whether to stop.
        reason: Reason in words.
        share: Share of draws over groups in which the rule stops too; None without a stop or without paired errors.
    """

    stop: bool
    reason: str
    share: float | None = None


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

    The confidence in a stop is the share of draws of the slides in which the rule stops too, see
    :func:`~repmetrics.decisions.slide_draws.draw_values`.

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

    @cache
    def smallest_change(i: int, k: int) -> float:
        return min_delta_errors * (change_error(valid[i], valid[k]) or 0.0)

    spectral = name in METRICS and METRICS[name].reads_spectrum
    rule = partial(_waited, smallest_change=smallest_change, sign=-1 if direction == "lower" else 1, spectral=spectral)
    smooth, (waited,) = rule(np.array([[m.value for m in valid]]))
    now = f"{smooth[0, -1]:.4g}"
    if waited < patience:
        return Decision(False, f"{name} is at {now}; {waited} of {patience} measurements without improvement")
    verb = "fallen" if direction == "lower" else "risen"
    best = f"{smooth[0, len(valid) - 1 - waited]:.4g}"
    reason = (
        f"{name} has not {verb} beyond {best} by more than {min_delta_errors:g} standard errors in {waited} "
        f"measurements (now {now})"
    )
    drawn = draw_values(valid)
    if drawn is None:
        return Decision(True, reason)
    share = float((rule(drawn)[1] >= patience).mean())
    return Decision(True, f"{reason}; it stops in {format_share(share)} of draws over groups", share)


def _waited(
    values: NDArray[np.float64], *, smallest_change: Callable[[int, int], float], sign: int, spectral: bool
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Medians of three of each series (series, measurements), and the measurements since the best of each."""
    count, length = values.shape
    smooth = np.stack([np.median(values[:, max(0, i - WINDOW + 1) : i + 1], axis=1) for i in range(length)], axis=1)
    rows, best, lowest = np.arange(count), np.zeros(count, dtype=int), np.zeros(count, dtype=int)
    falls_first = spectral & (smooth.min(axis=1) > 0)

    def smallest_changes(since: NDArray[np.int64], i: int) -> NDArray[np.float64]:
        smallest = {k: smallest_change(k, i) for k in np.unique(since).tolist()}
        return np.array([smallest[k] for k in since.tolist()])

    for i in range(1, length):
        rise = sign * (smooth[:, i] - smooth[rows, best])
        best = np.where(rise > smallest_changes(best, i), i, best)
        fall = sign * (smooth[rows, lowest] - smooth[:, i])
        low, high = np.minimum(smooth[:, 0], smooth[:, i]), np.maximum(smooth[:, 0], smooth[:, i])
        falls = falls_first & (low > MAX_FALL * high) & (fall > smallest_changes(lowest, i))
        best, lowest = np.where(falls, i, best), np.where(falls, i, lowest)
    return smooth, length - 1 - best


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
