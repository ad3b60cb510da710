r"""Spectral metrics: how many directions the features use.

Notation: Z is N×D, λ the eigenvalues of ZᵀZ (of the centered Z where stated), σ = √λ its singular values, p = σ/Σσ,
H₁ the Shannon entropy with natural logarithm and 0·log 0 = 0. Nothing is done to Z: it is not normalized, not
whitened, and not centered unless the name or an argument states it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, get_args, runtime_checkable

import torch
from torch import Tensor

from repmetrics.functional.checks import check_features
from repmetrics.functional.linalg import column_mean, float64_blocks, gram, symmetric_eigenvalues


@dataclass(frozen=True)
class Spectrum:
    """Eigenvalues of ZᵀZ, largest first.

    Attributes:
        eigenvalues: (min(n, d),) float64, ≥ 0; (min(n − 1, d),) if centered.
        n: Number of rows.
        d: Number of columns.
        centered: Whether the mean row was subtracted first.
        floored: Number of eigenvalues below the float64 resolution of λ₁, which were set to 0.
    """

    eigenvalues: Tensor
    n: int
    d: int
    centered: bool
    floored: int

    @property
    def singular_values(self) -> Tensor:
        """σ = √λ, largest first."""
        return self.eigenvalues.sqrt()

    @classmethod
    def from_eigenvalues(
        cls, eigenvalues: Tensor, *, n: int, d: int, centered: bool, energy: Tensor | float = 0.0
    ) -> Spectrum:
        """Keep the largest min(n, d) eigenvalues, and set those below rounding to 0.

        An eigenvalue of a float64 Gram matrix has an error near D·eps·λ₁. ``energy`` (Σ‖x‖² before centering) adds
        the floor of features that are constant up to rounding.
        """
        top = eigenvalues.flip(-1)[: max(min(n - centered, d), 1)]
        eps = torch.finfo(torch.float64).eps
        floor = d * eps * torch.maximum(top[0], torch.as_tensor(eps * energy, dtype=top.dtype, device=top.device))
        below = top <= floor
        return cls(top.masked_fill(below, 0.0), n=n, d=d, centered=centered, floored=int(below.sum()))


@runtime_checkable
class SecondMoments(Protocol):
    """Streaming state that these metrics can read, such as :class:`repmetrics.measurement.moments.Moments`.

    Attributes:
        sum_norm4: Σ‖x‖⁴ over the rows.
    """

    sum_norm4: float

    def spectrum(self, *, centered: bool) -> Spectrum:
        """Eigenvalues of the (centered) ZᵀZ."""


class PowerLaw(NamedTuple):
    """A line fitted to ln λ against ln k.

    Attributes:
        alpha: Minus its slope.
        r_squared: Share of the weighted variance of ln λ that the line explains.
    """

    alpha: Tensor
    r_squared: Tensor


Port = Literal["stable-pretraining", "reptrix"]
"""Other packages whose RankMe can be reproduced; their values differ from the paper's."""


def spectrum(features: Tensor | SecondMoments, *, centered: bool = False) -> Spectrum:
    """Compute the eigenvalues of ZᵀZ in float64, from the smaller of the two Gram matrices (D×D or N×N).

    Args:
        features: (N, D), any floating dtype, or a :class:`~repmetrics.measurement.moments.Moments`.
        centered: Subtract the mean row first.

    Returns:
        The spectrum, with the number of eigenvalues below float64's resolution.

    Raises:
        TypeError: Features are not floating.
        ValueError: Wrong shape, no rows, NaN or Inf.
    """
    if isinstance(features, SecondMoments):
        return features.spectrum(centered=centered)
    check_features(features)
    n, d = features.shape
    shift = column_mean(features) if centered else None
    if n < d:
        rows = features.detach().to(torch.float64)
        rows = rows if shift is None else rows - shift
        square = rows @ rows.T
    else:
        square = gram(features, shift=shift)
    trace = square.diagonal().sum()
    energy = trace if shift is None else trace + n * shift.square().sum()
    return Spectrum.from_eigenvalues(symmetric_eigenvalues(square), n=n, d=d, centered=centered, energy=energy)


