"""Metrics of moments without each block of rows, to first order: one pass over the rows for all metrics and blocks.

A metric f of the eigenvalues λ of the Gram matrix G = ZᵀZ, with eigenvectors V, has the derivative F = V·diag(∂f/∂λ)·Vᵀ
by G. Without the rows of a block, G loses the sum R of their products, and f changes by −⟨F, R⟩ + O(R²). Means,
variances and correlations without a block are exact.

The products of a block are read by panels (some rows of the matrix, up to its diagonal), each while it is in cache.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from repmetrics.functional.correlation import mean_of_pairs
from repmetrics.functional.linalg import (
    PANEL_ROWS,
    add_gram,
    float64_blocks,
    lower_panels,
    symmetric_eigenvectors,
    update_eigenvectors,
    weighted_projections,
)
from repmetrics.functional.spectrum import Spectrum
from repmetrics.measurement.blocks import Blocks
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
    """Derivative F of a metric by the Gram matrix.

    Attributes:
        panels: Rows of F up to the diagonal, each panel flat. Entries below the diagonal are doubled, those above are
            0: the dot product with a panel of another symmetric matrix, summed over panels, is that of both.
        centered: Whether the Gram matrix is that of the rows minus their mean.
        level: ⟨F, G⟩, by which the metric changes if all eigenvalues grow alike; 0 for metrics without a scale.
        of_mean: (D,) F·m of the mean m.
        mean_square: mᵀ·F·m.
    """

    panels: list[Tensor]
    centered: bool
    level: float
    of_mean: Tensor
    mean_square: Tensor


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
    replicates = _Replicates(whole, metrics)
    positions = blocks.index.argsort(stable=True).to(features.device).split(list(blocks.sizes))
    values = [replicates.without(features[of_block]) for of_block in positions]
    return [tuple(of_metric) for of_metric in torch.stack(values, 1).tolist()]


class _Replicates:
    """Metrics of moments without a block of rows."""

    def __init__(self, whole: Moments, metrics: Sequence[MetricSpec]) -> None:
        self.whole, self.metrics = whole, metrics
        self.mean, self.squares = whole.mean, whole.variances() * whole.n
        self.derivatives = _derivatives(whole, metrics)
        self.spectra = {m.centered: whole.spectrum(centered=m.centered) for m in metrics if m.centered is not None}
        # Metrics of moments that read a spectrum read nothing else; those of directions also read the mean.
        self.fixed = [m.function(whole) if m.centered is not None and not whole.unit else None for m in metrics]
        self.of_panel = next((m.of_panel for m in metrics if m.of_panel is not None), None)
        if self.of_panel is not None:
            self.varies = whole.correlation().varies
            self.scatter = list(lower_panels(whole.gram_lower(centered=True)))
        self.products, self.panel = torch.empty_like(whole.outer), self.mean.new_empty(PANEL_ROWS * whole.dim)

    def without(self, rows: Tensor) -> Tensor:
        """(len(metrics),) values without these rows."""
        whole, offset, left = self.whole, torch.zeros_like(self.mean), self.whole.n - len(rows)
        self.products.zero_()
        for part in float64_blocks(rows, unit=whole.unit, shift=self.mean):
            offset += part.sum(0)
            add_gram(self.products, part)
        variances = (self.squares - self.products.diagonal() - offset.square() / left).clamp_min(0) / left
        scale = (variances * left).rsqrt().masked_fill(variances == 0, 0.0)
        if self.of_panel is not None:
            scale.masked_fill_(~self.varies, 0.0)
        traces, pairs = self._sums(offset, scale, n=len(rows))
        mean = self.mean - offset / left
        state = _Without(whole.n, mean, variances, self.spectra, whole.sum_norm4, whole.unit, whole.dtype)
        values = []
        for metric, fixed, derivative, trace in zip(self.metrics, self.fixed, self.derivatives, traces, strict=True):
            if metric.of_panel is not None:
                values.append(mean_of_pairs(pairs, scale))
                continue
            value = metric.function(state) if fixed is None else fixed
            if derivative is not None:
                value = value - (trace - derivative.level * len(rows) / whole.n) * whole.n / left
            values.append(value)
        return torch.stack(values)

    def _sums(self, offset: Tensor, scale: Tensor, *, n: int) -> tuple[list[Tensor], Tensor]:
        """⟨F, R⟩ for each metric, and the sum over pairs of columns for those of correlations.

        With S the products of a block's n_g rows about the mean m, and o their sum, R = S + o·oᵀ/(n − n_g) for the
        centered Gram matrix, since the mean moves. Otherwise R = S + m·oᵀ + o·mᵀ + n_g·m·mᵀ.
        """
        left = self.whole.n - n
        traces = [
            offset.new_zeros(()) if d is None or d.centered else 2 * (offset @ d.of_mean) + n * d.mean_square
            for d in self.derivatives
        ]
        pairs = offset.new_zeros(())
        for number, panel in enumerate(lower_panels(self.products, space=self.panel)):
            rows, stop = panel.shape
            start, entries = stop - rows, panel.view(-1)
            for centered in (False, True):
                if centered:
                    panel.addr_(offset[start:stop], offset[:stop], alpha=1 / left)
                for k, derivative in enumerate(self.derivatives):
                    if derivative is not None and derivative.centered == centered:
                        traces[k] = traces[k] + derivative.panels[number].dot(entries)
            if self.of_panel is not None:
                torch.sub(self.scatter[number], panel, out=panel)
                pairs = pairs + self.of_panel(panel, scale)
        return traces, pairs


def _derivatives(whole: Moments, metrics: Sequence[MetricSpec]) -> list[_Derivative | None]:
    """Derivative of each metric; None for those that read no spectrum."""
    derivatives: list[_Derivative | None] = [None] * len(metrics)
    decomposed: tuple[Tensor, Tensor] | None = None
    for centered in sorted({metric.centered for metric in metrics if metric.centered is not None}, reverse=True):
        decomposed = eigenvalues, vectors = _decompose(whole, decomposed, centered=centered)
        whole.set_spectrum(eigenvalues, centered=centered)
        projected = vectors.T @ whole.mean
        for k, metric in enumerate(metrics):
            if metric.centered == centered:
                slopes = _slopes(metric, whole, centered=centered)
                level = slopes @ whole.spectrum(centered=centered).eigenvalues[: len(slopes)]
                weights = torch.zeros_like(eigenvalues)
                weights[len(weights) - len(slopes) :] = slopes.flip(0)
                of_mean = vectors @ (weights * projected)
                panels = list(lower_panels(weighted_projections(vectors, weights)))
                for panel in panels:
                    square = panel.mul_(2)[:, panel.shape[1] - len(panel) :].tril_()
                    square.diagonal().div_(2)
                flat = [panel.view(-1) for panel in panels]
                derivatives[k] = _Derivative(flat, centered, float(level), of_mean, of_mean @ whole.mean)
    return derivatives


def _decompose(whole: Moments, of_centered: tuple[Tensor, Tensor] | None, *, centered: bool) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors of a Gram matrix; from those of the centered one, since ZᵀZ is that plus n·m·mᵀ."""
    if of_centered is not None and not of_centered[0].is_cuda:
        updated = update_eigenvectors(*of_centered, whole.mean * math.sqrt(whole.n))
        if updated is not None:
            return updated
    return symmetric_eigenvectors(whole.gram_lower(centered=centered))


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
