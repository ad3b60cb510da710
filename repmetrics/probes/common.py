"""What all probes share: folds over groups, class codes, balanced accuracy, the colour baseline."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from repmetrics.functional.checks import check_features
from repmetrics.measurement.jackknife import Blocks, jackknife_error
from repmetrics.measurement.result import NO_GROUPS, Measurement

PROBES = ("linear_probe", "knn")
"""Names of what this module measures."""


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
    blocks = None if groups is None else Blocks.from_groups(groups)
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
        direction="higher",
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
