"""Leakage: how much a representation depends on the slide (or scanner, site, patient), not on tissue."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from repmetrics.functional.checks import check_features
from repmetrics.functional.correlation import resolution
from repmetrics.functional.ids import factorize
from repmetrics.functional.neighbors import check_pairwise, neighbor_distances


def group_index(groups: Sequence[Hashable] | Tensor, *, rows: int) -> tuple[Tensor, Tensor]:
    """Return the group index (N,) of each row and the size (g,) of each group.

    Raises:
        ValueError: Ids do not match the rows, or there are fewer than two groups.
    """
    index, names = factorize(groups)
    if len(index) != rows:
        raise ValueError(f"groups must hold one id per row, got {len(index)} for {rows} rows")
    if len(names) < 2:
        raise ValueError(f"at least two groups are needed to compare them, got {len(names)}")
    return index, torch.bincount(index)


def slide_leakage(features: Tensor, *, groups: Sequence[Hashable] | Tensor) -> Tensor:
    r"""Slide leakage: tr Σ_between-slide / tr Σ, the share of the variance that lies between slides.

    It uses slide ids, not labels. Features that do not depend on their slide score (g − 1)/(N − 1) for g groups.

    Convention: nothing is done to the features; the weight of a group is its number of rows.

    Args:
        features: (N, D), N ≥ 2, any floating dtype.
        groups: The slide's id of each row.

    Returns:
        0-dim float64 in 0 … 1; lower is better. NaN for constant features.

    Raises:
        TypeError: Features are not floating.
        ValueError: Wrong shape, NaN or Inf, ids that do not match, fewer than two groups.

    Example:
        >>> slide_leakage(torch.tensor([[0.0], [2.0], [4.0], [6.0]]), groups="aabb").item()
        0.8
    """
    check_features(features, min_rows=2)
    index, counts = group_index(groups, rows=len(features))
    rows = features.detach().to(torch.float64)
    mean = rows.mean(0)
    rows = rows - mean
    index, counts = index.to(rows.device), counts.to(rows)
    sums = torch.zeros(len(counts), rows.shape[1], dtype=torch.float64, device=rows.device).index_add_(0, index, rows)
    between, total = (sums.square().sum(1) / counts).sum(), rows.square().sum()
    constant = total <= resolution(features.dtype) ** 2 * len(rows) * mean.square().sum()
    return torch.full_like(total, math.nan) if constant else between / total


def neighbor_leakage(features: Tensor, *, groups: Sequence[Hashable] | Tensor, k: int = 10) -> Tensor:
    r"""Same-slide neighbors: the rate at which a row's k nearest neighbors share its slide, over chance.

    Chance for a row in a group of m is (m − 1)/(N − 1); the ratio is of the two means over rows.

    Convention: Euclidean distances of the features as they come; a row is not its own neighbor.

    Args:
        features: (N, D), k + 1 ≤ N ≤ 10 000, any floating dtype.
        groups: The slide's id of each row.
        k: Number of neighbors.

    Returns:
        0-dim float64 ≥ 0; 1 is chance, lower is better.

    Raises:
        TypeError: Features are not floating.
        ValueError: Wrong shape, too few or too many rows, NaN or Inf, ids that do not match, groups all of size one.

    Example:
        >>> neighbor_leakage(torch.tensor([[0.0], [0.1], [9.0], [9.1]]), groups="aabb", k=1).item()
        3.0
    """
    check_pairwise(features, min_rows=k + 1)
    index, counts = group_index(groups, rows=len(features))
    chance = ((counts[index] - 1).to(torch.float64) / (len(features) - 1)).mean()
    if chance == 0:
        raise ValueError("every group has a single row: at least one group must have two")
    neighbors = neighbor_distances(features, k=k)[1].cpu()
    rate = (index[neighbors] == index[:, None]).to(torch.float64).mean()
    return rate / chance
