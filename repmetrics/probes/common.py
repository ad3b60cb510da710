"""Input checks, balanced accuracy with its error, and the color baseline, shared by the probes."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from repmetrics.functional.checks import check_features
from repmetrics.functional.ids import check_ids, factorize
from repmetrics.measurement.blocks import INDEPENDENT_SAMPLES, Blocks, Independent, declared_independent
from repmetrics.measurement.jackknife import jackknife_error, margin
from repmetrics.measurement.result import NO_GROUPS, Measurement, each_its_own_group

MIN_GROUPS = 6
"""Fewest (equal) groups of a class with an error, unless every group has the class: ``benchmarks/coverage.py``."""


def color_statistics(images: Tensor) -> Tensor:
    """Mean and standard deviation of each channel, (B, 2·C) float32; (B, 0) if images are not (B, C, H, W).

    Features whose probe does not exceed a probe on these statistics encode no more about the labels than color does.

    Example:
        >>> color_statistics(torch.ones(2, 3, 4, 4))[0].tolist()
        [1.0, 1.0, 1.0, 0.0, 0.0, 0.0]
    """
    if images.ndim != 4:
        return torch.zeros(len(images), 0, device=images.device)
    std, mean = torch.std_mean(images.float(), dim=(2, 3), correction=0)
    return torch.cat([mean, std], dim=1)


def check_inputs(features: Tensor, labels: Tensor, groups: Sequence[Hashable] | None) -> NDArray[np.int64]:
    """Class index 0 … K − 1 of each row."""
    check_features(features, min_rows=2)
    if labels.shape != (len(features),):
        raise ValueError(f"labels must be ({len(features)},), one per row, got {tuple(labels.shape)}")
    if groups is not None and len(groups) != len(features):
        raise ValueError(f"groups must hold one id per row, got {len(groups)} for {len(features)} rows")
    if groups is not None:
        check_ids(groups, name="groups")
    classes, target = np.unique(labels.cpu().numpy(), return_inverse=True)
    if len(classes) < 2:
        raise ValueError(f"all {len(features)} labels are {classes[0]}: a probe needs at least two classes")
    if groups is not None and len(set(groups)) < 2:
        raise ValueError("all rows belong to one group: a probe is never tested on a group that it was fitted on")
    return target.astype(np.int64)


def _balanced_accuracy(correct: NDArray[np.bool_], target: NDArray[np.int64], classes: int) -> float:
    """Mean recall of the classes in float64; NaN if a class is absent, where torchmetrics gives a number."""
    counts = np.bincount(target, minlength=classes)
    if (counts == 0).any():
        return float("nan")
    return float((np.bincount(target, weights=correct, minlength=classes) / counts).mean())


def _without_blocks(
    correct: NDArray[np.bool_], target: NDArray[np.int64], block: NDArray[np.int64], *, classes: int
) -> list[float]:
    """:func:`_balanced_accuracy` of the rows outside of each block."""
    cell, shape = block * classes + target, (int(block.max()) + 1, classes)
    counts = np.bincount(cell, minlength=shape[0] * classes).reshape(shape)
    hits = np.bincount(cell, weights=correct, minlength=shape[0] * classes).reshape(shape)
    left = counts.sum(0) - counts
    recalls = np.divide(hits.sum(0) - hits, left, out=np.full(shape, np.nan), where=left > 0)
    accuracies: list[float] = recalls.mean(1).tolist()
    return accuracies


def probe_measurement(
    name: str,
    predicted: NDArray[np.int64],
    target: NDArray[np.int64],
    features: Tensor,
    groups: Sequence[Hashable] | Independent | None,
    *,
    folds: int,
    convention: str,
) -> Measurement:
    """Balanced accuracy of a cross-fitted probe's predictions, with its jackknife error over groups.

    The models of different folds share most of their training rows, so predictions of different folds depend on one
    another. The jackknife of the predictions lacks this part, which is about half of the variance where features carry
    little of the labels. With J folds, Nadeau and Bengio's correction multiplies the variance by 1 + J·n_test/n_train.

    Args:
        name: Name of the measurement.
        predicted: Predicted classes (N,).
        target: Classes (N,).
        features: Features (N, D).
        groups: One id per row, None, or "independent".
        folds: Number J of folds. A probe that leaves out one group at a time has as many as groups.
        convention: Definition of the probe, for the record.

    Source:
        Nadeau & Bengio 2003, "Inference for the generalization error".
    """
    classes = int(target.max()) + 1
    correct = predicted == target
    value = _balanced_accuracy(correct, target, classes)
    error: float | None = None
    half_width: float | None = None
    replicates: tuple[float, ...] | None = None
    independent = declared_independent(groups)
    ids = None if independent else groups
    if independent:
        blocks: Blocks | None = Blocks.from_independent(range(len(target)))
    else:
        blocks = None if ids is None else Blocks.from_groups(ids)
    reason: str | None = NO_GROUPS
    if blocks is not None and not independent and blocks.groups == len(target):
        reason = each_its_own_group(len(target))
    elif blocks is not None:
        reason = _no_error(target, ids)
    if blocks is not None and reason is None:
        without = _without_blocks(correct, target, blocks.index.numpy(), classes=classes)
        stretch = math.sqrt(1 + folds / (folds - 1))  # n_test/n_train = 1/(J − 1)
        replicates = tuple(value + stretch * (accuracy - value) for accuracy in without)
        error, half_width = jackknife_error(value, replicates, blocks.sizes), margin(value, replicates, blocks)
        if np.isnan(error):
            error, half_width = None, None
            reason = "a class occurs in one block of groups only: there is no accuracy without it"
    return Measurement(
        name=name,
        value=value,
        standard_error=error,
        reason=reason,
        direction="higher",
        n=len(target),
        d=features.shape[1],
        groups=None if blocks is None else blocks.groups,
        convention=convention,
        dtype=str(features.dtype).removeprefix("torch."),
        warnings=(*_warnings(target, ids), *[INDEPENDENT_SAMPLES] * independent),
        details={"accuracy": float(correct.mean()), "chance": 1 / classes, "classes": classes},
        margin=half_width,
        degrees_of_freedom=None if half_width is None or blocks is None else blocks.degrees_of_freedom,
        replicates=replicates,
        blocks=blocks,
    )


def _units(target: NDArray[np.int64], groups: Sequence[Hashable] | None) -> NDArray[np.int64]:
    """Rows of each class (first axis) in each group, or in each row without groups."""
    unit = np.arange(len(target)) if groups is None else factorize(groups)[0].numpy()
    table = np.zeros((target.max() + 1, unit.max() + 1), dtype=np.int64)
    np.add.at(table, (target, unit), 1)
    return table


def _no_error(target: NDArray[np.int64], groups: Sequence[Hashable] | None) -> str | None:
    """Reason why no error holds: a class that few groups have. Without one of them, the others lean to the rest."""
    table = _units(target, groups)
    occurs = (table > 0).sum(1)
    equal = table.sum(1) ** 2 / (table**2).sum(1)  # groups of equal size that would be as concentrated
    few = np.flatnonzero((equal < MIN_GROUPS) & (occurs < table.shape[1]))
    if not len(few):
        return None
    return (
        f"class number {few[0]} occurs in {occurs[few[0]]} of {table.shape[1]} groups, as good as "
        f"{equal[few[0]]:.1f} equal ones: below {MIN_GROUPS} no error holds, and noise may score below chance"
    )


def _warnings(target: NDArray[np.int64], groups: Sequence[Hashable] | None) -> tuple[str, ...]:
    occurs = (_units(target, groups) > 0).sum(1)
    unit = "row" if groups is None else "group"
    alone = np.flatnonzero(occurs < 2)
    return tuple(f"class number {c} occurs in one {unit} only: it can never be predicted there" for c in alone)
