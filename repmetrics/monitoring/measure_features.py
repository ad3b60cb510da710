"""Metrics and probes of features and their views, for the monitor and for ``repmetrics score``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from repmetrics.data.features import Features
from repmetrics.functional.checks import UndefinedError
from repmetrics.measurement.blocks import Independent
from repmetrics.measurement.measure import Method, measure
from repmetrics.measurement.moments import Moments
from repmetrics.measurement.registry import DEFAULT_METRICS, METRICS
from repmetrics.measurement.result import Measurement
from repmetrics.probes.knn import knn_probe
from repmetrics.probes.linear import linear_probe


def measure_features(
    features: Features,
    *,
    metrics: Sequence[str] = DEFAULT_METRICS,
    views: Tensor | None = None,
    pairs: Features | None = None,
    view_set: str = "",
    turns: Tensor | None = None,
    previous: Tensor | None = None,
    independent: bool = False,
    strict: bool = True,
    jackknife: Method = "auto",
    moments: Moments | None = None,
) -> dict[str, Measurement]:
    """Metrics of held-out features: first those of the features, then those of their views and turns.

    Args:
        features: Features (N, D) of the held-out set.
        metrics: Names from :data:`~repmetrics.measurement.registry.METRICS`.
        views: Features (N, q, D) of q views of each row; without them, metrics that need views are left out.
        pairs: Features (n, 2, D) of two views of some of the images, with their groups; without them, metrics that
            compare two views are NaN with a reason.
        view_set: Distribution of the pairs of views, which becomes part of the convention.
        turns: Features (N, 4, D) of quarter-turns of each image; without them, metrics of turns are left out.
        previous: Features (N, D′) of the previous evaluation; without them, metrics that need them are left out.
        independent: Whether all images are declared to be independent; they then have no groups.
        strict: Whether to raise if a metric cannot be computed; otherwise it is NaN with a reason.
        jackknife: Computation of the replicates of metrics from moments, see
            :func:`~repmetrics.measurement.measure.measure`.
        moments: Moments of the features, if they are known already.

    Returns:
        Measurements by name.
    """
    omitted = {"views", "turns"} if previous is not None else {"views", "turns", "previous"}
    plain = [name for name in metrics if METRICS[name].inputs not in omitted]
    groups: Sequence[str] | Independent | None = "independent" if independent else features.groups
    inputs = {"groups": groups, "previous": previous, "jackknife": jackknife}
    measurements = _measure(features.values, plain, strict=strict, moments=moments, **inputs)
    of_views = [name for name in metrics if METRICS[name].inputs == "views"]
    of_pairs = [name for name in of_views if METRICS[name].two_views]
    if views is not None:
        of_others = [name for name in of_views if name not in of_pairs]
        measurements |= _measure_views(
            Features(views, features.groups), of_others, independent=independent, strict=strict
        )
    if pairs is None:
        measurements |= {name: _undefined(name, features.values, "no views of these inputs") for name in of_pairs}
    else:
        for name, m in _measure_views(pairs, of_pairs, independent=independent, strict=False).items():
            measurements[name] = replace(m, convention=f"{m.convention}; {view_set}", details={**m.details, "views": 2})
    of_turns = [name for name in metrics if METRICS[name].inputs == "turns"]
    if turns is not None:
        measurements |= _measure(turns, of_turns, strict=strict, groups=groups)
    return measurements


def _measure_views(
    views: Features, metrics: Sequence[str], *, independent: bool, strict: bool
) -> dict[str, Measurement]:
    """Metrics of features (n, q, D) of q views of each image."""
    if not metrics:
        return {}
    count = views.values.shape[1]
    groups: Sequence[str] | Independent | None = "independent" if independent else None
    if views.groups is not None:
        groups = [group for group in views.groups for _ in range(count)]
    ids = [row // count for row in range(len(views.values) * count)]
    return _measure(views.values.flatten(0, 1), metrics, strict=strict, groups=groups, views=ids)


def measure_probes(
    features: Features, *, independent: bool = False, moments: Moments | None = None
) -> dict[str, Measurement]:
    """Linear probe and k-nearest-neighbor probe of the rows with a label; empty without labels.

    Args:
        features: Features (N, D) with their labels and groups.
        independent: Whether all rows are declared to be independent; they then have no groups.
        moments: Empty moments, which are filled with those of all rows if every row has a label.

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
    groups: Sequence[str] | Independent | None = "independent" if independent else rows.groups
    results = [
        linear_probe(rows.values, rows.labels, groups=groups, moments=None if missing else moments),
        knn_probe(rows.values, rows.labels, groups=groups),
    ]
    return {result.name: replace(result, warnings=(*note, *result.warnings)) for result in results}


def _measure(features: Tensor, metrics: Sequence[str], *, strict: bool, **inputs: Any) -> dict[str, Measurement]:
    """Measure all metrics together; on an error that must not end a run, one by one, NaN for those undefined.

    A collapsed encoder has features without a direction, and identical views. That calls for an alarm, not an error.
    """
    if not metrics:
        return {}
    try:
        return measure(features, metrics=metrics, **inputs)
    except ValueError as error:
        if strict and not isinstance(error, UndefinedError):
            raise
        if len(metrics) > 1:
            return {name: _measure(features, [name], strict=strict, **inputs)[name] for name in metrics}
        (name,) = metrics
        return {name: _undefined(name, features, str(error))}


def _undefined(name: str, features: Tensor, reason: str) -> Measurement:
    """Measurement without a value."""
    metric, dtype = METRICS[name], str(features.dtype).removeprefix("torch.")
    n, d = features.shape[0], features.shape[-1]
    return Measurement(name, math.nan, None, reason, metric.direction, n, d, None, metric.convention, dtype)
