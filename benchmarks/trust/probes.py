"""Probes of frozen features on the labels of a domain, on any device."""

from __future__ import annotations

import torch
from torch import Tensor

PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Penalties of the ridge regression, in units of the number of rows."""

BUDGETS = (20, 50, 100, 200, 500, 1000)
"""Numbers of labels of the small probes."""


def ridge_predictions(x: Tensor, y: Tensor, test: Tensor, *, seed: int = 0) -> Tensor:
    """Classes (M,) predicted by a ridge regression on indicators of the classes.

    The penalty with the highest accuracy on a random fifth of the rows is chosen, then all rows are fitted.

    Args:
        x: Features (N, D).
        y: Classes (N,).
        test: Features (M, D).
        seed: Seed of the fifth.
    """
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed)).to(x.device)
    inner, outer = order[len(x) // 5 :], order[: len(x) // 5]
    scores = _ridge_scores(x[inner], y[inner], x[outer], classes=int(y.max()) + 1)
    accuracy = (scores.argmax(2) == y[outer]).double().mean(1)
    best = int(accuracy.argmax())
    return _ridge_scores(x, y, test, classes=int(y.max()) + 1)[best].argmax(1)


def _ridge_scores(x: Tensor, y: Tensor, test: Tensor, *, classes: int) -> Tensor:
    """Scores (penalties, M, K); features are standardized by the rows of the fit, classes have equal weight."""
    x, mean, scale = _standardize(x)
    target = torch.nn.functional.one_hot(y, classes).double()
    weight = 1 / target.sum(0).clamp(min=1)[y]
    weight = weight * len(y) / weight.sum()
    center = (weight[:, None] * target).sum(0) / len(y)
    gram = (x * weight[:, None]).T @ x / len(x)
    cross = (x * weight[:, None]).T @ (target - center) / len(x)
    eye = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    penalized = gram + torch.tensor(PENALTIES, dtype=x.dtype, device=x.device)[:, None, None] * eye
    return (test.double() - mean) / scale @ torch.linalg.solve(penalized, cross.expand(len(PENALTIES), -1, -1)) + center


def _standardize(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x = x.double()
    scale, mean = torch.std_mean(x, 0, correction=0)
    scale = torch.where(scale > 0, scale, 1.0)
    return (x - mean) / scale, mean, scale


def balanced_accuracy(correct: Tensor, y: Tensor, groups: Tensor) -> tuple[float, float]:
    """Mean recall of the classes, and its delete-a-group jackknife error.

    Args:
        correct: Whether each row is predicted correctly, (N,).
        y: Classes (N,).
        groups: Group of each row (N,).
    """
    index = torch.unique(groups, return_inverse=True)[1]
    count, classes = int(index.max()) + 1, int(y.max()) + 1
    cell = index * classes + y
    rows = torch.bincount(cell, minlength=count * classes).view(count, classes).double()
    hits = torch.bincount(cell, weights=correct.double(), minlength=count * classes).view(count, classes)
    total_rows, total_hits = rows.sum(0), hits.sum(0)
    left = ((total_hits - hits) / (total_rows - rows).clamp(min=1)).mean(1)
    error = ((left - left.mean()).square().sum() * (count - 1) / count).sqrt()
    return float((total_hits / total_rows).mean()), float(error)


def knn_predictions(x: Tensor, y: Tensor, test: Tensor, *, k: int = 20) -> Tensor:
    """Classes (M,) by a vote of the k nearest rows by cosine."""
    unit = torch.nn.functional.normalize(x.float() - x.float().mean(0), dim=1)
    query = torch.nn.functional.normalize(test.float() - x.float().mean(0), dim=1)
    votes = [y[(part @ unit.T).topk(k, dim=1).indices] for part in query.split(1000)]
    return torch.cat(votes).mode(1).values


def few_label_accuracies(x: Tensor, y: Tensor, *, labels: int, draws: int) -> list[float]:
    """Accuracy that a probe on few labels estimates for itself, for each draw of labels.

    Ridge regression on standardized features with leave-one-out predictions in closed form,
    ŷ₋ᵢ = (ŷᵢ − hᵢ·yᵢ)/(1 − hᵢ). The penalty has the smallest leave-one-out error. Draws depend on the number of rows
    and their classes alone, so that all runs of a domain are compared on the same labels.

    Args:
        x: Features (N, D).
        y: Classes (N,).
        labels: Number of labels of a draw.
        draws: Number of draws.
    """
    generator = torch.Generator().manual_seed(labels)
    rows = torch.stack([torch.randperm(len(x), generator=generator)[:labels] for _ in range(draws)]).to(x.device)
    x, y = x[rows].double(), y[rows]
    scale, mean = torch.std_mean(x, 1, keepdim=True, correction=0)
    x = (x - mean) / torch.where(scale > 0, scale, 1.0)
    target = torch.nn.functional.one_hot(y, int(y.max()) + 1).double()
    target_mean = target.mean(1, keepdim=True)
    values, vectors = torch.linalg.eigh(x.transpose(1, 2) @ x / labels)
    rotated = x @ vectors
    best_error = torch.full((draws,), torch.inf, dtype=x.dtype, device=x.device)
    best = torch.zeros(draws, dtype=x.dtype, device=x.device)
    for penalty in PENALTIES:
        shrunk = rotated / (values.clamp(min=0) + penalty)[:, None, :] / labels
        fitted = shrunk @ (rotated.transpose(1, 2) @ (target - target_mean)) + target_mean
        leverage = (shrunk * rotated).sum(2, keepdim=True) + 1 / labels
        left_out = (fitted - leverage * target) / (1 - leverage).clamp(min=1e-9)
        error = (left_out - target).square().sum((1, 2))
        accuracy = (left_out.argmax(2) == y).double().mean(1)
        best = torch.where(error < best_error, accuracy, best)
        best_error = torch.minimum(error, best_error)
    return [float(value) for value in best]
