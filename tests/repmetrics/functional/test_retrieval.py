"""View retrieval and InfoNCE against pair-by-pair cosines, and at collapse."""

from __future__ import annotations

import math

import numpy as np
import oracles
import pytest
import torch
from draws import gaussian, orthonormal
from torch import Tensor

from repmetrics.functional.retrieval import (
    match_views,
    mean_matches,
    view_infonce,
    view_retrieval,
    view_retrieval_whitened,
)


def two_views(n: int, d: int, *, noise: float = 0.7, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(n, d) features of two noisy views, with a decaying spectrum and an offset."""
    scale = torch.arange(1, d + 1, dtype=torch.float64) ** -1.0
    images = gaussian(n, d, seed=seed)
    first, second = ((images + noise * gaussian(n, d, seed=seed + k)) * scale + 3 for k in (1, 2))
    return first, second


def stacked(first: Tensor, second: Tensor) -> tuple[Tensor, list[int]]:
    return torch.cat([first, second]), [*range(len(first)), *range(len(first))]


@pytest.mark.parametrize(("n", "d"), [(40, 6), (60, 30), (600, 8)], ids=str)
def test_equals_the_formula(n, d) -> None:
    first, second = two_views(n, d)
    rows, ids = stacked(first, second)
    a, b = first.numpy(), second.numpy()
    raw, white = view_retrieval(rows, views=ids).item(), view_retrieval_whitened(rows, views=ids).item()
    assert 1 / n < raw < 1  # neither chance nor saturated: the formula is tested where it can differ
    assert raw == pytest.approx(oracles.view_retrieval(a, b), rel=1e-12)
    assert white == pytest.approx(oracles.view_retrieval(a, b, whiten=True), rel=1e-12)
    assert view_infonce(rows, views=ids).item() == pytest.approx(oracles.view_infonce(a, b), rel=1e-10)


def test_whitening_floors_small_eigenvalues() -> None:
    """Directions below the floor keep their order of magnitude below 1: whitening does not raise rounding to signal."""
    first, second = two_views(60, 5)
    tiny = torch.tensor([1, 1, 1, 1e-6, 1e-6])
    rows, ids = stacked(first * tiny, second * tiny)
    kept, _ = stacked(first[:, :3], second[:, :3])
    assert view_retrieval_whitened(rows, views=ids) == view_retrieval_whitened(kept, views=ids)


def test_ids_not_positions_pair_the_views_and_further_views_are_ignored() -> None:
    first, second = two_views(50, 6)
    rows, ids = stacked(first, second)
    expected = view_retrieval(rows, views=ids).item()
    order = torch.randperm(50, generator=torch.Generator().manual_seed(3))
    shuffled = torch.cat([first[order], second])
    names = [f"image {i}" for i in [*order.tolist(), *range(50)]]
    assert view_retrieval(shuffled, views=names).item() == pytest.approx(expected, rel=1e-12)
    third = torch.cat([rows, gaussian(50, 6, seed=9)])
    assert view_retrieval(third, views=[*ids, *range(50)]).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("function", [view_retrieval, view_retrieval_whitened], ids=["raw", "whitened"])
def test_collapse_is_chance_and_equal_views_are_certain(function) -> None:
    first, second = two_views(40, 6)
    assert function(torch.full((80, 6), 0.1), views=[*range(40)] * 2).item() == pytest.approx(1 / 40)
    assert function(*stacked(first, first)[:1], views=stacked(first, first)[1]).item() == 1
    constant_views = torch.cat([first, second.mean(0).expand(40, -1)])
    # equal second views differ by rounding, so that one image of 40 is hit, or two
    assert function(constant_views, views=[*range(40)] * 2).item() == pytest.approx(1 / 40, abs=0.03)


def test_infonce_has_closed_forms() -> None:
    n = 5
    simplex = torch.eye(n, dtype=torch.float64)  # centered cosines: 1 and −1/(n − 1)
    rows, ids = stacked(simplex, simplex)
    expected = math.log(1 + (n - 1) * math.exp(-10 * (1 + 1 / (n - 1))))
    assert view_infonce(rows, views=ids).item() == pytest.approx(expected, rel=1e-12)
    assert view_infonce(torch.ones(10, 3), views=[*range(5)] * 2).item() == pytest.approx(math.log(5), rel=1e-12)


def test_rotation_scale_and_offset_change_nothing() -> None:
    first, second = two_views(80, 7)
    moved = [4 * each @ orthonormal(7, 7, seed=5) - 2 for each in (first, second)]
    for whiten in (False, True):
        before, after = match_views(first, second, whiten=whiten), match_views(*moved, whiten=whiten)
        assert torch.equal(before.hits, after.hits)
        torch.testing.assert_close(after.losses, before.losses, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("whiten", [False, True])
def test_without_a_block_queries_and_gallery_lose_its_images(whiten) -> None:
    n = 530  # two blocks of queries
    first, second = two_views(n, 9, noise=1.0)
    groups = torch.randint(0, 5, (n,), generator=torch.Generator().manual_seed(1))
    rows, ids = stacked(first, second)
    result = mean_matches(rows, views=ids, blocks=groups.repeat(2), whiten=whiten)
    similarity = oracles.view_similarity(first.numpy(), second.numpy(), whiten=whiten)
    for block in range(5):
        kept = (groups != block).numpy()
        part = similarity[kept][:, kept]
        assert result.hits[1 + block].item() == pytest.approx(
            (part.argmax(1) == np.arange(len(part))).mean(), rel=1e-12
        )
        losses = np.log(np.exp(10 * part).sum(1)) - 10 * np.diag(part)
        assert result.losses[1 + block].item() == pytest.approx(losses.mean(), rel=1e-9)
    assert len(set(result.hits.tolist())) > 1


def test_bad_input_is_refused_in_one_sentence() -> None:
    with pytest.raises(ValueError, match=r"one shape \(N, D\), got \(4, 3\) and \(4, 2\)"):
        match_views(gaussian(4, 3), gaussian(4, 2))
    with pytest.raises(ValueError, match="at least 2 views; 1 have one, first 2"):
        view_retrieval(gaussian(5, 2), views=[0, 1, 0, 1, 2])
    with pytest.raises(TypeError, match="floating"):
        match_views(torch.ones(4, 3, dtype=torch.int64), torch.ones(4, 3, dtype=torch.int64))
