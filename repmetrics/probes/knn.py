"""k-nearest-neighbor probe on frozen features."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from repmetrics.functional.clusters import evenly_spaced
from repmetrics.functional.ids import factorize
from repmetrics.functional.linalg import float64_blocks
from repmetrics.functional.neighbors import MAX_ROWS
from repmetrics.measurement.result import Measurement
from repmetrics.probes.common import check_inputs, probe_measurement

PART = 64
"""Columns of a part in :func:`largest`."""


def knn_probe(
    features: Tensor,
    labels: Tensor,
    *,
    groups: Sequence[Hashable] | None = None,
    k: int = 20,
    temperature: float = 0.07,
) -> Measurement:
    """Balanced accuracy of a vote of the k nearest rows of *other* groups, weighted by exp(cosine/temperature).

    The weights are those of Wu et al. 2018 and DINO. A row never votes for itself or for its group. Without groups,
    only the row itself is left out. Of more than 10 000 rows, as many at equal distances are used, and this is stated.

    Args:
        features: Features (N, D), floating; rows are normalized here, not centered.
        labels: Labels (N,), integers of at least two classes.
        groups: One id per row.
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
    target = check_inputs(features, labels, groups)
    kept = evenly_spaced(len(target), MAX_ROWS)
    note = ""
    if len(kept) < len(target):
        note = f"{len(kept)} of {len(target)} rows, at equal distances in their order: the cost grows with the square"
        features, target = features[kept.to(features.device)], target[kept.numpy()]
        groups = None if groups is None else [groups[i] for i in kept.tolist()]
    unit = torch.cat([normalize(rows, dim=1, eps=1e-300).float() for rows in float64_blocks(features)])
    group = (torch.arange(len(target)) if groups is None else factorize(groups)[0]).to(unit.device, torch.int32)
    onehot = one_hot(torch.from_numpy(target)).to(unit)
    in_group = torch.zeros(int(group.max()) + 1, onehot.shape[1]).to(unit).index_add_(0, group, onehot)
    total = onehot.sum(0)
    votes = []
    for start in range(0, len(unit), 1024):
        cosine = unit[start : start + 1024] @ unit.T
        cosine.masked_fill_(group[start : start + 1024, None] == group, -torch.inf)
        nearest, index = largest(cosine, min(k, len(unit) - 1))
        weight = ((nearest - nearest[:, :1]) / temperature).exp()  # the largest weight is 1: no overflow
        rows_of_class = total - in_group[group[start : start + 1024].long()]  # that may vote
        vote = (weight[..., None] * onehot[index]).sum(1) * total / rows_of_class.clamp_min(1)
        votes.append(vote.argmax(1).cpu())
    predicted = torch.cat(votes).numpy()
    folds = min(5, len(group.unique()))  # one group is left out at a time, but that correction is too small
    left_out = "the row itself" if groups is None else "its group"
    convention = f"balanced accuracy; k = {k}, cosine, weights exp(cos/{temperature:g}), {left_out} left out"
    result = probe_measurement("knn", predicted, target, features, groups, folds=folds, convention=convention)
    return replace(result, warnings=(*result.warnings, note)) if note else result


def largest(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest values of each row (B, N), largest first, and their columns; as ``topk``, which takes longer.

    The columns are divided into parts. The k largest values lie in the k parts with the largest maxima.

    Example:
        >>> largest(torch.tensor([[1.0, 3.0, 2.0]]), 2)
        (tensor([[3., 2.]]), tensor([[1, 2]]))
    """
    rows, columns = values.shape
    parts = columns // PART
    if parts <= 2 * k:
        direct = values.topk(k, dim=1)
        return direct.values, direct.indices
    divided = values[:, : parts * PART].unflatten(1, (PART, parts))  # column p·parts + j is in part j
    best = divided.amax(1).topk(k, dim=1, sorted=False).indices
    inside = best + parts * torch.arange(PART, device=values.device)[:, None, None]  # (PART, B, k)
    rest = torch.arange(parts * PART, columns, device=values.device).expand(rows, -1)
    candidates = torch.cat([inside.transpose(0, 1).flatten(1), rest], 1)
    found = values.gather(1, candidates).topk(k, dim=1)
    return found.values, candidates.gather(1, found.indices)
