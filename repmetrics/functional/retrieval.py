"""View retrieval: whether the nearest second view of an image's first view is a view of the same image."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from repmetrics.functional.checks import check_features
from repmetrics.functional.hypersphere import centered_directions
from repmetrics.functional.linalg import BLOCK_ROWS, gram, symmetric_eigenvectors
from repmetrics.functional.multiview import view_index

WHITENING_FLOOR = 1e-4
"""Smallest eigenvalue that whitening divides by, as a share of the largest."""

INFONCE_TEMPERATURE = 0.1


class ViewMatches(NamedTuple):
    """Comparison of each first view with all second views; see :func:`match_views`.

    Attributes:
        hits: (N,) float64: 1 if the nearest second view is that of the same image, 1/m if m are equally near, else 0.
        losses: (N,) float64: InfoNCE of each first view.
    """

    hits: Tensor
    losses: Tensor


def match_views(
    first: Tensor, second: Tensor, *, whiten: bool = False, temperature: float = INFONCE_TEMPERATURE
) -> ViewMatches:
    """Compare each first view with all second views by cosine similarity, in float64 and in blocks of rows.

    Args:
        first: (N, D) features of the first view of each image, any floating dtype, any device.
        second: (N, D) features of the second views, in the same order.
        whiten: Whether to whiten the centered features; see :func:`view_retrieval_whitened`.
        temperature: Temperature of InfoNCE.

    Raises:
        TypeError: Features are not floating.
        ValueError: Wrong shape, fewer than two images, NaN or Inf, two sets of views that do not match.

    Example:
        >>> images = torch.eye(3)
        >>> match_views(images, images[[0, 2, 1]]).hits.tolist()  # two views are exchanged
        [1.0, 0.0, 0.0]
    """
    check_features(first, min_rows=2)
    check_features(second, min_rows=2)
    if first.shape != second.shape:
        raise ValueError(f"both views must have one shape (N, D), got {tuple(first.shape)} and {tuple(second.shape)}")
    queries, gallery = _directions(first, second, whiten=whiten)
    hits, losses = [], []
    for start in range(0, len(queries), BLOCK_ROWS):
        cosine = queries[start : start + BLOCK_ROWS] @ gallery.T
        same = cosine.diagonal(start).clone()
        cosine.diagonal(start).fill_(-torch.inf)
        hits.append(_hits(cosine, same, cosine.amax(1)))
        cosine.diagonal(start).copy_(same)
        losses.append(torch.logsumexp(cosine / temperature, 1) - same / temperature)
    return ViewMatches(torch.cat(hits), torch.cat(losses))


def _directions(first: Tensor, second: Tensor, *, whiten: bool) -> tuple[Tensor, Tensor]:
    """Both views, centered together, whitened if asked for, and scaled to length 1, in float64."""
    both = centered_directions(torch.cat([first, second]), transform=_whitened if whiten else None)
    return both[: len(first)], both[len(first) :]


def _hits(others: Tensor, same: Tensor, nearest: Tensor) -> Tensor:
    """1 where the same image is nearer than all others, 1/(1 + m) where m others are as near, else 0.

    Args:
        others: (B, N) cosines; −inf for the same image.
        same: (B,) cosines of the same images.
        nearest: (B,) maxima of ``others``.
    """
    hits = (same > nearest).to(same)
    ties = (same == nearest).nonzero().flatten()
    if len(ties):
        hits[ties] = 1 / (1 + (others[ties] == same[ties, None]).sum(1).to(same))
    return hits


def mean_matches(
    features: Tensor, *, views: Sequence[Hashable] | Tensor, blocks: Tensor | None = None, whiten: bool = False
) -> ViewMatches:
    """Mean hits and mean losses (1 + G,): of all images, then of those outside of each block among themselves.

    The features are centered and whitened with all rows. Without a block, equal maxima count as half a hit.

    Args:
        features: (N, D), at least two rows per sample, any floating dtype.
        views: The sample's id of each row.
        blocks: (N,) int64 in 0 … G − 1, the block of each row; the views of one sample are in one block. None: G = 0.
        whiten: Whether to whiten the centered features.
    """
    first, second, rows = _first_two_views(features, views)
    if blocks is None:
        return ViewMatches(*(each.mean()[None] for each in match_views(first, second, whiten=whiten)))
    block, order = blocks.to(rows.device)[rows].sort(stable=True)  # the images of a block are neighbors: slices
    queries, gallery = _directions(first[order], second[order], whiten=whiten)
    sizes = torch.bincount(block)
    kept = torch.cat([sizes.new_tensor([len(block)]), len(block) - sizes]).to(queries)
    if not gallery.any() and not queries.any():  # constant features: chance
        return ViewMatches(1 / kept, kept.log())
    hits, losses = torch.zeros_like(kept), torch.zeros_like(kept)
    for start in range(0, len(queries), BLOCK_ROWS):
        part = slice(start, start + BLOCK_ROWS)
        for total, of_rows in zip((hits, losses), _matches(queries[part], gallery, start, block, sizes), strict=True):
            total += of_rows
    return ViewMatches(hits / kept, losses / kept)


def _matches(queries: Tensor, gallery: Tensor, start: int, block: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
    """Sums (1 + G,) of hits and losses of the queries from ``start`` on: of all, then without each block."""
    cosine = queries @ gallery.T
    same = cosine.diagonal(start).clone()
    cosine.diagonal(start).fill_(-torch.inf)
    slices = cosine.split(sizes.tolist(), dim=1)
    best = torch.stack([of_block.amax(1) for of_block in slices], 1)
    two = best.topk(min(2, best.shape[1]), dim=1)
    hits = _hits(cosine, same, two.values[:, 0])
    numbers = torch.arange(len(sizes), device=block.device)
    outside = (block[start : start + len(queries), None] != numbers).to(same)
    other = torch.where(two.indices[:, :1] == numbers, two.values[:, -1:], two.values[:, :1])
    without = ((same[:, None] > other).to(same) + (same[:, None] == other) / 2) * outside
    cosine.diagonal(start).copy_(same)
    cosine.sub_(same[:, None]).div_(INFONCE_TEMPERATURE).exp_()
    totals = torch.stack([of_block.sum(1) for of_block in slices], 1)
    whole = totals.sum(1, keepdim=True)
    losses = torch.where(outside > 0, (whole - totals).clamp_min(1).log(), 0.0)
    return torch.cat([hits.sum()[None], without.sum(0)]), torch.cat([whole.log().sum()[None], losses.sum(0)])


def _whitened(centered: Tensor) -> Tensor:
    eigenvalues, vectors = symmetric_eigenvectors(gram(centered))
    return centered @ vectors * eigenvalues.clamp_min(WHITENING_FLOOR * eigenvalues[-1]).rsqrt()


def _first_two_views(features: Tensor, views: Sequence[Hashable] | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """First and second row of each sample, in the order of their first appearance, and the index of the first."""
    check_features(features, min_rows=4)
    index, counts = view_index(views, rows=len(features))
    order = index.argsort(stable=True)
    start = counts.cumsum(0) - counts
    first, second = order[start].to(features.device), order[start + 1].to(features.device)
    return features[first], features[second], first


def view_retrieval(features: Tensor, *, views: Sequence[Hashable] | Tensor) -> Tensor:
    r"""View retrieval: share of images whose first view is nearest, among all second views, to its own second view.

    A view set determines what the features may ignore. A good encoder maps two views of one image close together, and
    other images elsewhere. Use one fixed view set for all runs: the augmentation of a run inflates its value.

    Convention: features of both views are centered by their common mean; cosine similarity; the first two rows of each
    sample are its views, further rows are not used; ties share one hit. The value falls with the number of images, so
    compare at one number only.

    Args:
        features: (N, D), at least two rows per sample, any floating dtype.
        views: The sample's id of each row.

    Returns:
        0-dim float64 in 0 … 1; higher is better; chance, and the value of constant features, is 1 over the number of
        samples.

    Raises:
        TypeError: Features are not floating.
        ValueError: Wrong shape, NaN or Inf, ids that do not match, fewer than 2 samples, a sample with one view.

    Source:
        Instance discrimination as a measurement: Wu et al. 2018, arXiv 1805.01978, without training.

    Example:
        >>> images = torch.eye(3)
        >>> view_retrieval(torch.cat([images, images[[0, 2, 1]]]), views=[0, 1, 2, 0, 1, 2]).item()
        0.333...
    """
    return mean_matches(features, views=views).hits[0]


def view_retrieval_whitened(features: Tensor, *, views: Sequence[Hashable] | Tensor) -> Tensor:
    r"""View retrieval of whitened features: directions of low variance count as much as strong ones.

    Convention: as :func:`view_retrieval`, after x → Λ^-½·Vᵀ(x − mean). V and Λ are the eigenvectors and eigenvalues of
    the covariance of both views together; eigenvalues below 1e-4 of the largest are raised to that value. With fewer
    rows than columns, whitening makes all rows orthogonal, and the value is noise: take many more rows.

    Args:
        features: (N, D), at least two rows per sample, any floating dtype.
        views: The sample's id of each row.

    Returns:
        0-dim float64 in 0 … 1; higher is better; chance is 1 over the number of samples.

    Raises:
        TypeError: Features are not floating.
        ValueError: Wrong shape, NaN or Inf, ids that do not match, fewer than 2 samples, a sample with one view.

    Source:
        As :func:`view_retrieval`.

    Example:
        >>> images, loud = torch.eye(4), torch.tensor([9.0, -9.0, 9.0, -9.0])  # a column that says nothing of images
        >>> rows = torch.cat([torch.cat([images, images]), torch.cat([loud, loud.roll(1)])[:, None]], 1)
        >>> ids = [0, 1, 2, 3] * 2
        >>> view_retrieval(rows, views=ids).item(), round(view_retrieval_whitened(rows, views=ids).item(), 2)
        (0.0, 1.0)
    """
    return mean_matches(features, views=views, whiten=True).hits[0]


def view_infonce(features: Tensor, *, views: Sequence[Hashable] | Tensor) -> Tensor:
    r"""InfoNCE of two views: mean over i of −ln[exp(a_i·b_i/τ) / Σ_j exp(a_i·b_j/τ)], τ = 0.1.

    It is a smooth form of :func:`view_retrieval` that does not saturate.

    Convention: centered, cosine similarity, all N second views in the denominator; natural logarithm.

    Args:
        features: (N, D), at least two rows per sample, any floating dtype.
        views: The sample's id of each row.

    Returns:
        0-dim float64 > 0; lower is better; ln N for constant features.

    Raises:
        TypeError: Features are not floating.
        ValueError: Wrong shape, NaN or Inf, ids that do not match, fewer than 2 samples, a sample with one view.

    Source:
        van den Oord et al. 2018, arXiv 1807.03748; the temperature of SimCLR, arXiv 2002.05709.

    Example:
        >>> round(view_infonce(torch.ones(6, 2), views=[0, 1, 2, 0, 1, 2]).exp().item(), 6)  # constant: chance
        3.0
    """
    return mean_matches(features, views=views).losses[0]
