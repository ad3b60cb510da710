"""Spectral metrics against the papers' formulas, closed forms and invariances."""

from __future__ import annotations

import itertools
import math

import oracles
import pytest
import torch
from draws import features, gaussian, hadamard, orthonormal, orthonormal_centered, with_spectrum
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from repmetrics.functional.correlation import dead_features, odcorr
from repmetrics.functional.hypersphere import mean_direction, uniformity_w2
from repmetrics.functional.spectrum import (
    alpha_req,
    effective_rank,
    entropy,
    participation_ratio,
    power_law,
    rankme,
    rankme_centered,
    spectrum,
    stable_rank,
)
from repmetrics.measurement.moments import Moments

# float64 throughout: a Gram matrix squares the condition, so σ is known to √eps ≈ 1.5e-8 of σ₁ at worst. The draws
# below keep σ_k/σ₁ above 1e-3, where λ is good to about 1e-16/1e-6 relative.
TIGHT = {"rel": 1e-9, "abs": 1e-12}

FAMILY = [rankme, rankme_centered, effective_rank, participation_ratio, stable_rank]
SHAPES = [(64, 16), (200, 7), (16, 64), (33, 33), (2, 5), (2100, 6)]
"""Tall, wide (the N×N path), square, the fewest rows, more than one block of rows."""


def centered_oracle(z: oracles.Array) -> float:
    return oracles.rankme(oracles.center(z))


ORACLES = {
    rankme: oracles.rankme,
    rankme_centered: centered_oracle,
    effective_rank: oracles.effective_rank,
    participation_ratio: oracles.participation_ratio,
    stable_rank: oracles.stable_rank,
}


def skewed(n: int, d: int, *, seed: int = 0, offset: float = 0.5) -> Tensor:
    """Correlated columns of falling size about an offset: no two conventions agree on them."""
    return gaussian(n, d, seed=seed) * torch.linspace(1, 0.1, d) @ orthonormal(d, d, seed=seed + 7) + offset


# ── against the formulas ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("function", FAMILY, ids=lambda f: f.__name__)
def test_equals_the_formula(function, shape) -> None:
    # Centering leaves min(N − 1, D) directions. The last σ of the formula's SVD is near 1e-16·σ₁, which does not change
    # the entropy at this tolerance.
    x = skewed(*shape)
    assert function(x).item() == pytest.approx(ORACLES[function](x.numpy()), **TIGHT)


@pytest.mark.parametrize("function", FAMILY, ids=lambda f: f.__name__)
def test_moments_give_the_same_as_features(function) -> None:
    x = skewed(300, 20)
    assert function(Moments(x)).item() == pytest.approx(function(x).item(), **TIGHT)


@pytest.mark.parametrize("shape", [(12, 40), (39, 40)], ids=str)
@pytest.mark.parametrize("function", FAMILY, ids=lambda f: f.__name__)
def test_wide_features_take_the_small_gram_and_agree_with_the_streaming_one(function, shape) -> None:
    # Moments uses only the D×D Gram matrix, features with N < D only the N×N one. The null space of the D×D matrix is
    # rounding, and only the largest min(N, D) eigenvalues are kept.
    x = skewed(*shape)
    assert function(x).item() == pytest.approx(function(Moments(x)).item(), rel=1e-7)


def test_rankme_with_the_ports_epsilon() -> None:
    z = skewed(100, 30)
    for eps in (1e-7, 1e-5, 1e-3):
        assert rankme(z, eps=eps).item() == pytest.approx(oracles.rankme(z.numpy(), eps=eps), **TIGHT)


def test_an_epsilon_of_1e_5_is_wrong_by_more_than_four_percent_at_768() -> None:
    isotropic = torch.eye(768)
    excess = rankme(isotropic, eps=1e-5).item() / 768 - 1
    assert 0.04 < excess < 0.06
    assert rankme(isotropic).item() == pytest.approx(768, rel=1e-9)


def test_the_conventions_differ_and_each_is_its_own() -> None:
    """A test of the tests: on these features, no two conventions give the same value."""
    z = skewed(500, 24).numpy()
    values = [oracle(z) for oracle in ORACLES.values()] + [oracles.rankme(z, eps=1e-5)]
    gaps = [abs(a - b) / a for i, a in enumerate(values) for b in values[i + 1 :]]
    assert min(gaps) > 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("function", FAMILY, ids=lambda f: f.__name__)
