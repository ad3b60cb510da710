"""Metrics of patch tokens, for dense tasks, where RankMe, α-ReQ and LiDAR correlate *negatively* with quality."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from repmetrics.functional.checks import check_tokens
from repmetrics.functional.clusters import kmeans
from repmetrics.functional.hypersphere import directions
from repmetrics.functional.spectrum import rankme

DSE_IMAGES = 8
"""Images clustered together for the between-cluster term."""


class DenseStructure(NamedTuple):
    """Terms of DSE, each 0-dim; see :func:`dse`.

    Attributes:
        inter: Mean distance of a token to the nearest centroid other than its own.
        intra_image: Mean radius of the clusters of one image.
        intra_batch: Mean radius of the clusters of eight images together.
        dimension: Mean of RankMe/min(B, D) over draws of one token per image.
        dse: The value, inter − (intra_image + intra_batch)/2 + dimension.
    """

    inter: Tensor
    intra_image: Tensor
    intra_batch: Tensor
    dimension: Tensor
    dse: Tensor


def dense_structure(
    tokens: Tensor,
    *,
    local_clusters: int = 3,
    global_clusters: int = 24,
    seed: int = 0,
    compat: Literal["authors"] | None = None,
) -> DenseStructure:
    """Compute the terms of DSE; see :func:`dse`."""
    check_tokens(tokens)
    if compat not in (None, "authors"):
        raise ValueError(f"compat must be 'authors' or None, got {compat!r}")
    unit = directions(tokens.flatten(0, 1).to(torch.float64)).reshape(tokens.shape)
    unit = unit if compat is None else unit.to("cpu", torch.float32)
    generator = torch.Generator().manual_seed(seed)
    cluster: Callable[[Tensor, int], tuple[Tensor, Tensor]] = (
        partial(kmeans, seed=seed) if compat is None else partial(_authors_kmeans, generator=generator)
    )
    flat = unit.flatten(0, 1)
    spread = (flat - flat.mean(0)).norm(dim=1).mean().clamp_min(2.0**-23)
    per_image = [_radii(image, cluster(image, local_clusters)[1]).mean() for image in unit]
    gaps, radii = [], []
    for stack in (images.flatten(0, 1) for images in unit.split(DSE_IMAGES)):
        centroids, labels = cluster(stack, global_clusters)
        gaps.append(_gap(stack, centroids, labels))
        radii.append(_radii(stack, labels))
    inter, intra_image = torch.stack(gaps).mean() / spread, torch.stack(per_image).mean() / spread
    intra_batch = torch.cat(radii).mean() / spread
    dimension = _dimension(unit, generator, eps=0.0 if compat is None else 1e-12).to(inter)
    return DenseStructure(
        inter, intra_image, intra_batch, dimension, inter - (intra_image + intra_batch) / 2 + dimension
    )


def dse(
    tokens: Tensor,
    *,
    local_clusters: int = 3,
    global_clusters: int = 24,
    seed: int = 0,
    compat: Literal["authors"] | None = None,
) -> Tensor:
    r"""DSE, the Dense representation Structure Estimator: cluster separation − cluster radius + dimension.

    DSE = inter − (intra_image + intra_batch)/2 + λ·dimension. Clusters replace classes: k-means within each image and
    within stacks of eight images.

    - *inter* is the mean distance of a token to the nearest centroid other than its own.
    - *intra* is the mean of Σσ(centered cluster)/√max(n − 1, D).
    - Both are divided by the mean distance of a token from the mean token.
    - *dimension* is RankMe/min(B, D) of one token per image, averaged over T draws without replacement.

    Convention: tokens are scaled to length 1; λ = 1, as in the authors' code. The paper sets λ per run, from standard
    deviations over its checkpoints: combine the terms of :func:`dense_structure` for that. k-means runs to convergence
    from a greedy start with a fixed seed, in float64.

    Args:
        tokens: (B, T, D) patch tokens, CLS and registers left out, any floating dtype.
        local_clusters: Number of clusters in one image.
        global_clusters: Number of clusters in eight images.
        seed: Seed of the k-means start and of the draws.
        compat: ``"authors"`` gives the numbers of the authors' code after ``torch.manual_seed(seed)``, on the CPU and
            up to rounding: float32, k-means starts drawn in proportion to the distance instead of its square, at most
            20 iterations, ε = 1e-12.

    Returns:
        0-dim float64 (float32 with ``compat``); higher is better, within one method.

    Raises:
        TypeError: Tokens are not floating.
        ValueError: Not (B, T, D), NaN or Inf, a token of length 0, unknown ``compat``.

    Source:
        Dai et al. 2025, arXiv 2510.17299; its code, EldercatSAM/SSL-Degradation at b75fd51.
    """
    return dense_structure(
        tokens, local_clusters=local_clusters, global_clusters=global_clusters, seed=seed, compat=compat
    ).dse


def dse_inter(tokens: Tensor, *, seed: int = 0, compat: Literal["authors"] | None = None) -> Tensor:
    """Separation of the clusters of patch tokens, a term of DSE.

    Convention, arguments, errors and source: as :func:`dse`.

    Returns:
        0-dim float64 ≥ 0; higher is better, within one method.

    Example:
        >>> halves = torch.eye(2).repeat_interleave(4, 0)[None]  # a token to the other centroid √2, to the mean √½
        >>> round(dse_inter(halves).item(), 6)
        2.0
    """
    return dense_structure(tokens, seed=seed, compat=compat).inter


def dse_intra(tokens: Tensor, *, seed: int = 0, compat: Literal["authors"] | None = None) -> Tensor:
    """Radius of the clusters of patch tokens, a term of DSE: (intra_image + intra_batch)/2.

    Convention, arguments, errors and source: as :func:`dse`.

    Returns:
        0-dim float64 ≥ 0; lower is better, within one method.

    Example:
        >>> round(dse_intra(torch.eye(2).repeat_interleave(4, 0)[None]).item(), 6)  # each cluster is a point
        0.0
    """
    terms = dense_structure(tokens, seed=seed, compat=compat)
    return (terms.intra_image + terms.intra_batch) / 2


def dse_dimension(tokens: Tensor, *, seed: int = 0, compat: Literal["authors"] | None = None) -> Tensor:
    """Effective dimension of patch tokens, a term of DSE.

    Convention, arguments, errors and source: as :func:`dse`.

    Returns:
        0-dim float64 in 1/min(B, D) … 1; higher is better, within one method.

    Example:
        >>> round(dse_dimension(torch.eye(3)[:, None].repeat(1, 5, 1)).item(), 6)  # three images, orthogonal tokens
        1.0
    """
    return dense_structure(tokens, seed=seed, compat=compat).dimension


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


def _dimension(unit: Tensor, generator: torch.Generator, *, eps: float) -> Tensor:
    """Mean of RankMe/min(B, D) over T draws of one token per image; each image has its own order of tokens."""
    order = torch.stack([torch.randperm(unit.shape[1], generator=generator) for _ in unit]).to(unit.device)
    draws = unit.gather(1, order[..., None].expand_as(unit)).transpose(0, 1)
    return torch.stack([rankme(draw, eps=eps) for draw in draws]).mean() / min(draws.shape[1:])


def _authors_kmeans(rows: Tensor, k: int, *, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Centroids and labels by the k-means of DSE's authors, which starts from the same seed at each call.

    The labels are those before the last update of the centroids.
    """
    generator.manual_seed(generator.initial_seed())
    centroids = rows[torch.randint(0, len(rows), (1,), generator=generator)]
    for _ in range(k - 1):
        distances = torch.cdist(rows, centroids).min(1).values
        drawn = torch.multinomial(distances / distances.sum(), 1, generator=generator)
        centroids = torch.cat([centroids, rows[drawn]])
    labels = torch.zeros(len(rows), dtype=torch.int64)
    for _ in range(20):
        labels = torch.cdist(rows, centroids).argmin(1)
        updated = torch.stack([rows[labels == c].mean(0) if (labels == c).any() else centroids[c] for c in range(k)])
        shift, centroids = (updated - centroids).norm(), updated
        if shift < 1e-4:
            break
    return centroids, labels


def _gap(rows: Tensor, centroids: Tensor, labels: Tensor) -> Tensor:
    """Mean distance of a row to the nearest centroid other than its own; 0 with a single centroid."""
    if len(centroids) < 2:
        return torch.zeros((), dtype=rows.dtype)
    distances = torch.cdist(rows, centroids)
    distances[torch.arange(len(rows), device=rows.device), labels] = torch.inf
    return distances.min(1).values.mean()


def _radii(rows: Tensor, labels: Tensor) -> Tensor:
    """Σσ/√max(n − 1, D) of each centered cluster with more than one row; a single 0 if there is none."""
    clusters = [rows[labels == label] for label in labels.unique()]
    radii = [
        torch.linalg.svdvals(c - c.mean(0)).sum() / max(len(c) - 1, c.shape[1]) ** 0.5 for c in clusters if len(c) > 1
    ]
    return torch.stack(radii) if radii else torch.zeros(1, dtype=rows.dtype)
