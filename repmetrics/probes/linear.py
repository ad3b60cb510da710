"""Cross-fitted linear probe on frozen features."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
from torch import Tensor

from repmetrics.functional.discriminant import FOLDS, FoldSums, folds_of
from repmetrics.measurement.blocks import Independent, declared_independent
from repmetrics.measurement.moments import Moments
from repmetrics.measurement.result import Measurement
from repmetrics.probes.common import check_inputs, probe_measurement


def linear_probe(
    features: Tensor,
    labels: Tensor,
    *,
    groups: Sequence[Hashable] | Independent | None = None,
    folds: int = FOLDS,
    moments: Moments | None = None,
) -> Measurement:
    r"""Balanced accuracy of a linear discriminant on frozen features, cross-fitted.

    Every row is predicted once, by a model fitted without it and without the rows of its group. The prediction is the
    class c with the largest μ_cᵀW⁻¹z − ½·μ_cᵀW⁻¹μ_c. Here z is standardized by the training rows, μ_c are their class
    means, and W is their covariance within classes, in float64. W is shrunk to a multiple of the identity by Ledoit
    and Wolf's closed form. Classes have equal weight whatever their size. There is no tuning and no iteration.

    The standard error is a delete-a-group jackknife over the predictions. It does not include the variance from
    refitting the model.

    Args:
        features: Features (N, D), floating.
        labels: Labels (N,), integers of at least two classes.
        groups: One id per row (slide, patient); a group is never split between training and test.
            "independent" declares that no two rows have a common source.
        folds: Maximum number of folds; there are fewer if there are fewer groups.
        moments: Empty moments, to fill with those of the features: the probe needs the same sums.

    Returns:
        ``linear_probe`` in 0 … 1, higher is better; ``details`` hold plain ``accuracy``, ``chance`` and ``classes``.

    Raises:
        ValueError: Wrong shapes, one class, one group, or NaN or Inf.

    Source:
        Ledoit & Wolf 2004, "A well-conditioned estimator for large-dimensional covariance matrices".

    Example:
        >>> import torch
        >>> x = torch.randn(200, 4, generator=torch.Generator().manual_seed(0))
        >>> linear_probe(x, (x[:, 0] > 0).long()).value > 0.95
        True
    """
    ids = None if declared_independent(groups) else groups
    target = check_inputs(features, labels, ids)
    fold = folds_of(target, groups=ids, folds=folds)
    rows = features.detach().cpu()
    sums = FoldSums(rows, target, fold)
    if moments is not None:
        moments.set_sums(rows, shift=sums.origin, total=sums.total, outer=sums.gram)
    split = "a group is never split" if ids is not None else "stratified by label"
    return probe_measurement(
        "linear_probe",
        sums.predict(),
        target,
        features,
        groups,
        folds=len(np.unique(fold)),
        convention=f"balanced accuracy; shrunk linear discriminant, {len(np.unique(fold))} folds, {split}",
    )
