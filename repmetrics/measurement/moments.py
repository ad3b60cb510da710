"""Moments: the streaming state from which all second-order metrics are computed."""

from __future__ import annotations

from typing import Self, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from repmetrics.functional.checks import check_features, check_lengths
from repmetrics.functional.correlation import Correlation
from repmetrics.functional.linalg import (
    BLOCK_ROWS,
    Precision,
    add_gram,
    column_mean,
    float64_blocks,
    mirror,
    on_float64_device,
    row_blocks,
    single_torch_thread,
    symmetric_eigenvalues,
)
from repmetrics.functional.spectrum import Spectrum


class Moments:
    """n, Σ(x−s), Σ(x−s)(x−s)ᵀ and Σ‖x‖⁴ over the rows x of features, in float64, about a fixed shift s.

    The memory is D² for any number of rows. Moments can be added, subtracted, and reduced over processes. Any split of
    the rows, merged in any order, equals one pass up to float64 rounding. The shift (the mean of the first rows) keeps
    the digits of the variance under a large common offset; it cancels from every result.

    The spectrum and the correlation matrix are cached until the next update.

    Args:
        features: (N, D) first rows, or None for an empty state that takes D from its first update.
        shift: (D,) to subtract; default: the mean of the first rows.
        unit: Whether to scale each row to length 1 first, for metrics of directions.
        precision: Precision of the products, see :data:`~repmetrics.functional.linalg.Precision`.

    Example:
        >>> x = torch.randn(100, 5, generator=torch.Generator().manual_seed(0))
        >>> halves = Moments(x[:30]) + Moments(x[30:])
        >>> halves.n, torch.allclose(halves.covariance(), torch.cov(x.T.double(), correction=0))
        (100, True)
    """

    def __init__(
        self,
        features: Tensor | None = None,
        *,
        shift: Tensor | None = None,
        unit: bool = False,
        precision: Precision = "float64",
    ) -> None:
        if precision not in get_args(Precision):
            raise ValueError(f"precision must be one of {', '.join(get_args(Precision))}, got {precision!r}")
        self.unit = unit
        self.precision = precision
        self.dtype: torch.dtype | None = None  # of the rows before any conversion
        self.n = 0
        self.sum_norm4 = 0.0
        self.shift = torch.empty(0, dtype=torch.float64) if shift is None else shift.detach().to(torch.float64)
        self.sum = torch.zeros_like(self.shift)
        self.outer = torch.zeros(self.dim, self.dim, dtype=torch.float64, device=self.shift.device)
        self._spectra: dict[bool, Spectrum] = {}
        self._correlation: Correlation | None = None
        if features is not None:
            self.update(features)

    @property
    def dim(self) -> int:
        """D; 0 before the first update."""
        return self.shift.shape[0]

    def __repr__(self) -> str:
        return f"Moments(n={self.n}, dim={self.dim})"

    # ── accumulate ──────────────────────────────────────────────────────────────────────────────────────────────

    def update(self, features: Tensor) -> Self:
        """Add the rows of ``features`` (N, D), any floating dtype.

        Raises:
            TypeError: Features are not floating.
            ValueError: Wrong shape, no rows, NaN or Inf, another D, dtype or device. The state is unchanged.
        """
        features = on_float64_device(features)
        check_features(features)
        if self.unit:
            check_lengths(features)
        if self.dim == 0:
            self._start(features)
        if features.shape[1] != self.dim:
            raise ValueError(
                f"features had D = {self.dim} columns before, now {features.shape[1]}: use one state per encoder"
            )
        if features.device != self.shift.device:
            raise ValueError(f"features were on {self.shift.device} before, now on {features.device}: move them first")
        if self.dtype not in (None, features.dtype):
            raise ValueError(f"features were {self.dtype} before, now {features.dtype}: cast all batches to one dtype")
        self.dtype = features.dtype
        with single_torch_thread():
            for block in row_blocks(features):
                self.sum_norm4 += self._norm4(block)
            for rows in float64_blocks(features, unit=self.unit, shift=self.shift):
                self.sum += rows.sum(0)
                add_gram(self.outer, rows, precision=self.precision)
        self.n += features.shape[0]
        self._clear_cache()
        return self

    def set_sums(self, features: Tensor, *, shift: Tensor, total: Tensor, outer: Tensor) -> Self:
        """Fill empty moments from known sums of the rows of ``features`` (N, D) about a shift.

        Args:
            features: Rows, which have been checked.
            shift: (D,) float64, subtracted from each row.
            total: (D,) Σ(x − shift).
            outer: (D, D) Σ(x − shift)(x − shift)ᵀ, its lower triangle; kept, not copied.
        """
        if self.n or self.unit:
            raise ValueError(f"only empty moments of features can be filled, got {self}")
        self.n, self.dtype = len(features), features.dtype
        self.shift, self.sum, self.outer = shift, total, outer
        self.sum_norm4 = sum(self._norm4(block) for block in row_blocks(features))
        return self

    def _norm4(self, block: Tensor) -> float:
        """Σ‖x‖⁴ of the rows of a block, which are 1 each for directions."""
        if self.unit:
            return float(len(block))
        return float(torch.linalg.vector_norm(block, dim=1, dtype=torch.float64).pow(4).sum())

    def _start(self, features: Tensor) -> None:
        self.shift = column_mean(features[:BLOCK_ROWS], unit=self.unit)  # any point near the rows is suitable
        self.sum = torch.zeros_like(self.shift)
        self.outer = torch.zeros(self.dim, self.dim, dtype=torch.float64, device=self.shift.device)

    def _clear_cache(self) -> None:
        self._spectra.clear()
        self._correlation = None

    # ── combine ─────────────────────────────────────────────────────────────────────────────────────────────────

    def _new(self, n: int, sum_norm4: float, shift: Tensor, sums: tuple[Tensor, Tensor]) -> Moments:
        moments = Moments(unit=self.unit, precision=self.precision)
        moments.dtype = self.dtype
        moments.n, moments.sum_norm4, moments.shift, (moments.sum, moments.outer) = n, sum_norm4, shift, sums
        return moments

    def _sums_about(self, shift: Tensor) -> tuple[Tensor, Tensor]:
        """Both sums about another shift. With δ = old − new, x − new = (x − old) + δ."""
        if torch.equal(shift, self.shift):
            return self.sum, self.outer
        delta = self.shift - shift
        cross = torch.outer(self.sum, delta)
        return self.sum + self.n * delta, self.outer + cross + cross.T + self.n * torch.outer(delta, delta)

    def __add__(self, other: Moments) -> Moments:
        """Moments of the rows of both."""
        return self._combine(other, sign=1)

    def __sub__(self, other: Moments) -> Moments:
        """Moments of the rows of ``self`` without those of ``other``, which must be a part of them."""
        if other.n > self.n:
            raise ValueError(f"cannot subtract {other.n} rows from {self.n}: subtract a part from its whole")
        return self._combine(other, sign=-1)

    def _combine(self, other: Moments, *, sign: int) -> Moments:
        if 0 in (self.dim, other.dim):
            filled = other if self.dim == 0 else self
            return self._new(filled.n, filled.sum_norm4, filled.shift, (filled.sum.clone(), filled.outer.clone()))
        if self.unit != other.unit:
            raise ValueError("moments of features and moments of their directions (unit=True) cannot be combined")
        if self.dim != other.dim:
            raise ValueError(f"moments of D = {self.dim} and D = {other.dim} cannot be combined")
        total, outer = other._sums_about(self.shift)
        return self._new(
            self.n + sign * other.n,
            self.sum_norm4 + sign * other.sum_norm4,
            self.shift,
            (self.sum + sign * total, self.outer + sign * outer),
        )

    def all_reduce(self, group: dist.ProcessGroup | None = None) -> Moments:
        """Moments of the rows of all processes, on every process. Batch sizes may differ; D must be equal.

        The shift is that of the lowest rank that has rows.
        """
        world = dist.get_world_size(group)
        shifts: list[Tensor | None] = [None] * world
        dist.all_gather_object(shifts, self.shift.cpu() if self.n else None, group=group)
        shift = next((s for s in shifts if s is not None), None)
        if shift is None:
            raise ValueError(f"none of {world} processes has a row: give each a shard of the held-out samples")
        shift = shift.to(self.shift.device)
        local = self if self.n else Moments(shift=shift, unit=self.unit)
        counts = torch.tensor([local.n, local.sum_norm4], dtype=torch.float64, device=shift.device)
        sums = tuple(tensor.clone() for tensor in local._sums_about(shift))
        for tensor in (counts, *sums):
            dist.all_reduce(tensor, group=group)
        return self._new(int(counts[0]), float(counts[1]), shift, (sums[0], sums[1]))

    # ── derive ──────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def mean(self) -> Tensor:
        """(D,) mean row."""
        self._require_rows(1)
        return self.shift + self.sum / self.n

    def gram(self, *, centered: bool = False) -> Tensor:
        """(D, D) ZᵀZ, or that of Z minus its mean row."""
        self._require_rows(1)
        full = mirror(self.outer).addr_(self.sum, self.sum, alpha=-1 / self.n)
        return full if centered else full.addr_(self.mean, self.mean, alpha=self.n)

    def gram_lower(self, *, centered: bool = False) -> Tensor:
        """As :meth:`gram`, of which the lower triangle holds: a new matrix, to be overwritten."""
        self._require_rows(1)
        lower = torch.addr(self.outer, self.sum, self.sum, alpha=-1 / self.n)
        return lower if centered else lower.addr_(self.mean, self.mean, alpha=self.n)

    def covariance(self) -> Tensor:
        """(D, D) covariance of the columns, divisor n."""
        return self.gram(centered=True).div_(self.n)

    def variances(self) -> Tensor:
        """(D,) variances of the columns, divisor n."""
        self._require_rows(1)
        return ((self.outer.diagonal() - self.sum.square() / self.n) / self.n).clamp_min(0)

    def spectrum(self, *, centered: bool = False) -> Spectrum:
        """Eigenvalues of ZᵀZ, or of that of the centered Z, largest first; cached."""
        if centered not in self._spectra:
            self.set_spectrum(symmetric_eigenvalues(self.gram_lower(centered=centered)), centered=centered)
        return self._spectra[centered]

    def set_spectrum(self, eigenvalues: Tensor, *, centered: bool) -> Spectrum:
        """Cache the eigenvalues of :meth:`gram`, smallest first, from a caller that computed them with eigenvectors."""
        energy = self.n * (self.variances().sum() + self.mean.square().sum())
        self._spectra[centered] = Spectrum.from_eigenvalues(
            eigenvalues, n=self.n, d=self.dim, centered=centered, energy=energy
        )
        return self._spectra[centered]

    def correlation(self) -> Correlation:
        """Pearson correlations between the columns that vary; cached."""
        self._require_rows(2)
        if self._correlation is None:
            self._correlation = Correlation.from_covariance(
                self.covariance(), mean=self.mean, n=self.n, dtype=self.dtype
            )
        return self._correlation

    def _require_rows(self, least: int) -> None:
        if self.n < least:
            raise ValueError(
                f"this needs at least {least} row{'s' * (least > 1)}, the moments hold {self.n}: update() first"
            )
