"""Linear discriminant on frozen features, and folds for cross-fitting; shared by the probes."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from repmetrics.functional.ids import factorize
from repmetrics.functional.linalg import gram

FOLDS = 5
SHRINKAGE_FLOOR = 1e-6
"""Smallest shrinkage: keeps the covariance of collapsed features, with eigenvalues of rounding size, invertible."""


def folds_of(labels: NDArray[np.int64], *, groups: Sequence[Hashable] | None = None, folds: int = FOLDS) -> Any:
    """Fold of each row, (N,): classes are spread evenly over folds, and a group is never split.

    Without groups, the rows of a class are assigned in a fixed shuffled order. With groups, the largest group is
    assigned first, and each group to the fold where it balances the classes most.

    Example:
        >>> folds_of(np.array([0, 1, 0, 1]), groups=["a", "a", "b", "b"]).tolist()
        [0, 0, 1, 1]
    """
    classes, target = np.unique(labels, return_inverse=True)
    if groups is None:
        fold = np.empty(len(target), dtype=np.int64)
        generator = np.random.default_rng(0)
        for c in range(len(classes)):
            rows = generator.permutation(np.flatnonzero(target == c))
            fold[rows] = (np.arange(len(rows)) + c) % folds
        return fold
    group_of_row = factorize(groups, key=str)[0].numpy()
    table = np.zeros((group_of_row.max() + 1, len(classes)))
    np.add.at(table, (group_of_row, target), 1)
    share = table / table.sum(0)
    filled = np.zeros((min(folds, len(table)), len(classes)))
    fold_of_group = np.empty(len(table), dtype=np.int64)
    for group in np.argsort(-share.sum(1), kind="stable"):
        unevenness = ((filled + share[group]) ** 2 - filled**2).sum(1)
        fold_of_group[group] = np.lexsort((filled.sum(1), unevenness))[0]  # ties: the emptiest fold
        filled[fold_of_group[group]] += share[group]
    return fold_of_group[group_of_row]


def cross_predict(rows: Tensor, target: NDArray[np.int64], fold: NDArray[np.int64]) -> NDArray[np.int64]:
    """Class of each row (N,), predicted by the discriminant of the rows of all other folds.

    Args:
        rows: Rows (N, D), float64; they are standardized by the training rows of each fold.
        target: Classes (N,).
        fold: Fold (N,) of each row.
    """
    predicted = np.empty_like(target)
    for k in np.unique(fold):
        test = torch.from_numpy(fold == k).to(rows.device)
        predicted[fold == k] = _fit_predict(rows[~test], target[fold != k], rows[test])
    return predicted


def _fit_predict(train: Tensor, target: NDArray[np.int64], test: Tensor) -> NDArray[np.int64]:
    classes, y = np.unique(target, return_inverse=True)
    scale, mean = torch.std_mean(train, 0, correction=0)
    scale = torch.where(scale == 0, 1.0, scale)
    weights, bias = discriminant((train - mean) / scale, torch.from_numpy(y).to(train.device))
    scores = (test - mean) / scale @ weights + bias
    predicted: NDArray[np.int64] = classes[scores.argmax(1).cpu().numpy()]
    return predicted


def discriminant(rows: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Weights (D, K) and biases (K,) of the linear discriminant with equal priors and a shrunk covariance.

    With S = RᵀR/n of the rows R about their class means and m = tr S/D, the covariance is (1 − a)·S + a·m·I and
    a = min(1, (Σ‖r‖⁴/n − ‖S‖²)/n ÷ (‖S‖² − D·m²)).

    Args:
        rows: Rows (n, D), float64.
        target: Classes (n,), 0 … K − 1, each at least once.
    """
    n, d = rows.shape
    counts = torch.bincount(target)
    means = rows.new_zeros(len(counts), d).index_add_(0, target, rows) / counts[:, None]
    within = rows - means[target]
    scatter = gram(within) / n
    level, square = scatter.trace() / d, scatter.square().sum()
    if level == 0:  # every row is its class mean: any covariance will do
        scatter, level, square = torch.eye(d, dtype=rows.dtype), rows.new_ones(()), rows.new_tensor(d)
    noise = (within.square().sum(1).square().mean() - square) / n
    spread = square - d * level**2
    shrinkage = 1.0 if noise >= spread else max(float(noise / spread), SHRINKAGE_FLOOR)
    covariance = (1 - shrinkage) * scatter
    covariance.diagonal().add_(shrinkage * level)
    weights = torch.cholesky_solve(means.T, torch.linalg.cholesky(covariance))
    return weights, -(means.T * weights).sum(0) / 2
