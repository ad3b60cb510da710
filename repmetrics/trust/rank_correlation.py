"""Kendall's τ-b and Spearman's ρ, weighted, partial, and many at once, as a bootstrap needs them: pure functions."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

Array = NDArray[np.float64]


def kendall(a: Array, b: Array, weights: Array | None = None) -> Array:
    r"""Kendall's τ-b, Σ s_a s_b / √(Σ s_a² · Σ s_b²) over pairs, s = sign of the difference; one for each weighting.

    Args:
        a: (n,).
        b: (n,).
        weights: (B, n), how often each sample was drawn; default once.

    Example:
        >>> kendall(np.array([1.0, 2, 3]), np.array([1.0, 3, 2])).round(3).tolist()
        [0.333]
    """
    weights = np.ones((1, len(a))) if weights is None else weights
    first, second = np.sign(a[:, None] - a), np.sign(b[:, None] - b)

    def total(pairs: Array) -> Array:
        summed: Array = np.einsum("bi,ij,bj->b", weights, pairs, weights, optimize=True)
        return summed

    with np.errstate(invalid="ignore", divide="ignore"):
        result: Array = total(first * second) / np.sqrt(total(first**2) * total(second**2))
    return result


def spearman(a: Array, b: Array, given: Array | None = None) -> Array:
    """Spearman's ρ of rows, (B, n) each; partial where a third is given. NaN where a row is constant."""
    x, y = centred_ranks(a), centred_ranks(b)
    if given is None:
        return _cosine(x, y)
    z = centred_ranks(given)
    return partial_correlation((x * y).sum(-1), (x * z).sum(-1), (y * z).sum(-1), *((v * v).sum(-1) for v in (x, y, z)))


def centred_ranks(values: Array) -> Array:
    """Mean ranks less their mean, along the last axis."""
    ranks: Array = rankdata(values, axis=-1)
    return ranks - ranks.mean(-1, keepdims=True)


def _cosine(x: Array, y: Array) -> Array:
    with np.errstate(invalid="ignore", divide="ignore"):
        result: Array = (x * y).sum(-1) / np.sqrt((x * x).sum(-1) * (y * y).sum(-1))
    return result


def partial_correlation(xy: Array, xz: Array, yz: Array, xx: Array, yy: Array, zz: Array) -> Array:
    """Correlation of x and y after the regression on z is taken out of both; NaN where nothing is left."""
    left_x, left_y = xx - xz**2 / zz, yy - yz**2 / zz
    enough = (left_x > 1e-9 * xx) & (left_y > 1e-9 * yy)
    with np.errstate(invalid="ignore", divide="ignore"):
        result: Array = np.where(enough, (xy - xz * yz / zz) / np.sqrt(np.maximum(left_x * left_y, 0)), math.nan)
    return result