def entropy(weights: Tensor, *, eps: float = 0.0) -> Tensor:
    """H₁(p + eps) = −Σ (p + eps)·ln(p + eps) with p = w/Σw; 0·ln 0 = 0, and all-zero weights give 0."""
    total = weights.sum()
    p = weights / total if total > 0 else torch.zeros_like(weights)
    p = p + eps
    negative: Tensor = torch.special.xlogy(p, p).sum()
    return -negative


def rankme(features: Tensor | SecondMoments, *, eps: float = 0.0, compat: Port | None = None) -> Tensor:
    r"""RankMe: exp H₁(σ/Σσ), the effective number of directions of the features **as they come**.

    Convention: Z is not centered, σ is not squared, p is not renormalized after ``eps`` is added. The paper adds an ε
    of unstated size to each p, outside the division. Public ports use 1e-7 or 1e-5, and 1e-5 is wrong by +4.6 % at
    D = 768. The default, ε = 0 with 0·ln 0 = 0, is the limit that all of them approximate.

    Args:
        features: (N, D), any floating dtype, or a :class:`~repmetrics.measurement.moments.Moments`;
            the paper uses N = 25 600.
        eps: Constant added to each p, to reproduce a port.
        compat: Package whose value is reproduced instead: ``"stable-pretraining"`` (0.1.8: ε = 1e-5, so that a
            rank-one matrix 768 wide scores 1.09) or ``"reptrix"`` (0.1.0: entropy of the **eigenvalues** of the
            **centered** covariance, ε = 1e-7). Neither is the paper's RankMe.

    Returns:
        0-dim float64 in 1 … min(N, D); higher is better, **within one method**. All-zero features give 1.
        Biased low at finite N: about D·exp(−D/(8N)) for isotropic features.

    Raises:
        TypeError: Features are not floating.
        ValueError: Wrong shape, no rows, NaN or Inf, unknown ``compat``.

    Source:
        Garrido et al. 2023, arXiv 2210.02885, equation 1.

    Example:
        >>> rankme(torch.eye(4)).item()
        4.0
    """
    if compat is None:
        return entropy(spectrum(features).singular_values, eps=eps).exp()
    if compat == "stable-pretraining":
        return entropy(spectrum(features).singular_values, eps=1e-5).exp()
    if compat == "reptrix":
        return entropy(spectrum(features, centered=True).eigenvalues, eps=1e-7).exp()
    raise ValueError(f"compat must be one of {', '.join(get_args(Port))}, got {compat!r}")


def rankme_centered(features: Tensor | SecondMoments) -> Tensor:
    r"""RankMe of Z with its mean row subtracted: unlike :func:`rankme`, it does not depend on a common offset.

    A mean of ten standard deviations lowers ``rankme`` from 600 to 128 without any collapse, so compare the two.

    Convention: centered, σ not squared, ε = 0.

    Args:
        features: (N, D), any floating dtype, or a :class:`~repmetrics.measurement.moments.Moments`.

    Returns:
        0-dim float64 in 1 … min(N − 1, D); higher is better, within one method. Constant features give 1.

    Raises:
        TypeError: Features are not floating.
        ValueError: Wrong shape, no rows, NaN or Inf.

    Example:
        >>> rankme_centered(torch.eye(4) + 7).item()  # a simplex of n points spans n − 1 directions
        3.0...
    """
    return entropy(spectrum(features, centered=True).singular_values).exp()


