"""How well labels can be read off frozen features: a cross-fitted linear probe and a k-nearest-neighbours vote."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from repmetrics.functional.linalg import gram
from repmetrics.measurement.result import Measurement
from repmetrics.probes.common import _checked, _codes, _measurement

FOLDS = 5


SHRINKAGE_FLOOR = 1e-6
"""Keeps the covariance of collapsed features, whose small eigenvalues are rounding, invertible."""


def linear_probe(
    features: Tensor, labels: Tensor, *, groups: Sequence[Hashable] | None = None, folds: int = FOLDS
) -> Measurement:
    r"""Balanced accuracy of a linear discriminant on frozen features, cross-fitted.

    Every row is predicted once, by a model that saw neither it nor any row of its group: the class c with the largest
    μ_cᵀW⁻¹z − ½·μ_cᵀW⁻¹μ_c, where z is standardised by the training rows, μ_c are their class means and W is their
    covariance within classes, shrunk to a multiple of the identity by Ledoit and Wolf's closed form, in float64.
    Classes have equal weight whatever their size. There is nothing to tune and nothing to converge.

    The standard error is a delete-a-group jackknife over the predictions; it does not hold the variance from
    refitting the model.

    Args:
        features: (N, D), floating.
        labels: (N,) integers, at least two classes.
        groups: one id a row (slide, patient); a group is never split between training and test.
        folds: at most so many; fewer where there are fewer groups.

    Returns:
        ``linear_probe`` in 0 … 1, higher is better; ``details`` hold plain ``accuracy``, ``chance`` and ``classes``.

    Raises:
        ValueError: wrong shapes, one class, one group, NaN or Inf.

    Source:
        Ledoit & Wolf 2004, "A well-conditioned estimator for large-dimensional covariance matrices".

    Example:
        >>> x = torch.randn(200, 4, generator=torch.Generator().manual_seed(0))
        >>> linear_probe(x, (x[:, 0] > 0).long()).value > 0.95
        True
    """
    target = _checked(features, labels, groups)
    fold = folds_of(target, groups=groups, folds=folds)
    rows = features.detach().to("cpu", torch.float64)
    predicted = np.empty_like(target)
    for k in np.unique(fold):
        test = torch.from_numpy(fold == k)
        predicted[fold == k] = _fit_predict(rows[~test], target[fold != k], rows[test])
    held = "a group is never split" if groups is not None else "stratified by label"
    return _measurement(
        "linear_probe",
        predicted,
        target,
        features,
        groups,
        convention=f"balanced accuracy; shrunk linear discriminant, {len(np.unique(fold))} folds, {held}",
    )


def folds_of(labels: NDArray[np.int64], *, groups: Sequence[Hashable] | None = None, folds: int = FOLDS) -> Any:
    """Fold of each row, (N,): classes spread evenly over folds, a group never split.

    Without groups, the rows of a class are dealt in a fixed shuffled order. With groups, the largest group goes
    first, each into the fold where it evens out the classes most.

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
    owner = _codes(groups).numpy()
    table = np.zeros((owner.max() + 1, len(classes)))
    np.add.at(table, (owner, target), 1)
    share = table / table.sum(0)
    filled = np.zeros((min(folds, len(table)), len(classes)))
    home = np.empty(len(table), dtype=np.int64)
    for group in np.argsort(-share.sum(1), kind="stable"):
        unevenness = ((filled + share[group]) ** 2 - filled**2).sum(1)
        home[group] = np.lexsort((filled.sum(1), unevenness))[0]  # ties go to the emptiest fold
        filled[home[group]] += share[group]
    return home[owner]


def _fit_predict(train: Tensor, target: NDArray[np.int64], test: Tensor) -> NDArray[np.int64]:
    classes, y = np.unique(target, return_inverse=True)
    scale, mean = torch.std_mean(train, 0, correction=0)
    scale = torch.where(scale == 0, 1.0, scale)
    weights, bias = discriminant((train - mean) / scale, torch.from_numpy(y))
    scores = (test - mean) / scale @ weights + bias
    predicted: NDArray[np.int64] = classes[scores.argmax(1).numpy()]
    return predicted


def discriminant(rows: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Weights (D, K) and biases (K,) of the linear discriminant with equal priors and a shrunk covariance.

    With S = RᵀR/n of the rows R about their class means and m = tr S/D, the covariance is (1 − a)·S + a·m·I and
    a = min(1, (Σ‖r‖⁴/n − ‖S‖²)/n ÷ (‖S‖² − D·m²)).

    Args:
        rows: (n, D) float64.
        target: (n,) classes 0 … K − 1, each at least once.
    """
    n, d = rows.shape
    counts = torch.bincount(target)
    means = rows.new_zeros(len(counts), d).index_add_(0, target, rows) / counts[:, None]
    within = rows - means[target]
    scatter = gram(within) / n
    level, square = scatter.trace() / d, scatter.square().sum()
    if level == 0:  # every row is its class mean: any covariance serves
        scatter, level, square = torch.eye(d, dtype=rows.dtype), rows.new_ones(()), rows.new_tensor(d)
    noise = (within.square().sum(1).square().mean() - square) / n
    spread = square - d * level**2
    shrinkage = 1.0 if noise >= spread else max(float(noise / spread), SHRINKAGE_FLOOR)
    covariance = (1 - shrinkage) * scatter
    covariance.diagonal().add_(shrinkage * level)
    weights = torch.cholesky_solve(means.T, torch.linalg.cholesky(covariance))
    return weights, -(means.T * weights).sum(0) / 2
