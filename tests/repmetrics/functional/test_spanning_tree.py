"""Minimum spanning trees against SciPy's, and dimensions of known sets."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from draws import gaussian, orthonormal
from scipy.sparse.csgraph import minimum_spanning_tree

from repmetrics.functional.spanning_tree import mst_dimension, tree_length


def test_the_tree_is_scipys() -> None:
    rows = gaussian(120, 5).numpy()
    distances = np.sqrt(((rows[:, None] - rows) ** 2).sum(2))
    assert tree_length(distances) == pytest.approx(minimum_spanning_tree(distances).sum(), rel=1e-12)


@pytest.mark.parametrize(("d", "expected"), [(1, 1.00), (2, 1.91), (5, 4.69), (10, 8.77)])
def test_cubes_have_their_dimension_but_for_the_known_bias(d, expected) -> None:
    """Uniform cubes of dimension d in 64 columns, 2048 rows; values of an independent program on another draw."""
    cube = torch.rand(2048, d, generator=torch.Generator().manual_seed(d), dtype=torch.float64)
    rows = cube @ orthonormal(64, d, seed=1).T
    # Draws of the cube differ by up to 2 %, draws of the subsets as much.
    assert mst_dimension(rows, unit=False).item() == pytest.approx(expected, rel=0.06)


def test_equals_the_fit_over_scipys_trees() -> None:
    rows = gaussian(320, 4).numpy()
    unit = rows / np.sqrt((rows**2).sum(1, keepdims=True))
    random = np.random.default_rng(0)
    sizes = np.geomspace(20, 320, 8)
    points = []
    for size in sizes.round().astype(int):
        for _ in range(12):
            part = unit[random.permutation(320)[:size]]
            tree = minimum_spanning_tree(np.sqrt(((part[:, None] - part) ** 2).sum(2))).sum()
            points.append((np.log(size), np.log(tree)))
    slope = np.cov(np.array(points).T)[0, 1] / np.var([x for x, _ in points], ddof=1)
    # 3 draws against 12: the slope's standard error is .01, the dimension's .1
    assert mst_dimension(torch.from_numpy(rows)).item() == pytest.approx(1 / (1 - slope), abs=0.3)


def test_directions_lose_the_radius() -> None:
    generator = torch.Generator().manual_seed(0)
    circle = torch.rand(1024, generator=generator, dtype=torch.float64) * 2 * math.pi
    rows = torch.stack([circle.cos(), circle.sin()], 1) * (1 + torch.rand(1024, 1, generator=generator))
    assert mst_dimension(rows).item() == pytest.approx(1, abs=0.05)
    assert mst_dimension(rows, unit=False).item() > 1.7


def test_rotation_and_scale_change_nothing_and_the_seed_little() -> None:
    rows = gaussian(300, 6)
    expected = mst_dimension(rows).item()
    assert mst_dimension(3 * rows @ orthonormal(6, 6)).item() == pytest.approx(expected, rel=1e-9)
    assert mst_dimension(rows, seed=1).item() == pytest.approx(expected, rel=0.15)


def test_few_or_constant_rows_have_no_dimension() -> None:
    assert math.isnan(mst_dimension(gaussian(63, 4)).item())
    assert math.isnan(mst_dimension(torch.full((100, 4), 0.1)).item())


def test_of_many_rows_2048_are_used() -> None:
    rows = gaussian(2 * 2048 + 1, 3)
    assert mst_dimension(rows) == mst_dimension(rows[torch.arange(2048) * len(rows) // 2048])
