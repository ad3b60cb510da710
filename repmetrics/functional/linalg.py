"""Float64 means, Gram matrices and eigenvalues, shared by all second-order metrics."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import numpy as np
import torch
from scipy.linalg import eigh, eigvalsh
from scipy.linalg.blas import dgemm, dgemv, dsyrk, ssyrk
from scipy.linalg.lapack import dlasd4, dpotrf, dpotrs
from torch import Tensor

BLOCK_ROWS = 512
"""Rows converted to float64 at a time. The extra memory is a few times 8·512·D bytes for any N."""

PANEL_ROWS = 128
"""Rows of a D×D matrix that are processed at a time, so that they stay in cache."""

SHORTEST = 1e-140
"""Length of a row below which the squares of its entries lose digits in float64."""

Precision = Literal["float64", "block_float32"]
"""Precision of products. ``"block_float32"`` multiplies blocks of rows in float32 (TF32 off) and sums them in float64,
for accelerators on which float64 is slow. Its error is only two to three times below that of float32 throughout, and
largest where collapse must be detected. ``"float64"`` is the default everywhere."""


def row_blocks(features: Tensor) -> Iterator[Tensor]:
    """Yield views of at most :data:`BLOCK_ROWS` rows, in order."""
    for start in range(0, len(features), BLOCK_ROWS):
        yield features.detach()[start : start + BLOCK_ROWS]


def on_float64_device(features: Tensor) -> Tensor:
    """The features where they can be float64: on the CPU, if their device has no such type, as Apple's MPS."""
    if not isinstance(features, Tensor) or features.device.type in ("cpu", "cuda"):
        return features
    try:
        features.detach()[:1].to(torch.float64)
    except (TypeError, RuntimeError):
        return features.cpu()
    return features


def float64_blocks(features: Tensor, *, unit: bool = False, shift: Tensor | None = None) -> Iterator[Tensor]:
    """Yield blocks of rows in float64; with ``unit``, rows are scaled to length 1, after ``check_lengths``.

    ``shift`` (D,) is subtracted last.
    """
    for block in row_blocks(features):
        rows = block.to(torch.float64)
        if unit:
            rows = unit_rows(rows)
        if shift is not None:
            rows = rows - shift if rows.data_ptr() == block.data_ptr() else rows.sub_(shift)
        yield rows


def unit_rows(rows: Tensor) -> Tensor:
    """Float64 rows scaled to length 1, also where the squares of a row underflow."""
    lengths = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    if lengths.min() > SHORTEST:
        return rows / lengths
    largest = rows.abs().amax(1, keepdim=True)
    rows = rows * torch.exp2(-torch.frexp(largest).exponent.to(torch.float64))  # a power of two: no rounding
    return rows / torch.linalg.vector_norm(rows, dim=1, keepdim=True)


def column_mean(features: Tensor, *, unit: bool = False) -> Tensor:
    """(D,) mean row in float64, without a float64 copy of the features."""
    total = torch.zeros(features.shape[1], dtype=torch.float64, device=features.device)
    for rows in float64_blocks(features, unit=unit):
        total += rows.sum(0)
    return total / len(features)


@contextmanager
def single_torch_thread() -> Iterator[None]:
    """Limit torch to one CPU thread, so that its threads do not compete with those of SciPy's BLAS.

    Idle threads of both libraries busy-wait on the cores that the other needs. On two cores, this made the sums of
    25 600 × 1024 features five times slower. So SciPy does all expensive algebra on the CPU (it also has the symmetric
    update that torch lacks), and torch does the rest on one thread.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def add_gram(gram: Tensor, rows: Tensor, *, precision: Precision = "float64") -> None:
    """Add rowsᵀ·rows to the **lower triangle** of ``gram``; :func:`mirror` gives the full matrix.

    On the CPU, a BLAS symmetric rank-k update does half the work of a general product.

    Args:
        gram: (D, D) float64, C-contiguous, updated in place.
        rows: (B, D) float64, one block.
        precision: Precision of the products; the sum is always float64.
    """
    if precision == "block_float32":
        gram += _float32_product(rows.to(torch.float32))
    elif gram.is_cuda:
        gram.addmm_(rows.T, rows)
    else:
        # BLAS reads a C-ordered matrix as its transpose: the upper triangle in BLAS is the lower one in torch.
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


def lower_panels(lower: Tensor, *, space: Tensor | None = None) -> Iterator[Tensor]:
    """Yield the rows of a matrix up to the diagonal, :data:`PANEL_ROWS` at a time: copies (P, stop), contiguous.

    The last P columns of a panel are square; above their diagonal they hold what ``lower`` (D, D) holds there.

    Args:
        lower: (D, D), of which the lower triangle is of interest.
        space: Space for at least P·D numbers, which each panel overwrites; default: new panels.
    """
    for start in range(0, len(lower), PANEL_ROWS):
        view = lower[start : start + PANEL_ROWS, : start + PANEL_ROWS]
        panel = view.new_empty(view.shape) if space is None else space[: view.numel()].view(view.shape)
        yield panel.copy_(view)


def symmetric_eigenvalues(lower: Tensor) -> Tensor:
    """Eigenvalues of a symmetric (D, D) float64 matrix given by its lower triangle and overwritten; smallest first."""
    if lower.is_cuda:
        return torch.linalg.eigvalsh(lower)
    return torch.from_numpy(eigvalsh(lower.numpy().T, lower=False, overwrite_a=True, check_finite=False))


def symmetric_eigenvectors(lower: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues as :func:`symmetric_eigenvalues`, and the eigenvectors in columns."""
    if lower.is_cuda:
        return torch.linalg.eigh(lower)
    values, vectors = eigh(lower.numpy().T, lower=False, driver="evd", overwrite_a=True, check_finite=False)
    return torch.from_numpy(values), torch.from_numpy(vectors)


