"""Nearest neighbors against brute force over all pairs."""

from __future__ import annotations

import math

import oracles
import pytest
import torch
from draws import gaussian, hadamard, orthonormal

from repmetrics.functional.neighbors import kde_entropy, knn_entropy, neighbor_distances, twonn

SHAPES = [(40, 3), (12, 30), (600, 4)]
"""The last has two blocks of rows."""


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_neighbors_are_those_of_brute_force(shape) -> None:
    x = gaussian(*shape) + 2
    all_pairs = torch.from_numpy(oracles.distances(x.numpy()))
    expected = all_pairs.sort(dim=1)
    distances, indices = neighbor_distances(x, k=5)
    torch.testing.assert_close(distances, expected.values[:, :5], rtol=1e-12, atol=0)
    assert torch.equal(indices, expected.indices[:, :5])


def test_duplicates_are_at_distance_zero_and_a_row_is_not_its_own_neighbor() -> None:
    x = torch.cat([gaussian(5, 3), gaussian(5, 3)]) + 1e6
    distances, indices = neighbor_distances(x, k=1)
    assert distances.max().item() == 0
    assert indices[:, 0].tolist() == [5, 6, 7, 8, 9, 0, 1, 2, 3, 4]


def test_near_duplicates_keep_their_digits() -> None:
    x = gaussian(6, 3) * 100
    twins = x + 1e-6 * orthonormal(3, 3)[0]
    distances, _ = neighbor_distances(torch.cat([x, twins]), k=1)
    # Entries of size 100 are 1e-14 apart in float64: 1e-6 is known to 1e-8 of itself.
    torch.testing.assert_close(distances, torch.full((12, 1), 1e-6, dtype=torch.float64), rtol=1e-6, atol=0)


@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_knn_entropy_equals_the_formula(shape, k) -> None:
    x = gaussian(*shape) + 0.2
    assert knn_entropy(x, k=k).item() == pytest.approx(oracles.knn_entropy(x.numpy(), k=k), rel=1e-9)


@pytest.mark.parametrize("concentration", [1.0, 5.0])
def test_kde_entropy_equals_the_formula(concentration) -> None:
    x = gaussian(40, 6)
    expected = oracles.kde_entropy(x.numpy(), concentration=concentration)
    assert kde_entropy(x, concentration=concentration).item() == pytest.approx(expected, rel=1e-10)


def test_kde_entropy_spans_more_than_one_block() -> None:
    x = gaussian(600, 3)
    u = x / x.norm(dim=1, keepdim=True)
    kernel = torch.exp(5 * (u @ u.T - 1)).fill_diagonal_(0)
    assert kde_entropy(x).item() == pytest.approx(-(kernel.sum(1) / 599).log().mean().item(), rel=1e-10)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_twonn_equals_the_formula(shape) -> None:
    x = gaussian(*shape)
    assert twonn(x).item() == pytest.approx(oracles.twonn(x.numpy()), rel=1e-9)


@pytest.mark.parametrize("dimension", [1, 2, 5])
def test_twonn_finds_the_dimension_of_a_flat_sheet(dimension) -> None:
    # The estimator's own standard error is d/√N = 2 %, with a boundary bias of a few per cent at dimension 5.
    x = torch.rand(2500, dimension, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sheet = x @ orthonormal(20, dimension).T + 3
    assert twonn(sheet).item() == pytest.approx(dimension, rel=0.1)


def test_equal_distances_have_closed_forms() -> None:
    x = hadamard(8)  # all directions at right angles
    assert knn_entropy(x, k=3).item() == pytest.approx(math.log(2) / 2, rel=1e-12)
    assert kde_entropy(x, concentration=3.0).item() == pytest.approx(3, rel=1e-12)
    assert kde_entropy(torch.ones(5, 3)).item() == pytest.approx(0, abs=1e-6)


def test_invariances() -> None:
    x = gaussian(50, 5)
    q = orthonormal(5, 5, seed=3)
    lengths = torch.exp(gaussian(50, 1, seed=4))
    for function in (knn_entropy, kde_entropy):
        assert function(lengths * x @ q).item() == pytest.approx(function(x).item(), rel=1e-9)
    assert twonn(7 * x @ q + 2).item() == pytest.approx(twonn(x).item(), rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_other_dtypes(dtype) -> None:
    x = gaussian(60, 4).to(dtype)
    z = x.double().numpy()
    # Directions of narrower dtypes are float32; the nearest pair is 100 times nearer than the unit length.
    assert knn_entropy(x).item() == pytest.approx(oracles.knn_entropy(z, k=1), rel=1e-5)
    assert kde_entropy(x).item() == pytest.approx(oracles.kde_entropy(z, concentration=5.0), rel=1e-6)
    assert twonn(x).item() == pytest.approx(oracles.twonn(z), rel=1e-9)


def test_twonn_leaves_duplicates_out_and_gives_up_below_three_rows() -> None:
    x = gaussian(50, 3)
    assert math.isfinite(twonn(torch.cat([x, x[:5]])).item())
    assert math.isnan(twonn(x[:4].repeat(2, 1)).item())
    assert knn_entropy(x[:4].repeat(2, 1)).item() == -math.inf


def test_bad_input_is_refused_in_one_sentence() -> None:
    with pytest.raises(ValueError, match="at most 10000 rows, got 10001: take a random subset"):
        twonn(torch.zeros(10_001, 1))
    with pytest.raises(ValueError, match="at least 5 rows and one column, got"):
        knn_entropy(gaussian(4, 2), k=4)
    with pytest.raises(ValueError, match="at least 3 rows"):
        twonn(gaussian(2, 2))
    with pytest.raises(ValueError, match="at least 2 rows"):
        kde_entropy(gaussian(1, 2))
    with pytest.raises(ValueError, match="2 of 9 features have length 0"):
        knn_entropy(torch.cat([torch.zeros(2, 2), torch.ones(7, 2)]))
    with pytest.raises(ValueError, match="pool the tokens first"):
        twonn(torch.ones(2, 3, 4))
