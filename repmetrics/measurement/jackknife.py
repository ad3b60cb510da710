"""Grouped jackknife: a metric without each block of slides, and the standard error that follows.

Rows of one slide are alike, and slides are (more nearly) independent. So groups are left out, never rows. Metrics of
moments have two kinds of replicates: exact ones subtract the moments of a block from those of all rows, and decompose
them again; those to first order are in ``first_order``.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from operator import add

import torch
from scipy.special import stdtrit
from torch import Tensor

from repmetrics.functional.checks import check_lengths
from repmetrics.functional.linalg import column_mean
from repmetrics.measurement.blocks import Blocks
from repmetrics.measurement.moments import Moments

CONFIDENCE = 0.95
"""Confidence of a margin: where nothing differs, a claim of a difference is false in 5 % of cases at most."""


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
