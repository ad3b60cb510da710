"""Eigenvectors after one added row are those of the sum, or there are none where the formula would lose digits."""

from __future__ import annotations

import pytest
import torch
from draws import gaussian

from repmetrics.functional.linalg import symmetric_eigenvectors, update_eigenvectors


@pytest.mark.parametrize("d", [2, 3, 64, 200])
@pytest.mark.parametrize("decay", [0.0, 2.0, 6.0])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("unit", [1e-60, 1.0, 1e60])
def test_an_update_is_a_decomposition_of_the_sum(d: int, decay: float, scale: float, unit: float) -> None:
    rows = unit * gaussian(4 * d, d).to(torch.float64) * torch.logspace(0, -decay, d, dtype=torch.float64)
    row = scale * rows[0]
    whole = rows.T @ rows + torch.outer(row, row)
    updated = update_eigenvectors(*symmetric_eigenvectors(rows.T @ rows), row)
    assert updated is not None
    values, vectors = updated
    largest, eye = float(values[-1]), torch.eye(d, dtype=torch.float64)
    assert values.diff().min() >= 0
    torch.testing.assert_close(values, torch.linalg.eigvalsh(whole), rtol=0.0, atol=1e-13 * largest)
    torch.testing.assert_close(vectors.T @ vectors, eye, rtol=0.0, atol=1e-12)
    torch.testing.assert_close(vectors * values @ vectors.T, whole, rtol=0.0, atol=1e-13 * largest)


def test_no_update_where_it_would_lose_digits() -> None:
    values, vectors = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64), torch.eye(3, dtype=torch.float64)
    row = torch.ones(3, dtype=torch.float64)
    assert update_eigenvectors(values, vectors, row) is not None
    assert update_eigenvectors(values, vectors, torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)) is None
    assert update_eigenvectors(values, vectors, 0 * row) is None
    assert update_eigenvectors(torch.tensor([1.0, 1.0, 4.0], dtype=torch.float64), vectors, row) is None
    assert update_eigenvectors(torch.tensor([-1e-17, -1e-18, 4.0], dtype=torch.float64), vectors, row) is None
    assert update_eigenvectors(0 * values, vectors, row) is None
    assert update_eigenvectors(values[:1], vectors[:1, :1], row[:1]) is None
