"""Cross-fitted ridge regression on frozen features: how well numbers can be read from them, beyond known covariates."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from repmetrics.functional.checks import check_features
from repmetrics.functional.discriminant import FOLDS, folds_of
from repmetrics.measurement.blocks import Blocks
from repmetrics.measurement.jackknife import jackknife_error
from repmetrics.measurement.registry import Direction
from repmetrics.measurement.result import NO_GROUPS, Measurement

RELATIVE_PENALTIES = tuple(10.0**k for k in range(-5, 3))
"""Penalties to choose from, in units of the mean eigenvalue of the covariance."""

UNEXPLAINED_FLOOR = 1e-6
"""Share of the variance below which what covariates leave is the error of their own regression."""


def ridge_probe(
    features: Tensor,
    target: Tensor,
    *,
    name: str = "ridge_probe",
    groups: Sequence[Hashable] | None = None,
    beyond: Tensor | None = None,
    folds: int = FOLDS,
) -> Measurement:
    r"""Skill of a ridge regression on frozen features, cross-fitted: 1 − Σ(y − ŷ)²/Σ(y − ȳ)².

    Every row is predicted once, by a model fitted without it and without the rows of its group. Features are
    standardized by the training rows. The penalty is chosen by generalized cross-validation on the training rows. With
    ``beyond``, y is what a regression on these covariates leaves, cross-fitted in the same folds.

    The standard error is a delete-a-group jackknife over the predictions.

    Args:
        features: (N, D), floating.
        target: (N,) numbers.
        name: Name of the measurement.
        groups: One id per row (slide, patient); a group is never split between training and test.
        beyond: (N, C) covariates, such as color statistics.
        folds: Maximum number of folds.

    Returns:
        Skill ≤ 1, higher is better; 0 is the skill of the mean. NaN for a constant target, and for one that the
        covariates determine.

    Raises:
        ValueError: Wrong shapes, NaN or Inf, or a single group.

    Source:
        Golub, Heath & Wahba 1979, "Generalized cross-validation as a method for choosing a good ridge parameter".

    Example:
        >>> x = torch.randn(200, 4, generator=torch.Generator().manual_seed(0))
        >>> round(ridge_probe(x, x @ torch.tensor([1.0, 2.0, 0.0, 0.0])).value, 3)
        1.0
    """
    check_features(features, min_rows=2)
    if target.shape != (len(features),) or not torch.isfinite(target).all():
        raise ValueError(f"target must be ({len(features)},) finite numbers, got {tuple(target.shape)}")
    if groups is not None and (len(groups) != len(features) or len(set(groups)) < 2):
        raise ValueError(f"groups must hold one id per row, of at least two groups, got {len(set(groups))} distinct")
    fold = folds_of(np.zeros(len(features), dtype=np.int64), groups=groups, folds=folds)
    y = target.detach().to("cpu", torch.float64)
    if beyond is not None:
        remainder = y - cross_fit(beyond.detach().to("cpu", torch.float64), y, fold)
        y = remainder if remainder.var() > UNEXPLAINED_FLOOR * y.var() else torch.zeros_like(y)
    error = (y - cross_fit(features.detach().to("cpu", torch.float64), y, fold)).square()
    spread = (y - y.mean()).square()
    covariates = "" if beyond is None else f", beyond {beyond.shape[1]} covariates"
    return rowwise_measurement(
        name,
        lambda kept: float(1 - error[kept].sum() / spread[kept].sum()),
        features,
        groups=groups,
        direction="higher",
        convention=f"1 − Σ(y − ŷ)²/Σ(y − ȳ)²; ridge, {len(np.unique(fold))} folds{covariates}",
        undefined="the target is constant" if beyond is None else "the covariates determine the target",
    )


def cross_fit(rows: Tensor, target: Tensor, fold: NDArray[np.int64]) -> Tensor:
    """Prediction (N,) of each row by the ridge regression of all other folds, float64."""
    predicted = torch.empty_like(target)
    for k in np.unique(fold):
        test = torch.from_numpy(fold == k)
        scale, mean = torch.std_mean(rows[~test], 0, correction=0)
        scale = torch.where(scale == 0, 1.0, scale)
        center = target[~test].mean()
        weights = ridge((rows[~test] - mean) / scale, target[~test] - center)
        predicted[test] = (rows[test] - mean) / scale @ weights + center
    return predicted


def ridge(rows: Tensor, target: Tensor) -> Tensor:
    """Weights (D,) of a ridge regression without intercept, its penalty by generalized cross-validation.

    Args:
        rows: (N, D) centered columns, float64.
        target: (N,) centered numbers.
    """
    left, sigma, right = torch.linalg.svd(rows, full_matrices=False)
    square, projected = sigma.square(), left.T @ target
    outside = target.square().sum() - projected.square().sum()
    n = len(rows)
    best, weights = torch.inf, torch.zeros_like(rows[0])
    for relative in RELATIVE_PENALTIES:
        penalty = relative * square.sum() / rows.shape[1]
        if penalty == 0:
            break
        kept = square / (square + penalty)
        residual = outside + ((1 - kept) * projected).square().sum()
        freedom = max(1 - float(kept.sum() + 1) / n, 1e-9)
        criterion = float(residual) / freedom**2
        if criterion < best:
            best, weights = criterion, right.T @ (sigma / (square + penalty) * projected)
    return weights


def rowwise_measurement(
    name: str,
    statistic: Callable[[Tensor], float],
    features: Tensor,
    *,
    groups: Sequence[Hashable] | None,
    direction: Direction,
    convention: str,
    undefined: str,
) -> Measurement:
    """Measurement of a statistic of rows, with its jackknife error over groups.

    Args:
        name: Name of the measurement.
        statistic: Function: mask (N,) of the rows to use → value.
        features: (N, D) features that the value is about.
        groups: One id per row.
        direction: Direction of an improvement.
        convention: What was and was not done.
        undefined: Reason where the value is NaN.
    """
    rows = torch.ones(len(features), dtype=torch.bool)
    value = statistic(rows)
    blocks = None if groups is None else Blocks.from_groups(groups)
    error, reason, replicates = None, NO_GROUPS, None
    if np.isnan(value):
        reason = undefined
    elif blocks is not None:
        replicates = tuple(statistic(blocks.index != block) for block in range(len(blocks.sizes)))
        error = jackknife_error(value, replicates, blocks.sizes)
        if np.isnan(error):
            error, reason = None, "the value does not exist without some of the groups"
    return Measurement(
        name=name,
        value=value,
        standard_error=error,
        reason=None if error is not None else reason,
        direction=direction,
        n=len(features),
        d=features.shape[1],
        groups=None if blocks is None else blocks.groups,
        convention=convention,
        dtype=str(features.dtype).removeprefix("torch."),
        replicates=replicates,
        blocks=blocks,
    )
