"""How well labels can be read off frozen features: a cross-fitted linear probe and a k-nearest-neighbours vote."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from repmetrics.functional.gram import check_features, gram
from repmetrics.jackknife import Blocks, jackknife_error
from repmetrics.measurement import NO_GROUPS, Measurement

FOLDS = 5

PROBES = ("linear_probe", "knn")
"""Names of what this module measures."""

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


def knn_probe(
    features: Tensor,
    labels: Tensor,
    *,
    groups: Sequence[Hashable] | None = None,
    k: int = 20,
    temperature: float = 0.07,
) -> Measurement:
    """Balanced accuracy of a vote of the k nearest rows of *other* groups, weighted by exp(cosine/temperature).

    The weighting is that of Wu et al. 2018 and DINO. A row never votes for itself, nor for its group. Without
    groups, only the row itself is left out.

    Args:
        features: (N, D), floating; rows are normalised here, not centred.
        labels: (N,) integers, at least two classes.
        groups: one id a row.
        k: neighbours asked.
        temperature: of the vote.

    Returns:
        ``knn`` in 0 … 1, higher is better.

    Raises:
        ValueError: as :func:`linear_probe`.

    Example:
        >>> x = torch.randn(200, 4, generator=torch.Generator().manual_seed(0)) + 1
        >>> knn_probe(torch.cat([x, -x]), torch.arange(400) // 200).value > 0.9
        True
    """
    target = _checked(features, labels, groups)
    unit = torch.nn.functional.normalize(features.detach().float(), dim=1)
    owner = _codes(range(len(target)) if groups is None else groups).to(unit.device)
    onehot = torch.nn.functional.one_hot(torch.from_numpy(target)).to(unit)
    votes = []
    for start in range(0, len(unit), 1024):
        cosine = unit[start : start + 1024] @ unit.T
        cosine[owner[start : start + 1024, None] == owner] = -torch.inf
        nearest, index = cosine.topk(min(k, len(unit) - 1), dim=1)
        weight = ((nearest - nearest[:, :1]) / temperature).exp()  # the largest weight is 1: no overflow
        votes.append((weight[..., None] * onehot[index]).sum(1).argmax(1).cpu())
    predicted = torch.cat(votes).numpy()
    left_out = "the row itself" if groups is None else "its group"
    convention = f"balanced accuracy; k = {k}, cosine, weights exp(cos/{temperature:g}), {left_out} left out"
    return _measurement("knn", predicted, target, features, groups, convention=convention)


def colour_statistics(images: Tensor) -> Tensor:
    """Mean and standard deviation of each channel, (B, 2·C) float32; (B, 0) where images are not (B, C, H, W).

    A probe on features that does not beat a probe on these has learnt nothing that colour does not show.

    Example:
        >>> colour_statistics(torch.ones(2, 3, 4, 4))[0].tolist()
        [1.0, 1.0, 1.0, 0.0, 0.0, 0.0]
    """
    if images.ndim != 4:
        return torch.zeros(len(images), 0, device=images.device)
    std, mean = torch.std_mean(images.float(), dim=(2, 3), correction=0)
    return torch.cat([mean, std], dim=1)


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


def _codes(groups: Sequence[Hashable]) -> Tensor:
    names = {name: i for i, name in enumerate(sorted(set(groups), key=str))}
    return torch.tensor([names[group] for group in groups])


def _checked(features: Tensor, labels: Tensor, groups: Sequence[Hashable] | None) -> NDArray[np.int64]:
    check_features(features, min_rows=2)
    if labels.shape != (len(features),):
        raise ValueError(f"labels must be ({len(features)},), one a row, got {tuple(labels.shape)}")
    if groups is not None and len(groups) != len(features):
        raise ValueError(f"groups must hold one id a row, got {len(groups)} for {len(features)} rows")
    classes, target = np.unique(labels.cpu().numpy(), return_inverse=True)
    if len(classes) < 2:
        raise ValueError(f"all {len(features)} labels are {classes[0]}: a probe needs at least two classes")
    if groups is not None and len(set(groups)) < 2:
        raise ValueError("all rows belong to one group: a probe is never tested on a group that it was fitted on")
    return target.astype(np.int64)


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


def _balanced_accuracy(correct: NDArray[np.bool_], target: NDArray[np.int64], classes: int) -> float:
    counts = np.bincount(target, minlength=classes)
    if (counts == 0).any():
        return float("nan")
    return float((np.bincount(target, weights=correct, minlength=classes) / counts).mean())


def _measurement(
    name: str,
    predicted: NDArray[np.int64],
    target: NDArray[np.int64],
    features: Tensor,
    groups: Sequence[Hashable] | None,
    *,
    convention: str,
) -> Measurement:
    classes = int(target.max()) + 1
    correct = predicted == target
    value = _balanced_accuracy(correct, target, classes)
    error: float | None = None
    reason: str | None = NO_GROUPS
    replicates: tuple[float, ...] | None = None
    blocks = None if groups is None else Blocks.deal(groups)
    if blocks is not None:
        home = blocks.index.numpy()
        replicates = tuple(
            _balanced_accuracy(correct[home != b], target[home != b], classes) for b in range(len(blocks.sizes))
        )
        error, reason = jackknife_error(value, replicates, blocks.sizes), None
        if np.isnan(error):
            error, reason = None, "a class occurs in one block of groups only: there is no accuracy without it"
    return Measurement(
        name=name,
        value=value,
        standard_error=error,
        reason=reason,
        better="higher",
        n=len(target),
        d=features.shape[1],
        groups=None if blocks is None else blocks.groups,
        convention=convention,
        dtype=str(features.dtype).removeprefix("torch."),
        warnings=_warnings(target, groups),
        details={"accuracy": float(correct.mean()), "chance": 1 / classes, "classes": classes},
        replicates=replicates,
        blocks=blocks,
    )


def _warnings(target: NDArray[np.int64], groups: Sequence[Hashable] | None) -> tuple[str, ...]:
    owners = _codes(range(len(target)) if groups is None else groups).numpy()
    alone = [c for c in range(target.max() + 1) if len(np.unique(owners[target == c])) < 2]
    unit = "row" if groups is None else "group"
    return tuple(f"class number {c} occurs in one {unit} only: it can never be predicted there" for c in alone)
