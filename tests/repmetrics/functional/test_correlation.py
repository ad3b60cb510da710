"""ODCorr and dead features against the formula, closed forms and invariances."""

from __future__ import annotations

import math

import oracles
import pytest
import torch
from draws import equicorrelated, features, gaussian, hadamard, orthonormal, orthonormal_centered
from hypothesis import given, settings
from hypothesis import strategies as st

from repmetrics.functional.correlation import correlation, dead_features, odcorr, odcorr_null_floor
from repmetrics.measurement.moments import Moments

REDUCTIONS = ["abs", "rms", "signed"]
TIGHT = {"rel": 1e-10, "abs": 1e-12}  # float64 sums over at most a few hundred rows

# ── ODCorr ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", [(50, 6), (8, 20), (2, 3), (1500, 4)], ids=str)
def test_equals_the_formula(shape, reduction) -> None:
    x = gaussian(*shape) @ gaussian(shape[1], shape[1], seed=1) + 2.0
    expected = oracles.odcorr(x.numpy(), reduction=reduction)
    assert odcorr(x, reduction=reduction).item() == pytest.approx(expected, **TIGHT)
    assert odcorr(Moments(x), reduction=reduction).item() == pytest.approx(expected, **TIGHT)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_other_dtypes_are_computed_in_float64(dtype) -> None:
    x = (gaussian(200, 7) + 1).to(dtype)
    assert odcorr(x).dtype == torch.float64
    assert odcorr(x).item() == pytest.approx(oracles.odcorr(x.double().numpy()), **TIGHT)


def test_orthogonal_columns_do_not_correlate() -> None:
    assert odcorr(hadamard(64)[:, 1:]).item() == pytest.approx(0, abs=1e-12)  # column 0 is constant


@pytest.mark.parametrize(("g", "m"), [(1, 4), (4, 3), (5, 2)])
def test_copied_features(g, m) -> None:
    assert odcorr(orthonormal_centered(40, g).repeat(1, m)).item() == pytest.approx((m - 1) / (g * m - 1), **TIGHT)


@pytest.mark.parametrize("d", [3, 10])
def test_one_duplicated_pair(d) -> None:
    x = orthonormal_centered(40, d)
    x[:, 1] = x[:, 0]
    assert odcorr(x).item() == pytest.approx(2 / (d * (d - 1)), **TIGHT)


@pytest.mark.parametrize("rho", [-0.1, 0.0, 0.4, 0.95])
def test_equicorrelation_is_read_back(rho) -> None:
    x = equicorrelated(60, 7, rho) * torch.arange(1, 8) + 5
    assert odcorr(x).item() == pytest.approx(abs(rho), **TIGHT)
    assert odcorr(x, reduction="rms").item() == pytest.approx(abs(rho), **TIGHT)
    assert odcorr(x, reduction="signed").item() == pytest.approx(rho, **TIGHT)


def test_the_diagonal_is_left_out() -> None:
    """With the diagonal in, two uncorrelated features would score 1/2."""
    assert odcorr(orthonormal_centered(30, 2)).item() == pytest.approx(0, abs=1e-12)


def test_independent_features_score_the_null_floor() -> None:
    # 32 640 pairs: the mean |r| is known to 0.4 % (one standard error); 4 of them.
    for n in (20, 200):
        assert odcorr(gaussian(n, 256, seed=3)).item() == pytest.approx(odcorr_null_floor(n), rel=0.017)


def test_null_floor_closed_form() -> None:
    # n = 2: every correlation is ±1. n = 4: r is uniform on −1 … 1, so E|r| = 1/2.
    assert odcorr_null_floor(2) == pytest.approx(1, rel=1e-12)
    assert odcorr_null_floor(4) == pytest.approx(0.5, rel=1e-12)
    assert odcorr_null_floor(10**7) == pytest.approx(math.sqrt(2 / math.pi / 10**7), rel=1e-6)
    with pytest.raises(ValueError, match="n ≥ 2 rows, got 1"):
        odcorr_null_floor(1)


@given(features(min_rows=4, min_cols=2), st.integers(0, 1000))
@settings(max_examples=50, deadline=None)
def test_affine_maps_and_signs_of_each_feature_change_nothing(x, seed) -> None:
    scale = torch.exp(gaussian(1, x.shape[1], seed=seed)) * gaussian(1, x.shape[1], seed=seed + 1).sign()
    moved = x * scale + 10 * gaussian(1, x.shape[1], seed=seed + 2)
    for reduction in ("abs", "rms"):
        # An offset of 30 leaves 14 digits of a column of size 1; one of size 1e-3 keeps 10.
        assert odcorr(moved, reduction=reduction).item() == pytest.approx(
            odcorr(x, reduction=reduction).item(), rel=1e-7, abs=1e-9
        )
    assert 0 <= odcorr(x).item() <= 1 + 1e-12


