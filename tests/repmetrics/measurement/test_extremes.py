"""Extreme scales and offsets: every metric is right, or refused with a reason."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from repmetrics.decisions.alarms import collapse_stats
from repmetrics.measurement.measure import measure
from repmetrics.measurement.registry import METRICS
from repmetrics.metrics import METRIC_CLASSES
from repmetrics.probes.knn import knn_probe
from repmetrics.probes.linear import linear_probe

NAMES = [name for name, metric in METRICS.items() if not metric.from_tokens and metric.inputs != "turns"]
SHIFT_FREE = [
    "rankme_centered", "alpha_req", "odcorr", "dead_features", "twonn", "lidar", "slide_leakage", "neighbor_leakage",
    "cka_drift",
]  # fmt: skip


def features() -> Tensor:
    random = torch.Generator().manual_seed(0)
    x = torch.randn(240, 110, generator=random, dtype=torch.float64) / torch.arange(1, 111) ** 0.5
    return x + 0.3 * x[:, :1]


def value(name: str, x: Tensor, previous: Tensor | None = None) -> float:
    ids = [i // 4 for i in range(len(x))]
    extra: Any = {"views": {"views": ids}, "groups": {"groups": ids}, "previous": {"previous": previous}}
    return measure(x, metrics=[name], **extra.get(METRICS[name].inputs, {}))[name].value


@pytest.mark.parametrize("name", NAMES)
def test_scales(name: str) -> None:
    """No metric depends on the scale. Squares of 1e-200 are 0, and those of 1e200 overflow."""
    x = features()
    before = x.roll(1, 0) + x
    expected = value(name, x, before)
    for dtype, scales in ((torch.float64, (1e-60, 1e60)), (torch.float32, (1e-30, 1e-37, 1e30))):
        for scale in scales:
            got = value(name, (x * scale).to(dtype), (before * scale).to(dtype))
            # float32 rounds the inputs; alpha_req reads small eigenvalues
            assert got == pytest.approx(expected, rel=1e-9 if dtype == torch.float64 else 1e-4), (dtype, scale)
    for scale in (1e-200, 1e200):
        with pytest.raises(ValueError, match=r"fourth powers (under|over)flow; scale them"):
            value(name, x * scale, before)


@pytest.mark.parametrize("name", SHIFT_FREE)
def test_offsets(name: str) -> None:
    """An offset of 1e8 leaves float64 eight digits; float32 loses those of the features themselves."""
    x = features()
    before = x.roll(1, 0) + x
    assert value(name, x + 1e8, before + 1e8) == pytest.approx(value(name, x, before), rel=1e-5)
    low, low_before = (x * 100 + 1e6).float(), (before * 100 + 1e6).float()
    exact = value(name, low.double() - 1e6, low_before.double() - 1e6)
    assert value(name, low, low_before) == pytest.approx(exact, rel=1e-5)


@pytest.mark.parametrize("name", ["rankme_centered", "alpha_req", "odcorr", "dead_features"])
def test_offsets_in_torchmetrics(name: str) -> None:
    x = features()
    metric = METRIC_CLASSES[name](num_features=110)  # type: ignore[call-arg]
    for batch in (x + 1e8).split(50):
        metric.update(batch)
    assert float(metric.compute()) == pytest.approx(value(name, x), rel=1e-5)


@pytest.mark.parametrize("scale", [1e-60, 1e-30, 1e30, 1e60])
def test_errors_of_both_kinds_do_not_depend_on_the_scale(scale: float) -> None:
    """First order multiplies in float32, whose squares overflow at 1e20 and vanish at 1e-23."""
    x, groups = features(), [i // 8 for i in range(240)]
    names = ["rankme", "rankme_centered", "effective_rank", "odcorr", "mean_direction"]
    for jackknife in ("exact", "first_order"):
        expected = measure(x, groups=groups, metrics=names, jackknife=jackknife)  # type: ignore[arg-type]
        got = measure(x * scale, groups=groups, metrics=names, jackknife=jackknife)  # type: ignore[arg-type]
        for name in names:
            assert got[name].standard_error == pytest.approx(expected[name].standard_error, rel=1e-3)


@pytest.mark.parametrize("scale", [1e-60, 1e60])
def test_probes_and_collapse_stats(scale: float) -> None:
    x = features()
    labels = (x[:, 0] > 0).long()
    for probe in (linear_probe, knn_probe):
        assert probe(x * scale, labels).value == probe(x, labels).value
    assert collapse_stats(x * scale)[:4] == pytest.approx(collapse_stats(x)[:4], rel=1e-9)
    assert collapse_stats(x + 1e8).dead_features == 0


def test_a_short_row_beside_long_ones_has_a_direction() -> None:
    x = features()
    short = x.clone()
    short[3] *= 1e-170
    for name in ("mean_direction", "knn_entropy"):
        assert value(name, short) == pytest.approx(value(name, x), rel=1e-9)
    assert math.isnan(value("odcorr", torch.full((8, 3), 1e8, dtype=torch.float64)))
