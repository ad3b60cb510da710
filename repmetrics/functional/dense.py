"""Metrics of patch tokens, for dense tasks, where RankMe, α-ReQ and LiDAR correlate *negatively* with quality."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
from scipy.cluster.vq import kmeans2
from torch import Tensor

from repmetrics.functional.checks import check_tokens
from repmetrics.functional.hypersphere import directions
from repmetrics.functional.spectrum import rankme

DSE_IMAGES = 8
"""Images clustered together for the between-cluster term."""


class DenseStructure(NamedTuple):
    """Terms of DSE, each 0-dim float64; see :func:`dse`.

    Attributes:
        inter: Mean distance of a token to the nearest centroid other than its own.
        intra_image: Mean radius of the clusters of one image.
        intra_batch: Mean radius of the clusters of eight images together.
        dimension: RankMe of all tokens over min(tokens, D).
        dse: The value, inter − (intra_image + intra_batch)/2 + dimension.
    """

    inter: Tensor
    intra_image: Tensor
    intra_batch: Tensor
    dimension: Tensor
    dse: Tensor


def dense_structure(
    tokens: Tensor, *, local_clusters: int = 3, global_clusters: int = 24, seed: int = 0
) -> DenseStructure:
    """Compute the terms of DSE; see :func:`dse`."""
    check_tokens(tokens)
    unit = directions(tokens.flatten(0, 1).to(torch.float64)).reshape(tokens.shape).cpu()
    flat = unit.flatten(0, 1)
    spread = (flat - flat.mean(0)).norm(dim=1).mean().clamp_min(2.0**-23)
    local = [_cluster(image, local_clusters, seed) for image in unit]
    stacks = [stack.flatten(0, 1) for stack in unit.split(DSE_IMAGES)]
    shared = [_cluster(stack, global_clusters, seed) for stack in stacks]
    inter = torch.stack([_gap(stack, *clusters) for stack, clusters in zip(stacks, shared, strict=True)]).mean()
    per_image = [_radii(image, labels).mean() for image, (_, labels) in zip(unit, local, strict=True)]
    intra_image = torch.stack(per_image).mean()
    radii = [_radii(stack, labels) for stack, (_, labels) in zip(stacks, shared, strict=True)]
    intra_batch = torch.cat(radii).mean()
    dimension = rankme(flat) / min(flat.shape)
    inter, intra_image, intra_batch = inter / spread, intra_image / spread, intra_batch / spread
    return DenseStructure(
        inter, intra_image, intra_batch, dimension, inter - (intra_image + intra_batch) / 2 + dimension
    )


def dse(tokens: Tensor, *, local_clusters: int = 3, global_clusters: int = 24, seed: int = 0) -> Tensor:
    r"""DSE, the Dense representation Structure Estimator: cluster separation − cluster radius + dimension.

    DSE = inter − (intra_image + intra_batch)/2 + dimension. Clusters replace classes: k-means within each image and
    within stacks of eight images.

    - *inter* is the mean distance of a token to the nearest centroid other than its own.
    - *intra* is the mean of Σσ(centered cluster)/√max(n − 1, D).
    - Both are divided by the mean distance of a token from the mean token.
    - *dimension* is RankMe/min(tokens, D).

    Convention: tokens are scaled to length 1; λ = 1; k-means++ with a fixed seed. The dimension is that of all tokens
    together; the paper averages over draws of one token per image.

    Args:
        tokens: (B, T, D) patch tokens, CLS and registers left out, any floating dtype.
        local_clusters: Number of clusters in one image.
        global_clusters: Number of clusters in eight images.
        seed: Seed of the k-means start.

    Returns:
        0-dim float64; higher is better, within one method.

    Raises:
        TypeError: Tokens are not floating.
        ValueError: Not (B, T, D), NaN or Inf, a token of length 0.

    Source:
        Dai et al. 2025, arXiv 2510.17299.
    """
    return dense_structure(tokens, local_clusters=local_clusters, global_clusters=global_clusters, seed=seed).dse


def gram_drift(tokens: Tensor, *, anchor: Tensor) -> Tensor:
    r"""Gram drift: mean over images of ‖UUᵀ − AAᵀ‖²_F / T², the change of the similarities between patches.

    Convention: tokens are scaled to length 1; the anchor is the same images under an earlier (or the best) model.

    Args:
        tokens: (B, T, D) patch tokens, any floating dtype.
        anchor: (B, T, D′) the anchor's tokens of the same images.

    Returns:
        0-dim float64 in 0 … 4; 0 is no drift. Neither direction is better by itself.

    Raises:
        TypeError: Tokens are not floating.
        ValueError: Not (B, T, D), different B or T, NaN or Inf, a token of length 0.

    Source:
        The Gram objective of DINOv3, arXiv 2508.10104.

    Example:
        >>> x = torch.randn(2, 9, 4, generator=torch.Generator().manual_seed(0))
        >>> gram_drift(x * 3, anchor=x).item() < 1e-12  # scale does not matter
        True
    """
    check_tokens(tokens)
    check_tokens(anchor)
    if tokens.shape[:2] != anchor.shape[:2]:
        raise ValueError(
            f"tokens and anchor must be of the same images, got {tuple(tokens.shape)} and {tuple(anchor.shape)}"
        )
    if tokens.device != anchor.device:
        raise ValueError(f"tokens are on {tokens.device}, the anchor's on {anchor.device}: move them first")
    u, a = (directions(t.flatten(0, 1).to(torch.float64)).reshape(t.shape) for t in (tokens, anchor))
    return (u @ u.mT - a @ a.mT).square().mean()


def high_norm_share(tokens: Tensor, *, factor: float = 3.0) -> Tensor:
    r"""Share of patch tokens longer than ``factor`` times the median: artifact tokens that register tokens remove.

    Convention: tokens as they come; the median is over all tokens of the batch. The source uses an absolute threshold
    (150) for one model, not a relative one.

    Args:
        tokens: (B, T, D) patch tokens before the final norm, any floating dtype.
        factor: Smallest length of an artifact token, in medians.

    Returns:
        0-dim float64 in 0 … 1; lower is better.

    Raises:
        TypeError: Tokens are not floating.
        ValueError: Not (B, T, D), NaN or Inf.

    Source:
        Darcet et al. 2024, arXiv 2309.16588.

    Example:
        >>> tokens = torch.ones(1, 10, 4)
        >>> tokens[0, 3] *= 20
        >>> high_norm_share(tokens).item()
        0.1
    """
    check_tokens(tokens)
    norms = torch.linalg.vector_norm(tokens.detach(), dim=-1, dtype=torch.float64)
    return (norms > factor * norms.median()).to(torch.float64).mean()


def _cluster(rows: Tensor, k: int, seed: int) -> tuple[Tensor, Tensor]:
    """Compute centroids and labels, with no more clusters than distinct rows."""
    k = min(k, len(rows.unique(dim=0)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # an empty cluster keeps its centroid: fewer classes, not an error
        centroids, labels = kmeans2(rows.numpy(), k, minit="++", rng=seed)
    return torch.from_numpy(centroids), torch.from_numpy(labels).to(torch.int64)


def _gap(rows: Tensor, centroids: Tensor, labels: Tensor) -> Tensor:
    """Mean distance of a row to the nearest centroid other than its own; 0 with a single centroid."""
    if len(centroids) < 2:
        return torch.zeros((), dtype=rows.dtype)
    distances = torch.cdist(rows, centroids)
    distances[torch.arange(len(rows)), labels] = torch.inf
    return distances.min(1).values.mean()


def _radii(rows: Tensor, labels: Tensor) -> Tensor:
    """Σσ/√max(n − 1, D) of each centered cluster with more than one row; a single 0 if there is none."""
    clusters = [rows[labels == label] for label in labels.unique()]
    radii = [
        torch.linalg.svdvals(c - c.mean(0)).sum() / max(len(c) - 1, c.shape[1]) ** 0.5 for c in clusters if len(c) > 1
    ]
    return torch.stack(radii) if radii else torch.zeros(1, dtype=rows.dtype)