def test_rotation_does_change_it() -> None:
    x = gaussian(200, 6) * torch.arange(1, 7)
    assert abs(odcorr(x @ orthonormal(6, 6)).item() - odcorr(x).item()) > 0.05


@given(features(min_rows=3, min_cols=2), st.integers(2, 4))
@settings(max_examples=25, deadline=None)
def test_repeating_every_row_changes_nothing(x, times) -> None:
    assert odcorr(x.repeat(times, 1)).item() == pytest.approx(odcorr(x).item(), rel=1e-8, abs=1e-10)


def test_constant_features_are_left_out_and_counted() -> None:
    x = gaussian(100, 5).float()
    padded = torch.cat([x, torch.full((100, 2), 0.1), torch.zeros(100, 1), torch.full((100, 1), 1e6)], 1)
    for source in (padded, Moments(padded)):
        assert correlation(source).excluded == 4
        assert correlation(source).matrix.shape == (5, 5)
        assert odcorr(source).item() == pytest.approx(odcorr(x).item(), **TIGHT)
    torch.testing.assert_close(correlation(padded).matrix.diagonal(), torch.ones(5, dtype=torch.float64))


@pytest.mark.parametrize(
    "x",
    # In float64 the mean of a thousand 0.1 rounds: its variance is 1e-33, not 0.
    [torch.full((1000, 3), 0.1, dtype=torch.float64), torch.full((9, 3), 0.1), torch.zeros(9, 3), gaussian(9, 1)],
    ids=["0.1 in float64", "0.1", "0", "D=1"],
)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_fewer_than_two_varying_features_have_no_correlation(x, reduction) -> None:
    assert math.isnan(odcorr(x, reduction=reduction).item())
    assert math.isnan(odcorr(Moments(x), reduction=reduction).item())


def test_bad_input_is_refused_in_one_sentence() -> None:
    with pytest.raises(ValueError, match=r"at least 2 rows and one column, got \(1, 4\)"):
        odcorr(torch.ones(1, 4))
    with pytest.raises(ValueError, match="at least 2 rows, the moments hold 1"):
        odcorr(Moments(torch.ones(1, 4)))
    with pytest.raises(ValueError, match="reduction must be one of abs, rms, signed, got 'mean'"):
        odcorr(gaussian(5, 3), reduction="mean")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="NaN or Inf in 1 of 3 rows, columns 1"):
        odcorr(torch.tensor([[1.0, 2.0], [3.0, math.nan], [5.0, 6.0]]))
    with pytest.raises(ValueError, match="pool the tokens first"):
        odcorr(torch.ones(2, 3, 4))
    with pytest.raises(TypeError, match=r"torch.int32: convert them with .float\(\)"):
        odcorr(torch.ones(4, 2, dtype=torch.int32))


# ── dead features ───────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("ratio", [0.9e-6, 1.1e-6])
def test_dead_is_below_a_millionth_of_the_median_variance(ratio) -> None:
    scale = torch.ones(11, dtype=torch.float64)
    scale[2] = scale[7] = ratio**0.5
    x = orthonormal_centered(50, 11) * scale + 0.3
    expected = 2 / 11 if ratio < 1e-6 else 0
    assert oracles.dead_features(x.numpy()) == pytest.approx(expected)
    assert dead_features(x).item() == pytest.approx(expected)
    assert dead_features(Moments(x)).item() == pytest.approx(expected)


@pytest.mark.parametrize("value", [0.0, 0.1, 1e4])
@pytest.mark.parametrize("constant", [3, 6, 10])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_constant_features_are_dead_even_in_the_majority(value, constant, dtype) -> None:
    # In float64 the mean of 0.1 rounds, and a variance of 1e-33 must count as dead.
    x = gaussian(1000, 10).to(dtype)
    x[:, :constant] = value
    assert dead_features(x).item() == pytest.approx(constant / 10)
    assert dead_features(Moments(x)).item() == pytest.approx(constant / 10)


def test_healthy_features_are_not_dead() -> None:
    assert dead_features(gaussian(100, 20) * torch.logspace(0, -2.5, 20)).item() == 0
