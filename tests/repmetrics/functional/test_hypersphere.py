"""Metrics of the directions u = x/‖x‖."""

from __future__ import annotations

import math

import oracles
import pytest
import torch
from draws import features, gaussian, orthonormal
from hypothesis import given, settings
from hypothesis import strategies as st

from repmetrics.functional.hypersphere import directions, mean_direction, uniformity_w2
from repmetrics.measurement.moments import Moments

FUNCTIONS = {uniformity_w2: oracles.uniformity_w2, mean_direction: oracles.mean_direction}


def by_name(function) -> str:
    return function.__name__


@pytest.mark.parametrize("shape", [(100, 8), (6, 20), (1, 4), (1500, 5)], ids=str)
@pytest.mark.parametrize("function", FUNCTIONS, ids=by_name)
def test_equals_the_formula(function, shape) -> None:
    x = gaussian(*shape) + 0.4
    # W₂ is a root: where it is 0.05 an error of 1e-13 in its square is one of 1e-12.
    expected = FUNCTIONS[function](x.numpy())
    assert function(x).item() == pytest.approx(expected, rel=1e-9)
    assert function(Moments(x, unit=True)).item() == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("function", FUNCTIONS, ids=by_name)
def test_other_dtypes(function, dtype) -> None:
    x = (gaussian(300, 8) + 0.4).to(dtype)
    assert function(x).dtype == torch.float64
    assert function(x).item() == pytest.approx(FUNCTIONS[function](x.double().numpy()), rel=1e-9)


def test_moments_of_rows_that_are_not_unit_are_refused() -> None:
    for function in FUNCTIONS:
        with pytest.raises(ValueError, match=r"build them with Moments\(features, unit=True\)"):
            function(Moments(directions(gaussian(50, 4))))


@pytest.mark.parametrize(("r", "d"), [(1, 8), (4, 16), (16, 16)])
def test_uniformity_of_rank_r_is_a_closed_form(r, d) -> None:
    # ±e₁ … ±e_r rotated: mean 0, covariance I/r on r of d directions, exactly.
    basis = orthonormal(d, d, seed=2)[:, :r].T
    x = torch.cat([basis, -basis])
    # At r = d the square is 0 up to 1e-15, its root up to 4e-8.
    assert uniformity_w2(x).item() == pytest.approx(math.sqrt(2 - 2 * math.sqrt(r / d)), rel=1e-9, abs=1e-7)


@pytest.mark.parametrize(("r", "d"), [(4, 64), (16, 64), (64, 64)])
def test_uniformity_of_gaussian_features_of_rank_r(r, d) -> None:
    # N = 64·r: what finite sampling adds to the square is of order r/N = 1/64 · ¼ of tr Σ.
    x = gaussian(64 * r, r, seed=1) @ orthonormal(d, d, seed=2)[:, :r].T
    assert uniformity_w2(x).item() ** 2 == pytest.approx(2 - 2 * math.sqrt(r / d), abs=0.02)


def test_complete_collapse() -> None:
    x = torch.ones(50, 6) * torch.arange(1, 51)[:, None]
    assert mean_direction(x).item() == pytest.approx(1, abs=1e-6)
    assert uniformity_w2(x).item() == pytest.approx(math.sqrt(2), abs=1e-6)


def test_opposite_directions_cancel() -> None:
    x = gaussian(40, 5)
    assert mean_direction(torch.cat([x, -3 * x])).item() == pytest.approx(0, abs=1e-12)


@given(features(min_cols=2), st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_rotation_and_the_length_of_rows_change_nothing(x, seed) -> None:
    lengths = torch.exp(gaussian(len(x), 1, seed=seed))
    turned = lengths * x @ orthonormal(x.shape[1], x.shape[1], seed=seed)
    assert mean_direction(turned).item() == pytest.approx(mean_direction(x).item(), rel=1e-9, abs=1e-9)
    # Exact zeros of λ become 1e-16·λ₁ under a rotation; its root enters W₂².
    assert uniformity_w2(turned).item() ** 2 == pytest.approx(uniformity_w2(x).item() ** 2, abs=1e-6)
    assert 0 <= mean_direction(x).item() <= 1 + 1e-12
    assert 0 <= uniformity_w2(x).item() <= math.sqrt(2) + 1e-6


@pytest.mark.parametrize("scale", [1e-30, 1e-22, 1e22, 1e30])
def test_directions_of_very_short_and_very_long_rows(scale) -> None:
    x = gaussian(20, 4, dtype=torch.float32)
    torch.testing.assert_close(directions(x * scale), directions(x), rtol=1e-6, atol=1e-7)


def test_a_row_of_length_zero_has_no_direction() -> None:
    x = gaussian(10, 3)
    x[4] = 0
    for function in FUNCTIONS:
        with pytest.raises(ValueError, match="1 of 10 features have length 0, hence no direction"):
            function(x)


def test_bad_input_is_refused_in_one_sentence() -> None:
    for function in FUNCTIONS:
        with pytest.raises(ValueError, match="pool the tokens first"):
            function(torch.ones(2, 3, 4))
        with pytest.raises(TypeError, match="floating dtype"):
            function(torch.ones(2, 3, dtype=torch.int64))
        with pytest.raises(ValueError, match="1 NaN or Inf in 1 of 2 rows, columns 0"):
            function(torch.tensor([[math.nan, 1.0], [1.0, 1.0]]))
