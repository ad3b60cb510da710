"""Leakage of slides into the representation."""

from __future__ import annotations

import math

import oracles
import pytest
import torch
from draws import features, gaussian, orthonormal
from hypothesis import given, settings
from hypothesis import strategies as st

from repmetrics.functional.leakage import neighbor_leakage, slide_leakage

BOTH = [slide_leakage, neighbor_leakage]


def named(n: int, *, groups: int, seed: int = 0) -> list[str]:
    """Ids in random order, of groups of unequal size with at least one row."""
    draw = torch.randint(0, groups, (n,), generator=torch.Generator().manual_seed(seed))
    draw[:groups] = torch.arange(groups)
    return [f"slide {i}" for i in draw.tolist()]


@pytest.mark.parametrize(("n", "d", "g"), [(60, 4, 5), (30, 50, 3), (700, 3, 12)])
def test_equals_the_formula(n, d, g) -> None:
    ids = named(n, groups=g)
    signature = torch.tensor([float(name.split()[1]) for name in ids])[:, None]
    x = gaussian(n, d) + 0.3 * signature + 5
    assert slide_leakage(x, groups=ids).item() == pytest.approx(oracles.slide_leakage(x.numpy(), ids), rel=1e-10)
    for k in (1, 5):
        expected = oracles.neighbor_leakage(x.numpy(), ids, k=k)
        assert neighbor_leakage(x, groups=ids, k=k).item() == pytest.approx(expected, rel=1e-10)


def test_closed_forms() -> None:
    ids = [g for g in range(6) for _ in range(4)]
    apart = orthonormal(6, 6)[ids]  # nothing but the slide
    assert slide_leakage(apart, groups=ids).item() == pytest.approx(1, rel=1e-12)
    assert neighbor_leakage(apart, groups=ids, k=3).item() == pytest.approx(23 / 3, rel=1e-12)
    balanced = torch.cat([gaussian(12, 3), -gaussian(12, 3)])
    mirrored = [i % 12 for i in range(24)]  # every slide's rows sum to 0
    assert slide_leakage(balanced, groups=mirrored).item() == pytest.approx(0, abs=1e-12)


def test_features_that_ignore_the_slide_score_chance() -> None:
    # E = (g − 1)/(N − 1), sd of the ratio √(2/(g − 1)/D) of it: 3.2 % at g = 40, D = 50; 4 of them.
    ids = named(2000, groups=40)
    x = gaussian(2000, 50)
    assert slide_leakage(x, groups=ids).item() == pytest.approx(39 / 1999, rel=0.13)
    # 20 000 neighbors, 500 of them of the same slide by chance: 4.5 % each, 4 of them.
    assert neighbor_leakage(x, groups=ids).item() == pytest.approx(1, rel=0.18)


@given(features(min_rows=12), st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_rotation_scale_and_offset_change_nothing_and_bounds_hold(x, seed) -> None:
    ids = named(len(x), groups=3, seed=seed)
    value = slide_leakage(x, groups=ids).item()
    moved = 3 * x @ orthonormal(x.shape[1], x.shape[1], seed=seed) - 2
    assert slide_leakage(moved, groups=ids).item() == pytest.approx(value, rel=1e-7)
    assert 0 <= value <= 1 + 1e-12


def test_tensor_ids_and_other_dtypes() -> None:
    ids = torch.arange(60) % 4
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        x = gaussian(60, 5).to(dtype)
        z = x.double().numpy()
        assert slide_leakage(x, groups=ids).item() == pytest.approx(oracles.slide_leakage(z, ids.tolist()), rel=1e-9)
        assert neighbor_leakage(x, groups=ids).item() == pytest.approx(
            oracles.neighbor_leakage(z, ids.tolist(), k=10), rel=1e-9
        )


@pytest.mark.parametrize("value", [0.0, 0.1, 1e5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_constant_features_have_no_leakage_to_speak_of(value, dtype) -> None:
    constant = torch.full((1000, 3), value, dtype=dtype)
    assert math.isnan(slide_leakage(constant, groups=named(1000, groups=4)).item())


@pytest.mark.parametrize("function", BOTH, ids=lambda f: f.__name__)
def test_bad_ids_are_refused_in_one_sentence(function) -> None:
    x = gaussian(12, 3)
    with pytest.raises(ValueError, match="groups must hold one id per row, got 11 for 12 rows"):
        function(x, groups=["a"] * 11)
    with pytest.raises(ValueError, match="at least two groups are needed to compare them, got 1"):
        function(x, groups=["a"] * 12)
    with pytest.raises(TypeError):
        function(x)


def test_groups_of_size_one() -> None:
    x = gaussian(12, 3)
    assert slide_leakage(x, groups=range(12)).item() == pytest.approx(1, rel=1e-12)
    with pytest.raises(ValueError, match="every group has a single row: at least one group must have two"):
        neighbor_leakage(x, groups=range(12))


def test_bad_features_are_refused_in_one_sentence() -> None:
    with pytest.raises(ValueError, match="pool the tokens first"):
        slide_leakage(torch.ones(2, 3, 4), groups=[0, 1])
    with pytest.raises(ValueError, match="NaN or Inf"):
        slide_leakage(torch.full((2, 2), math.nan), groups=[0, 1])
    with pytest.raises(ValueError, match="at least 11 rows"):
        neighbor_leakage(gaussian(10, 3), groups=[0, 1] * 5)
