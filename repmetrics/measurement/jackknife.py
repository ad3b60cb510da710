"""Grouped jackknife: a metric without each block of slides, and the standard error that follows.

Rows of one slide are alike, and slides are (more nearly) independent. So groups are left out, never rows. Metrics of
moments have two kinds of replicates, and both work for any metric:

* exact: the moments of a block are subtracted from those of all rows, and decomposed again;
* first order: the moments of all rows are decomposed once, with eigenvectors. Without block g, the eigenvalue λ_k of
  ZᵀZ becomes λ_k − Σ_{i∈g}(v_k·x_i)² + O(g²). One product X·V serves all blocks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from itertools import groupby
from operator import add, itemgetter

import torch
from scipy.special import stdtrit
from torch import Tensor

from repmetrics.functional.checks import check_lengths
from repmetrics.functional.correlation import odcorr
from repmetrics.functional.ids import factorize
from repmetrics.functional.linalg import column_mean, float32_product, float64_blocks, symmetric_eigenvectors
from repmetrics.functional.spectrum import Spectrum
from repmetrics.measurement.moments import Moments

MAX_BLOCKS = 32
"""Largest number of blocks: more replicates cost more and improve the error little."""

CONFIDENCE = 0.95
"""Confidence of a margin: where nothing differs, a claim of a difference is false in 5 % of cases at most."""


@dataclass(frozen=True)
class Blocks:
    """Partition of rows into blocks of whole groups.

    Attributes:
        index: (N,) int64, the block of each row.
        sizes: Rows of each block.
        groups: Number of distinct groups.
        digest: Hash of ``index``. Differences can be paired exactly where it is equal.
        variances: Σ (rows of a group / rows of the block)² over the groups of each block. It is the variance of the
            block's mean in units of that of a group's mean, if the rows of one group are equal.
    """

    index: Tensor
    sizes: tuple[int, ...]
    groups: int
    digest: str
    variances: tuple[float, ...]

    @classmethod
    def from_groups(cls, groups: Iterable[Hashable], *, count: int = MAX_BLOCKS) -> Blocks:
        """Assign groups to at most ``count`` blocks of nearly equal size, without splitting a group.

        The largest group is assigned first, to the smallest block; ties are broken by name. So the same rows always
        give the same blocks.

        Example:
            >>> Blocks.from_groups(["a", "b", "b", "c", "a", "d"], count=2).index.tolist()
            [0, 1, 1, 0, 0, 1]
        """
        group_of_row, names = factorize(groups)
        group_sizes = torch.bincount(group_of_row).tolist()
        sizes = [0] * min(count, len(names))
        block_of_group = [0] * len(names)
        for group in sorted(range(len(names)), key=lambda group: (-group_sizes[group], str(names[group]))):
            block_of_group[group] = sizes.index(min(sizes))
            sizes[block_of_group[group]] += group_sizes[group]
        block_of_row = torch.tensor(block_of_group, dtype=torch.int64)[group_of_row]
        digest = hashlib.sha256(repr(block_of_row.tolist()).encode()).hexdigest()[:16]
        variances = [0.0] * len(sizes)
        for rows, block in zip(group_sizes, block_of_group, strict=True):
            variances[block] += (rows / sizes[block]) ** 2
        return cls(block_of_row, tuple(sizes), len(names), digest, tuple(variances))

    @cached_property
    def degrees_of_freedom(self) -> float:
        r"""Satterthwaite's degrees of freedom of the squared error in :func:`margin`; g − 1 for g equal blocks.

        For a mean θ = Σ w_j·x_j of blocks, that square is the quadratic form Σ a_j·(x_j − θ)² with
        a_j = (g−1)/g·(w_j/(1 − w_j))². Its degrees of freedom are 2·mean²/variance, where the x_j are independent and
        have the variances above. One block with most of the rows leaves about one, however many others there are.

        Source:
            Satterthwaite 1946, "An approximate distribution of estimates of variance components"; Bell & McCaffrey
            2002, "Bias reduction in standard errors for linear regression with multi-stage samples".

        Example:
            >>> [round(Blocks.from_groups(ids).degrees_of_freedom, 1) for ids in ("aabbccdd", "aaaaaaaabcd")]
            [3.0, 1.1]
        """
        g = len(self.sizes)
        w = torch.tensor(self.sizes, dtype=torch.float64) / sum(self.sizes)
        deviations = torch.eye(g, dtype=torch.float64) - w
        scales = torch.tensor(self.variances, dtype=torch.float64).sqrt()
        form = (deviations * (w / (1 - w)).square()[:, None]).T @ deviations * scales * scales[:, None]
        return float(form.trace().square() / form.square().sum())


def jackknife_error(value: float, replicates: Sequence[float], sizes: Sequence[int]) -> float:
    r"""Standard error by the delete-a-group jackknife for groups of unequal size.

    With h_j = n/m_j and pseudo-values t_j = h_j·θ − (h_j − 1)·θ₍ⱼ₎, the variance is
    (1/g)·Σ (t_j − θ_J)²/(h_j − 1), θ_J = g·θ − Σ (1 − m_j/n)·θ₍ⱼ₎. For equal groups this is the usual
    (g−1)/g·Σ(θ₍ⱼ₎ − mean)².

    Args:
        value: θ, from all rows.
        replicates: θ₍ⱼ₎, without block j.
        sizes: m_j, rows of block j.

    Returns:
        The standard error; NaN if a replicate is NaN.

    Source:
        Busing, Meijer & van der Leeden 1999, "Delete-m jackknife for unequal m".

    Example:
        >>> x = [1.0, 2.0, 4.0, 5.0]  # the mean's jackknife error is s/√n
        >>> round(jackknife_error(3.0, [(12 - v) / 3 for v in x], [1] * 4), 6)
        0.912871
    """
    theta = torch.tensor(replicates, dtype=torch.float64)
    m = torch.tensor(sizes, dtype=torch.float64)
    h = m.sum() / m
    center = len(theta) * value - ((1 - 1 / h) * theta).sum()
    pseudo = h * value - (h - 1) * theta
    return float(((pseudo - center).square() / (h - 1)).mean().sqrt())


def margin(value: float, replicates: Sequence[float], blocks: Blocks) -> float:
    r"""Half-width of the 95 % interval: t·√((g−1)/g·Σ(θ₍ⱼ₎ − θ)²) with the blocks' degrees of freedom.

    The deviations are from the value of all rows, not from the mean of the replicates. For many equal blocks this is
    1.96 standard errors. For few or unequal blocks it is wider than the standard error suggests. The metrics of few
    slides are far from linear: without one of two slides, both replicates have lost the variance between slides.

    Args:
        value: θ, from all rows.
        replicates: θ₍ⱼ₎, without block j.
        blocks: Blocks of the replicates.

    Returns:
        The half-width; NaN if a replicate is NaN.

    Source:
        MacKinnon, Nielsen & Webb 2023, "Fast and reliable jackknife and bootstrap methods for cluster-robust
        inference".

    Example:
        >>> x = [1.0, 2.0, 4.0, 5.0]  # the mean's interval is Student's: 3.182·s/√n
        >>> round(margin(3.0, [(12 - v) / 3 for v in x], Blocks.from_groups("abcd")), 4)
        2.9052
    """
    theta = torch.tensor(replicates, dtype=torch.float64)
    error = ((len(theta) - 1) / len(theta) * (theta - value).square().sum()).sqrt()
    return float(stdtrit(blocks.degrees_of_freedom, (1 + CONFIDENCE) / 2) * error)


def exact_replicates(features: Tensor, blocks: Blocks, *, unit: bool = False) -> tuple[Moments, list[Moments]]:
    """Compute the moments of all rows, and without each block. Memory: D×D per block.

    With ``unit``, the moments are those of the directions.
    """
    if unit:
        check_lengths(features)
    shift = column_mean(features, unit=unit)
    index = blocks.index.to(features.device)
    parts = [Moments(features[index == block], shift=shift, unit=unit) for block in range(len(blocks.sizes))]
    whole = reduce(add, parts)
    return whole, [whole - part for part in parts]


@dataclass(frozen=True)
class FirstOrderMoments:
    """Moments without one block, to first order: the quantities that metrics read.

    Attributes:
        n: Remaining rows.
        mean: (D,) mean row, exact.
        sum_norm4: Σ‖x‖⁴, exact.
        unit: Whether rows were scaled to length 1.
        dtype: Dtype of the features before any conversion.
        block: Position of the block.
        products: What all blocks share; it is computed when a metric first reads it.
    """

    n: int
    mean: Tensor
    sum_norm4: float
    unit: bool
    dtype: torch.dtype | None
    block: int
    products: _Products

    def variances(self) -> Tensor:
        """(D,) variances of the columns, exact."""
        return self.products.variances[self.block]

    def spectrum(self, *, centered: bool) -> Spectrum:
        """Eigenvalues of the (centered) ZᵀZ, largest first, to first order."""
        return self.products.spectra(centered=centered)[self.block]

    @property
    def odcorr(self) -> Tensor:
        """Off-diagonal correlation, in float32."""
        return self.products.odcorr[self.block]


def first_order_replicates(
    features: Tensor, blocks: Blocks, *, unit: bool = False
) -> tuple[Moments, list[FirstOrderMoments]]:
    """Compute the moments of all rows, and to first order without each block. Memory: a few D×D matrices for any N.

    The products are float32: they give the error, not the value.
    """
    whole = Moments(features, unit=unit)
    products = _Products(features, blocks, whole)
    return whole, [
        FirstOrderMoments(
            n=whole.n - size,
            mean=whole.mean - products.offsets[block] / (whole.n - size),
            sum_norm4=whole.sum_norm4 - products.sum_norm4[block],
            unit=unit,
            dtype=whole.dtype,
            block=block,
            products=products,
        )
        for block, size in enumerate(blocks.sizes)
    ]


class _Products:
    """Sums over the rows of each block, and the products with the eigenvectors that metrics ask for.

    Attributes:
        offsets: (blocks, D) Σ(x − m) of each block.
        sum_norm4: Σ‖x‖⁴ of each block.
        variances: (blocks, D) variances of the columns without each block, exact.
    """

    def __init__(self, features: Tensor, blocks: Blocks, whole: Moments) -> None:
        self._whole, self._sizes = whole, blocks.sizes
        self._features, self._index = features, blocks.index.to(features.device)
        self._spectra: dict[bool, list[Spectrum]] = {}
        self.offsets = whole.mean.new_zeros(len(blocks.sizes), whole.dim)
        self.sum_norm4 = [0.0] * len(blocks.sizes)
        scatter = torch.zeros_like(self.offsets)
        for block, rows in self._rows():
            self.sum_norm4[block] += float(rows.square().sum(1).square().sum())
            rows = rows - whole.mean
            self.offsets[block] += rows.sum(0)
            scatter[block] += rows.square().sum(0)
        kept = whole.n - torch.tensor(blocks.sizes, dtype=torch.float64, device=features.device)[:, None]
        # The mean moves too: C₍₋g₎ = C − Σ_g(x−m)(x−m)ᵀ − (Σ_g(x−m))(Σ_g(x−m))ᵀ/(n − n_g).
        self._steps = self.offsets / kept.sqrt()
        self.variances = (whole.variances() * whole.n - scatter - self._steps.square()).clamp_min(0) / kept

    def _rows(self) -> Iterator[tuple[int, Tensor]]:
        """Rows in float64 with the position of their block, block by block."""
        for block in range(len(self._sizes)):
            for rows in float64_blocks(self._features[self._index == block], unit=self._whole.unit):
                yield block, rows

    def spectra(self, *, centered: bool) -> list[Spectrum]:
        """Spectra without each block, to first order."""
        if centered not in self._spectra:
            projection = _Projection(self._whole, centered=centered)
            energies = torch.zeros_like(self.offsets)
            for block, rows in self._rows():
                energies[block] += projection.energy(rows - self._whole.mean if centered else rows)
            if centered:
                energies += projection.squares(self._steps)
            self._spectra[centered] = [projection.without(energy) for energy in energies]
        return self._spectra[centered]

    @cached_property
    def odcorr(self) -> list[Tensor]:
        """ODCorr without each block."""
        correlation, values = _CorrelationWithout(self._whole), []
        for block, pieces in groupby(self._rows(), key=itemgetter(0)):
            for _, rows in pieces:
                correlation.remove(rows - self._whole.mean)
            correlation.remove(self._steps[block][None])
            values.append(correlation.odcorr())
        return values


class _Projection:
    """Eigenvectors of the (centered) ZᵀZ, which give its spectrum without a block."""

    def __init__(self, whole: Moments, *, centered: bool) -> None:
        eigenvalues, vectors = symmetric_eigenvectors(whole.gram(centered=centered))
        self.vectors = vectors.flip(1).to(torch.float32)
        self.spectrum = whole.set_spectrum(eigenvalues, centered=centered)
        self.scale = float(self.spectrum.eigenvalues[0] / whole.n) ** 0.5 or 1.0

    def squares(self, rows: Tensor) -> Tensor:
        """(v_k·x)² of each row. Rows are scaled to the range of float32."""
        return float32_product(rows / self.scale, self.vectors).square().to(torch.float64) * self.scale**2

    def energy(self, rows: Tensor) -> Tensor:
        """Σ over rows of (v_k·x)², which λ_k loses without them."""
        return float32_product(rows / self.scale, self.vectors).square().sum(0).to(torch.float64) * self.scale**2

    def without(self, energy: Tensor) -> Spectrum:
        """Spectrum without the rows of this energy."""
        s = self.spectrum
        left = (s.eigenvalues - energy[: len(s.eigenvalues)]).clamp_min(0).masked_fill(s.eigenvalues == 0, 0.0)
        return Spectrum(left.sort(descending=True).values, n=s.n, d=s.d, centered=s.centered, floored=s.floored)


class _CorrelationWithout:
    """ODCorr without a block: exact but for float32, whose rounding cancels in the difference to all rows."""

    def __init__(self, whole: Moments) -> None:
        gram, self.varies = whole.gram(centered=True), whole.correlation().varies
        self.scale = gram.diagonal().rsqrt().masked_fill(~self.varies, 0.0)  # to the range of float32
        self.scatter = (gram * self.scale * self.scale[:, None]).to(torch.float32)
        self.removed = torch.zeros_like(self.scatter)
        self.bias = odcorr(whole) - self._from_scatter(self.scatter)

    def remove(self, rows: Tensor) -> None:
        """Remove the scatter of rows, given as deviations from the mean of all, until the next :meth:`odcorr`."""
        rows = rows * self.scale
        self.removed += float32_product(rows.T, rows)

    def odcorr(self) -> Tensor:
        """Compute ODCorr without the removed scatter, then restore it."""
        remaining = self._from_scatter(self.scatter - self.removed) + self.bias
        self.removed.zero_()
        return remaining

    def _from_scatter(self, scatter: Tensor) -> Tensor:
        scale = scatter.diagonal().rsqrt().masked_fill(~self.varies, 0.0)
        d = self.varies.sum()
        return ((scale @ scatter.abs() @ scale).to(torch.float64) - d) / (d * (d - 1))