def test_other_dtypes_are_computed_in_float64(function, dtype) -> None:
    x = skewed(200, 10).to(dtype)
    value = function(x)
    assert value.dtype == torch.float64
    assert value.item() == pytest.approx(ORACLES[function](x.to(torch.float64).numpy()), **TIGHT)


@pytest.mark.parametrize("function", FAMILY, ids=lambda f: f.__name__)
def test_gradients_and_strides_do_not_matter(function) -> None:
    x = skewed(60, 8).float()
    expected = function(x).item()
    assert function(x.requires_grad_()).item() == expected
    assert function(x.detach().T.contiguous().T).item() == pytest.approx(expected, rel=1e-12)
    assert function(torch.stack([x.detach(), x.detach()], 2)[:, :, 0]).item() == pytest.approx(expected, rel=1e-12)


def test_features_are_not_changed() -> None:
    x = skewed(1500, 8)
    before = x.clone()
    for function in FAMILY:
        function(x)
    assert torch.equal(x, before)


# ── closed forms ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("d", [1, 2, 8, 64])
def test_orthogonal_equal_columns_have_full_rank(d) -> None:
    for function in (rankme, effective_rank, participation_ratio, stable_rank):
        assert function(hadamard(64)[:, :d]).item() == pytest.approx(d, rel=1e-12)


@pytest.mark.parametrize(("r", "d", "n"), [(1, 9, 40), (3, 9, 40), (5, 30, 12), (9, 9, 9)])
def test_isotropic_of_rank_r_rotated_scores_r(r, d, n) -> None:
    x = orthonormal(n, r) @ orthonormal(d, r, seed=1).T * 12.5
    for function in (rankme, effective_rank, participation_ratio, stable_rank):
        # What is beyond rank r is rounding of 1e-16·λ₁ and floored to 0, so it does not change the entropy.
        assert function(x).item() == pytest.approx(r, rel=1e-9)


@pytest.mark.parametrize(("g", "m"), [(1, 5), (4, 3), (6, 2)])
def test_features_copied_m_times_count_once(g, m) -> None:
    x = orthonormal_centered(50, g).repeat(1, m)
    assert rankme(x).item() == pytest.approx(g, rel=1e-9)
    assert rankme_centered(x + 3).item() == pytest.approx(g, rel=1e-9)


