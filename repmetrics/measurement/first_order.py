"""Metrics of moments without each block of rows, to first order: one pass over the rows for all metrics and blocks.

A metric f of the eigenvalues λ of the Gram matrix G = ZᵀZ, with eigenvectors V, has the derivative F = V·diag(∂f/∂λ)·Vᵀ
by G. Without the rows of a block, G loses the sum R of their products, and f changes by −⟨F, R⟩ + O(R²). Means,
variances and correlations without a block are exact.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from repmetrics.functional.linalg import BLOCK_ROWS, PANEL_ROWS, add_gram, float64_blocks, symmetric_eigenvectors
from repmetrics.functional.spectrum import Spectrum
from repmetrics.measurement.jackknife import Blocks
from repmetrics.measurement.moments import Moments
from repmetrics.measurement.registry import MetricSpec


@dataclass(frozen=True)
class _Without:
    """Moments without one block, as far as metrics read them; the spectra are those of all rows.

    Attributes:
        n: Number of all rows, to which the spectra belong.
        mean: (D,) mean row without the block, exact.
        columns: (D,) variances of the columns without the block, exact.
        spectra: Spectra of all rows, by whether they are centered.
        sum_norm4: Σ‖x‖⁴ of all rows.
        unit: Whether rows were scaled to length 1.
        dtype: Dtype of the features before any conversion.
    """

    n: int
    mean: Tensor
    columns: Tensor
    spectra: Mapping[bool, Spectrum]
    sum_norm4: float
    unit: bool
    dtype: torch.dtype | None

    def variances(self) -> Tensor:
        """(D,) variances of the columns."""
        return self.columns

    def spectrum(self, *, centered: bool) -> Spectrum:
        """Eigenvalues of the (centered) ZᵀZ of all rows, largest first."""
        return self.spectra[centered]


@dataclass(frozen=True)
class _Derivative:
    """Derivative of a metric by the Gram matrix.

    Attributes:
        matrix: F, (D, D) symmetric.
        centered: Whether the Gram matrix is that of the rows minus their mean.
        level: ⟨F, G⟩, by which the metric changes if all eigenvalues grow alike; 0 for metrics without a scale.
    """

    matrix: Tensor
    centered: bool
    level: float


def first_order_replicates(
    features: Tensor, blocks: Blocks, whole: Moments, metrics: Sequence[MetricSpec]
) -> list[tuple[float, ...]]:
    """Compute metrics of moments without each block, to first order. Memory: a few D×D matrices for any N.

    Args:
        features: (N, D), any floating dtype.
        blocks: Blocks of the rows.
        whole: Moments of all rows; the spectra computed here stay in their cache.
        metrics: Metrics of moments.

    Returns:
        For each metric, its values without each block.
    """
    derivatives = list(_derivatives(whole, metrics))
    known = [derivative for derivative in derivatives if derivative is not None]
    offsets = _offsets(features, blocks, whole)
    sizes = torch.tensor(blocks.sizes, dtype=torch.float64, device=offsets.device)
    kept = whole.n - sizes
    spectra = {derivative.centered: whole.spectrum(centered=derivative.centered) for derivative in known}
    panels = list(_panels([derivative.matrix for derivative in known]))
    read = _Readers(whole, metrics, spectra)
    traces = offsets.new_zeros(len(known), len(sizes))
    bases = []
    for block, scatter in enumerate(_scatters(features, blocks, whole)):
        if known:
            traces[:, block] = _inner_products(panels, scatter)
        bases.append(read.without(scatter, offsets[block], left=float(kept[block])))
    changes = iter(
        (trace + _moved_mean(each, whole.mean, offsets, sizes, kept) - each.level * sizes / whole.n) * whole.n / kept
        for each, trace in zip(known, traces, strict=True)
    )
    return [
        tuple((base if derivative is None else base - next(changes)).tolist())
        for base, derivative in zip(torch.stack(bases, 1), derivatives, strict=True)
    ]


class _Readers:
    """Metrics without a block, as far as they read other than the spectrum, which is that of all rows here."""

    def __init__(self, whole: Moments, metrics: Sequence[MetricSpec], spectra: Mapping[bool, Spectrum]) -> None:
        self.whole, self.metrics, self.spectra = whole, metrics, spectra
        self.mean, self.squares = whole.mean, whole.variances() * whole.n
        # Metrics of moments that read a spectrum read nothing else; those of directions also read the mean.
        self.fixed = [m.function(whole) if m.centered is not None and not whole.unit else None for m in metrics]
        self.centered = whole.gram(centered=True) if any(m.of_scatter is not None for m in metrics) else None

    def without(self, scatter: Tensor, offset: Tensor, *, left: float) -> Tensor:
        """(len(metrics),) values. ``scatter``, the block's Gram matrix, is overwritten."""
        columns = (self.squares - scatter.diagonal() - offset.square() / left).clamp_min(0) / left
        mean, whole = self.mean - offset / left, self.whole
        state = _Without(whole.n, mean, columns, self.spectra, whole.sum_norm4, whole.unit, whole.dtype)
        if self.centered is not None:
            _leave(self.centered, scatter, offset, left=left)
        values = []
        for metric, fixed in zip(self.metrics, self.fixed, strict=True):
            if metric.of_scatter is not None:
                values.append(metric.of_scatter(scatter, whole.correlation().varies))
            else:
                values.append(metric.function(state) if fixed is None else fixed)
        return torch.stack(values)


