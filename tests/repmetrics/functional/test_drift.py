"""Debiased CKA against the N×N formula."""

from __future__ import annotations

import math

import oracles
import pytest
import torch
from draws import gaussian, orthonormal
from hypothesis import given, settings
from hypothesis import strategies as st

from repmetrics.functional.drift import cka_drift


@pytest.mark.parametrize(("n", "d", "e"), [(30, 4, 4), (10, 25, 3), (4, 2, 2), (200, 8, 16)])
def test_equals_the_formula(n, d, e) -> None:
    x = gaussian(n, d) + 1
    y = x[:, : min(d, e)] @ gaussian(min(d, e), e, seed=1) + gaussian(n, e, seed=2) - 4
    if oracles.hsic((y @ y.T).numpy(), (y @ y.T).numpy()) <= 0:
        pytest.skip("the unbiased HSIC of this draw is negative: no CKA")
    assert cka_drift(x, previous=y).item() == pytest.approx(oracles.cka(x.numpy(), y.numpy()), rel=1e-8)


def test_independent_features_score_zero_where_the_biased_form_scores_d_over_n_plus_d() -> None:
    values = torch.stack(
        [cka_drift(gaussian(60, 40, seed=s), previous=gaussian(60, 40, seed=s + 1000)) for s in range(50)]
    )
    # One draw's sd is about 0.02 here; the mean of 50 is within 4 standard errors of 0, and 0.4 is far away.
    assert abs(values.mean().item()) < 0.015


@given(st.integers(0, 1000), st.floats(0.01, 100))
@settings(max_examples=30, deadline=None)
def test_rotation_scale_offset_and_common_order_change_nothing(seed, scale) -> None:
    x, y = gaussian(25, 4, seed=seed), gaussian(25, 6, seed=seed + 1)
    y[:, :4] += x
    order = torch.randperm(25, generator=torch.Generator().manual_seed(seed))
    expected = cka_drift(x, previous=y).item()
    moved = scale * x[order] @ orthonormal(4, 4, seed=seed) + 9
    assert cka_drift(moved, previous=y[order]).item() == pytest.approx(expected, rel=1e-7, abs=1e-9)
    assert cka_drift(y, previous=x).item() == pytest.approx(expected, rel=1e-9)
    assert cka_drift(moved, previous=x[order]).item() == pytest.approx(1, rel=1e-7)


def test_the_order_of_rows_matters_only_between_the_two() -> None:
    x = gaussian(100, 3)
    assert abs(cka_drift(x.flip(0), previous=x).item()) < 0.3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_other_dtypes(dtype) -> None:
    x = gaussian(40, 3).to(dtype)
    y = (x.double() + gaussian(40, 3, seed=1)).to(dtype)
    expected = oracles.cka(x.double().numpy(), y.double().numpy())
    assert cka_drift(x, previous=y).item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("value", [0.0, 0.1, 1e5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_constant_features_have_no_cka(value, dtype) -> None:
    constant = torch.full((1000, 3), value, dtype=dtype)
    assert math.isnan(cka_drift(gaussian(1000, 3), previous=constant).item())
    assert math.isnan(cka_drift(constant, previous=constant).item())


def test_bad_input_is_refused_in_one_sentence() -> None:
    with pytest.raises(ValueError, match="drift compares the same rows, got 9 and 8"):
        cka_drift(gaussian(9, 3), previous=gaussian(8, 3))
    with pytest.raises(ValueError, match="at least 4 rows"):
        cka_drift(gaussian(3, 3), previous=gaussian(3, 3))
    with pytest.raises(ValueError, match="NaN or Inf"):
        cka_drift(gaussian(4, 2), previous=torch.full((4, 2), math.nan))
    with pytest.raises(ValueError, match="pool the tokens first"):
        cka_drift(torch.ones(4, 3, 2), previous=gaussian(4, 2))
