"""Correlation between features, and features that do not vary."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Protocol, get_args, runtime_checkable

import torch
from torch import Tensor

from repmetrics.functional.checks import check_features
from repmetrics.functional.linalg import column_mean, float64_blocks, gram

Reduction = Literal["abs", "rms", "signed"]


def resolution(dtype: torch.dtype | None) -> float:
    """Share of the root mean square below which a standard deviation is 0 to the dtype: the feature is constant.

    2⁻²³ for float32 and narrower dtypes. 2⁻⁴⁰ for float64, above the rounding of its sums.
    """
    return 2.0**-40 if dtype == torch.float64 else 2.0**-23


@dataclass(frozen=True)
class Correlation:
    """Pearson correlations between the features that vary.

    Attributes:
        matrix: (D', D') float64 with ones on the diagonal; D' features vary.
        n: Number of rows.
        varies: (D,) bool, whether each feature varies; the others are constant.
    """

    matrix: Tensor
    n: int
    varies: Tensor

    @property
    def excluded(self) -> int:
        """Number of constant features left out."""
        return int((~self.varies).sum())

    @classmethod
    def from_covariance(
        cls, covariance: Tensor, *, mean: Tensor, n: int, dtype: torch.dtype | None = None
    ) -> Correlation:
        """Compute correlations from the (D, D) covariance with divisor n and the (D,) mean of features of a dtype.

        The covariance is overwritten.
        """
        variance = covariance.diagonal()
        varies = variance > resolution(dtype) ** 2 * (variance + mean.square())
        if not varies.all():
            covariance, variance = covariance[varies][:, varies], variance[varies]
        scale = variance.rsqrt()
        return cls(covariance.mul_(scale).mul_(scale[:, None]), n=n, varies=varies)


@runtime_checkable
class HasCorrelation(Protocol):
    """Streaming state that ODCorr can read, such as :class:`repmetrics.measurement.moments.Moments`."""

    def correlation(self) -> Correlation:
        """Correlations between the features that vary."""


def correlation(features: Tensor | HasCorrelation) -> Correlation:
    """Pearson correlation matrix of the columns in float64, without constant columns.

    Args:
        features: (N, D) with N ≥ 2, any floating dtype, or a :class:`~repmetrics.measurement.moments.Moments`.

    Raises:
        TypeError: Features are not floating.
        ValueError: Wrong shape, fewer than two rows, NaN or Inf.
    """
    if isinstance(features, HasCorrelation):
        return features.correlation()
    check_features(features, min_rows=2)
    mean = column_mean(features)
    n = features.shape[0]
    return Correlation.from_covariance(gram(features, shift=mean) / n, mean=mean, n=n, dtype=features.dtype)


def odcorr(features: Tensor | HasCorrelation, *, reduction: Reduction = "abs") -> Tensor:
    r"""ODCorr: the mean over i ≠ j of abs(corr_ij), corr the Pearson correlation matrix of the features.

    Convention: absolute values by default; ``"rms"`` is √(mean corr²), ``"signed"`` the plain mean. The diagonal is
    left out. Constant features, which have no correlation, are left out too. The source names the quantity without a
    formula; this definition is an interpretation.

    Args:
        features: (N, D) with N ≥ 2, any floating dtype, or a :class:`~repmetrics.measurement.moments.Moments`.
        reduction: Reduction of the off-diagonal entries to one number.

    Returns:
        0-dim float64 in 0 … 1 (−1/(D−1) … 1 when signed); lower is better. At finite N, independent features score
        :func:`odcorr_null_floor`. NaN if fewer than two features vary.

    Raises:
        TypeError: Features are not floating.
        ValueError: Wrong shape, fewer than two rows, NaN or Inf, unknown reduction.

    Source:
        "off-diagonal correlation" of arXiv 2404.15217 (kaiko.ai).

    Example:
        >>> x = torch.tensor([[1.0, 1.0, 0.0], [-1.0, -1.0, 0.0], [0.0, 0.0, 1.0], [0.0, 0.0, -1.0]])
        >>> round(odcorr(x).item(), 6)  # one duplicated pair: 2/(D(D−1))
        0.333333
    """
    if reduction not in get_args(Reduction):
        raise ValueError(f"reduction must be one of {', '.join(get_args(Reduction))}, got {reduction!r}")
    matrix = correlation(features).matrix
    d = matrix.shape[0]
    if d < 2:
        return torch.tensor(math.nan, dtype=torch.float64, device=matrix.device)
    pairs = d * (d - 1)
    if reduction == "signed":
        return (matrix.sum() - matrix.diagonal().sum()) / pairs
    if reduction == "rms":
        return ((matrix.square().sum() - matrix.diagonal().square().sum()) / pairs).sqrt()
    return (matrix.abs().sum() - matrix.diagonal().abs().sum()) / pairs


def odcorr_null_floor(n: int) -> float:
    r"""Null floor of :func:`odcorr` (``reduction="abs"``): its expected value for independent Gaussian features.

    Γ((n−1)/2) / (√π·Γ(n/2)) ≈ √(2/(πn)).

    Args:
        n: Number of rows, ≥ 2.

    Raises:
        ValueError: N < 2.

    Example:
        >>> round(odcorr_null_floor(10_000), 6)
        0.007979
    """
    if n < 2:
        raise ValueError(f"a correlation needs n ≥ 2 rows, got {n}")
    return math.exp(math.lgamma((n - 1) / 2) - math.lgamma(n / 2)) / math.sqrt(math.pi)


def add_pairs(panel: Tensor, scale: Tensor) -> Tensor:
    """Σ|c_ij|·s_i·s_j over the rows i of a panel of the centered Gram matrix C and all j ≤ i.

    With s the reciprocal norms of the columns, or 0 for those left out, the sum over all panels leads to :func:`odcorr`
    by :func:`mean_of_pairs`.

    Args:
        panel: (P, stop) rows stop − P … stop − 1 of C up to the diagonal, overwritten.
        scale: s, (D,).
    """
    rows, stop = panel.shape
    panel.abs_()[:, stop - rows :].tril_()
    return scale[stop - rows : stop] @ (panel @ scale[:stop])


def mean_of_pairs(total: Tensor, scale: Tensor) -> Tensor:
    """Mean over i ≠ j of a sum by :func:`add_pairs`, in which each diagonal entry counts 1; NaN without a pair."""
    count = int((scale > 0).sum())
    return 2 * (total - count) / (count * (count - 1)) if count > 1 else torch.full_like(total, math.nan)


DEAD_VARIANCE = 1e-6
"""Share of the median feature's variance below which a feature is dead."""


