"""Linear discriminant on frozen features, and folds for cross-fitting; shared by the probes."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from repmetrics.functional.ids import factorize
from repmetrics.functional.linalg import (
    BLOCK_ROWS,
    add_gram,
    column_mean,
    gram,
    row_blocks,
    single_torch_thread,
    solve_positive,
)

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
        rows: Rows (N, D), floating; they are standardized by the training rows of each fold, in float64.
        target: Classes (N,).
        fold: Fold (N,) of each row.
    """
    return FoldSums(rows, target, fold).predict()


class FoldSums:
    """Sums over the rows of each fold and of each class, about a point near the mean, for cross-fitted discriminants.

    The Gram matrices of the folds are summed once. Those of the training rows are their differences. Further passes
    over the rows take a few products each, in blocks: there is no float64 copy of the rows.

    Args:
        rows: Rows (N, D), floating.
        target: Classes (N,).
        fold: Fold (N,) of each row.

    Attributes:
        origin: (D,) point about which the rows are summed.
        total: (D,) sum of all rows about it.
        gram: Gram matrix (D, D) of all rows about it, its lower triangle.
    """

    def __init__(self, rows: Tensor, target: NDArray[np.int64], fold: NDArray[np.int64]) -> None:
        self._classes, y = np.unique(target, return_inverse=True)
        self._target = target
        with single_torch_thread():
            self._data = _Labeled.center(rows, torch.from_numpy(y).to(rows.device))
            self._folds = [torch.from_numpy(np.flatnonzero(fold == k)).to(rows.device) for k in np.unique(fold)]
            self._parts = [_Sums.of(self._data, index, len(self._classes)) for index in self._folds]
            self._whole = _Sums(*(_total(parts) for parts in zip(*self._parts, strict=True)))
        self.origin, self.total, self.gram = self._data.origin, self._whole.totals.sum(0), self._whole.gram

    def predict(self) -> NDArray[np.int64]:
        """Class of each row (N,) by the discriminant without its fold. The sums of the folds are overwritten."""
        predicted = np.empty_like(self._target)
        with single_torch_thread():
            discriminants = _discriminants(self._data, self._folds, self._parts, self._whole)
            for index, (weights, bias, present) in zip(self._folds, discriminants, strict=True):
                best = [(block @ weights + bias).argmax(1) for block, _ in self._data.blocks(index)]
                classes = self._classes[present.cpu().numpy()]
                predicted[index.cpu().numpy()] = classes[torch.cat(best).cpu().numpy()]
        return predicted


