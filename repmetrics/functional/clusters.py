"""Clusters of the features: whether k-means finds the same ones twice, and whether neighbors predict them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from repmetrics.functional.checks import check_features
from repmetrics.functional.hypersphere import centered_directions
from repmetrics.functional.ids import count_blocks, means_without_blocks

CLUSTERS = (10, 50)
"""Numbers of clusters; values are means over them."""

MAX_ITERATIONS = 30
ROWS_PER_CLUSTER = 4
MAX_CLUSTERED = 1024
"""Largest number of rows to cluster. Of more rows, as many at equal distances in the order of the rows are taken."""

NEIGHBORS = 10


def kmeans(rows: Tensor, k: int, *, seed: int) -> tuple[Tensor, Tensor]:
    """k-means by Lloyd's iterations from a greedy k-means++ start, until no row changes its cluster or 30 times.

    Args:
        rows: (N, D), floating, any device; distances are computed in its dtype.
        k: Number of clusters. There are fewer if there are fewer distinct rows.
        seed: Seed of the start. Its random numbers are drawn on the CPU: they are the same on every device.

    Returns:
        Centroids (k, D), and the cluster (N,) of each row. An empty cluster keeps its centroid.

    Source:
        Arthur & Vassilvitskii 2007, "k-means++"; Lloyd 1982.

    Example:
        >>> rows = torch.tensor([[0.0], [0.1], [5.0], [5.1]])
        >>> kmeans(rows, 2, seed=0)[0].flatten().sort().values
        tensor([0.0500, 5.0500])
    """
    center = rows.mean(0)
    rows = rows - center  # translation changes no distance, and short rows lose fewer digits
    norms = rows.square().sum(1)
    centroids = rows[_starts(rows, norms, k, seed)]
    labels = torch.full((len(rows),), -1, device=rows.device)
    for _ in range(MAX_ITERATIONS):
        nearest = (centroids.square().sum(1) - 2 * rows @ centroids.T).argmin(1)
        if torch.equal(nearest, labels):
            break
        labels = nearest
        members = torch.nn.functional.one_hot(labels, len(centroids)).to(rows)
        counts = members.sum(0)[:, None]
        centroids = torch.where(counts > 0, members.T @ rows / counts.clamp_min(1), centroids)
    return centroids + center, labels


def _starts(rows: Tensor, norms: Tensor, k: int, seed: int) -> list[int]:
    """Rows to start from, by greedy k-means++.

    Candidates are drawn with a probability proportional to the squared distance to the nearest start so far. Of
    2 + ln k candidates, the one that leaves the smallest sum of these distances is taken.
    """
    candidates = 2 + int(math.log(k))
    uniform = torch.rand(k, candidates, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    chosen = [int(uniform[0, 0] * len(rows))]
    smallest = torch.finfo(rows.dtype).eps * norms.max()  # distances of equal rows, up to rounding
    distances = _squared_distances(rows, norms, chosen)[:, 0]
    for draws in uniform[1:].to(rows):
        distances = torch.where(distances <= smallest, 0.0, distances)
        cumulative = distances.cumsum(0)
        if cumulative[-1] == 0:
            break
        drawn = torch.searchsorted(cumulative, cumulative[-1] * draws, right=True).clamp_max(len(rows) - 1)
        nearer = torch.minimum(distances[:, None], _squared_distances(rows, norms, drawn))
        best = nearer.sum(0).argmin()
        chosen.append(int(drawn[best]))
        distances = nearer[:, best]
    return chosen


def _squared_distances(rows: Tensor, norms: Tensor, others: list[int] | Tensor) -> Tensor:
    """(N, m) squared distances of rows to m of them."""
    return (norms[:, None] + norms[others] - 2 * rows @ rows[others].T).clamp_min(0)


def adjusted_mutual_information(first: Tensor, second: Tensor) -> float:
    r"""Adjusted mutual information of two labelings: (I − E I)/((H₁ + H₂)/2 − E I), 0 expected of random labels.

    E I is the expectation over all permutations of the labels, by the hypergeometric distribution of each cell of the
    contingency table.

    Args:
        first: (N,) int64 labels ≥ 0.
        second: (N,) int64 labels ≥ 0.

    Returns:
        A number ≤ 1; 1 if the labelings are equal up to names, also if each has one cluster, or one row per cluster.

    Source:
        Vinh, Epps & Bailey 2010, "Information theoretic measures for clusterings comparison", with the arithmetic mean.

    Example:
        >>> round(adjusted_mutual_information(torch.tensor([0, 0, 1, 1]), torch.tensor([1, 1, 0, 0])), 9)
        1.0
    """
    width = int(second.max()) + 1
    table = torch.bincount(first.cpu() * width + second.cpu(), minlength=(int(first.max()) + 1) * width)
    table = table.reshape(-1, width)
    table = table[table.sum(1) > 0][:, table.sum(0) > 0]
    if table.shape in ((1, 1), (len(first), len(first))):
        return 1.0  # by convention: the quotient is 0/0
    n, a, b = int(table.sum()), table.sum(1), table.sum(0)
    p, q, joint = (counts.to(torch.float64) / n for counts in (a, b, table))
    information = float(torch.xlogy(joint, joint / (p[:, None] * q)).sum())
    entropy = -float(torch.xlogy(p, p).sum() + torch.xlogy(q, q).sum()) / 2
    expected = _expected_information(a, b, n)
    return (information - expected) / max(entropy - expected, torch.finfo(torch.float64).eps)


def _expected_information(a: Tensor, b: Tensor, n: int) -> float:
    """Expected mutual information of two labelings with cluster sizes a and b, over all permutations."""
    log_factorial = torch.lgamma(torch.arange(1, n + 2, dtype=torch.float64))
    (a, a_times), (b, b_times) = (sizes.unique(return_counts=True) for sizes in (a, b))
    a, b = a[:, None, None], b[:, None]
    count = torch.arange(1, int(min(a.max(), b.max())) + 1)  # rows in a cell, (M,)
    rest = n - a - b + count
    possible = (count <= torch.minimum(a, b)) & (rest >= 0)  # (A, B, M)
    log_probability = (
        (log_factorial[a] + log_factorial[n - a])
        + (log_factorial[b] + log_factorial[n - b])
        - log_factorial[n]
        - log_factorial[count]
        - log_factorial[(a - count).clamp_min(0)]
        - log_factorial[(b - count).clamp_min(0)]
        - log_factorial[rest.clamp(0, n)]
    )
    gain = (count * n / (a * b).to(torch.float64)).log()
    terms = torch.where(possible, log_probability.exp() * count / n * gain, 0.0).sum(2)
    return float(a_times.to(terms) @ terms @ b_times.to(terms))


def cluster_agreement(features: Tensor, *, clusters: int | Sequence[int] = CLUSTERS, seed: int = 0) -> Tensor:
    r"""Clustering agreement: adjusted mutual information of the clusters that two halves of the rows yield.

    The rows are divided at random. k-means runs on each half from a different start. Each result assigns all rows to
    its nearest centroid, and the two labelings are compared. Features with stable groups agree.

    Convention: rows are centered and scaled to length 1; mean over k = 10 and k = 50; one division, fixed by the seed.

    Args:
        features: (N, D), any floating dtype; of more than 1024 rows, 1024 at equal distances are used.
        clusters: Number of clusters, or several to average over.
        seed: Seed of the division and of both starts.

    Returns:
        0-dim float64 ≤ 1; higher is better; 0 is the agreement of random labels. NaN for constant features, and for
        fewer than four rows per cluster.

    Raises:
        TypeError: Features are not floating.
        ValueError: Wrong shape, NaN or Inf.

    Source:
        Stability of clusterings: Ben-Hur, Elisseeff & Guyon 2002; for self-supervised features: arXiv 2409.06612.

    Example:
        >>> rows = torch.eye(10).repeat(8, 1) + 0.01 * torch.randn(80, 10, generator=torch.Generator().manual_seed(0))
        >>> cluster_agreement(rows, clusters=10).item() > 0.7
        True
    """
    return mean_agreement(features, clusters=clusters, seed=seed)[0]


def mean_agreement(
    features: Tensor,
    *,
    blocks: Tensor | None = None,
    clusters: int | Sequence[int] = CLUSTERS,
    seed: int = 0,
) -> Tensor:
    """Agreements (1 + G,): of all rows, and of those outside of each block, on the clusters of all rows.

    Args:
        features: As in :func:`cluster_agreement`.
        blocks: (N,) int64 in 0 … G − 1, the block of each row; None: G = 0.
        clusters: As there.
        seed: As there.
    """
    unit, counts = _prepare(features, clusters)
    count = count_blocks(blocks)
    if unit is None:
        return torch.full((1 + count,), math.nan, dtype=torch.float64, device=features.device)
    kept: list[slice | Tensor] = [slice(None)]
    if blocks is not None:
        block = blocks.cpu()[evenly_spaced(len(features), MAX_CLUSTERED)]
        kept += [block != number for number in range(count)]
    pairs = _paired_clusters(unit, counts, seed)
    values = [sum(adjusted_mutual_information(a[rows], b[rows]) for a, b in pairs) / len(pairs) for rows in kept]
    return torch.tensor(values, dtype=torch.float64, device=features.device)


def _prepare(features: Tensor, clusters: int | Sequence[int]) -> tuple[Tensor | None, Sequence[int]]:
    """Rows to cluster, or None if there is nothing to cluster; the numbers of clusters."""
    check_features(features, min_rows=2)
    counts = [clusters] if isinstance(clusters, int) else list(clusters)
    if not counts or min(counts) < 2:
        raise ValueError(f"clusters must be numbers of clusters of at least 2, got {clusters}")
    unit = centered_directions(features[evenly_spaced(len(features), MAX_CLUSTERED).to(features.device)])
    return (None if len(unit) < ROWS_PER_CLUSTER * max(counts) or not unit.any() else unit), counts


def evenly_spaced(rows: int, most: int) -> Tensor:
    """Indices of at most ``most`` rows at equal distances.

    Example:
        >>> evenly_spaced(9, 3).tolist(), evenly_spaced(2, 3).tolist()
        ([0, 3, 6], [0, 1])
    """
    count = min(rows, most)
    return torch.arange(count) * rows // count


def _paired_clusters(unit: Tensor, counts: Sequence[int], seed: int) -> list[tuple[Tensor, Tensor]]:
    """Clusters of all rows by k-means on one half and on the other half, for each number of clusters."""
    halves = _halves(len(unit), seed)
    pairs = []
    for k in counts:
        centroids = [kmeans(unit[half], k, seed=2 * seed + number)[0] for number, half in enumerate(halves)]
        first, second = (torch.cdist(unit, each).argmin(1).cpu() for each in centroids)
        pairs.append((first, second))
    return pairs


def _halves(n: int, seed: int) -> tuple[Tensor, Tensor]:
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    return order[: n // 2], order[n // 2 :]


def cluster_learnability(features: Tensor, *, clusters: int | Sequence[int] = CLUSTERS, seed: int = 0) -> Tensor:
    r"""Cluster learnability: accuracy with which nearest neighbors predict the k-means cluster of held-out rows.

    k-means on all rows gives pseudo-labels. The rows are divided at random into halves. Each row is predicted by the
    10 nearest rows of the other half.

    Convention: rows are centered and scaled to length 1; mean over k = 10 and k = 50. The source measures the area
    under the learning curve instead, and multiplies by an intrinsic dimension.

    Args:
        features: (N, D), any floating dtype; of more than 1024 rows, 1024 at equal distances are used.
        clusters: Number of clusters, or several to average over.
        seed: Seed of the division and of the start.

    Returns:
        0-dim float64 in 0 … 1; higher is better. NaN for constant features, and for fewer than four rows per cluster.

    Raises:
        TypeError: Features are not floating.
        ValueError: Wrong shape, NaN or Inf.

    Source:
        Lu et al. 2022, arXiv 2206.01251 (CLID).

    Example:
        >>> rows = torch.eye(4).repeat(20, 1) + 0.01 * torch.randn(80, 4, generator=torch.Generator().manual_seed(0))
        >>> cluster_learnability(rows, clusters=4).item()
        1.0
    """
    return mean_learnability(features, clusters=clusters, seed=seed)[0]


def mean_learnability(
    features: Tensor,
    *,
    blocks: Tensor | None = None,
    clusters: int | Sequence[int] = CLUSTERS,
    seed: int = 0,
) -> Tensor:
    """Accuracies (1 + G,): of all rows, and of those outside of each block, with the clusters of all rows.

    Args:
        features: As in :func:`cluster_learnability`.
        blocks: (N,) int64 in 0 … G − 1, the block of each row; None: G = 0.
        clusters: As there.
        seed: As there.
    """
    unit, counts = _prepare(features, clusters)
    if unit is None:
        return torch.full((1 + count_blocks(blocks),), math.nan, dtype=torch.float64, device=features.device)
    block = None if blocks is None else blocks.cpu()[evenly_spaced(len(features), MAX_CLUSTERED)]
    return means_without_blocks(_learned_rows(unit, counts, seed), block, count=count_blocks(blocks))


def _learned_rows(unit: Tensor, counts: Sequence[int], seed: int) -> Tensor:
    """(N,) float64: share of the numbers of clusters at which the neighbors predict the row's cluster."""
    labels = [kmeans(unit, k, seed=seed)[1] for k in counts]
    correct = torch.zeros(len(unit), dtype=torch.float64, device=unit.device)
    halves = [half.to(unit.device) for half in _halves(len(unit), seed)]
    for test, train in (halves, halves[::-1]):
        nearest = (unit[test] @ unit[train].T).topk(min(NEIGHBORS, len(train)), dim=1).indices
        for label in labels:
            votes = torch.nn.functional.one_hot(label[train][nearest]).sum(1)
            correct[test] += (votes.argmax(1) == label[test]).to(correct)
    return correct / len(counts)
