"""``measure``: metrics of features, each with its standard error."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from repmetrics.functional.checks import check_features, check_tokens, drop_nonfinite
from repmetrics.functional.ids import check_ids
from repmetrics.functional.linalg import on_float64_device, single_torch_thread
from repmetrics.measurement.jackknife import (
    Blocks,
    FirstOrderMoments,
    exact_replicates,
    first_order_replicates,
    jackknife_error,
    margin,
)
from repmetrics.measurement.moments import Moments
from repmetrics.measurement.registry import (
    ARGUMENTS,
    DEFAULT_METRICS,
    METRICS,
    Inputs,
    MetricSpec,
    check_metric_names,
)
from repmetrics.measurement.result import NO_GROUPS, Measurement, each_its_own_group

Method = Literal["auto", "exact", "first_order", "none"]

EXACT_UP_TO = 512
"""Largest D for which ``jackknife="auto"`` decomposes every replicate. Above, first order costs an eighth or less."""

ROWS_PER_DIMENSION = 4
"""Rows per column below which a warning is given: the downward bias of the ranks then exceeds 4 %."""


@dataclass(frozen=True)
class _Rows:
    """Features and the arguments of the metrics, row by row."""

    features: Tensor
    groups: list[Hashable] | None
    views: list[Hashable] | None
    previous: Tensor | None
    anchor: Tensor | None

    def select(self, mask: Tensor) -> _Rows:
        """Return the rows where the mask is true."""
        indices = mask.nonzero().flatten().tolist()
        return _Rows(
            self.features[mask],
            groups=None if self.groups is None else [self.groups[i] for i in indices],
            views=None if self.views is None else [self.views[i] for i in indices],
            previous=None if self.previous is None else self.previous[mask],
            anchor=None if self.anchor is None else self.anchor[mask],
        )

    def evaluate(self, metric: MetricSpec) -> float:
        """Compute a metric from the features, not from moments."""
        return float(metric.function(self.features, **self.arguments(metric)))

    def arguments(self, metric: MetricSpec) -> dict[str, Any]:
        """Return the argument of a metric, by name, if it has one."""
        return {name: getattr(self, name) for name in ARGUMENTS if name == metric.argument}


def measure(
    features: Tensor,
    *,
    groups: Sequence[Hashable] | Tensor | None = None,
    views: Sequence[Hashable] | Tensor | None = None,
    previous: Tensor | None = None,
    anchor: Tensor | None = None,
    metrics: Sequence[str] = DEFAULT_METRICS,
    jackknife: Method = "auto",
    nonfinite: Literal["refuse", "drop"] = "refuse",
) -> dict[str, Measurement]:
    """Measure features: one accumulation, one decomposition, and each metric with its standard error.

    Args:
        features: (N, D) with N ≥ 2, any floating dtype, on any device; or patch tokens (B, T, D) for dense metrics.
        groups: One id per row (slide, patient). Rows of one group count as dependent, groups as independent. None gives
            values without errors.
        views: The sample's id of each row, for metrics of several views (LiDAR, alignment).
        previous: (N, D′) another checkpoint's features of the same rows, for drift.
        anchor: (B, T, D′) the anchor's tokens of the same images, for Gram drift.
        metrics: Names from :data:`~repmetrics.measurement.registry.METRICS`.
        jackknife: Computation of the replicates of metrics from moments. ``"exact"`` decomposes each replicate,
            ``"first_order"`` perturbs one decomposition, ``"auto"`` is exact up to D = 512, ``"none"`` gives no errors.
            Other metrics are recomputed without each block, at up to 32 times the cost of the value.
        nonfinite: Whether to refuse rows with NaN or Inf, or to drop them and give a warning.

    Returns:
        One :class:`Measurement` per name, in the given order.

    Raises:
        TypeError: Features are not floating.
        ValueError: Wrong shape, fewer than two rows, NaN or Inf, an unknown metric, a missing argument of a metric, or
            ids that do not match the rows.

    Example:
        >>> x = torch.randn(512, 8, generator=torch.Generator().manual_seed(0))
        >>> m = measure(x, groups=[i // 16 for i in range(512)])["rankme"]
        >>> print(f"{m.value:.2f} ± {m.standard_error:.2f} from {m.groups} groups")
        7.98 ± 0.01 from 32 groups
    """
    check_metric_names(metrics)
    if jackknife not in get_args(Method):
        raise ValueError(f"jackknife must be one of {', '.join(get_args(Method))}, got {jackknife!r}")
    features = on_float64_device(features)
    others = [None if each is None else on_float64_device(each) for each in (previous, anchor)]
    rows = _Rows(features, _ids(groups, "groups", features), _ids(views, "views", features), *others)
    rows, dropped = _checked(rows, metrics, nonfinite)
    blocks = None if rows.groups is None else Blocks.from_groups(rows.groups)
    reason = _no_error(blocks, jackknife, samples=len(rows.features) if rows.views is None else len(set(rows.views)))
    evaluation = _Evaluation(rows, None if reason else blocks, jackknife)
    by_inputs = sorted(metrics, key=lambda name: METRICS[name].inputs)  # never two states in memory
    with single_torch_thread():
        measurements = {name: _measurement(name, evaluation, blocks, reason, dropped) for name in by_inputs}
    return {name: measurements[name] for name in metrics}


def _no_error(blocks: Blocks | None, jackknife: Method, *, samples: int) -> str:
    """Return why there can be no errors, or an empty text if there can."""
    if blocks is None:
        return NO_GROUPS
    if blocks.groups == samples:
        return each_its_own_group(samples)
    if jackknife == "none":
        return "jackknife='none': no error was asked for"
    if len(blocks.sizes) == 1:
        return "a single group: no error can be estimated from it"
    if sum(blocks.sizes) - max(blocks.sizes) < 2:
        return "one group holds all rows but one: no error can be estimated without it"
    return ""


def _ids(ids: Sequence[Hashable] | Tensor | None, name: str, features: Tensor) -> list[Hashable] | None:
    if ids is None:
        return None
    listed: list[Hashable] = ids.tolist() if isinstance(ids, Tensor) else list(ids)
    if isinstance(features, Tensor) and features.ndim and len(listed) != len(features):
        raise ValueError(f"{name} must hold one id per row, got {len(listed)} for {len(features)} rows")
    check_ids(listed, name=name)
    return listed


def _checked(rows: _Rows, metrics: Sequence[str], nonfinite: str) -> tuple[_Rows, int]:
    """Return rows that suit every metric, and how many rows were dropped."""
    dense = [name for name in metrics if METRICS[name].from_tokens]
    if dense and len(dense) < len(metrics):
        raise ValueError(f"{', '.join(dense)} take patch tokens (B, T, D), the others features (N, D): measure apart")
    for name in metrics:
        argument = METRICS[name].argument
        if argument is not None and getattr(rows, argument) is None:
            raise ValueError(f"{name} needs {argument}=: {ARGUMENTS[argument]}")
    if dense:
        check_tokens(rows.features)
        return rows, 0
    dropped = 0
    if nonfinite == "drop" and isinstance(rows.features, Tensor) and rows.features.ndim == 2:
        _, finite = drop_nonfinite(rows.features)
        dropped = int((~finite).sum())
        rows = rows.select(finite) if dropped else rows
    check_features(rows.features, min_rows=2)
    return rows, dropped


class _Evaluation:
    """Values and replicates. Moments shared by consecutive metrics are computed once, then freed."""

    def __init__(self, rows: _Rows, blocks: Blocks | None, jackknife: Method) -> None:
        self.rows = rows
        self.blocks = blocks
        first_order = jackknife == "first_order" or (jackknife == "auto" and rows.features.shape[-1] > EXACT_UP_TO)
        self.jackknife = first_order_replicates if first_order else exact_replicates
        self._states: dict[Inputs, tuple[Moments, Sequence[Moments | FirstOrderMoments]]] = {}

    def state(self, inputs: Inputs) -> tuple[Moments, Sequence[Moments | FirstOrderMoments]]:
        """Return the moments of the features or of their directions, of all rows and without each block."""
        if inputs not in self._states:
            features = self.rows.features
            unit = inputs == "directions"
            self._states.clear()
            self._states[inputs] = (
                (Moments(features, unit=unit), [])
                if self.blocks is None
                else self.jackknife(features, self.blocks, unit=unit)
            )
        return self._states[inputs]

    def value(self, metric: MetricSpec) -> float:
        """Compute the metric of all rows."""
        if metric.from_moments:
            return float(metric.function(self.state(metric.inputs)[0]))
        return self.rows.evaluate(metric)

    def replicates(self, metric: MetricSpec) -> tuple[float, ...] | None:
        """Compute the metric without each block, or return None without blocks."""
        if self.blocks is None:
            return None
        if metric.from_moments:
            first_order = metric.first_order or metric.function
            return tuple(
                float((first_order if isinstance(state, FirstOrderMoments) else metric.function)(state))
                for state in self.state(metric.inputs)[1]
            )
        if metric.replicates is not None:
            return tuple(metric.replicates(self.rows.features, blocks=self.blocks.index, **self.rows.arguments(metric)))
        index = self.blocks.index.to(self.rows.features.device)
        return tuple(self.rows.select(index != block).evaluate(metric) for block in range(len(self.blocks.sizes)))


def _measurement(name: str, evaluation: _Evaluation, blocks: Blocks | None, reason: str, dropped: int) -> Measurement:
    metric, features = METRICS[name], evaluation.rows.features
    value = _comparable(evaluation.value(metric))
    error: float | None = None
    half_width: float | None = None
    replicates = None if math.isnan(value) else evaluation.replicates(metric)
    if math.isnan(value):
        reason = metric.undefined
    elif replicates is not None and evaluation.blocks is not None:
        error = jackknife_error(value, replicates, evaluation.blocks.sizes)
        half_width = margin(value, replicates, evaluation.blocks)
        if math.isnan(error):
            error, half_width, reason = None, None, "the metric does not exist without some of the groups"
    groups = None if blocks is None else blocks.groups
    return Measurement(
        name=name,
        value=value,
        standard_error=error,
        reason=None if error is not None else reason,
        direction=metric.direction,
        n=features.shape[0],
        d=features.shape[-1],
        groups=groups,
        convention=metric.convention,
        dtype=str(features.dtype).removeprefix("torch."),
        warnings=_warnings(metric, features, dropped),
        details=_details(metric, evaluation, groups=groups or 0),
        margin=half_width,
        degrees_of_freedom=None if half_width is None or blocks is None else blocks.degrees_of_freedom,
        replicates=replicates,
        blocks=evaluation.blocks,
    )


def _comparable(value: float) -> float:
    """The value, NaN as the object `math.nan`, which equals itself in tuples: equal measurements compare equal."""
    return math.nan if math.isnan(value) else value


def _warnings(metric: MetricSpec, features: Tensor, dropped: int) -> tuple[str, ...]:
    warnings = []
    n, d = features.shape[0], features.shape[-1]
    if metric.centered is not None and n < ROWS_PER_DIMENSION * d:
        warnings.append(f"N = {n} < 4·D = {4 * d}: ranks are biased low, compare only at this N")
    if features.dtype in (torch.bfloat16, torch.float16):
        kind = str(features.dtype).removeprefix("torch.")
        warnings.append(f"{kind} features: quantisation adds false rank, take them before the cast where possible")
    if dropped:
        warnings.append(f"{dropped} of {n + dropped} rows held NaN or Inf and were dropped")
    return tuple(warnings)


def _details(metric: MetricSpec, evaluation: _Evaluation, *, groups: int) -> dict[str, float]:
    details: dict[str, float] = {}
    if metric.null_floor is not None:
        details["null_floor"] = metric.null_floor(len(evaluation.rows.features), groups)
    if metric.from_moments:
        moments = evaluation.state(metric.inputs)[0]
        if metric.centered is not None:
            details["floored"] = moments.spectrum(centered=metric.centered).floored
        details |= {name: _comparable(compute(moments)) for name, compute in metric.details.items()}
    return details
