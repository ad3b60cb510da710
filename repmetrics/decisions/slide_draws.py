"""Draws of the slides: the values that measurements would have on other slides of the same kind."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from repmetrics.measurement.result import Measurement

DRAWS = 2_000
"""Draws of the slides, for the confidence in a choice."""


def draw_values(measured: Sequence[Measurement], *, draws: int = DRAWS) -> NDArray[np.float64] | None:
    """Values of measurements of the same rows, on other draws of the slides: (draws, measurements).

    A draw weighs the g blocks of slides by standard normal numbers z: value + √((g − 1)/g)·Σ z_j·(replicate_j − mean).
    The variance of such draws is that of the jackknife, and what the measurements share over the same slides cancels.

    Args:
        measured: Measurements of one metric on the same rows.
        draws: Number of draws.

    Returns:
        The values, or None without paired errors.
    """
    blocks = measured[0].blocks
    if blocks is None or any(m.replicates is None for m in measured):
        return None
    if any(m.blocks is None or m.blocks.digest != blocks.digest for m in measured):
        return None
    replicates = np.array([m.replicates for m in measured])  # (measurements, blocks)
    count = replicates.shape[1]
    weights = np.random.default_rng(0).standard_normal((draws, count)) * math.sqrt((count - 1) / count)
    drawn: NDArray[np.float64] = np.array([m.value for m in measured])
    return drawn + weights @ (replicates - replicates.mean(1, keepdims=True)).T


def format_share(share: float) -> str:
    """Format a share of draws in percent; no finite number of draws shows certainty.

    Example:
        >>> format_share(0.934), format_share(1.0), format_share(0.0)
        ('93%', 'more than 99%', 'less than 1%')
    """
    if share > 0.99:
        return "more than 99%"
    return "less than 1%" if share < 0.01 else f"{share:.0%}"
