"""Intrinsic dimension from the growth of minimum spanning trees."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from repmetrics.functional.checks import check_features
from repmetrics.functional.clusters import evenly_spaced
from repmetrics.functional.correlation import resolution
from repmetrics.functional.hypersphere import directions

SIZES = 8
"""Numbers of rows at which trees are built, in geometric progression from N/16 to N."""

DRAWS = 3
MAX_ROWS = 2048
"""Largest number of rows of a tree. Of more rows, as many at equal distances in the order of the rows are taken."""

SMALLEST = 4
"""Smallest number of rows of a tree; with fewer than 64 rows there is no dimension."""


def mst_dimension(features: Tensor, *, unit: bool = True, seed: int = 0) -> Tensor:
    r"""Dimension from minimum spanning trees: 1/(1 − slope) of ln E(n) against ln n.

    E(n) is the total length of the minimum spanning tree of n rows. Rows that fill d dimensions evenly have
    E(n) ∝ n^((d − 1)/d). The literature disagrees on whether a higher value is better.

    Convention: Euclidean distances of rows scaled to length 1; 8 sizes from N/16 to N in geometric progression; ln E is
    averaged over 3 random subsets of each size; least squares with equal weights.

    Args:
        features: (N, D), any floating dtype; of more than 2048 rows, 2048 at equal distances are used.
        unit: Whether to scale rows to length 1.
        seed: Seed of the subsets.

    Returns:
        0-dim float64 ≥ 1; neither direction is better by itself. NaN for fewer than 64 rows, for constant features, and
        if E(n) grows as fast as n.

    Raises:
        TypeError: Features are not floating.
        ValueError: Wrong shape, NaN or Inf, a row of length 0.

    Source:
        Costa & Hero 2004, "Geodesic entropic graphs for dimension and entropy estimation"; as a measure of encoders:
        arXiv 2606.03338.

    Example:
        >>> line = torch.rand(512, 1, generator=torch.Generator().manual_seed(0)) @ torch.ones(1, 5)
        >>> round(mst_dimension(line, unit=False).item(), 1)
        1.0
    """
    check_features(features, min_rows=2)
    features = features[evenly_spaced(len(features), MAX_ROWS).to(features.device)]
    rows = directions(features) if unit else features.detach().to(torch.float64)
    undefined = torch.full((), math.nan, dtype=torch.float64, device=features.device)
    n, mean = len(rows), rows.mean(0)
    rows = rows - mean
    if n < 16 * SMALLEST or rows.square().sum() <= resolution(features.dtype) ** 2 * n * mean.square().sum():
        return undefined
    distances = torch.cdist(rows, rows, compute_mode="use_mm_for_euclid_dist").cpu().numpy()
    generator = torch.Generator().manual_seed(seed)
    sizes = np.unique(np.geomspace(n / 16, n, SIZES).round().astype(np.int64))
    log_lengths = [_log_length(distances, int(size), generator) for size in sizes]
    if not np.isfinite(log_lengths).all():
        return undefined
    slope = float(np.polyfit(np.log(sizes), log_lengths, 1)[0])
    return undefined.new_tensor(1 / (1 - slope)) if slope < 1 else undefined


def _log_length(distances: NDArray[np.float64], size: int, generator: torch.Generator) -> float:
    """Mean over random subsets of one size of the logarithm of the tree's length; −∞ for a tree of length 0."""
    n = len(distances)
    lengths = []
    for _ in range(DRAWS if size < n else 1):  # all subsets of all rows are equal
        subset = torch.randperm(n, generator=generator)[:size].numpy()
        lengths.append(tree_length(distances[np.ix_(subset, subset)] if size < n else distances))
    with np.errstate(divide="ignore"):
        return float(np.log(lengths).mean())


def tree_length(distances: NDArray[np.float64]) -> float:
    """Total length of the minimum spanning tree of a symmetric matrix of distances, by Prim's algorithm.

    Example:
        >>> tree_length(np.array([[0.0, 1.0, 4.0], [1.0, 0.0, 2.0], [4.0, 2.0, 0.0]]))
        3.0
    """
    nearest = distances[0].copy()  # distance of each row to the tree
    reached = np.zeros(len(distances))
    reached[0] = np.inf
    total = 0.0
    for _ in range(len(distances) - 1):
        row = int((nearest + reached).argmin())
        total += float(nearest[row])
        reached[row] = np.inf
        np.minimum(nearest, distances[row], out=nearest)
    return total