class _Labeled(NamedTuple):
    """Rows (N, D) with their classes (N,) and a point (D,) near their mean, about which they are summed."""

    rows: Tensor
    labels: Tensor
    origin: Tensor

    @classmethod
    def center(cls, rows: Tensor, labels: Tensor) -> _Labeled:
        """The origin is the mean, and the value itself of a constant column, which then is exactly 0."""
        rows, origin = rows.detach(), column_mean(rows)
        constant = torch.stack([(block == rows[0]).all(0) for block in row_blocks(rows)]).all(0)
        return cls(rows, labels, torch.where(constant, rows[0].to(torch.float64), origin))

    def blocks(self, index: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the rows at these positions about the origin, in float64, with their classes, block by block."""
        for part in index.split(BLOCK_ROWS):
            yield self.rows[part].to(torch.float64).sub_(self.origin), self.labels[part]


class _Sums(NamedTuple):
    """Sums over rows: Gram matrix (D, D), its lower triangle; total of each class (K, D); count of each class (K,)."""

    gram: Tensor
    totals: Tensor
    counts: Tensor

    @classmethod
    def of(cls, data: _Labeled, index: Tensor, classes: int) -> _Sums:
        """Sums over the rows at these positions."""
        d, zeros = data.rows.shape[1], data.origin.new_zeros
        sums = cls(zeros(d, d), zeros(classes, d), torch.bincount(data.labels[index], minlength=classes))
        for rows, labels in data.blocks(index):
            add_gram(sums.gram, rows)
            sums.totals.index_add_(0, labels, rows)
        return sums

    @property
    def mean(self) -> Tensor:
        """(D,) mean row."""
        return self.totals.sum(0) / self.counts.sum()

    @property
    def deviations(self) -> Tensor:
        """(D,) standard deviations of the columns."""
        return (self.gram.diagonal() / self.counts.sum() - self.mean.square()).clamp_min(0).sqrt()


def _discriminants(
    data: _Labeled, folds: list[Tensor], sums: list[_Sums], whole: _Sums
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield the discriminant without each fold: weights and biases of rows about the origin; which classes it has."""
    spread = whole.deviations
    training = [  # in the place of the folds' sums: no further D×D matrices
        _Sums(torch.sub(whole.gram, each.gram, out=each.gram), whole.totals - each.totals, whole.counts - each.counts)
        for each in sums
    ]
    few = len(data.rows) < EXACT_ROWS
    exact = [few or bool((train.deviations < CANCELLATION * spread).any()) for train in training]
    norm4 = None if all(exact) else _sums_of_norm4(data, folds, training)
    for k, train in enumerate(training):
        present = train.counts > 0
        if exact[k] or norm4 is None:
            others = torch.cat([index for other, index in enumerate(folds) if other != k])
            mean, scale, means, scatter, norm4_mean = _standardized_from_rows(data, others, present)
        else:
            mean, scale = train.mean, _nonzero(train.deviations)
            means = (train.totals[present] / train.counts[present, None] - mean) / scale
            scatter, norm4_mean = _scatter_within(train, scale), norm4[k] / train.counts.sum()
        weights, bias = discriminant(means, scatter, norm4_mean, n=int(train.counts.sum()))
        weights = weights / scale[:, None]
        yield weights, bias - mean @ weights, present


def _total(parts: Sequence[Tensor]) -> Tensor:
    total = parts[0].clone()
    for part in parts[1:]:
        total += part
    return total


def _nonzero(deviations: Tensor) -> Tensor:
    return torch.where(deviations == 0, 1.0, deviations)


def _standardized_from_rows(
    data: _Labeled, index: Tensor, present: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Mean and deviations of the rows at these positions; once standardized, class means, scatter, mean of ‖r‖⁴."""
    rows, labels = (torch.cat(parts) for parts in zip(*data.blocks(index), strict=True))
    scale, mean = torch.std_mean(rows, 0, correction=0)
    scale = _nonzero(scale)
    of_class = (present.cumsum(0) - 1)[labels]  # position of the class among those present
    z = (rows - mean) / scale
    means = z.new_zeros(int(present.sum()), z.shape[1]).index_add_(0, of_class, z)
    means /= torch.bincount(of_class)[:, None]
    within = z - means[of_class]
    return mean, scale, means, gram(within) / len(within), within.square().sum(1).square().mean()


def _scatter_within(train: _Sums, scale: Tensor) -> Tensor:
    """RᵀR/n of the standardized rows about the means of their classes, in the place of the Gram matrix."""
    totals = train.totals / train.counts.clamp_min(1)[:, None].sqrt()
    columns = scale.reciprocal()
    return train.gram.addmm_(totals.T, totals, alpha=-1).mul_(columns / train.counts.sum()).mul_(columns[:, None])


def _sums_of_norm4(data: _Labeled, folds: list[Tensor], training: list[_Sums]) -> Tensor:
    """Σ‖r‖⁴ of the standardized training rows about the means of their classes, for each fold, from products."""
    total = data.origin.new_zeros(len(folds))
    means = torch.stack([train.totals / train.counts.clamp_min(1)[:, None] for train in training])  # (F, K, D)
    weights = torch.stack([_nonzero(train.deviations).square().reciprocal() for train in training])  # (F, D)
    constants = torch.einsum("fkd,fd->fk", means.square(), weights)
    weighted = (means * weights[:, None]).flatten(0, 1).T  # (D, F·K)
    for fold, index in enumerate(folds):
        others = torch.arange(len(folds), device=total.device) != fold
        for rows, labels in data.blocks(index):
            cross = (rows @ weighted).unflatten(1, constants.shape)
            of_class = labels[:, None, None].expand(-1, len(folds), 1)
            norms = rows.square_() @ weights.T - 2 * cross.gather(2, of_class)[..., 0] + constants.T[labels]
            total += norms.clamp_min_(0).square_().sum(0) * others
    return total


def discriminant(means: Tensor, scatter: Tensor, norm4: Tensor, *, n: int) -> tuple[Tensor, Tensor]:
    """Weights (D, K) and biases (K,) of the linear discriminant with equal priors and a shrunk covariance.

    With S = RᵀR/n of the rows R about their class means and m = tr S/D, the covariance is (1 − a)·S + a·m·I and
    a = min(1, (Σ‖r‖⁴/n − ‖S‖²)/n ÷ (‖S‖² − D·m²)).

    Args:
        means: (K, D) means of the classes, float64.
        scatter: S, (D, D), of which the lower triangle is read; overwritten.
        norm4: Mean of ‖r‖⁴ over the rows.
        n: Number of rows.
    """
    d = len(scatter)
    scatter.tril_()
    level = scatter.trace() / d
    square = 2 * torch.linalg.vector_norm(scatter).square() - scatter.diagonal().square().sum()
    if level < 1e-12:  # of a variance of 1 in all: every row is its class mean, and any covariance will do
        scatter, level, square = torch.eye(d).to(means), means.new_ones(()), means.new_tensor(d)
    noise = (norm4 - square) / n
    spread = square - d * level**2
    shrinkage = 1.0 if noise >= spread else max(float(noise / spread), SHRINKAGE_FLOOR)
    covariance = scatter.mul_(1 - shrinkage)
    covariance.diagonal().add_(shrinkage * level)
    weights = solve_positive(covariance, means.T)
    return weights, -(means.T * weights).sum(0) / 2
