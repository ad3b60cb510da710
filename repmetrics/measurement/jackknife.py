"""The grouped jackknife: what a metric would have been without each block of slides, and the error that follows.

Rows of one slide are alike; slides are (more nearly) independent. So groups are left out, never rows. Two ways to the
replicates of a moments-fed metric, both without a second look at the metric's formula:

* exact: the moments of a block are subtracted from the whole, and decomposed again;
* first order: the whole is decomposed once, with eigenvectors; without block g the eigenvalue λ_k of ZᵀZ becomes
  λ_k − Σ_{i∈g}(v_k·x_i)² + O(g²). One product X·V serves all blocks.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add

import torch
from torch import Tensor

from repmetrics.functional.checks import check_lengths
from repmetrics.functional.correlation import odcorr
from repmetrics.functional.linalg import column_mean, float32_product, float64_blocks, symmetric_eigenvectors
from repmetrics.functional.spectrum import Spectrum
from repmetrics.measurement.moments import Moments

MAX_BLOCKS = 32
"""Groups are dealt into at most this many blocks; more replicates cost more and say little more."""


@dataclass(frozen=True)
class Blocks:
    """Rows dealt into blocks of whole groups.

    Attributes:
        index: (N,) int64, the block of each row.
        sizes: rows in each block.
        groups: how many distinct groups there were.
        digest: equal exactly when two sets of rows were dealt alike, in the same order: then differences can be paired.
    """

    index: Tensor
    sizes: tuple[int, ...]
    groups: int
    digest: str

    @classmethod
    def from_groups(cls, groups: Iterable[Hashable], *, count: int = MAX_BLOCKS) -> Blocks:
        """Deal groups into at most ``count`` blocks of nearly equal size, a group never split.

        Largest group first into the smallest block, ties by name: the same rows give the same blocks every time.

        Example:
            >>> Blocks.from_groups(["a", "b", "b", "c", "a", "d"], count=2).index.tolist()
            [0, 1, 1, 0, 0, 1]
        """
        rows = list(groups)
        sizes = sorted(Counter(rows).items(), key=lambda item: (-item[1], str(item[0])))
        filled = [0] * min(count, len(sizes))
        home: dict[Hashable, int] = {}
        for group, size in sizes:
            home[group] = filled.index(min(filled))
            filled[home[group]] += size
        dealt = [home[group] for group in rows]
        digest = hashlib.sha256(repr(dealt).encode()).hexdigest()[:16]
        return cls(torch.tensor(dealt, dtype=torch.int64), tuple(filled), len(sizes), digest)


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
        The standard error; NaN if a replicate is.

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
    centre = len(theta) * value - ((1 - 1 / h) * theta).sum()
    pseudo = h * value - (h - 1) * theta
    return float(((pseudo - centre).square() / (h - 1)).mean().sqrt())


def exact_replicas(features: Tensor, blocks: Blocks, *, unit: bool = False) -> tuple[Moments, list[Moments]]:
    """Moments of all rows (of their directions, with ``unit``), and without each block. Memory: D×D for each block."""
    if unit:
        check_lengths(features)
    shift = column_mean(features, unit=unit)
    index = blocks.index.to(features.device)
    parts = [Moments(features[index == block], shift=shift, unit=unit) for block in range(len(blocks.sizes))]
    whole = reduce(add, parts)
    return whole, [whole - part for part in parts]


@dataclass(frozen=True)
class FirstOrderMoments:
    """The moments without one block, to first order: what the metrics of the registry ask.

    Attributes:
        n: rows left.
        mean: (D,) their mean, exact.
        sum_norm4: Σ‖x‖⁴ of them, exact.
        unit: whether rows were scaled to length 1.
        spectra: their spectra to first order, by whether they are centred; of directions only the centred one.
        column_variances: (D,) of their columns, exact.
        odcorr: their off-diagonal correlation, to float32; None of directions.
    """

    n: int
    mean: Tensor
    sum_norm4: float
    unit: bool
    spectra: Mapping[bool, Spectrum]
    column_variances: Tensor
    odcorr: Tensor | None

    def evaluate(self, function: Callable[..., Tensor]) -> Tensor:
        """A metric without the block. ODCorr is at hand as a number: a D×D matrix for each block would not be."""
        return self.odcorr if function is odcorr and self.odcorr is not None else function(self)

    def variances(self) -> Tensor:
        """(D,) variances of the columns."""
        return self.column_variances

    def spectrum(self, *, centered: bool) -> Spectrum:
        """Eigenvalues of the (centred) ZᵀZ, largest first."""
        return self.spectra[centered]


def first_order_replicas(
    features: Tensor, blocks: Blocks, *, unit: bool = False
) -> tuple[Moments, list[FirstOrderMoments]]:
    """Moments of all rows, and to first order without each block. Memory: a few D×D matrices, whatever N is.

    The products run in float32: they carry the error bar, not the value.
    """
    whole = Moments(features, unit=unit)
    # No metric of the directions asks for their not centred spectrum or for ODCorr: that is more than half of the cost.
    projections = {centered: _Projection(whole, centered=centered) for centered in ((True,) if unit else (True, False))}
    correlation = None if unit else _CorrelationWithout(whole)
    index = blocks.index.to(features.device)
    replicas = []
    for block, size in enumerate(blocks.sizes):
        kept = whole.n - size
        energies = {centered: torch.zeros_like(whole.mean) for centered in projections}
        offset, scatter, sum_norm4 = torch.zeros_like(whole.mean), torch.zeros_like(whole.mean), 0.0
        for rows in float64_blocks(features[index == block], unit=unit):
            shifted = rows - whole.mean
            offset += shifted.sum(0)
            scatter += shifted.square().sum(0)
            sum_norm4 += float(rows.square().sum(1).square().sum())
            for centered, projection in projections.items():
                energies[centered] += projection.energy(shifted if centered else rows)
            if correlation is not None:
                correlation.remove(shifted)
        # The mean moves too: C₍₋g₎ = C − Σ_g(x−m)(x−m)ᵀ − (Σ_g(x−m))(Σ_g(x−m))ᵀ/(n − n_g).
        step = (offset / kept**0.5)[None]
        energies[True] += projections[True].energy(step)
        if correlation is not None:
            correlation.remove(step)
        replicas.append(
            FirstOrderMoments(
                n=kept,
                mean=whole.mean - offset / kept,
                sum_norm4=whole.sum_norm4 - sum_norm4,
                unit=unit,
                spectra={centered: projections[centered].without(energy) for centered, energy in energies.items()},
                column_variances=(whole.variances() * whole.n - scatter - step[0].square()).clamp_min(0) / kept,
                odcorr=None if correlation is None else correlation.odcorr(),
            )
        )
    return whole, replicas


class _Projection:
    """Eigenvectors of the (centred) ZᵀZ, and its spectrum after a block has gone."""

    def __init__(self, whole: Moments, *, centered: bool) -> None:
        eigenvalues, vectors = symmetric_eigenvectors(whole.gram(centered=centered))
        self.vectors = vectors.flip(1).to(torch.float32)
        self.spectrum = whole.set_spectrum(eigenvalues, centered=centered)

    def energy(self, rows: Tensor) -> Tensor:
        """Σ over rows of (v_k·x)², which is what λ_k loses with them."""
        return float32_product(rows, self.vectors).square().sum(0)

    def without(self, energy: Tensor) -> Spectrum:
        s = self.spectrum
        left = (s.eigenvalues - energy[: len(s.eigenvalues)]).clamp_min(0).masked_fill(s.eigenvalues == 0, 0.0)
        return Spectrum(left.sort(descending=True).values, n=s.n, d=s.d, centered=s.centered, floored=s.floored)


class _CorrelationWithout:
    """ODCorr after a block has gone: exact but for float32, whose rounding cancels in the difference to the whole."""

    def __init__(self, whole: Moments) -> None:
        self.scatter = whole.gram(centered=True).to(torch.float32)
        self.taken = torch.zeros_like(self.scatter)
        self.varies = whole.correlation().varies
        self.bias = odcorr(whole) - self._of(self.scatter)

    def remove(self, rows: Tensor) -> None:
        """Take the rows' scatter (they are deviations from the mean of all) out of the next reading."""
        self.taken += float32_product(rows.T, rows)

    def odcorr(self) -> Tensor:
        """ODCorr without what was taken, the mean's move included; then everything is back."""
        left = self._of(self.scatter - self.taken) + self.bias
        self.taken.zero_()
        return left

    def _of(self, scatter: Tensor) -> Tensor:
        scale = scatter.diagonal().rsqrt().masked_fill(~self.varies, 0.0)
        d = self.varies.sum()
        return ((scale @ scatter.abs() @ scale).to(torch.float64) - d) / (d * (d - 1))