def update_eigenvectors(values: Tensor, vectors: Tensor, row: Tensor) -> tuple[Tensor, Tensor] | None:
    r"""Eigenvalues, smallest first, and eigenvectors of V·diag(λ)·Vᵀ + x·xᵀ, for a third of a decomposition's cost.

    With z = Vᵀx, LAPACK's ``dlasd4`` finds each root μ of 1 + Σ z_j²/(λ_j − μ). The eigenvector of μ is V·w,
    w_j ∝ ẑ_j/(λ_j − μ), with ẑ recomputed from the roots, so that the vectors are orthogonal to rounding.

    Args:
        values: λ, (D,) float64 on the CPU, smallest first; those below 0 by rounding count as 0.
        vectors: V, (D, D), in columns.
        row: x, (D,).

    Returns:
        Eigenvalues (D,) and eigenvectors (D, D) in columns. None where the formula loses digits: two values that are
        equal to rounding, or an entry of z that is 0 to rounding.

    Source:
        Gu & Eisenstat 1994, "A stable and efficient algorithm for the rank-one modification of the symmetric
        eigenproblem".
    """
    d, basis = values.clamp_min(0).sqrt().numpy(), vectors.numpy()
    z = dgemv(1.0, basis, row.numpy(), trans=1)  # SciPy's BLAS: the threads of NumPy's would compete with its own
    scale, smallest = max(d[-1], np.linalg.norm(z)), len(d) * np.finfo(np.float64).eps
    if len(d) < 2 or scale == 0 or np.diff(d).min() <= smallest * scale or np.abs(z).min() <= smallest * scale:
        return None
    d, z = d / scale, z / scale
    roots, weights, logarithms = np.empty_like(d), np.empty((len(d), len(d))), np.zeros_like(d)
    for i in range(len(d)):
        difference, roots[i], total, info = dlasd4(i, d, z)
        if info:
            return None
        weights[i] = difference * total  # λ_j − μ_i
        gaps = (d - d[i]) * (d + d[i])
        gaps[i] = 1.0
        logarithms += np.log(np.abs(weights[i] / gaps))
    np.divide(np.copysign(np.exp(logarithms / 2), z), weights, out=weights)
    weights /= np.linalg.norm(weights, axis=1, keepdims=True)
    return torch.from_numpy((scale * roots) ** 2), torch.from_numpy(dgemm(1.0, basis, weights.T))


def solve_positive(lower: Tensor, right: Tensor) -> Tensor:
    """A⁻¹·right (D, K) of a positive definite (D, D) float64 matrix A given by its lower triangle and overwritten."""
    if lower.is_cuda:
        return torch.cholesky_solve(right, torch.linalg.cholesky(lower))
    factor, info = dpotrf(lower.numpy().T, lower=0, clean=0, overwrite_a=1)
    if info:
        raise ValueError(f"the matrix is not positive definite: LAPACK stopped at row {info}")
    return torch.from_numpy(dpotrs(factor, right.numpy(), lower=0)[0])


def weighted_projections(vectors: Tensor, weights: Tensor) -> Tensor:
    """Lower triangle (D, D) of Σ w_k·v_k·v_kᵀ over the columns of an orthonormal (D, D) matrix.

    A symmetric update takes weights ≥ 0. So the least weight is subtracted, and as much of the identity added.
    """
    least = weights.min().clamp_max(0)
    scaled = vectors * (weights - least).sqrt()
    cuda = scaled.is_cuda
    product = scaled @ scaled.T if cuda else torch.from_numpy(dsyrk(1.0, np.asfortranarray(scaled.numpy())).T)
    product.diagonal().add_(least)
    return product


def mirror(gram: Tensor) -> Tensor:
    """Return the full symmetric matrix, a copy, of which ``gram`` holds the lower triangle."""
    full = gram.tril()
    return full.add_(full.tril(-1).T)


def gram(features: Tensor, *, shift: Tensor | None = None) -> Tensor:
    """(x − shift)ᵀ(x − shift) as a full (D, D) float64 matrix on the device of ``features``."""
    dim = features.shape[1]
    state = torch.zeros(dim, dim, dtype=torch.float64, device=features.device)
    with single_torch_thread():
        for rows in float64_blocks(features, shift=shift):
            add_gram(state, rows)
    return mirror(state)