def effective_rank(features: Tensor | SecondMoments, *, centered: bool = False) -> Tensor:
    r"""Effective rank: exp H₁(λ/Σλ), the entropy of the share of **variance** in each direction.

    It is insensitive to small λ, hence numerically the safest of these metrics, and never above :func:`rankme`.

    Convention: λ = σ², not centered by default.

    Args:
        features: (N, D), any floating dtype, or a :class:`~repmetrics.measurement.moments.Moments`.
        centered: Subtract the mean row first.

    Returns:
        0-dim float64 in 1 … min(N, D); higher is better, within one method.

    Raises:
        TypeError: Features are not floating.
        ValueError: Wrong shape, no rows, NaN or Inf.

    Source:
        Roy & Vetterli 2007, "The effective rank: a measure of effective dimensionality", applied to λ.

    Example:
        >>> round(effective_rank(torch.diag(torch.tensor([2.0, 1.0]))).item(), 4)  # λ = 4, 1
        1.6494
    """
    return entropy(spectrum(features, centered=centered).eigenvalues).exp()


def participation_ratio(features: Tensor | SecondMoments, *, centered: bool = False, unbiased: bool = False) -> Tensor:
    r"""Participation ratio: (Σλ)²/Σλ², how many equal eigenvalues would be as concentrated.

    Convention: not centered by default. IsoScore is exactly (PR − 1)/(D − 1) and has no function of its own.

    Args:
        features: (N, D), any floating dtype, or a :class:`~repmetrics.measurement.moments.Moments`.
        centered: Subtract the mean row first.
        unbiased: Leave the products of a row with itself out of both sums,
            [(Σ‖x‖²)² − Σ‖x‖⁴]/[‖ZᵀZ‖²_F − Σ‖x‖⁴], which removes the bias PR ≈ D/(1 + D/N). Only for uncentered
            features.

    Returns:
        0-dim float64 in 1 … D; higher is better, within one method. All-zero features give 1. The unbiased form
        can leave the range, and is NaN if its denominator is not positive.

    Raises:
        TypeError: Features are not floating.
        ValueError: Wrong shape, no rows, NaN or Inf, ``unbiased`` together with ``centered``.

    Source:
        Gao et al. 2017, "A theory of multineuronal dimensionality, dynamics and measurement"; the unbiased form
        replaces each sum over pairs of rows by the sum over distinct pairs.

    Example:
        >>> round(participation_ratio(torch.diag(torch.tensor([2.0, 1.0]))).item(), 4)  # 25/17
        1.4706
    """
    eigenvalues = spectrum(features, centered=centered).eigenvalues
    linear, square = eigenvalues.sum().square(), eigenvalues.square().sum()
    if not unbiased:
        return linear / square if square > 0 else torch.ones_like(square)
    if centered:
        raise ValueError("the unbiased participation ratio is defined for uncentered features: leave centered=False")
    sum_norm4 = row_norm4(features) if isinstance(features, Tensor) else features.sum_norm4
    return (linear - sum_norm4) / (square - sum_norm4) if square > sum_norm4 else torch.full_like(square, math.nan)


def row_norm4(features: Tensor) -> float:
    """Σ‖x‖⁴ over the rows, in float64."""
    return sum(float(rows.square().sum(1).square().sum()) for rows in float64_blocks(features))


def stable_rank(features: Tensor | SecondMoments, *, centered: bool = False) -> Tensor:
    r"""Stable rank: Σλ/λ₁, the energy of all directions in units of the strongest.

    Convention: not centered by default; the centered form is NESum.

    Args:
        features: (N, D), any floating dtype, or a :class:`~repmetrics.measurement.moments.Moments`.
        centered: Subtract the mean row first.

    Returns:
        0-dim float64 in 1 … D; higher is better, within one method. All-zero features give 1.

    Raises:
        TypeError: Features are not floating.
        ValueError: Wrong shape, no rows, NaN or Inf.

    Source:
        Rudelson & Vershynin 2007; NESum: He & Ozay 2022.

    Example:
        >>> stable_rank(torch.diag(torch.tensor([2.0, 1.0]))).item()  # 5/4
        1.25
    """
    eigenvalues = spectrum(features, centered=centered).eigenvalues
    return eigenvalues.sum() / eigenvalues[0] if eigenvalues[0] > 0 else torch.ones_like(eigenvalues[0])