def _derivatives(whole: Moments, metrics: Sequence[MetricSpec]) -> Iterator[_Derivative | None]:
    """Yield the derivative of each metric; None for those that read no spectrum."""
    vectors: dict[bool, Tensor] = {}
    for metric in metrics:
        if metric.centered is None:
            yield None
        else:
            centered = metric.centered
            if centered not in vectors:
                eigenvalues, ascending = symmetric_eigenvectors(whole.gram(centered=centered))
                whole.set_spectrum(eigenvalues, centered=centered)
                vectors[centered] = ascending.flip(1)
            slopes = _slopes(metric, whole, centered=centered)
            basis = vectors[centered][:, : len(slopes)]
            eigenvalues = whole.spectrum(centered=centered).eigenvalues[: len(slopes)]
            yield _Derivative((basis * slopes) @ basis.T, centered, float(slopes @ eigenvalues))


def _slopes(metric: MetricSpec, whole: Moments, *, centered: bool) -> Tensor:
    """(k,) ∂f/∂λ for the eigenvalues above rounding, largest first."""
    spectrum = whole.spectrum(centered=centered)
    positive = spectrum.eigenvalues[spectrum.eigenvalues > 0]
    if not len(positive):
        return positive
    with torch.inference_mode(False), torch.enable_grad():
        eigenvalues = positive.clone().requires_grad_()
        spectra = {centered: replace(spectrum, eigenvalues=eigenvalues)}
        mean = whole.mean.clone()
        state = _Without(whole.n, mean, mean, spectra, whole.sum_norm4, whole.unit, whole.dtype)
        value = metric.function(state)
        return torch.autograd.grad(value, eigenvalues)[0] if value.requires_grad else torch.zeros_like(positive)


def _offsets(features: Tensor, blocks: Blocks, whole: Moments) -> Tensor:
    """(G, D) Σ(x − mean) over the rows of each block."""
    mean = whole.mean
    offsets = mean.new_zeros(len(blocks.sizes), whole.dim)
    index = blocks.index.to(offsets.device).split(BLOCK_ROWS)
    for rows, of_rows in zip(float64_blocks(features, unit=whole.unit, shift=mean), index, strict=True):
        offsets.index_add_(0, of_rows, rows)
    return offsets


def _scatters(features: Tensor, blocks: Blocks, whole: Moments) -> Iterator[Tensor]:
    """Yield the Gram matrix (D, D) of the rows of each block about the mean of all; lower triangle, in one buffer."""
    index, mean = blocks.index.to(features.device), whole.mean
    scatter = torch.empty_like(whole.outer)
    for block in range(len(blocks.sizes)):
        scatter.zero_()
        for rows in float64_blocks(features[index == block], unit=whole.unit, shift=mean):
            add_gram(scatter, rows)
        yield scatter


def _leave(centered: Tensor, scatter: Tensor, offset: Tensor, *, left: float) -> None:
    """Replace S by C − S − o·oᵀ/(n − n_g), the centered Gram matrix without the block; lower triangle."""
    for start in range(0, len(scatter), PANEL_ROWS):
        stop = start + PANEL_ROWS
        panel = scatter[start:stop, :stop]
        torch.sub(centered[start:stop, :stop], panel, out=panel).addr_(
            offset[start:stop], offset[:stop], alpha=-1 / left
        )


def _inner_products(panels: Sequence[Tensor], lower: Tensor) -> Tensor:
    """⟨F, S⟩ of the matrices F in panels with a symmetric S, of which the lower triangle is given and the rest is 0."""
    total = lower.new_zeros(len(panels[0]))
    for start, panel in zip(range(0, len(lower), PANEL_ROWS), panels, strict=True):
        stop = min(start + PANEL_ROWS, len(lower))
        entries = lower[start:stop, :stop].reshape(-1)
        total += torch.stack([row.dot(entries) for row in panel])  # the bits do not depend on the other metrics
    return total


def _panels(matrices: Sequence[Tensor]) -> Iterator[Tensor]:
    """Yield the rows of the lower triangles of symmetric matrices, panel by panel, to multiply a lower triangle with.

    Entries below the diagonal count twice. A panel is (len(matrices), rows · columns).
    """
    if not matrices:
        return
    d = len(matrices[0])
    for start in range(0, d, PANEL_ROWS):
        stop = min(start + PANEL_ROWS, d)
        panel = 2 * torch.stack([matrix[start:stop, :stop] for matrix in matrices])
        panel[:, :, start:stop].diagonal(dim1=1, dim2=2).div_(2)
        yield panel.flatten(1)


def _moved_mean(derivative: _Derivative, mean: Tensor, offsets: Tensor, sizes: Tensor, kept: Tensor) -> Tensor:
    """(G,) ⟨F, R − S⟩: what the Gram matrix loses in addition to the products S of a block's rows about the mean m.

    With o = Σ(x − m), R = S + o·oᵀ/(n − n_g) if centered: the mean moves. Otherwise R = S + m·oᵀ + o·mᵀ + n_g·m·mᵀ.
    """
    if derivative.centered:
        return ((offsets @ derivative.matrix) * offsets).sum(1) / kept
    projected = derivative.matrix @ mean
    return 2 * offsets @ projected + sizes * (mean @ projected)
