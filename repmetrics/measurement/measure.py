"""``measure``: metrics of features, each with its standard error."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from repmetrics.functional.checks import check_features, check_tokens, drop_nonfinite
from repmetrics.functional.ids import check_ids
from repmetrics.functional.linalg import on_float64_device, single_torch_thread
from repmetrics.measurement.blocks import INDEPENDENT_SAMPLES, Blocks, Independent, declared_independent
from repmetrics.measurement.first_order import first_order_replicates
from repmetrics.measurement.jackknife import exact_replicates, jackknife_error, margin
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

FEW_BLOCKS = 8
"""Number of blocks up to which replicates are exact up to D = 1024: a block holds too much for first order."""

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
    groups: Sequence[Hashable] | Tensor | Independent | None = None,
    views: Sequence[Hashable] | Tensor | None = None,
    previous: Tensor | None = None,
    anchor: Tensor | None = None,
    metrics: Sequence[str] = DEFAULT_METRICS,
    jackknife: Method = "auto",
    nonfinite: Literal["refuse", "drop"] = "refuse",
    moments: Moments | None = None,
) -> dict[str, Measurement]:
    """Measure features: one accumulation, one decomposition, and each metric with its standard error.

    Args:
        features: (N, D) with N ≥ 2, any floating dtype, on any device; or patch tokens (B, T, D) for dense metrics.
        groups: One id per row (slide, patient). Rows of one group count as dependent, groups as independent. None gives
            values without errors. "independent" declares that no two rows have a common source, as for photographs of
            different scenes: errors then come from blocks of random rows, and each measurement has a warning.
        views: The sample's id of each row, for metrics of several views (LiDAR, alignment).
        previous: (N, D′) another checkpoint's features of the same rows, for drift.
        anchor: (B, T, D′) the anchor's tokens of the same images, for Gram drift.
        metrics: Names from :data:`~repmetrics.measurement.registry.METRICS`.
        jackknife: Computation of the replicates of metrics from moments. ``"exact"`` decomposes each replicate,
            ``"first_order"`` takes the derivative of one decomposition for more than 8 blocks or D > 1024, ``"auto"``
            is also exact up to D = 512, ``"none"`` gives no errors. Other metrics are recomputed without each block, at
            up to 32 times the cost of the value, unless there is a cheaper way.
        nonfinite: Whether to refuse rows with NaN or Inf, or to drop them and give a warning.
        moments: Moments of these features, if they are known already. Spectra computed here stay in their cache.

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
    independent = declared_independent(groups)
    ids = None if independent else _ids(groups, "groups", features)
    rows = _Rows(features, ids, _ids(views, "views", features), *others)
    rows, dropped = _checked(rows, metrics, nonfinite)
    samples = range(len(rows.features)) if rows.views is None else rows.views
    if independent:
        blocks: Blocks | None = Blocks.from_independent(samples)
    else:
        blocks = None if rows.groups is None else Blocks.from_groups(rows.groups)
    reason = _no_error(blocks, jackknife, samples=None if independent else len(set(samples)))
    if moments is not None and (moments.unit or (moments.n, moments.dim) != tuple(rows.features.shape)):
        raise ValueError(f"moments must be those of the features {tuple(rows.features.shape)}, got {moments}")
    evaluation = _Evaluation(rows, None if reason else blocks, jackknife, metrics, moments)
    warnings = [INDEPENDENT_SAMPLES] * independent + _dropped(rows, dropped)
    by_inputs = sorted(metrics, key=lambda name: METRICS[name].inputs)  # never two states in memory
    with single_torch_thread():
        measurements = {name: _measurement(name, evaluation, blocks, reason, warnings) for name in by_inputs}
    return {name: measurements[name] for name in metrics}