def is_dead(variance: Tensor, mean: Tensor, *, dtype: torch.dtype | None) -> Tensor:
    """(D,) bool, whether each column is dead, from the variances and means of all; see :func:`dead_features`."""
    constant = variance <= resolution(dtype) ** 2 * mean.square()
    return constant | (variance <= DEAD_VARIANCE * variance.median())


def column_mean_and_variance(features: Tensor) -> tuple[Tensor, Tensor]:
    """(D,) means and (D,) variances of the columns, in float64, in two passes over blocks of rows."""
    mean = column_mean(features)
    variance = torch.zeros_like(mean)
    for rows in float64_blocks(features):
        variance += (rows - mean).square().sum(0) / len(features)
    return mean, variance


@runtime_checkable
class HasVariances(Protocol):
    """Streaming state that :func:`dead_features` can read.

    Attributes:
        dtype: Dtype of the features before any conversion.
    """

    dtype: torch.dtype | None

    @property
    def mean(self) -> Tensor:
        """(D,) mean row."""

    def variances(self) -> Tensor:
        """(D,) variances of the columns."""


def dead_features(features: Tensor | HasVariances) -> Tensor:
    r"""Dead features: the share of columns whose variance is below 1e-6 times the median column's.

    Convention: variance about the column's own mean. A column that is constant to float32 is dead for any median,
    because the median is itself 0 if half of the columns are constant.

    Args:
        features: (N, D) with N ≥ 2, any floating dtype, or a :class:`~repmetrics.measurement.moments.Moments`.

    Returns:
        0-dim float64 in 0 … 1; 0 is best.

    Raises:
        TypeError: Features are not floating.
        ValueError: Wrong shape, fewer than two rows, NaN or Inf.

    Example:
        >>> dead_features(torch.tensor([[0.0, 1.0, 3.0, 5.0], [1.0, 0.0, 5.0, 5.0]])).item()
        0.25
    """
    if isinstance(features, HasVariances):
        variance, mean = features.variances(), features.mean
    else:
        check_features(features, min_rows=2)
        mean, variance = column_mean_and_variance(features)
    return is_dead(variance, mean, dtype=features.dtype).to(torch.float64).mean()
