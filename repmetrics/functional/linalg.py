"""Checked features and their symmetric products in float64: the floor on which every second-order metric stands."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from scipy.linalg import eigh, eigvalsh
from scipy.linalg.blas import dsyrk, sgemm, ssyrk
from torch import Tensor

BLOCK_ROWS = 512
"""Rows converted to float64 at a time: bounds the extra memory to a few times 8·512·D bytes, whatever N is."""


Precision = Literal["float64", "block_float32"]
"""How products are taken. ``"block_float32"`` multiplies blocks of rows in float32 (TF32 off) and sums them in float64:
for accelerators on which float64 is slow. It is only two to three times better than float32 throughout, and worst
where collapse must be seen; ``"float64"`` is the default everywhere."""


def row_blocks(features: Tensor) -> Iterator[Tensor]:
    """Views of at most :data:`BLOCK_ROWS` rows at a time, in order."""
    for start in range(0, len(features), BLOCK_ROWS):
        yield features.detach()[start : start + BLOCK_ROWS]


def float64_blocks(features: Tensor, *, unit: bool = False) -> Iterator[Tensor]:
    """The rows in float64, a block at a time; with ``unit`` each scaled to length 1: see :func:`check_lengths`."""
    for block in row_blocks(features):
        rows = block.to(torch.float64)
        yield rows / torch.linalg.vector_norm(rows, dim=1, keepdim=True) if unit else rows


def column_mean(features: Tensor, *, unit: bool = False) -> Tensor:
    """(D,) mean row in float64, without a float64 copy of the features."""
    total = torch.zeros(features.shape[1], dtype=torch.float64, device=features.device)
    for rows in float64_blocks(features, unit=unit):
        total += rows.sum(0)
    return total / len(features)


@contextmanager
def cores_for_blas() -> Iterator[None]:
    """One thread for torch inside, on the CPU: its pool and that of SciPy's BLAS would spin against each other.

    Idle threads of either wait by burning the cores that the other needs; measured on two cores, that made the sums
    of 25 600 × 1024 features five times slower. So the heavy algebra on the CPU is SciPy's throughout (which also has
    the symmetric update that torch lacks), and torch does the rest on one thread.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def add_gram(gram: Tensor, rows: Tensor, *, precision: Precision = "float64") -> None:
    """``gram += rowsᵀ·rows``, **lower triangle only**; call :func:`mirror` to read it.

    On CPU a BLAS symmetric rank-k update does half the work of a general product.

    Args:
        gram: (D, D) float64, C-contiguous, updated in place.
        rows: (B, D) float64, one block.
        precision: of the products; the sum is float64 always.
    """
    if precision == "block_float32":
        gram += _float32_product(rows.to(torch.float32))
    elif gram.is_cuda:
        gram.addmm_(rows.T, rows)
    else:
        # A C-ordered matrix is its own transpose in BLAS's column order: upper there is lower here.
        dsyrk(1.0, rows.contiguous().numpy().T, beta=1.0, c=gram.numpy().T, overwrite_c=1)


def _float32_product(rows: Tensor) -> Tensor:
    if not rows.is_cuda:
        return torch.from_numpy(ssyrk(1.0, rows.contiguous().numpy().T).T)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        return rows.T @ rows
    finally:
        torch.set_float32_matmul_precision(before)


def symmetric_eigenvalues(square: Tensor) -> Tensor:
    """Eigenvalues of a symmetric (D, D) float64 matrix, smallest first."""
    if square.is_cuda:
        return torch.linalg.eigvalsh(square)
    return torch.from_numpy(eigvalsh(square.numpy(), check_finite=False))


def symmetric_eigenvectors(square: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, smallest first, and the eigenvectors in columns."""
    if square.is_cuda:
        return torch.linalg.eigh(square)
    values, vectors = eigh(square.numpy(), driver="evd", check_finite=False)
    return torch.from_numpy(values), torch.from_numpy(vectors)


def float32_product(left: Tensor, right: Tensor) -> Tensor:
    """(B, D) times (D, K) in float32: for error bars, not for values."""
    left, right = left.to(torch.float32), right.to(torch.float32)
    if left.is_cuda:
        return left @ right
    # Transposed twice: C order there is Fortran's order of the transpose here, and nothing is copied.
    return torch.from_numpy(sgemm(1.0, right.contiguous().numpy().T, left.contiguous().numpy().T).T)


def mirror(gram: Tensor) -> Tensor:
    """The full symmetric matrix (a copy) of which ``gram`` holds the lower triangle."""
    full = gram.tril()
    return full.add_(full.tril(-1).T)


def gram(features: Tensor, *, shift: Tensor | None = None) -> Tensor:
    """(x − shift)ᵀ(x − shift) as a full (D, D) float64 matrix on the device of ``features``."""
    dim = features.shape[1]
    state = torch.zeros(dim, dim, dtype=torch.float64, device=features.device)
    with cores_for_blas():
        for rows in float64_blocks(features):
            add_gram(state, rows if shift is None else rows - shift)
    return mirror(state)
