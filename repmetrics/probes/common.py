"""Input checks, balanced accuracy with its error, and the color baseline, shared by the probes."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from repmetrics.functional.checks import check_features
from repmetrics.functional.ids import check_ids, factorize
from repmetrics.measurement.jackknife import Blocks, jackknife_error
from repmetrics.measurement.result import NO_GROUPS, Measurement, each_its_own_group

PROBES = ("linear_probe", "knn")
"""Names of the probes' measurements."""


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


def probe_measurement(
    name: str,
    predicted: NDArray[np.int64],
    target: NDArray[np.int64],
    features: Tensor,
    groups: Sequence[Hashable] | None,
    *,
    convention: str,
) -> Measurement:
    """Balanced accuracy of a probe's predictions, with its jackknife error over groups."""
    classes = int(target.max()) + 1
    correct = predicted == target
    value = _balanced_accuracy(correct, target, classes)
    error: float | None = None
    reason: str | None = NO_GROUPS
    replicates: tuple[float, ...] | None = None
    blocks = None if groups is None else Blocks.from_groups(groups)
    if blocks is not None and blocks.groups == len(target):
        reason = each_its_own_group(len(target))
    elif blocks is not None:
        block = blocks.index.numpy()
        replicates = tuple(
            _balanced_accuracy(correct[block != b], target[block != b], classes) for b in range(len(blocks.sizes))
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
    units = np.arange(len(target)) if groups is None else factorize(groups)[0].numpy()
    alone = [c for c in range(target.max() + 1) if len(np.unique(units[target == c])) < 2]
    unit = "row" if groups is None else "group"
    return tuple(f"class number {c} occurs in one {unit} only: it can never be predicted there" for c in alone)
