"""Drift of a representation between two checkpoints, on the same rows."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from repmetrics.functional.checks import check_features


def cka_drift(features: Tensor, *, previous: Tensor) -> Tensor:
    r"""Debiased linear CKA between two representations of the **same rows in the same order**.

    HSIC(K, L)/√(HSIC(K, K)·HSIC(L, L)) with the unbiased HSIC and K = XXᵀ, L = YYᵀ. On independent features the biased
    form scores D/(N + D), and this form 0. The cost is O(N·D²), without an N×N matrix.

    Convention: features as they come (the estimator centers them); 1 is no drift.

    Args:
        features: (N, D), N ≥ 4, any floating dtype.
        previous: (N, D′) the other checkpoint's features of the same rows.

    Returns:
        0-dim float64, 0 … 1 up to noise around 0; NaN if one of the two is constant. Neither direction is better.

    Raises:
        TypeError: Features are not floating.
        ValueError: Wrong shape, fewer than four rows, different N, NaN or Inf.

    Source:
        Kornblith et al. 2019, arXiv 1905.00414; unbiased HSIC: Song et al. 2012, equation 5.

    Example:
        >>> x = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
        >>> round(cka_drift(x @ torch.linalg.qr(torch.randn(4, 4)).Q, previous=x).item(), 6)  # rotation is no drift
        1.0
    """
    for matrix in (features, previous):
        check_features(matrix, min_rows=4)
    if len(features) != len(previous):
        raise ValueError(f"drift compares the same rows, got {len(features)} and {len(previous)}")
    if features.device != previous.device:
        raise ValueError(f"features are on {features.device}, the previous ones on {previous.device}: move them first")
    # HSIC does not depend on a shift of the features. Centering first prevents cancellation between its three terms.
    x, y = (m.detach().to(torch.float64) for m in (features, previous))
    x, y = x - x.mean(0), y - y.mean(0)
    x, y = (m / m.abs().max().clamp_min(1e-300) for m in (x, y))  # eighth powers follow
    scale = _hsic(x, x) * _hsic(y, y)
    return _hsic(x, y) / scale.sqrt() if scale > 0 else torch.full_like(scale, math.nan)


def _hsic(x: Tensor, y: Tensor) -> Tensor:
    """Unbiased HSIC of linear kernels with zeroed diagonals, up to the factor n(n − 3)."""
    n = len(x)
    kd, ld = x.square().sum(1), y.square().sum(1)
    k_rows, l_rows = x @ x.sum(0) - kd, y @ y.sum(0) - ld
    trace = (x.T @ y).square().sum() - kd @ ld
    return trace + k_rows.sum() * l_rows.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (k_rows @ l_rows)
