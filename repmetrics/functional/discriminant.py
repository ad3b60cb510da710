"""Linear discriminant on frozen features, and folds for cross-fitting; shared by the probes."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from repmetrics.functional.ids import factorize
from repmetrics.functional.linalg import gram

FOLDS = 5
SHRINKAGE_FLOOR = 1e-6
"""Smallest shrinkage: keeps the covariance of collapsed features, with eigenvalues of rounding size, invertible."""

EXACT_ROWS = 1024
"""Number of rows below which each fold's covariance is summed from its rows, and not from Gram matrices of folds."""
CANCELLATION = 1e-4
"""It is also summed from rows if a column varies in a fold's training rows by less than this share of its variation:
the difference of two Gram matrices would lose eight of 16 digits."""


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
    classes, y = np.unique(target, return_inverse=True)
    labels, fold_of_row = torch.from_numpy(y).to(rows.device), torch.from_numpy(fold).to(rows.device)
    rows = rows - rows.mean(0)  # the sums below are differences: an offset would cancel in them
    spread = rows.std(0, correction=0)
    sums = [_Sums.of(rows[fold_of_row == k], labels[fold_of_row == k], classes=len(classes)) for k in np.unique(fold)]
    whole = _Sums(*(torch.stack(parts).sum(0) for parts in zip(*sums, strict=True)))
    predicted = np.empty_like(target)
    for k, part in zip(np.unique(fold), sums, strict=True):
        test = fold_of_row == k
        train = _Sums(*(all_ - without for all_, without in zip(whole, part, strict=True)))
        others = rows[~test]
        scale, mean = torch.std_mean(others, 0, correction=0)
        scale = torch.where(scale == 0, 1.0, scale)
        present = train.counts > 0
        position = present.cumsum(0) - 1  # of each class among those of the training rows
        of_class = position[labels[~test]]
        if len(rows) < EXACT_ROWS or bool((scale < CANCELLATION * spread).any()):
            z = (others - mean) / scale
            means = rows.new_zeros(int(present.sum()), rows.shape[1]).index_add_(0, of_class, z)
            means /= train.counts[present, None]
            within = z - means[of_class]
            scatter, norms = gram(within) / len(within), within.square().sum(1)
        else:
            means = (train.totals[present] / train.counts[present, None] - mean) / scale
            scatter = train.within(present) / scale / scale[:, None]
            norms = _norms_within(others, of_class, means * scale + mean, scale)
        weights, bias = discriminant(means, scatter, norms)
        scores = (rows[test] - mean) / scale @ weights + bias
        predicted[fold == k] = classes[present.cpu().numpy()][scores.argmax(1).cpu().numpy()]
    return predicted


class _Sums(NamedTuple):
    """Sums over rows: Gram matrix (D, D), total of each class (K, D), count of each class (K,)."""

    gram: Tensor
    totals: Tensor
    counts: Tensor

    @classmethod
    def of(cls, rows: Tensor, labels: Tensor, *, classes: int) -> _Sums:
        """Sums over rows (n, D)."""
        totals = rows.new_zeros(classes, rows.shape[1]).index_add_(0, labels, rows)
        return cls(gram(rows), totals, torch.bincount(labels, minlength=classes))

    def within(self, present: Tensor) -> Tensor:
        """RᵀR/n of the rows about the means of their classes."""
        totals = self.totals[present] / self.counts[present, None].sqrt()
        return (self.gram - totals.T @ totals) / self.counts.sum()


def _norms_within(rows: Tensor, labels: Tensor, means: Tensor, scale: Tensor) -> Tensor:
    """‖(x − μ_c)/scale‖² of each row, from products."""
    weight = scale.square().reciprocal()
    cross = (rows @ (means * weight).T).gather(1, labels[:, None])[:, 0]
    return (rows.square() @ weight - 2 * cross + (means.square() @ weight)[labels]).clamp_min(0)


def discriminant(means: Tensor, scatter: Tensor, norms: Tensor) -> tuple[Tensor, Tensor]:
    """Weights (D, K) and biases (K,) of the linear discriminant with equal priors and a shrunk covariance.

    With S = RᵀR/n of the rows R about their class means and m = tr S/D, the covariance is (1 − a)·S + a·m·I and
    a = min(1, (Σ‖r‖⁴/n − ‖S‖²)/n ÷ (‖S‖² − D·m²)).

    Args:
        means: (K, D) means of the classes, float64.
        scatter: S, (D, D).
        norms: ‖r‖² of each row, (n,).
    """
    d = len(scatter)
    level, square = scatter.trace() / d, scatter.square().sum()
    if level < 1e-12:  # of a variance of 1 in all: every row is its class mean, and any covariance will do
        scatter, level, square = torch.eye(d, dtype=means.dtype), means.new_ones(()), means.new_tensor(d)
    noise = (norms.square().mean() - square) / len(norms)
    spread = square - d * level**2
    shrinkage = 1.0 if noise >= spread else max(float(noise / spread), SHRINKAGE_FLOOR)
    covariance = (1 - shrinkage) * scatter
    covariance.diagonal().add_(shrinkage * level)
    weights = torch.cholesky_solve(means.T, torch.linalg.cholesky(covariance))
    return weights, -(means.T * weights).sum(0) / 2
