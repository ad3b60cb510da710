"""Metrics of several views of each sample: differences between samples against those between views."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from repmetrics.functional.checks import check_features
from repmetrics.functional.correlation import resolution
from repmetrics.functional.hypersphere import directions
from repmetrics.functional.ids import factorize
from repmetrics.functional.linalg import symmetric_eigenvalues
from repmetrics.functional.spectrum import entropy

LIDAR_DELTA = 1e-4
"""Ridge on Σw, relative to its mean eigenvalue."""


def view_index(views: Sequence[Hashable] | Tensor, *, rows: int) -> tuple[Tensor, Tensor]:
    """Return the sample index (N,) of each row and the number of views (n,) of each sample.

    Raises:
        ValueError: Ids do not match the rows, fewer than two samples, or a sample with a single view (named).

    Example:
        >>> view_index(["a", "b", "a", "b"], rows=4)
        (tensor([0, 1, 0, 1]), tensor([2, 2]))
    """
    index, names = factorize(views)
    if len(index) != rows:
        raise ValueError(f"views must hold the sample's id of each row, got {len(index)} ids for {rows} rows")
    counts = torch.bincount(index)
    if len(names) < 2:
        raise ValueError(f"views of at least 2 samples are needed, got {len(names)}")
    if (counts < 2).any():
        single = [str(name) for name, count in zip(names, counts, strict=True) if count < 2]
        raise ValueError(f"each sample needs at least 2 views; {len(single)} have one, first {', '.join(single[:3])}")
    return index, counts


def scatter(features: Tensor, index: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the between-sample and within-sample covariance (D, D), with equal weight for each sample.

    Σb = mean over samples of (μ_i − μ)(μ_i − μ)ᵀ with μ the mean of the μ_i;
    Σw = mean over samples of the mean over their views of (x − μ_i)(x − μ_i)ᵀ.
    """
    rows = features.detach().to(torch.float64)
    rows = rows - rows.mean(0)
    index, counts = index.to(rows.device), counts.to(rows.device)
    sums = torch.zeros(len(counts), rows.shape[1], dtype=torch.float64, device=rows.device)
    means = sums.index_add_(0, index, rows) / counts[:, None]
    spread = means - means.mean(0)
    inner = (rows - means[index]) / counts[index, None].sqrt()
    return spread.T @ spread / len(counts), inner.T @ inner / len(counts)


def lidar(
    features: Tensor, *, views: Sequence[Hashable] | Tensor, delta: float = LIDAR_DELTA, debias: bool = False
) -> Tensor:
    r"""LiDAR: exp H₁ of the eigenvalues of Σw^-½ Σb Σw^-½, the effective rank of the differences between samples.

    Convention: Σb and Σw weight samples equally and divide by n and q as the paper does; δ is relative,
    Σw + δ·tr(Σw)/D·I, so that scale cancels; ε = 0. Only ``views`` determines which rows are views of one sample, not
    their position.

    Args:
        features: (N, D), q ≥ 2 rows for each of n samples, in any order; n = 10·D with q = 10 is enough.
        views: The sample's id of each row.
        delta: Ridge on Σw, relative to its mean eigenvalue.
        debias: Use Σb − Σw/q with Σw unbiased, which removes the bias of Σb from finite views. Negative eigenvalues
            become 0.

    Returns:
        0-dim float64 in 1 … min(n − 1, D); higher is better.

    Raises:
        TypeError: Features are not floating.
        ValueError: Wrong shape, NaN or Inf, ids that do not match, fewer than 2 samples, a sample with one view,
            views that are identical.

    Source:
        Thilak et al. 2023, arXiv 2312.04000.

    Example:
        >>> samples = torch.eye(3).repeat_interleave(2, 0) * 9
        >>> jitter = torch.tensor([0.1, -0.1]).repeat(3)[:, None] * torch.eye(3).roll(1, 0).repeat_interleave(2, 0)
        >>> round(lidar(samples + jitter, views=[0, 0, 1, 1, 2, 2]).item(), 3)
        2.0
    """
    check_features(features, min_rows=4)
    index, counts = view_index(views, rows=features.shape[0])
    between, within = scatter(features, index, counts)
    if debias:
        # The scatter of a mean of q views contains Σw/q. A sum over views divided by q underestimates Σw by (q − 1)/q.
        q = counts.to(torch.float64).mean()
        between = between - within / (q - 1)
    dim = features.shape[1]
    scale = within.diagonal().sum()
    if scale <= resolution(features.dtype) ** 2 * features.detach().to(torch.float64).square().sum(1).mean():
        raise ValueError("the views of each sample are identical: LiDAR needs augmented views that differ")
    within = within + delta * scale / dim * torch.eye(dim, dtype=torch.float64, device=within.device)
    root = torch.linalg.cholesky(within)
    half = torch.linalg.solve_triangular(root, between, upper=False)
    whitened = torch.linalg.solve_triangular(root, half.T, upper=False)
    # L⁻¹ΣbL⁻ᵀ has the eigenvalues of Σw^-½ΣbΣw^-½: both are similar to Σw⁻¹Σb.
    eigenvalues = symmetric_eigenvalues((whitened + whitened.T) / 2).flip(-1)
    rank = min(len(counts) - 1, dim)
    return entropy(eigenvalues[:rank].clamp_min(0)).exp()


def alignment(features: Tensor, *, views: Sequence[Hashable] | Tensor) -> Tensor:
    r"""Alignment: E‖u − u⁺‖² over pairs of views of one sample, u = x/‖x‖.

    Complete collapse optimizes it, so it must not select models alone.

    Convention: rows are scaled to length 1; each sample has the same weight for any number of views.

    Args:
        features: (N, D), at least two rows per sample, in any order.
        views: The sample's id of each row.

    Returns:
        0-dim float64 in 0 … 4; neither direction is better by itself.

    Raises:
        TypeError: Features are not floating.
        ValueError: Wrong shape, NaN or Inf, a row of length 0, ids that do not match, a sample with one view.

    Source:
        Wang & Isola 2020, arXiv 2005.10242, with the exponent 2.

    Example:
        >>> alignment(torch.eye(2).repeat(2, 1), views=[0, 0, 1, 1]).item()  # orthogonal views
        2.0
    """
    unit = directions(features)
    index, counts = view_index(views, rows=len(unit))
    index, q = index.to(unit.device), counts.to(unit)
    sums = torch.zeros(len(counts), unit.shape[1], dtype=torch.float64, device=unit.device).index_add_(0, index, unit)
    # Σ_{i<j}‖u_i − u_j‖² = q·Σ‖u_i − ū‖² over q(q−1)/2 pairs. Differences keep the digits of views that nearly agree.
    spread = (unit - (sums / q[:, None])[index]).square().sum(1)
    return (2 * torch.zeros_like(q).index_add_(0, index, spread) / (q - 1)).mean()
