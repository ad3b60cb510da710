"""Measurement: a value with its standard error and all that is needed to read it."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from repmetrics.functional.checks import check_features, check_tokens, drop_nonfinite
from repmetrics.functional.correlation import odcorr_null_floor
from repmetrics.functional.linalg import cores_for_blas
from repmetrics.functional.spectrum import participation_ratio, power_law
from repmetrics.measurement.jackknife import (
    Blocks,
    FirstOrderMoments,
    exact_replicas,
    first_order_replicas,
    jackknife_error,
)
from repmetrics.measurement.moments import Moments
from repmetrics.measurement.registry import DEFAULT_METRICS, METRICS, MetricSpec, Needs, check_metric_names
from repmetrics.measurement.result import NO_GROUPS, Measurement

Method = Literal["auto", "exact", "first_order", "none"]

EXACT_UP_TO = 512
"""Largest D for which ``jackknife="auto"`` decomposes every replicate: above, first order costs an eighth or less."""

ROWS_PER_DIMENSION = 4
"""Below N = 4·D the downward bias of the ranks exceeds 4 %, and a warning is given."""


@dataclass(frozen=True)
class _Inputs:
    """What is measured, row by row."""

    features: Tensor
    groups: list[Hashable] | None
    views: list[Hashable] | None
    previous: Tensor | None
    anchor: Tensor | None

    def keep(self, rows: Tensor) -> _Inputs:
        """The rows where the mask is true."""
        chosen = rows.nonzero().flatten().tolist()
        return _Inputs(
            self.features[rows],
            groups=None if self.groups is None else [self.groups[i] for i in chosen],
            views=None if self.views is None else [self.views[i] for i in chosen],
            previous=None if self.previous is None else self.previous[rows],
            anchor=None if self.anchor is None else self.anchor[rows],
        )

    def call(self, metric: MetricSpec) -> Tensor:
        """The metric of these rows, from the features themselves."""
        names = {"views", "groups", "previous", "anchor"} & {metric.inputs}
        return metric.function(self.features, **{name: getattr(self, name) for name in names})


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
    """Measure features once: one accumulation, one decomposition, every metric with its error.

    Args:
        features: (N, D) with N ≥ 2, any floating dtype, on any device; or patch tokens (B, T, D) for dense metrics.
        groups: one id a row (slide, patient); rows of one group are taken as dependent, groups as independent.
            None gives values without errors.
        views: the sample's id of each row, for metrics of several views (LiDAR, alignment).
        previous: (N, D′) another checkpoint's features of the same rows, for drift.
        anchor: (B, T, D′) the anchor's tokens of the same images, for Gram drift.
        metrics: names from :data:`~repmetrics.measurement.registry.METRICS`.
        jackknife: how the replicates of moments-fed metrics are found: ``"exact"`` decomposes each,
            ``"first_order"`` perturbs one decomposition, ``"auto"`` is exact up to D = 512, ``"none"`` leaves errors
            out. Other metrics are recomputed without each block: up to 32 times the cost of the value.
        nonfinite: refuse rows with NaN or Inf, or drop them and say so.

    Returns:
        One :class:`Measurement` a name, in the order asked for.

    Raises:
        TypeError: features are not floating.
        ValueError: wrong shape, fewer than two rows, NaN or Inf, unknown metric, an argument that a metric needs
            and did not get, ids that do not match the rows.

    Example:
        >>> x = torch.randn(512, 8, generator=torch.Generator().manual_seed(0))
        >>> m = measure(x, groups=[i // 16 for i in range(512)])["rankme"]
        >>> print(f"{m.value:.2f} ± {m.standard_error:.2f} from {m.groups} groups")
        7.98 ± 0.01 from 32 groups
    """
    check_metric_names(metrics)
    if jackknife not in get_args(Method):
        raise ValueError(f"jackknife must be one of {', '.join(get_args(Method))}, got {jackknife!r}")
    inputs = _Inputs(features, _ids(groups, "groups", features), _ids(views, "views", features), previous, anchor)
    inputs, dropped = _checked(inputs, metrics, nonfinite)
    blocks = None if inputs.groups is None else Blocks.from_groups(inputs.groups)
    reason = _no_error(blocks, jackknife)
    evaluate = _Evaluation(inputs, None if reason else blocks, jackknife)
    in_turn = sorted(metrics, key=lambda name: METRICS[name].inputs)  # one state after the other, never two in memory
    with cores_for_blas():
        found = {name: _measurement(name, evaluate, blocks, reason, dropped) for name in in_turn}
    return {name: found[name] for name in metrics}


def _no_error(blocks: Blocks | None, jackknife: Method) -> str:
    """Why there can be no errors; empty where there can."""
    if blocks is None:
        return NO_GROUPS
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
        raise ValueError(f"{name} must hold one id a row, got {len(listed)} for {len(features)} rows")
    missing = sum(i is None or i == "" or i != i for i in listed)
    if missing:
        raise ValueError(f"{name} are missing for {missing} of {len(listed)} rows: give every row its id")
    return listed


def _checked(inputs: _Inputs, metrics: Sequence[str], nonfinite: str) -> tuple[_Inputs, int]:
    """Inputs fit for every metric asked for, and how many rows were dropped."""
    dense = [name for name in metrics if METRICS[name].inputs in ("tokens", "anchor")]
    if dense and len(dense) < len(metrics):
        raise ValueError(f"{', '.join(dense)} take patch tokens (B, T, D), the others features (N, D): measure apart")
    for name in metrics:
        needs = METRICS[name].inputs
        if needs in ("views", "groups", "previous", "anchor") and getattr(inputs, needs) is None:
            raise ValueError(f"{name} needs {needs}=: {_WHAT[needs]}")
    if dense:
        check_tokens(inputs.features)
        return inputs, 0
    dropped = 0
    if nonfinite == "drop" and isinstance(inputs.features, Tensor) and inputs.features.ndim == 2:
        _, keep = drop_nonfinite(inputs.features)
        dropped = int((~keep).sum())
        inputs = inputs.keep(keep) if dropped else inputs
    check_features(inputs.features, min_rows=2)
    return inputs, dropped


_WHAT: Mapping[Needs, str] = {
    "views": "the sample's id of each row",
    "groups": "the slide's id of each row",
    "previous": "another checkpoint's features of the same rows",
    "anchor": "the anchor's tokens of the same images",
}


class _Evaluation:
    """Values and replicates; what metrics in turn share is computed at the first that asks, and then let go."""

    def __init__(self, inputs: _Inputs, blocks: Blocks | None, jackknife: Method) -> None:
        self.inputs = inputs
        self.blocks = blocks
        first_order = jackknife == "first_order" or (jackknife == "auto" and inputs.features.shape[-1] > EXACT_UP_TO)
        self.replicas = first_order_replicas if first_order else exact_replicas
        self._states: dict[Needs, tuple[Moments, Sequence[Moments | FirstOrderMoments]]] = {}

    def state(self, needs: Needs) -> tuple[Moments, Sequence[Moments | FirstOrderMoments]]:
        """Moments of the features or of their directions, whole and without each block."""
        if needs not in self._states:
            features = self.inputs.features
            unit = needs == "directions"
            self._states.clear()
            self._states[needs] = (
                (Moments(features, unit=unit), [])
                if self.blocks is None
                else self.replicas(features, self.blocks, unit=unit)
            )
        return self._states[needs]

    def value(self, metric: MetricSpec) -> float:
        """The metric of all rows."""
        if metric.inputs in ("moments", "directions"):
            return float(metric.function(self.state(metric.inputs)[0]))
        return float(self.inputs.call(metric))

    def replicates(self, metric: MetricSpec) -> tuple[float, ...] | None:
        """The metric without each block, or None where there are no blocks."""
        if self.blocks is None:
            return None
        if metric.inputs in ("moments", "directions"):
            found = self.state(metric.inputs)[1]
            return tuple(
                float(r.evaluate(metric.function) if isinstance(r, FirstOrderMoments) else metric.function(r))
                for r in found
            )
        index = self.blocks.index.to(self.inputs.features.device)
        return tuple(float(self.inputs.keep(index != b).call(metric)) for b in range(len(self.blocks.sizes)))


def _measurement(name: str, evaluate: _Evaluation, blocks: Blocks | None, reason: str, dropped: int) -> Measurement:
    metric, features = METRICS[name], evaluate.inputs.features
    value = evaluate.value(metric)
    error: float | None = None
    replicates = None if math.isnan(value) else evaluate.replicates(metric)
    if math.isnan(value):
        reason = _NO_VALUE.get(name, "the metric does not exist for these features")
    elif replicates is not None and evaluate.blocks is not None:
        error = jackknife_error(value, replicates, evaluate.blocks.sizes)
        if math.isnan(error):
            error, reason = None, "the metric does not exist without some of the groups"
    return Measurement(
        name=name,
        value=value,
        standard_error=error,
        reason=None if error is not None else reason,
        direction=metric.direction,
        n=features.shape[0],
        d=features.shape[-1],
        groups=None if blocks is None else blocks.groups,
        convention=metric.convention,
        dtype=str(features.dtype).removeprefix("torch."),
        warnings=_warnings(name, features, dropped),
        details=_details(name, evaluate),
        replicates=replicates,
        blocks=evaluate.blocks,
    )


_NO_VALUE = {
    "odcorr": "fewer than two features vary: no correlation exists",
    "alpha_req": "fewer than 100 eigenvalues above rounding: no power law can be fitted",
    "twonn": "fewer than three distinct rows",
    "slide_leakage": "the features are constant",
    "cka_drift": "one of the two representations is constant",
}


_NO_RANK = ("odcorr", "dead_features", "mean_direction")  # not read from a spectrum: few rows do not bias them low


def _warnings(name: str, features: Tensor, dropped: int) -> tuple[str, ...]:
    found = []
    n, d = features.shape[0], features.shape[-1]
    if METRICS[name].inputs in ("moments", "directions") and name not in _NO_RANK and n < ROWS_PER_DIMENSION * d:
        found.append(f"N = {n} < 4·D = {4 * d}: ranks are biased low, compare only at this N")
    if features.dtype in (torch.bfloat16, torch.float16):
        kind = str(features.dtype).removeprefix("torch.")
        found.append(f"{kind} features: quantisation adds false rank, take them before the cast where possible")
    if dropped:
        found.append(f"{dropped} of {n + dropped} rows held NaN or Inf and were dropped")
    return tuple(found)


def _details(name: str, evaluate: _Evaluation) -> dict[str, float]:
    needs, n = METRICS[name].inputs, evaluate.inputs.features.shape[0]
    if name == "slide_leakage" and evaluate.inputs.groups is not None:
        return {"null_floor": (len(set(evaluate.inputs.groups)) - 1) / (n - 1)}
    if needs not in ("moments", "directions"):
        return {}
    whole = evaluate.state(needs)[0]
    if name == "odcorr":
        return {"null_floor": odcorr_null_floor(n), "excluded": whole.correlation().excluded}
    if name in ("dead_features", "mean_direction"):
        return {}
    found: dict[str, float] = {
        "floored": whole.spectrum(centered=name in ("rankme_centered", "alpha_req", "uniformity_w2")).floored
    }
    if name == "alpha_req":
        found["r_squared"] = float(power_law(whole).r_squared)
    if name == "participation_ratio":
        found["unbiased"] = float(participation_ratio(whole, unbiased=True))
    return found
