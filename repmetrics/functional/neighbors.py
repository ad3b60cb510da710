"""Metrics of nearest neighbors: local spread and intrinsic dimension, for at most 10 000 rows."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from repmetrics.functional.checks import check_features
from repmetrics.functional.hypersphere import directions
from repmetrics.functional.linalg import BLOCK_ROWS

MAX_ROWS = 10_000
"""Largest number of rows for metrics of all pairs."""


def check_pairwise(features: Tensor, *, min_rows: int) -> None:
    """Check as :func:`~repmetrics.functional.checks.check_features`, and refuse more than :data:`MAX_ROWS` rows."""
    check_features(features, min_rows=min_rows)
    if len(features) > MAX_ROWS:
        raise ValueError(f"pairwise metrics take at most {MAX_ROWS} rows, got {len(features)}: take a random subset")


def neighbor_distances(features: Tensor, *, k: int) -> tuple[Tensor, Tensor]:
    """Compute distances and indices (N, k) of the k nearest other rows, nearest first, in float64.

    The fast expanded square finds the neighbors. Their distances are then computed from differences, so that near
    duplicates keep their digits and duplicates are at distance 0.
    """
    rows = features.detach().to(torch.float64)
    rows = rows - rows.mean(0)
    distances, indices = [], []
    for start in range(0, len(rows), BLOCK_ROWS):
        block = rows[start : start + BLOCK_ROWS]
        pairs = torch.cdist(block, rows, compute_mode="use_mm_for_euclid_dist")
        diagonal = torch.arange(len(block), device=rows.device)
        pairs[diagonal, diagonal + start] = math.inf
        nearest = pairs.topk(k, dim=1, largest=False).indices
        exact = (block[:, None] - rows[nearest]).norm(dim=2).sort(dim=1)
        distances.append(exact.values)
        indices.append(nearest.gather(1, exact.indices))
    return torch.cat(distances), torch.cat(indices)


def knn_entropy(features: Tensor, *, k: int = 1) -> Tensor:
    r"""Mean log distance of a direction to its k-th nearest neighbor: the entropy of the directions, up to constants.

    (1/N)·Σ ln‖u_i − u_(k)‖; for k = 1 it is minus the KoLeo loss. A larger value means more spread out. There is no
    default direction: collapse lowers the spread, and so does good clustering.

    Convention: rows are scaled to length 1; natural logarithm; duplicates give −inf.

    Args:
        features: (N, D), k + 1 ≤ N ≤ 10 000, any floating dtype.
        k: Rank of the neighbor, 1 for the nearest.

    Returns:
        0-dim float64 ≤ ln 2.

    Raises:
        TypeError: Features are not floating.
        ValueError: Wrong shape, too few or too many rows, NaN or Inf, a row of length 0.

    Source:
        Kozachenko & Leonenko 1987; Sablayrolles et al. 2019, arXiv 1806.03198 (KoLeo).

    Example:
        >>> round(knn_entropy(torch.eye(4)).exp().item(), 4)  # all distances √2
        1.4142
    """
    check_pairwise(features, min_rows=k + 1)
    return neighbor_distances(directions(features), k=k)[0][:, -1].log().mean()


def kde_entropy(features: Tensor, *, concentration: float = 5.0) -> Tensor:
    r"""Entropy of the directions by a kernel density: −(1/N)·Σ_i ln[(1/(N−1))·Σ_{j≠i} exp(κ·(u_i·u_j − 1))].

    A smooth form of :func:`knn_entropy`, without a default direction for the same reason.

    Convention: rows are scaled to length 1; kernel normalized to 1 at distance 0; a row is not its own neighbor.

    Args:
        features: (N, D), 2 ≤ N ≤ 10 000, any floating dtype.
        concentration: κ of the von Mises–Fisher kernel.

    Returns:
        0-dim float64 in 0 … 2κ; 0 at complete collapse.

    Raises:
        TypeError: Features are not floating.
        ValueError: Wrong shape, too few or too many rows, NaN or Inf, a row of length 0.

    Source:
        Virchow2's regularizer, arXiv 2408.00738, section on KDE.

    Example:
        >>> kde_entropy(torch.eye(4)).item()  # u_i·u_j = 0
        5.0
    """
    check_pairwise(features, min_rows=2)
    unit = directions(features)
    parts = []
    for start in range(0, len(unit), BLOCK_ROWS):
        similarity = unit[start : start + BLOCK_ROWS] @ unit.T
        diagonal = torch.arange(len(similarity), device=unit.device)
        similarity[diagonal, diagonal + start] = -math.inf
        parts.append(torch.logsumexp(concentration * (similarity - 1), dim=1))
    return math.log(len(unit) - 1) - torch.cat(parts).mean()


def twonn(features: Tensor) -> Tensor:
    r"""TwoNN intrinsic dimension: (N − 1)/Σ ln(r₂/r₁), r₁ and r₂ the distances to the two nearest neighbors.

    This is the unbiased maximum-likelihood form. The literature disagrees on whether a higher value is better.

    Convention: Euclidean distances of the features as they come; rows that have a duplicate (r₁ = 0) are left out.

    Args:
        features: (N, D), 3 ≤ N ≤ 10 000, any floating dtype.

    Returns:
        0-dim float64 > 0; no default direction; NaN if fewer than 3 distinct rows remain.

    Raises:
        TypeError: Features are not floating.
        ValueError: Wrong shape, too few or too many rows, NaN or Inf.

    Source:
        Facco et al. 2017, doi 10.1038/s41598-017-11873-y; maximum likelihood: Denti et al. 2022.

    Example:
        >>> line = torch.rand(2000, 1, generator=torch.Generator().manual_seed(0)) @ torch.ones(1, 5)
        >>> abs(twonn(line).item() - 1) < 0.1
        True
    """
    check_pairwise(features, min_rows=3)
    distances = neighbor_distances(features, k=2)[0]
    distinct = distances[distances[:, 0] > 0]
    if len(distinct) < 3:
        return torch.tensor(math.nan, dtype=torch.float64, device=features.device)
    return (len(distinct) - 1) / (distinct[:, 1] / distinct[:, 0]).log().sum()
