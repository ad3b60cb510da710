"""Metrics and probes of features and their views, for the monitor and for ``repmetrics score``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from repmetrics.data.features import Features
from repmetrics.measurement.measure import measure
from repmetrics.measurement.registry import DEFAULT_METRICS, METRICS
from repmetrics.measurement.result import Measurement
from repmetrics.probes.knn import knn_probe
from repmetrics.probes.linear import linear_probe


def measure_features(
    features: Features,
    *,
    metrics: Sequence[str] = DEFAULT_METRICS,
    views: Tensor | None = None,
    previous: Tensor | None = None,
    strict: bool = True,
) -> dict[str, Measurement]:
    """Metrics of held-out features: first those of the features, then those of their views.

    Args:
        features: Features (N, D) of the held-out set.
        metrics: Names from :data:`~repmetrics.measurement.registry.METRICS`.
        views: Features (N, q, D) of q views of each row; without them, metrics that need views are left out.
        previous: Features (N, D′) of the previous evaluation; without them, metrics that need them are left out.
        strict: Whether to raise if a metric cannot be computed; otherwise it is NaN with a reason.

    Returns:
        Measurements by name.
    """
    omitted = {"views"} if previous is not None else {"views", "previous"}
    plain = [name for name in metrics if METRICS[name].inputs not in omitted]
    measurements = _measure(features.values, plain, strict=strict, groups=features.groups, previous=previous)
    of_views = [name for name in metrics if METRICS[name].inputs == "views"]
    if of_views and views is not None:
        count = views.shape[1]
        groups = None if features.groups is None else [group for group in features.groups for _ in range(count)]
        ids = [row // count for row in range(len(views) * count)]
        measurements |= _measure(views.flatten(0, 1), of_views, strict=strict, groups=groups, views=ids)
    return measurements


def measure_probes(features: Features) -> dict[str, Measurement]:
    """Linear probe and k-nearest-neighbor probe of the rows with a label; empty without labels.

    Raises:
        ValueError: The labels cannot be probed: one class, one group, or several numbers per row.
    """
    rows = features.labeled()
    if rows.labels is None:
        return {}
    missing = len(features.values) - len(rows.values)
    if len(rows.values) < 2:
        raise ValueError(f"{len(rows.values)} of {len(features.values)} samples have a label")
    note = (f"{missing} of {len(features.values)} samples have no label and are left out",) if missing else ()
    results = [probe(rows.values, rows.labels, groups=rows.groups) for probe in (linear_probe, knn_probe)]
    return {result.name: replace(result, warnings=(*note, *result.warnings)) for result in results}


def _measure(features: Tensor, metrics: Sequence[str], *, strict: bool, **inputs: Any) -> dict[str, Measurement]:
    """Measure all metrics together; on an error that must not end a run, one by one, NaN for those undefined.

    A collapsed encoder has features without a direction, and identical views. That calls for an alarm, not an error.
    """
    try:
        return measure(features, metrics=metrics, **inputs)
    except ValueError as error:
        if strict:
            raise
        if len(metrics) > 1:
            return {name: _measure(features, [name], strict=False, **inputs)[name] for name in metrics}
        (name,) = metrics
        metric, dtype = METRICS[name], str(features.dtype).removeprefix("torch.")
        n, d = features.shape
        return {
            name: Measurement(name, math.nan, None, str(error), metric.direction, n, d, None, metric.convention, dtype)
        }
