"""RankMe from a float64 Gram matrix against the float64 SVD of the same float32 features, on spectra that collapse."""

from __future__ import annotations

import oracles
import pytest
import torch
from draws import generator, with_spectrum
from torch import Tensor

from repmetrics.functional.spectrum import rankme, spectrum
from repmetrics.measurement.moments import Moments

SMALL = (2048, 256)
FULL = pytest.param((8192, 768), marks=pytest.mark.slow)


def spectra(d: int) -> dict[str, Tensor]:
    k = torch.arange(1, d + 1, dtype=torch.float64)
    return {
        "lambda k^-1": k**-0.5,
        "lambda k^-4": k**-2,
        "sigma exp 1e-8": 10 ** (-8 * (k - 1) / (d - 1)),
        "rank 64": (k <= 64).to(torch.float64),
    }


def drawn(name: str, shape: tuple[int, int]) -> Tensor:
    n, d = shape
    return (with_spectrum(spectra(d)[name], n) * n**0.5).float()


# What a float64 Gram matrix cannot resolve is λ < D·eps·λ₁, σ < 4e-7·σ₁ at D = 768. Directions below that are set to
# zero and counted. "sigma exp" has a fifth of its directions there, worth 6e-6 of RankMe; the rounding of float32
# features of "rank 64" puts the other D − 64 at σ ≈ 1e-8·σ₁, worth 1.6e-6 at D = 768 (7e-7 at 256).
@pytest.mark.parametrize("shape", [SMALL, FULL], ids=str)
@pytest.mark.parametrize(
    ("name", "tolerance"), [("lambda k^-1", 1e-6), ("lambda k^-4", 1e-6), ("sigma exp 1e-8", 1e-5), ("rank 64", 2e-6)]
)
def test_rankme_of_float32_features_against_float64_svd(name, tolerance, shape) -> None:
    x = drawn(name, shape)
    expected = oracles.rankme(x.double().numpy())
    assert rankme(x).item() == pytest.approx(expected, rel=tolerance)
    streamed = Moments()
    for batch in x.split(500):
        streamed.update(batch)
    assert rankme(streamed).item() == pytest.approx(expected, rel=tolerance)


def test_rank_64_reads_64_where_svd_also_counts_the_rounding_of_float32() -> None:
    x = drawn("rank 64", SMALL)
    svd = oracles.rankme(x.double().numpy())
    assert svd - 64 > 1e-5
    assert rankme(x).item() == pytest.approx(64, rel=1e-9)
    assert spectrum(x).floored == 192


def test_rank_64_that_float32_holds_exactly() -> None:
    # Products of small integers: no rounding anywhere, so the SVD sees exactly 64 directions too.
    n, d = SMALL
    left = torch.randint(-3, 4, (n, 64), generator=generator(0)).double()
    x = (left @ torch.randint(-3, 4, (64, d), generator=generator(1)).double()).float()
    assert rankme(x).item() == pytest.approx(oracles.rankme(x.double().numpy()), rel=1e-12)
    assert spectrum(x).floored == d - 64


@pytest.mark.parametrize("name", ["lambda k^-4", "sigma exp 1e-8"])
def test_a_float32_gram_matrix_would_fail_these_targets(name) -> None:
    """The sums are float64 because the same matrix product in float32 has an error a thousand times larger."""
    x = drawn(name, SMALL)
    square = (x.T @ x).double()
    sigma = torch.linalg.eigvalsh(square).clamp_min(0).sqrt()
    p = sigma / sigma.sum()
    wrong = torch.exp(-torch.special.xlogy(p, p).sum()).item()
    assert abs(wrong / oracles.rankme(x.double().numpy()) - 1) > 1e-4


def test_bfloat16_features_carry_false_rank() -> None:
    # The quantization is in the features, not in the arithmetic: the result is exact for the given features.
    x = drawn("lambda k^-4", SMALL)
    half = x.bfloat16()
    assert rankme(half).item() > 1.05 * rankme(x).item()
    assert rankme(half).item() == pytest.approx(oracles.rankme(half.double().numpy()), rel=1e-6)
