"""Kendall's τ-b and Spearman's ρ in the vectorized forms that a bootstrap needs: weighted, partial, many at once."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

Array = NDArray[np.float64]


def kendall(a: Array, b: Array, weights: Array | None = None) -> Array:
    r"""Kendall's τ-b for each weighting: Σ s_a s_b / √(Σ s_a² · Σ s_b²) over pairs, s = sign of the difference.

    Example:
        >>> kendall(np.array([1.0, 2, 3]), np.array([1.0, 3, 2])).round(3).tolist()
        [0.333]
    """
    weights = np.ones((1, len(a))) if weights is None else weights
    first, second = np.sign(a[:, None] - a), np.sign(b[:, None] - b)

    def total(pairs: Array) -> Array:
        sums: Array = np.einsum("bi,ij,bj->b", weights, pairs, weights, optimize=True)
        return sums

    with np.errstate(invalid="ignore", divide="ignore"):
        result: Array = total(first * second) / np.sqrt(total(first**2) * total(second**2))
    return result


def spearman(a: Array, b: Array) -> Array:
    """Spearman's ρ of rows (B, n); NaN where a row is constant."""
    x, y = centered_ranks(a), centered_ranks(b)
    with np.errstate(invalid="ignore", divide="ignore"):
        result: Array = (x * y).sum(-1) / np.sqrt((x * x).sum(-1) * (y * y).sum(-1))
    return result


def centered_ranks(values: Array) -> Array:
    """Ranks along the last axis, ties averaged, minus their mean."""
    ranks: Array = rankdata(values, axis=-1)
    return ranks - ranks.mean(-1, keepdims=True)


def partial_correlation(xy: Array, xz: Array, yz: Array, xx: Array, yy: Array, zz: Array) -> Array:
    """Correlation of x and y with z partialled out, from sums of products; NaN where no variance remains."""
    left_x, left_y = xx - xz**2 / zz, yy - yz**2 / zz
    enough = (left_x > 1e-9 * xx) & (left_y > 1e-9 * yy)
    with np.errstate(invalid="ignore", divide="ignore"):
        result: Array = np.where(enough, (xy - xz * yz / zz) / np.sqrt(np.maximum(left_x * left_y, 0)), math.nan)
    return result
