"""k-nearest-neighbor probe on frozen features."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from repmetrics.functional.ids import factorize
from repmetrics.measurement.result import Measurement
from repmetrics.probes.common import check_inputs, probe_measurement


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
    only the row itself is left out.

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
    unit = torch.nn.functional.normalize(features.detach().double(), dim=1, eps=1e-300).float()
    group = (torch.arange(len(target)) if groups is None else factorize(groups)[0]).to(unit.device)
    onehot = torch.nn.functional.one_hot(torch.from_numpy(target)).to(unit)
    in_group = torch.zeros(int(group.max()) + 1, onehot.shape[1]).to(unit).index_add_(0, group, onehot)
    total = onehot.sum(0)
    votes = []
    for start in range(0, len(unit), 1024):
        cosine = unit[start : start + 1024] @ unit.T
        cosine[group[start : start + 1024, None] == group] = -torch.inf
        nearest, index = cosine.topk(min(k, len(unit) - 1), dim=1)
        weight = ((nearest - nearest[:, :1]) / temperature).exp()  # the largest weight is 1: no overflow
        rows_of_class = total - in_group[group[start : start + 1024]]  # that may vote
        vote = (weight[..., None] * onehot[index]).sum(1) * total / rows_of_class.clamp_min(1)
        votes.append(vote.argmax(1).cpu())
    predicted = torch.cat(votes).numpy()
    folds = min(5, len(group.unique()))  # one group is left out at a time, but that correction is too small
    left_out = "the row itself" if groups is None else "its group"
    convention = f"balanced accuracy; k = {k}, cosine, weights exp(cos/{temperature:g}), {left_out} left out"
    return probe_measurement("knn", predicted, target, features, groups, folds=folds, convention=convention)
