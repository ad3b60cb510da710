"""LiDAR and alignment, whose views are grouped by explicit ids, not by position."""

from __future__ import annotations

import math

import oracles
import pytest
import torch
from draws import gaussian, orthonormal
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from repmetrics.functional.multiview import alignment, lidar, view_index


def viewed(n: int, q: int, d: int, *, seed: int = 0, jitter: float = 0.3) -> tuple[Tensor, list[int]]:
    """(n·q, d) features, q noisy views of each of n samples, and their ids."""
    ids = [i for i in range(n) for _ in range(q)]
    samples = gaussian(n, d, seed=seed) * torch.linspace(1, 0.2, d)
    return samples[ids] + jitter * gaussian(n * q, d, seed=seed + 1), ids


@pytest.mark.parametrize("debias", [False, True])
@pytest.mark.parametrize(("n", "q", "d"), [(30, 4, 6), (5, 2, 12), (50, 10, 5), (2, 3, 4)])
def test_lidar_equals_the_formula(n, q, d, debias) -> None:
    x, ids = viewed(n, q, d)
    for delta in (1e-4, 1e-2):
        expected = oracles.lidar(x.numpy(), ids, delta=delta, debias=debias)
        # Σw of n(q−1) < D views is singular up to δ: its inverse magnifies rounding to 1e-16/δ.
        assert lidar(x, views=ids, delta=delta, debias=debias).item() == pytest.approx(expected, rel=1e-7)


def test_lidar_of_separated_isotropic_samples_is_their_dimension() -> None:
    # Samples ±e_k, views along all axes equally: Σb and Σw are both multiples of I on d directions.
    d = 5
    samples = torch.cat([torch.eye(d), -torch.eye(d)]).double()
    offsets = 0.1 * torch.cat([torch.eye(d), -torch.eye(d)]).double()
    x = (samples[:, None] + offsets).flatten(0, 1) @ orthonormal(d, d).T
    ids = torch.arange(2 * d).repeat_interleave(2 * d)
    assert lidar(x, views=ids).item() == pytest.approx(d, rel=1e-9)


def test_lidar_sees_through_scale_and_views_of_unequal_spread() -> None:
    """A direction counts less if its spread is as large within samples as between them; RankMe cannot detect this."""
    x, ids = viewed(200, 5, 4, jitter=0.05)
    loud = x.clone()
    loud[:, 0] += 20 * gaussian(len(x), 1, seed=9)[:, 0]
    assert lidar(loud, views=ids).item() < lidar(x, views=ids).item() - 0.5


@given(st.integers(0, 1000), st.floats(0.01, 100), st.randoms(use_true_random=False))
@settings(max_examples=25, deadline=None)
def test_rotation_scale_offset_and_row_order_change_nothing(seed, scale, random) -> None:
    x, ids = viewed(12, 3, 4, seed=seed)
    order = list(range(len(ids)))
    random.shuffle(order)
    moved = (scale * x @ orthonormal(4, 4, seed=seed) + 3)[order]
    names = [f"image {ids[i]}" for i in order]
    for debias in (False, True):
        assert lidar(moved, views=names, debias=debias).item() == pytest.approx(
            lidar(x, views=ids, debias=debias).item(), rel=1e-6
        )
    turned = (scale * x @ orthonormal(4, 4, seed=seed))[order]
    assert alignment(turned, views=names).item() == pytest.approx(alignment(x, views=ids).item(), rel=1e-9)
    assert 1 <= lidar(x, views=ids).item() <= 4


def test_ids_not_positions_group_the_rows() -> None:
    x, ids = viewed(10, 2, 3)
    interleaved = torch.cat([x[0::2], x[1::2]])
    names = ids[0::2] + ids[1::2]
    assert names != ids
    for function in (lidar, alignment):
        right = function(x, views=ids).item()
        assert function(interleaved, views=names).item() == pytest.approx(right, rel=1e-9)
        assert abs(function(interleaved, views=ids).item() - right) > 0.05  # what grouping by position would give


def test_debiasing_removes_what_finite_views_add() -> None:
    # Samples differ along one axis only; two noisy views make their means differ along all.
    n, d = 4000, 8
    ids = torch.arange(n).repeat_interleave(2)
    x = 0.5 * gaussian(2 * n, d, seed=1)
    x[:, 0] += 5 * gaussian(n, 1, seed=2)[:, 0].repeat_interleave(2)
    plain, debiased = lidar(x, views=ids).item(), lidar(x, views=ids, debias=True).item()
    assert plain > 1.2
    assert debiased < 1.08


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_other_dtypes(dtype) -> None:
    x, ids = viewed(20, 4, 3)
    x = x.to(dtype)
    assert lidar(x, views=ids).item() == pytest.approx(oracles.lidar(x.double().numpy(), ids), rel=1e-7)
    # Unit rows of narrower dtypes are float32; the sums of two near views cancel to 1e-6 of themselves.
    assert alignment(x, views=ids).item() == pytest.approx(oracles.alignment(x.double().numpy(), ids), rel=1e-5)


def test_alignment_equals_the_formula_also_with_unequal_views() -> None:
    x = gaussian(9, 4)
    ids = list("abacbacca")
    assert alignment(x, views=ids).item() == pytest.approx(oracles.alignment(x.numpy(), ids), rel=1e-10)


def test_alignment_closed_forms() -> None:
    u = orthonormal(6, 3)
    ids = [*range(6), *range(6)]
    assert alignment(torch.cat([u, 5 * u]), views=ids).item() == pytest.approx(0, abs=1e-12)
    assert alignment(torch.cat([u, -u]), views=ids).item() == pytest.approx(4, rel=1e-12)


def test_tensor_ids_serve_like_lists() -> None:
    x, ids = viewed(6, 2, 3)
    assert lidar(x, views=torch.tensor(ids)).item() == lidar(x, views=ids).item()
    index, counts = view_index(["b", "a", "b", "a", "b"], rows=5)
    assert (index.tolist(), counts.tolist()) == ([0, 1, 0, 1, 0], [3, 2])


@pytest.mark.parametrize("function", [lidar, alignment], ids=lambda f: f.__name__)
def test_bad_ids_are_refused_in_one_sentence(function) -> None:
    x = gaussian(6, 3)
    with pytest.raises(ValueError, match="views must hold the sample's id of each row, got 5 ids for 6 rows"):
        function(x, views=list("aabbc"))
    with pytest.raises(ValueError, match="views of at least 2 samples are needed, got 1"):
        function(x, views=["a"] * 6)
    with pytest.raises(ValueError, match="each sample needs at least 2 views; 4 have one, first b, c, d"):
        function(x, views=list("aabcde"))
    with pytest.raises(TypeError):
        function(x)


def test_identical_views_are_refused() -> None:
    ids = torch.arange(4).repeat_interleave(3)
    for dtype in (torch.float32, torch.float64):
        x = 0.1 + gaussian(4, 3).to(dtype)[ids]  # the mean of three 0.1 rounds: no spread of views
        with pytest.raises(ValueError, match="identical: LiDAR needs augmented views that differ"):
            lidar(x, views=ids)


def test_bad_features_are_refused_in_one_sentence() -> None:
    with pytest.raises(ValueError, match=r"at least 4 rows and one column, got \(3, 2\)"):
        lidar(gaussian(3, 2), views=[0, 0, 1])
    with pytest.raises(ValueError, match="NaN or Inf"):
        alignment(torch.full((4, 2), math.nan), views=[0, 0, 1, 1])
