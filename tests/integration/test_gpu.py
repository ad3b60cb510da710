"""Metrics on a GPU, and block-float32 products on any device."""

from __future__ import annotations

import pytest
import torch

from repmetrics.functional.drift import cka_drift
from repmetrics.functional.spectrum import rankme
from repmetrics.measurement.measure import measure
from repmetrics.measurement.moments import Moments
from repmetrics.measurement.registry import METRICS

DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
    ),
]
ON_GPU = DEVICES[1:]


def features(n: int = 2000, d: int = 64) -> torch.Tensor:
    random = torch.Generator().manual_seed(0)
    return torch.randn(n, d, generator=random) * torch.arange(1, d + 1) ** -1.0 + 0.5


@pytest.mark.parametrize("device", ON_GPU)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_gpu_measures_what_the_cpu_does(device: str, dtype: torch.dtype) -> None:
    x, slides = features().to(dtype), [i // 20 for i in range(2000)]
    names = [name for name, m in METRICS.items() if m.inputs in ("moments", "directions", "features", "groups")]
    expected, results = (measure(z, groups=slides, metrics=names) for z in (x, x.to(device)))
    for name in names:
        # float64 sums in another order; NaN if alpha_req lacks ranks on both
        assert results[name].value == pytest.approx(expected[name].value, rel=1e-8, nan_ok=True), name
        assert results[name].standard_error == pytest.approx(expected[name].standard_error, rel=1e-4, abs=1e-9), name


@pytest.mark.parametrize("device", DEVICES)
def test_block_float32_is_named_and_close(device: str) -> None:
    x = features().to(device)
    exact, quick = Moments(x), Moments(x, precision="block_float32")
    # float32 products of 512 rows, summed in float64: some 1e-7 relative in each entry
    torch.testing.assert_close(quick.gram(), exact.gram(), rtol=2e-6, atol=2e-4)
    assert float(rankme(quick)) == pytest.approx(float(rankme(exact)), rel=1e-5)
    assert float(rankme(quick)) != float(rankme(exact))


@pytest.mark.parametrize("device", DEVICES)
def test_block_float32_leaves_the_global_precision_alone(device: str) -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        Moments(features().to(device), precision="block_float32")
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(ValueError, match="precision must be one of float64, block_float32, got 'tf32'"):
        Moments(precision="tf32")  # type: ignore[arg-type]


@pytest.mark.parametrize("device", ON_GPU)
def test_another_device_midway_is_refused(device: str) -> None:
    state = Moments(features())
    with pytest.raises(ValueError, match="were on cpu before, now on cuda"):
        state.update(features().to(device))
    with pytest.raises(ValueError, match="move them first"):
        cka_drift(features(), previous=features().to(device))
