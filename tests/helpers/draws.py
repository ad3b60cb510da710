"""Features to test with, reproducible by seed."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gaussian(n: int, d: int, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(n, d, generator=generator(seed), dtype=torch.float64).to(dtype)


def orthonormal(n: int, d: int, *, seed: int = 0) -> Tensor:
    """(n, d) float64 with orthonormal columns, n ≥ d."""
    return torch.linalg.qr(gaussian(n, d, seed=seed)).Q


def orthonormal_centered(n: int, d: int, *, seed: int = 0) -> Tensor:
    """(n, d) float64 with orthonormal columns of mean 0, n > d."""
    x = gaussian(n, d, seed=seed)
    return torch.linalg.qr(x - x.mean(0)).Q


def with_spectrum(sigma: Tensor, n: int, *, seed: int = 0) -> Tensor:
    """(n, d) float64 with the singular values ``sigma``, in a random basis."""
    d = len(sigma)
    return orthonormal(n, d, seed=seed) * sigma.to(torch.float64) @ orthonormal(d, d, seed=seed + 1).T


def equicorrelated(n: int, d: int, rho: float, *, seed: int = 0) -> Tensor:
    """(n, d) float64 whose sample correlation is exactly ``rho`` between any two columns."""
    target = torch.full((d, d), rho, dtype=torch.float64).fill_diagonal_(1.0)
    return orthonormal_centered(n, d, seed=seed) @ torch.linalg.cholesky(target).T


def hadamard(order: int) -> Tensor:
    """(order, order) of ±1 with orthogonal columns, by Sylvester's construction; the order is a power of two."""
    h = torch.ones(1, 1, dtype=torch.float64)
    while len(h) < order:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h


@st.composite
def features(draw: st.DrawFn, *, min_rows: int = 2, min_cols: int = 1) -> Tensor:
    """(N, D) float64: tall or wide, with decaying columns, and sometimes an offset or a repeated column."""
    n, d = draw(st.integers(min_rows, 40)), draw(st.integers(min_cols, 12))
    x = gaussian(n, d, seed=draw(st.integers(0, 2**16)))
    x = x * torch.arange(1, d + 1, dtype=torch.float64) ** -draw(st.sampled_from([0.0, 1.0, 3.0]))
    x = x + draw(st.sampled_from([0.0, 1.0, 30.0]))
    if d > 1 and draw(st.booleans()):
        x[:, draw(st.integers(1, d - 1))] = x[:, 0]
    return x