def _no_error(blocks: Blocks | None, jackknife: Method, *, samples: int | None) -> str:
    """Return why there can be no errors, or an empty text if there can.

    Groups of one sample each give none: they are file names more often than independent samples. The number of samples
    is None where these are declared to be independent.
    """
    if blocks is None:
        return NO_GROUPS
    if samples is not None and blocks.groups == samples:
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

    def __init__(
        self,
        rows: _Rows,
        blocks: Blocks | None,
        jackknife: Method,
        metrics: Sequence[str],
        moments: Moments | None,
    ) -> None:
        self.rows = rows
        self.blocks = blocks
        self._metrics = list(dict.fromkeys(metrics))
        self._decomposed = {METRICS[name].inputs for name in metrics if METRICS[name].reads_spectrum}
        self._moments = moments
        d = rows.features.shape[-1]
        self._first_order = (jackknife == "first_order" or (jackknife == "auto" and d > EXACT_UP_TO)) and (
            d > 2 * EXACT_UP_TO or (blocks is not None and len(blocks.sizes) > FEW_BLOCKS)
        )
        self._states: dict[Inputs, tuple[Moments, dict[str, tuple[float, ...]]]] = {}
        self._results: dict[Callable[..., Any], Any] = {}

    def state(self, inputs: Inputs) -> tuple[Moments, dict[str, tuple[float, ...]]]:
        """Return the moments of the features or of their directions, and all metrics of them without each block."""
        if inputs not in self._states:
            self._states.clear()
            self._states[inputs] = self._state(unit=inputs == "directions", inputs=inputs)
        return self._states[inputs]

    def _state(self, inputs: Inputs, *, unit: bool) -> tuple[Moments, dict[str, tuple[float, ...]]]:
        features, blocks = self.rows.features, self.blocks
        metrics = {name: METRICS[name] for name in self._metrics if METRICS[name].inputs == inputs}
        if blocks is not None and not self._first_order:
            whole, states = exact_replicates(features, blocks, unit=unit)
            return whole, {
                name: tuple(float(metric.function(state)) for state in states) for name, metric in metrics.items()
            }
        whole = Moments(features, unit=unit) if unit or self._moments is None else self._moments
        if blocks is None:
            return whole, {}
        values = first_order_replicates(features, blocks, whole, list(metrics.values()))
        return whole, dict(zip(metrics, values, strict=True))

    def _sums_suffice(self, metric: MetricSpec) -> bool:
        """Whether the metric has a cheap computation of its own, and no other one needs its moments decomposed."""
        return metric.with_replicates is not None and metric.inputs not in self._decomposed

    def value(self, metric: MetricSpec) -> float:
        """Compute the metric of all rows."""
        if self._sums_suffice(metric):
            return self._with_replicates(metric)[0]
        if metric.from_moments:
            return float(metric.function(self.state(metric.inputs)[0]))
        return self.rows.evaluate(metric)

    def replicates(self, name: str) -> tuple[float, ...] | None:
        """Compute the metric without each block, or return None without blocks."""
        metric = METRICS[name]
        if self.blocks is None:
            return None
        if self._sums_suffice(metric):
            return self._with_replicates(metric)[1:]
        if metric.from_moments:
            return self.state(metric.inputs)[1][name]
        index = self.blocks.index.to(self.rows.features.device)
        return tuple(self.rows.select(index != block).evaluate(metric) for block in range(len(self.blocks.sizes)))

    def _with_replicates(self, metric: MetricSpec) -> tuple[float, ...]:
        """Compute the metric of all rows and without each block; a result serves all metrics of its function."""
        assert metric.with_replicates is not None
        function, field = metric.with_replicates
        if function not in self._results:
            index = None if self.blocks is None else self.blocks.index
            self._results[function] = function(self.rows.features, blocks=index, **self.rows.arguments(metric))
        result = self._results[function]
        return tuple((getattr(result, field) if field else result).tolist())


def _measurement(
    name: str, evaluation: _Evaluation, blocks: Blocks | None, reason: str, warnings: Sequence[str]
) -> Measurement:
    metric, features = METRICS[name], evaluation.rows.features
    value = _comparable(evaluation.value(metric))
    error: float | None = None
    half_width: float | None = None
    replicates = None if math.isnan(value) else evaluation.replicates(name)
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
        warnings=(*_warnings(metric, features), *warnings),
        details=_details(metric, evaluation, groups=groups or 0),
        margin=half_width,
        degrees_of_freedom=None if half_width is None or blocks is None else blocks.degrees_of_freedom,
        replicates=replicates,
        blocks=evaluation.blocks,
    )


def _comparable(value: float) -> float:
    """The value, NaN as the object `math.nan`, which equals itself in tuples: equal measurements compare equal."""
    return math.nan if math.isnan(value) else value


def _warnings(metric: MetricSpec, features: Tensor) -> list[str]:
    warnings = []
    n, d = features.shape[0], features.shape[-1]
    if metric.centered is not None and n < ROWS_PER_DIMENSION * d:
        warnings.append(f"N = {n} < 4·D = {4 * d}: ranks are biased low, compare only at this N")
    if features.dtype in (torch.bfloat16, torch.float16):
        kind = str(features.dtype).removeprefix("torch.")
        warnings.append(f"{kind} features: quantisation adds false rank, take them before the cast where possible")
    return warnings


def _dropped(rows: _Rows, dropped: int) -> list[str]:
    total = len(rows.features) + dropped
    return [f"{dropped} of {total} rows held NaN or Inf and were dropped"] if dropped else []


def _details(metric: MetricSpec, evaluation: _Evaluation, *, groups: int) -> dict[str, float]:
    details: dict[str, float] = {}
    if metric.null_floor is not None:
        details["null_floor"] = metric.null_floor(len(evaluation.rows.features), groups)
    if metric.centered is not None or metric.details:
        moments = evaluation.state(metric.inputs)[0]
        if metric.centered is not None:
            details["floored"] = moments.spectrum(centered=metric.centered).floored
        details |= {name: _comparable(compute(moments)) for name, compute in metric.details.items()}
    return details
