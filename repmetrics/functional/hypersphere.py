"""Directions: the distribution of the features on the sphere, each scaled to length 1.

Notation: u = x/‖x‖, m = E u, Σ the covariance of u (divisor N).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from repmetrics.functional.checks import check_features, check_lengths
from repmetrics.functional.correlation import resolution
from repmetrics.functional.ids import count_blocks
from repmetrics.functional.linalg import BLOCK_ROWS, float64_blocks
from repmetrics.functional.spectrum import Spectrum, spectrum


@runtime_checkable
class DirectionMoments(Protocol):
    """Streaming moments of unit rows, such as ``Moments(features, unit=True)``."""

    n: int
    unit: bool

    @property
    def mean(self) -> Tensor:
        """(D,) mean row."""

    def spectrum(self, *, centered: bool) -> Spectrum:
        """Eigenvalues of the (centered) ZᵀZ."""


def directions(features: Tensor) -> Tensor:
    """Scale rows to length 1, in float64.

    Args:
        features: (N, D), any floating dtype.

    Raises:
        TypeError: Features are not floating.
        ValueError: Wrong shape, NaN or Inf, or a row of length 0, which has no direction.

    Example:
        >>> directions(torch.tensor([[3.0, 4.0]])).tolist()
        [[0.6, 0.8]]
    """
    check_features(features)
    check_lengths(features)
    return torch.cat(list(float64_blocks(features, unit=True)))


def centered_directions(features: Tensor, *, transform: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """Subtract the mean row and scale rows to length 1, in float64. A row at the mean has no direction and becomes 0.

    Constant features become 0, even if they differ by the rounding of float32.

    Args:
        features: (N, D), any floating dtype.
        transform: Function of the centered rows (N, D), applied before the scaling.

    Example:
        >>> centered_directions(torch.tensor([[0.0, 1.0], [0.0, 5.0], [0.0, 3.0]]))[:, 1].tolist()
        [-1.0, 1.0, 0.0]
    """
    check_features(features)
    rows = features.detach().to(torch.float64)
    mean = rows.mean(0)
    rows = rows - mean
    if rows.square().sum() <= resolution(features.dtype) ** 2 * len(rows) * mean.square().sum():
        return torch.zeros_like(rows)
    if transform is not None:
        rows = transform(rows)
    lengths = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return rows / torch.where(lengths == 0, 1.0, lengths)


def _check_unit(moments: DirectionMoments) -> None:
    if not moments.unit:
        raise ValueError("moments must be of rows of length 1: build them with Moments(features, unit=True)")


def uniformity_w2(features: Tensor | DirectionMoments) -> Tensor:
    r"""Uniformity as the Wasserstein-2 distance of the directions to the uniform sphere, in Gaussian approximation.

    √(‖m‖² + 1 + tr Σ − 2·tr Σ^½ / √D): the distance between N(m, Σ) and N(0, I/D). Unlike the pairwise Gaussian
    uniformity, which it replaces, it can be computed from moments and detects dimensional collapse.

    Convention: rows are scaled to length 1 (by this function, or with ``unit=True`` when moments are built).

    Args:
        features: (N, D), any floating dtype, or the moments of unit rows.

    Returns:
        0-dim float64 ≥ 0; lower is better; √2 at complete collapse, √(2 − 2√(r/D)) when spread evenly over rank r.

    Raises:
        TypeError: Features are not floating.
        ValueError: Wrong shape, no rows, NaN or Inf, a row of length 0, moments of rows that are not unit.

    Source:
        Fang et al. 2024, arXiv 2403.00642.

    Example:
        >>> x = torch.eye(4).repeat(2, 1) * torch.tensor([1.0, -1.0]).repeat_interleave(4)[:, None]
        >>> round(uniformity_w2(x).item(), 6)
        0.0
    """
    if isinstance(features, DirectionMoments):
        _check_unit(features)
        mean, n, centered = features.mean, features.n, features.spectrum(centered=True)
    else:
        unit = directions(features)
        mean, n, centered = unit.mean(0), len(unit), spectrum(unit, centered=True)
    variance = centered.eigenvalues / n
    squared = mean.square().sum() + 1 + variance.sum() - 2 * variance.sqrt().sum() / centered.d**0.5
    return squared.clamp_min(0).sqrt()


def mean_direction(features: Tensor | DirectionMoments) -> Tensor:
    r"""Length of the mean direction, ‖E u‖: 1 when all features point the same way.

    Convention: rows are scaled to length 1 (by this function, or with ``unit=True`` when moments are built).

    Args:
        features: (N, D), any floating dtype, or the moments of unit rows.

    Returns:
        0-dim float64 in 0 … 1; lower is better, → 1 is complete collapse.

    Raises:
        TypeError: Features are not floating.
        ValueError: Wrong shape, no rows, NaN or Inf, a row of length 0, moments of rows that are not unit.

    Example:
        >>> mean_direction(torch.tensor([[2.0, 0.0], [0.0, 5.0]])).item()
        0.7071...
    """
    if not isinstance(features, DirectionMoments):
        return directions(features).mean(0).norm()
    _check_unit(features)
    return features.mean.norm()


def mean_directions(features: Tensor, *, blocks: Tensor | None = None) -> Tensor:
    """Lengths (1 + G,) of the mean directions: of all rows, and of those outside of each block; without Gram matrices.

    Args:
        features: (N, D), any floating dtype.
        blocks: (N,) int64 in 0 … G − 1, the block of each row; None: G = 0.
    """
    check_features(features)
    check_lengths(features)
    count = max(count_blocks(blocks), 1)
    block = torch.zeros(len(features), dtype=torch.int64) if blocks is None else blocks
    sums = torch.zeros(count, features.shape[1], dtype=torch.float64, device=features.device)
    index = block.to(features.device).split(BLOCK_ROWS)
    for rows, of_rows in zip(float64_blocks(features, unit=True), index, strict=True):
        sums.index_add_(0, of_rows, rows)
    total, sizes = sums.sum(0), torch.bincount(block, minlength=count).to(sums)
    value = (total / len(features)).norm()[None]
    return (
        value if blocks is None else torch.cat([value, ((total - sums) / (len(features) - sizes)[:, None]).norm(dim=1)])
    )