@pytest.mark.parametrize("rho", [0.0, 0.3, 0.9])
def test_equicorrelation_has_one_large_eigenvalue(rho) -> None:
    d = 6
    target = torch.full((d, d), rho, dtype=torch.float64).fill_diagonal_(1.0)
    x = orthonormal_centered(80, d) @ torch.linalg.cholesky(target).T
    expected = torch.tensor([1 + (d - 1) * rho] + [1 - rho] * (d - 1), dtype=torch.float64)
    torch.testing.assert_close(spectrum(x, centered=True).eigenvalues, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("a", [0.25, 0.5, 1.0])
@pytest.mark.parametrize("d", [100, 128])
def test_power_law_has_its_closed_forms(a, d) -> None:
    k = torch.arange(1, d + 1, dtype=torch.float64)
    sigma = k**-a
    x = orthonormal_centered(300, d) * sigma @ orthonormal(d, d, seed=3).T
    total = sigma.sum()
    closed = math.exp(math.log(total) + a * float((sigma * k.log()).sum() / total))
    assert rankme(x).item() == pytest.approx(closed, rel=1e-9)
    fit = power_law(x)
    assert fit.alpha.item() == pytest.approx(2 * a, rel=1e-9)
    assert fit.r_squared.item() == pytest.approx(1, rel=1e-9)
    assert alpha_req(Moments(x)).item() == pytest.approx(2 * a, rel=1e-8)


def test_alpha_weighs_ranks_11_to_100_by_one_over_k() -> None:
    # A spectrum that is no power law: only the right ranks with the right weights give this slope and R².
    sigma = torch.cat([torch.full((10,), 50.0), 9 * torch.exp(-torch.arange(90) / 30.0), torch.full((28,), 1e-3)])
    x = orthonormal_centered(256, 128) * sigma @ orthonormal(128, 128, seed=2).T + 4.0
    alpha, r_squared = oracles.alpha_req(x.numpy())
    fit = power_law(x)
    assert fit.alpha.item() == pytest.approx(alpha, rel=1e-8)
    assert fit.r_squared.item() == pytest.approx(r_squared, rel=1e-8)
    assert r_squared < 0.99


@pytest.mark.parametrize(
    "x", [gaussian(500, 99), gaussian(100, 300), gaussian(500, 50) @ gaussian(50, 120)], ids=["D", "N", "rank"]
)
def test_alpha_of_fewer_than_100_ranks_is_nan(x) -> None:
    fit = power_law(x)
    assert math.isnan(fit.alpha.item())
    assert math.isnan(fit.r_squared.item())


@pytest.mark.parametrize("n", [2, 5, 17])
def test_a_simplex_of_n_points_spans_n_minus_one(n) -> None:
    simplex = torch.eye(n, dtype=torch.float64) @ orthonormal(n + 3, n, seed=4).T * 3 + 11
    assert rankme_centered(simplex).item() == pytest.approx(n - 1, rel=1e-9)


def test_a_common_offset_takes_rankme_down_and_leaves_the_centered_one() -> None:
    # Ten standard deviations of mean: λ₁ = N·D·100, the others N. Known to 2 %, the sampling of N = 4096 rows.
    d = 256
    x = gaussian(4096, d)
    sigma = torch.tensor([math.sqrt(1 + 100 * d)] + [1.0] * (d - 1))
    shifted = x + 10.0
    assert rankme(shifted).item() == pytest.approx(math.exp(entropy(sigma.double())), rel=0.02)
    assert rankme(shifted).item() < 0.6 * rankme(x).item()
    assert rankme_centered(shifted).item() == pytest.approx(rankme_centered(x).item(), rel=1e-9)


@pytest.mark.parametrize("offset", [1e3, 1e6])
def test_centered_rank_keeps_its_digits_under_a_large_offset(offset) -> None:
    # float64 carries offset 1e6 with absolute steps of 1e-10; entries are of size 1.
    x = orthonormal_centered(200, 4) * 14
    wide = torch.cat([x, torch.zeros(200, 4, dtype=torch.float64)], 1) + offset
    assert rankme_centered(wide).item() == pytest.approx(4, rel=1e-6)
    assert rankme_centered(Moments(wide)).item() == pytest.approx(4, rel=1e-6)


# ── statistical ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("gamma", [1 / 16, 1 / 4, 1 / 2])
def test_finite_sample_bias_of_isotropic_features(gamma) -> None:
    # Marchenko–Pastur to first order in γ. Fluctuations at D = 256 are O(1/D) of the value; the next order of the
    # exponents is below γ²/12, 2 % at γ = ½.
    d = 256
    x = gaussian(int(d / gamma), d, seed=5)
    tolerance = 0.002 + gamma**2 / 12
    assert rankme(x).item() == pytest.approx(d * math.exp(-gamma / 8), rel=tolerance)
    assert effective_rank(x).item() == pytest.approx(d * math.exp(-gamma / 2), rel=tolerance)
    assert participation_ratio(x).item() == pytest.approx(d / (1 + gamma), rel=0.003)


def test_the_unbiased_participation_ratio_has_no_bias() -> None:
    # γ = 2, where the plain form reads D/3. The sd over draws is 3 % at this size; 20 draws, 4 standard errors.
    d = 128
    draws = [gaussian(64, d, seed=s) for s in range(20)]
    plain = sum(participation_ratio(x).item() for x in draws) / len(draws)
    unbiased = sum(participation_ratio(x, unbiased=True).item() for x in draws) / len(draws)
    assert plain == pytest.approx(d / 3, rel=0.03)
    assert unbiased == pytest.approx(d, rel=0.03)


def test_the_unbiased_participation_ratio_equals_the_sum_over_distinct_pairs() -> None:
    for shape in [(9, 4), (5, 20), (40, 3)]:
        z = skewed(*shape)
        expected = oracles.participation_ratio_unbiased(z.numpy())
        assert participation_ratio(z, unbiased=True).item() == pytest.approx(expected, rel=1e-9)
        assert participation_ratio(Moments(z), unbiased=True).item() == pytest.approx(expected, rel=1e-7)


def test_the_unbiased_participation_ratio_of_orthogonal_rows_does_not_exist() -> None:
    assert math.isnan(participation_ratio(torch.eye(4), unbiased=True).item())


# ── properties ──────────────────────────────────────────────────────────────────────────────────────────────────


@given(features())
@settings(max_examples=60, deadline=None)
def test_ranks_are_ordered_and_bounded(x) -> None:
    n, d = x.shape
    chain = [float(min(n, d))] + [f(x).item() for f in (rankme, effective_rank, participation_ratio, stable_rank)] + [1]
    slack = 1 + 1e-9
    assert all(upper * slack >= lower for upper, lower in itertools.pairwise(chain)), chain
    assert rankme_centered(x).item() * slack >= 1
    assert rankme_centered(x).item() <= max(min(n - 1, d), 1) * slack


@given(features(), st.integers(0, 1000), st.sampled_from([-1000.0, -1.0, 1e-3, 7.0]))
@settings(max_examples=40, deadline=None)
def test_rotation_and_scale_change_nothing(x, seed, scale) -> None:
    turned = x @ orthonormal(x.shape[1], x.shape[1], seed=seed) * scale
    for function in FAMILY:
        # Repeated columns make exact zeros of λ that a rotation turns into rounding: 1e-6 is √eps·D in σ.
        assert function(turned).item() == pytest.approx(function(x).item(), rel=1e-5)


@given(features(min_rows=3), st.integers(2, 4))
@settings(max_examples=30, deadline=None)
def test_repeating_every_row_changes_nothing(x, times) -> None:
    for function in FAMILY:
        assert function(x.repeat(times, 1)).item() == pytest.approx(function(x).item(), rel=1e-5)


@given(features(min_rows=3), st.randoms(use_true_random=False))
@settings(max_examples=30, deadline=None)
def test_the_order_of_rows_and_columns_does_not_matter(x, random) -> None:
    rows, columns = list(range(x.shape[0])), list(range(x.shape[1]))
    random.shuffle(rows)
    random.shuffle(columns)
    for function in FAMILY:
        assert function(x[rows][:, columns]).item() == pytest.approx(function(x).item(), rel=1e-5)


@given(features(min_rows=3), st.floats(-100, 100))
@settings(max_examples=30, deadline=None)
def test_the_centered_ranks_do_not_see_an_offset(x, offset) -> None:
    expected = rankme_centered(x).item()
    assert rankme_centered(x + offset).item() == pytest.approx(expected, rel=1e-5)
    for function in (effective_rank, participation_ratio, stable_rank):
        value = function(x, centered=True).item()
        assert function(x - x.mean(0)).item() == pytest.approx(value, rel=1e-5)


# ── degenerate and bad input ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (1, 4)], ids=str)
@pytest.mark.parametrize("function", FAMILY, ids=lambda f: f.__name__)
def test_zero_and_constant_features_have_rank_one(function, shape) -> None:
    assert function(torch.zeros(shape)).item() == 1
    # 0.1 is not a binary fraction: its mean over rows rounds, and that rounding must not count as directions.
    assert function(torch.full(shape, 0.1)).item() == pytest.approx(1, rel=1e-12)
    assert function(torch.full((1000, 6), 0.1)).item() == pytest.approx(1, rel=1e-12)


@pytest.mark.parametrize(("shape", "length"), [((9, 4), 4), ((4, 9), 3), ((5, 5), 4), ((1, 3), 1)], ids=str)
def test_centered_spectrum_length(shape, length) -> None:
    # Centering removes a direction of the rows, not of the columns. At least one value is kept.
    for source in (gaussian(*shape), Moments(gaussian(*shape))):
        assert len(spectrum(source, centered=True).eigenvalues) == length
        assert len(spectrum(source).eigenvalues) == min(shape)


def test_floored_eigenvalues_are_counted() -> None:
    x = with_spectrum(torch.tensor([1.0, 1.0, 1e-3, 1e-9, 1e-12]), 50)
    result = spectrum(x)
    assert result.floored == 2
    assert (result.n, result.d, result.centered, len(result.eigenvalues)) == (50, 5, False, 5)
    assert result.eigenvalues.tolist() == sorted(result.eigenvalues.tolist(), reverse=True)
    assert spectrum(gaussian(50, 5)).floored == 0
    assert Moments(x).spectrum().floored == 2


BAD = [
    (torch.ones(8, 16, 384), ValueError, r"features must be \(N, D\), got \(8, 16, 384\): pool the tokens first"),
    (torch.ones(8), ValueError, r"features must be \(N, D\), got \(8,\)"),
    (torch.ones(4, 3, dtype=torch.int64), TypeError, r"floating dtype, got torch.int64: convert them with .float\(\)"),
    (torch.ones(0, 3), ValueError, r"at least 1 row and one column, got \(0, 3\)"),
    (torch.ones(3, 0), ValueError, r"one column, got \(3, 0\)"),
]


@pytest.mark.parametrize(
    ("bad", "error", "message"), BAD, ids=lambda v: getattr(v, "shape", None) and str(tuple(v.shape))
)
@pytest.mark.parametrize("function", [*FAMILY, alpha_req], ids=lambda f: f.__name__)
def test_bad_features_are_refused_in_one_sentence(function, bad, error, message) -> None:
    with pytest.raises(error, match=message) as caught:
        function(bad)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_nan_and_inf_are_counted_and_named_by_column(dtype) -> None:
    x = torch.ones(6, 4, dtype=dtype)
    x[1, 2] = math.nan
    x[4, 2] = math.inf
    x[4, 3] = -math.inf
    message = r"features hold 3 NaN or Inf in 2 of 6 rows, columns 2, 3: fix the encoder, or drop those rows"
    with pytest.raises(ValueError, match=message):
        rankme(x)


def test_infinities_that_cancel_are_still_seen() -> None:
    x = torch.zeros(4, 2)
    x[0, 1], x[1, 1] = math.inf, -math.inf
    with pytest.raises(ValueError, match=r"2 NaN or Inf in 2 of 4 rows, columns 1:"):
        rankme(x)


def test_large_finite_half_features_are_not_taken_for_infinite() -> None:
    x = torch.full((1000, 3), 60000.0, dtype=torch.float16)  # their sum overflows float16, not float64
    assert rankme(x).item() == pytest.approx(1)


def test_many_bad_columns_are_abbreviated() -> None:
    with pytest.raises(ValueError, match=r"columns 0, 1, 2, 3, 4, …: fix"):
        rankme(torch.full((2, 9), math.nan))


@pytest.mark.parametrize(
    "function", [*FAMILY, alpha_req, odcorr, dead_features, uniformity_w2, mean_direction], ids=lambda f: f.__name__
)
def test_arrays_and_lists_are_not_tensors(function) -> None:
    for wrong, name in ((gaussian(9, 3).numpy(), "ndarray"), ([[1.0, 2.0]], "list")):
        with pytest.raises(TypeError, match=rf"features must be a torch.Tensor \(N, D\), got {name}"):
            function(wrong)


def test_the_unbiased_form_is_for_uncentered_features() -> None:
    with pytest.raises(ValueError, match="leave centered=False"):
        participation_ratio(gaussian(9, 3), unbiased=True, centered=True)


# ── other packages' numbers ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("shape", [(300, 40), (1000, 64), (30, 50)], ids=str)
def test_compat_is_each_packages_own_formula(shape) -> None:
    z = skewed(*shape)
    ours = rankme(z, compat="stable-pretraining").item()
    assert ours == pytest.approx(oracles.rankme_stable_pretraining(z.numpy()), rel=1e-9)
    theirs = oracles.rankme_reptrix(z.numpy())
    # reptrix counts min(N, D) eigenvalues; where N ≤ D the last is 0 and adds −1e-7·ln 1e-7, 2e-6 of the value.
    assert rankme(z, compat="reptrix").item() == pytest.approx(theirs, rel=1e-9 if shape[0] > shape[1] else 2e-6)


def test_compat_reproduces_the_known_faults_and_the_default_does_not() -> None:
    ones = torch.ones(800, 768)
    assert rankme(ones, compat="stable-pretraining").item() == pytest.approx(1.0925, abs=5e-4)
    assert rankme(ones).item() == pytest.approx(1, rel=1e-12)
    x = gaussian(1000, 1024, dtype=torch.float32)
    # metrics.md's pair of figures on one 1000×1024 Gaussian draw; the draw's own seed is unknown, its spread is 1.
    assert rankme(x).item() == pytest.approx(814.4, abs=2)
    assert rankme(x, compat="reptrix").item() == pytest.approx(614.1, abs=3)


def test_an_unknown_port_is_named() -> None:
    with pytest.raises(ValueError, match="compat must be one of stable-pretraining, reptrix, got 'lightly'"):
        rankme(gaussian(5, 2), compat="lightly")  # type: ignore[arg-type]
