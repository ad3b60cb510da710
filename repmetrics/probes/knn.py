"""k-nearest-neighbor probe on frozen features."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from repmetrics.functional.clusters import evenly_spaced
from repmetrics.functional.ids import factorize
from repmetrics.functional.neighbors import MAX_ROWS
from repmetrics.measurement.blocks import Independent, declared_independent
from repmetrics.measurement.result import Measurement
from repmetrics.probes.common import check_inputs, probe_measurement

BLOCK_ROWS = 1024
"""Rows of the matrix of cosines computed at a time."""


def knn_probe(
    features: Tensor,
    labels: Tensor,
    *,
    groups: Sequence[Hashable] | Independent | None = None,
    k: int = 20,
    temperature: float = 0.07,
) -> Measurement:
    """Balanced accuracy of a vote of the k nearest rows of *other* groups, weighted by exp(cosine/temperature).

    The weights are those of Wu et al. 2018 and DINO. A row never votes for itself or for its group. Without groups,
    only the row itself is left out. Of more than 10 000 rows, as many at equal distances are used, and this is stated.

    Args:
        features: Features (N, D), floating; rows are normalized here, not centered.
        labels: Labels (N,), integers of at least two classes.
        groups: One id per row. "independent" declares that no two rows have a common source.
        k: Number of neighbors that vote.
        temperature: Temperature of the vote.

    Returns:
        ``knn`` in 0 … 1, higher is better.

    Raises:
        ValueError: Wrong shapes, one class, one group, or NaN or Inf.

    Example:
        >>> x = torch.randn(200, 4, generator=torch.Generator().manual_seed(0)) + 1
        >>> knn_probe(torch.cat([x, -x]), torch.arange(400) // 200).value > 0.9
        True
    """
    independent = declared_independent(groups)
    ids = None if independent else groups
    target = check_inputs(features, labels, ids)
    kept = evenly_spaced(len(target), MAX_ROWS)
    note = ""
    if len(kept) < len(target):
        note = f"{len(kept)} of {len(target)} rows, at equal distances in their order: the cost grows with the square"
        features, target = features[kept.to(features.device)], target[kept.numpy()]
        ids = None if ids is None else [ids[i] for i in kept.tolist()]
    codes = torch.arange(len(target)) if ids is None else factorize(ids)[0]
    predicted = _vote(features.detach(), torch.from_numpy(target), codes, k=k, temperature=temperature)
    folds = min(5, int(codes.max()) + 1)  # one group is left out at a time, but that correction is too small
    left_out = "the row itself" if ids is None else "its group"
    convention = f"balanced accuracy; k = {k}, cosine, weights exp(cos/{temperature:g}), {left_out} left out"
    declared = "independent" if independent else ids
    result = probe_measurement("knn", predicted, target, features, declared, folds=folds, convention=convention)
    return replace(result, warnings=(*result.warnings, note)) if note else result


def _vote(features: Tensor, target: Tensor, codes: Tensor, *, k: int, temperature: float) -> NDArray[np.int64]:
    """Class (N,) of each row by the vote of the rows with other codes."""
    codes, order = codes.sort(stable=True)  # the rows of a group are neighbors: a slice
    parts = (features[part].double() for part in order.to(features.device).split(BLOCK_ROWS))
    unit = torch.cat([normalize(rows, dim=1, eps=1e-300).float() for rows in parts])
    onehot, group = one_hot(target[order]).to(unit), codes.to(unit.device)
    in_group = torch.zeros(int(codes[-1]) + 1, onehot.shape[1]).to(unit).index_add_(0, group, onehot)
    ends, total = torch.bincount(codes).cumsum(0).tolist(), onehot.sum(0)
    votes = []
    for start in range(0, len(unit), BLOCK_ROWS):
        of_rows = group[start : start + BLOCK_ROWS]
        cosine = unit[start : start + BLOCK_ROWS] @ unit.T
        for code in range(int(of_rows[0]), int(of_rows[-1]) + 1):
            first, last = (ends[code - 1] if code else 0), ends[code]
            cosine[max(first - start, 0) : last - start, first:last] = -torch.inf
        nearest, index = cosine.topk(min(k, len(unit) - 1), dim=1)
        weight = ((nearest - nearest[:, :1]) / temperature).exp()  # the largest weight is 1: no overflow
        rows_of_class = total - in_group[of_rows]  # that may vote
        vote = (weight[..., None] * onehot[index]).sum(1) * total / rows_of_class.clamp_min(1)
        votes.append(vote.argmax(1).cpu())
    predicted = torch.empty_like(order)
    predicted[order] = torch.cat(votes)
    return predicted.numpy()
