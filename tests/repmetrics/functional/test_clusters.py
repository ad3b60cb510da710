"""k-means, adjusted mutual information, agreement and learnability of clusters."""

from __future__ import annotations

import math

import oracles
import pytest
import torch
from draws import gaussian, orthonormal
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.cluster.vq import kmeans2
from torch import Tensor

from repmetrics.functional.clusters import (
    adjusted_mutual_information,
    cluster_agreement,
    cluster_learnability,
    kmeans,
)


def blobs(k: int, per: int, d: int, *, spread: float = 0.05, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(k·per, d) rows around k orthogonal directions in random order, and their direction."""
    labels = torch.arange(k * per) % k
    return orthonormal(d, d, seed=seed)[labels] + spread * gaussian(k * per, d, seed=seed + 1), labels


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3)), min_size=3, max_size=7))
@example([(0, 0), (1, 1), (2, 2)])
@settings(max_examples=40, deadline=None)
def test_adjusted_mutual_information_equals_the_mean_over_permutations(pairs: list[tuple[int, int]]) -> None:
    first, second = (list(labels) for labels in zip(*pairs, strict=True))
    value = adjusted_mutual_information(torch.tensor(first), torch.tensor(second))
    if len(set(first)) == len(set(second)) == 1 or len(set(first)) == len(set(second)) == len(first):
        assert value == pytest.approx(1)  # by convention: the formula is 0/0
    elif len(set(first)) == 1 or len(set(second)) == 1:
        assert value == pytest.approx(0, abs=1e-12)
    else:
        # The mean entropy may equal E I up to rounding: then the quotient is rounding, too.
        expected = oracles.adjusted_mutual_information(first, second)
        assert value == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_adjusted_mutual_information_has_the_published_value() -> None:
    """The labels and the value that scikit-learn's own test uses, from the MATLAB code of Vinh et al."""
    first = torch.tensor([1] * 6 + [2] * 6 + [3] * 5)
    second = torch.tensor([1, 1, 1, 1, 2, 1, 2, 2, 2, 2, 3, 1, 3, 3, 3, 2, 2])
    assert adjusted_mutual_information(first, second) == pytest.approx(0.27821, abs=1e-5)
    # a larger case of the same test: numbers of rows at which factorials overflow
    assert adjusted_mutual_information(first.repeat(110), second.repeat(110)) == pytest.approx(0.38, abs=0.01)


def test_independent_labels_agree_by_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    values = [
        adjusted_mutual_information(*torch.randint(0, 10, (2, 300), generator=generator).unbind()) for _ in range(20)
    ]
    assert abs(sum(values) / 20) < 0.01  # sd of a mean of 20: 0.002


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kmeans_finds_separated_clusters_and_is_a_fixed_point(dtype) -> None:
    rows, labels = blobs(6, 30, 8)
    centroids, clusters = kmeans(rows.to(dtype), 6, seed=3)
    assert adjusted_mutual_information(labels, clusters) == pytest.approx(1)
    means = torch.stack([rows[clusters == c].mean(0) for c in range(6)])
    torch.testing.assert_close(centroids.double(), means, rtol=1e-5, atol=1e-6)


def test_kmeans_is_as_good_as_scipys() -> None:
    rows = gaussian(500, 6, seed=4)

    def inertia(centroids: Tensor) -> float:
        return torch.cdist(rows, centroids).min(1).values.square().sum().item()

    ours = min(inertia(kmeans(rows, 12, seed=s)[0]) for s in range(5))
    theirs = min(inertia(torch.from_numpy(kmeans2(rows.numpy(), 12, iter=100, minit="++", rng=s)[0])) for s in range(5))
    assert ours == pytest.approx(theirs, rel=0.02)


def test_kmeans_has_no_more_clusters_than_distinct_rows() -> None:
    rows = gaussian(3, 4).repeat(5, 1)
    centroids, labels = kmeans(rows, 7, seed=0)
    assert len(centroids) == 3
    torch.testing.assert_close(centroids[labels], rows)


def test_agreement_is_that_of_two_halves() -> None:
    clustered, _ = blobs(10, 40, 16)
    diffuse = gaussian(400, 16)
    stable, unstable = (cluster_agreement(x, clusters=10).item() for x in (clustered, diffuse))
    assert stable > 0.9 > 0.5 > unstable
    assert cluster_agreement(clustered).item() == pytest.approx(
        (stable + cluster_agreement(clustered, clusters=50).item()) / 2, rel=1e-12
    )


def test_learnability_is_an_accuracy_on_held_out_rows() -> None:
    clustered, _ = blobs(10, 40, 16)
    assert cluster_learnability(clustered, clusters=10).item() > 0.99
    easy, hard = (cluster_learnability(x, clusters=10).item() for x in (gaussian(400, 2), gaussian(400, 30)))
    assert easy > 0.8 > hard > 0.1  # in 30 dimensions clusters are slices of one cloud


@pytest.mark.parametrize("function", [cluster_agreement, cluster_learnability])
def test_collapse_and_few_rows_have_no_value(function) -> None:
    assert math.isnan(function(torch.full((400, 5), 0.3)).item())
    assert math.isnan(function(gaussian(199, 5)).item())
    assert math.isfinite(function(gaussian(200, 5)).item())
    with pytest.raises(ValueError, match="at least 2, got 1"):
        function(gaussian(200, 5), clusters=1)


@pytest.mark.parametrize("function", [cluster_agreement, cluster_learnability])
def test_scale_and_offset_change_nothing(function) -> None:
    rows, _ = blobs(10, 40, 16, spread=0.3)
    assert function(7 * rows - 3, clusters=10).item() == pytest.approx(function(rows, clusters=10).item(), abs=1e-12)
