"""Grouped jackknife: a metric without each block of slides, and the standard error that follows.

Rows of one slide are alike, and slides are (more nearly) independent. So groups are left out, never rows. Metrics of
moments have two kinds of replicates: exact ones subtract the moments of a block from those of all rows, and decompose
them again; those to first order are in ``first_order``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from operator import add

import torch
from scipy.special import stdtrit
from torch import Tensor

from repmetrics.functional.checks import check_lengths
from repmetrics.functional.ids import factorize
from repmetrics.functional.linalg import column_mean
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