ALPHA_RANKS = (11, 100)
"""First and last rank k of the power-law fit, both included."""


def power_law(features: Tensor | SecondMoments) -> PowerLaw:
    """Fit ln λ_k to ln k over ranks 11 … 100 by least squares with weights 1/k, for centered features.

    Both fields are NaN if fewer than 100 eigenvalues are above rounding.
    """
    first, last = ALPHA_RANKS
    eigenvalues = spectrum(features, centered=True).eigenvalues
    if len(eigenvalues) < last or eigenvalues[last - 1] <= 0:
        missing = torch.full_like(eigenvalues[0], math.nan)
        return PowerLaw(missing, missing)
    k = torch.arange(first, last + 1, dtype=torch.float64, device=eigenvalues.device)
    x, y, weight = k.log(), eigenvalues[first - 1 : last].log(), (1 / k) / (1 / k).sum()
    dx, dy = x - (weight * x).sum(), y - (weight * y).sum()
    slope = (weight * dx * dy).sum() / (weight * dx * dx).sum()
    total = (weight * dy * dy).sum()
    residual = (weight * (dy - slope * dx).square()).sum()
    return PowerLaw(-slope, 1 - residual / total if total > 0 else torch.ones_like(total))


def alpha_req(features: Tensor | SecondMoments) -> Tensor:
    r"""α-ReQ: minus the slope of ln λ_k against ln k, the decay of the covariance spectrum.

    Convention: centered; ranks 11 … 100; weights 1/k. :func:`power_law` also gives R²: the α of a spectrum that does
    not follow a power law has no meaning.

    Args:
        features: (N, D), any floating dtype, or a :class:`~repmetrics.measurement.moments.Moments`.

    Returns:
        0-dim float64; best near 1, not monotone. NaN if fewer than 100 eigenvalues are above rounding.

    Raises:
        TypeError: Features are not floating.
        ValueError: Wrong shape, no rows, NaN or Inf.

    Source:
        Agrawal et al. 2022, arXiv 2202.05808.

    Example:
        >>> x = torch.linalg.qr(torch.randn(512, 128, generator=torch.Generator().manual_seed(0)).double()).Q
        >>> x = torch.linalg.qr(x - x.mean(0)).Q * torch.arange(1, 129) ** -0.5  # σ_k = k^(−1/2)
        >>> round(alpha_req(x).item(), 3)
        1.0
    """
    return power_law(features).alpha


def alpha_distance(features: Tensor | SecondMoments) -> Tensor:
    r"""Distance of α-ReQ from 1: abs(α − 1), which gives :func:`alpha_req` a direction.

    Above 1, few directions hold the variance; below, noise does. Within runs of one method, a value near 1 goes with
    better probes of tissue, and not so on natural images.

    Convention: as :func:`alpha_req`.

    Args:
        features: (N, D), any floating dtype, or a :class:`~repmetrics.measurement.moments.Moments`.

    Returns:
        0-dim float64 ≥ 0; lower is better. NaN if fewer than 100 eigenvalues are above rounding.

    Raises:
        TypeError: Features are not floating.
        ValueError: Wrong shape, no rows, NaN or Inf.

    Source:
        Agrawal et al. 2022, arXiv 2202.05808.

    Example:
        >>> x = torch.linalg.qr(torch.randn(512, 128, generator=torch.Generator().manual_seed(0)).double()).Q
        >>> x = torch.linalg.qr(x - x.mean(0)).Q * torch.arange(1, 129) ** -1.0  # σ_k = 1/k, α = 2
        >>> round(alpha_distance(x).item(), 3)
        1.0
    """
    return (alpha_req(features) - 1).abs()
