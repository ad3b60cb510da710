"""The formulas of the papers in NumPy float64: slow, plain, and without code in common with the package."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def entropy(weights: Array) -> float:
    """H₁ of w/Σw with 0·log 0 = 0."""
    total = weights.sum()
    if total == 0:
        return 0.0
    p = weights[weights > 0] / total
    return float(-(p * np.log(p)).sum())


def center(z: Array) -> Array:
    return z - z.mean(axis=0)


def unit(z: Array) -> Array:
    return z / np.sqrt((z**2).sum(axis=1, keepdims=True))


# ── spectrum ────────────────────────────────────────────────────────────────────────────────────────────────────


def rankme(z: Array, *, eps: float = 0.0) -> float:
    """Garrido et al. 2023, equation 1: p_k = σ_k/‖σ‖₁ + ε, exp(−Σ p_k log p_k)."""
    sigma = np.linalg.svd(z, compute_uv=False)
    if eps == 0:
        return float(np.exp(entropy(sigma)))
    p = sigma / sigma.sum() + eps
    return float(np.exp(-(p * np.log(p)).sum()))


def rankme_stable_pretraining(z: Array) -> float:
    """stable-pretraining 0.1.8: p = σ/Σσ + 1e-5, exp(−Σ p log p); p is not divided by its sum again."""
    sigma = np.linalg.svd(z, compute_uv=False)
    p = sigma / sigma.sum() + 1e-5
    return float(np.exp(-np.sum(p * np.log(p))))


def rankme_reptrix(z: Array) -> float:
    """reptrix 0.1.0: λ of the centered covariance by PCA, p = λ/Σλ + 1e-7, exp(−Σ p log p)."""
    eigenvalues = np.linalg.svd(center(z), compute_uv=False) ** 2 / (len(z) - 1)
    p = eigenvalues / eigenvalues.sum() + 1e-7
    return float(np.exp(-np.sum(p * np.log(p))))


def effective_rank(z: Array) -> float:
    return float(np.exp(entropy(np.linalg.svd(z, compute_uv=False) ** 2)))


def participation_ratio(z: Array) -> float:
    """(tr C)²/tr C² with C = ZᵀZ, no decomposition."""
    c = z.T @ z
    return float(np.trace(c) ** 2 / (c * c).sum())


def participation_ratio_unbiased(z: Array) -> float:
    """Σ_{i≠j} ‖x_i‖²‖x_j‖² / Σ_{i≠j} (x_i·x_j)²."""
    above = below = 0.0
    for i, j in itertools.permutations(range(len(z)), 2):
        above += (z[i] @ z[i]) * (z[j] @ z[j])
        below += (z[i] @ z[j]) ** 2
    return above / below


def stable_rank(z: Array) -> float:
    """‖Z‖²_F/‖Z‖²₂."""
    return float(np.linalg.norm(z, "fro") ** 2 / np.linalg.norm(z, 2) ** 2)


def alpha_req(z: Array) -> tuple[float, float]:
    """Line through (log k, log λ_k), k = 11 … 100, weights 1/k: minus the slope, and R²."""
    k = np.arange(11, 101)
    y = np.log(np.linalg.svd(center(z), compute_uv=False)[10:100] ** 2)
    x, w = np.log(k), 1.0 / k
    design = np.stack([np.ones_like(x), x], axis=1)
    normal = design.T @ (w[:, None] * design)
    intercept, slope = np.linalg.inv(normal) @ (design.T @ (w * y))
    residual = y - intercept - slope * x
    spread = y - (w * y).sum() / w.sum()
    return float(-slope), float(1 - (w * residual**2).sum() / (w * spread**2).sum())


# ── correlation ─────────────────────────────────────────────────────────────────────────────────────────────────


def correlations(z: Array) -> list[float]:
    """corr_ij of every ordered pair i ≠ j of columns that vary, one pair at a time."""
    columns = [c - c.mean() for c in z.T if np.ptp(c) > 0]
    return [float((a @ b) / np.sqrt((a @ a) * (b @ b))) for a, b in itertools.permutations(columns, 2)]


def odcorr(z: Array, *, reduction: str = "abs") -> float:
    values = np.array(correlations(z))
    if reduction == "abs":
        return float(np.abs(values).mean())
    if reduction == "rms":
        return float(np.sqrt((values**2).mean()))
    return float(values.mean())


def dead_features(z: Array) -> float:
    variance = z.var(axis=0)
    return float(np.mean(variance < 1e-6 * np.median(variance)))


# ── directions ──────────────────────────────────────────────────────────────────────────────────────────────────


def uniformity_w2(z: Array) -> float:
    """√(‖m‖² + 1 + tr Σ − 2·tr Σ^½/√D) of the unit rows, Σ with divisor N."""
    u = unit(z)
    m = u.mean(axis=0)
    trace = (center(u) ** 2).sum() / len(u)
    root = np.linalg.norm(center(u), "nuc") / np.sqrt(len(u))
    return float(np.sqrt(max(m @ m + 1 + trace - 2 * root / np.sqrt(z.shape[1]), 0)))


def mean_direction(z: Array) -> float:
    return float(np.linalg.norm(unit(z).mean(axis=0)))


# ── views ───────────────────────────────────────────────────────────────────────────────────────────────────────


def lidar(z: Array, views: Sequence[object], *, delta: float = 1e-4, debias: bool = False) -> float:
    """Thilak et al. 2023 with equally many views per sample: exp H₁ of eig(Σw^-½ Σb Σw^-½)."""
    names = sorted(set(views), key=str)
    clouds = [z[[v == name for v in views]] for name in names]
    means = np.array([cloud.mean(axis=0) for cloud in clouds])
    overall = means.mean(axis=0)
    between = sum(np.outer(m - overall, m - overall) for m in means) / len(means)
    within = sum(center(cloud).T @ center(cloud) / len(cloud) for cloud in clouds) / len(clouds)
    if debias:
        q = len(clouds[0])
        between = between - within * q / (q - 1) / q  # Σb − Σw/q with the unbiased Σw
    d = z.shape[1]
    values, vectors = np.linalg.eigh(within + delta * np.trace(within) / d * np.eye(d))
    root = vectors @ np.diag(values**-0.5) @ vectors.T
    eigenvalues = np.sort(np.linalg.eigvalsh(root @ between @ root))[::-1][: min(len(names) - 1, d)]
    return float(np.exp(entropy(np.clip(eigenvalues, 0, None))))


def alignment(z: Array, views: Sequence[object]) -> float:
    """Mean over samples of the mean over pairs of its views of ‖u − u⁺‖²."""
    u = unit(z)
    means = []
    for name in dict.fromkeys(views):
        rows = [i for i, v in enumerate(views) if v == name]
        means.append(np.mean([((u[i] - u[j]) ** 2).sum() for i, j in itertools.combinations(rows, 2)]))
    return float(np.mean(means))


# ── neighbors ──────────────────────────────────────────────────────────────────────────────────────────────────


def distances(z: Array) -> Array:
    """(N, N) Euclidean distances by differences, ∞ on the diagonal."""
    out = np.array([np.sqrt(((z - row) ** 2).sum(axis=1)) for row in z])
    np.fill_diagonal(out, np.inf)
    return out


def knn_entropy(z: Array, *, k: int) -> float:
    return float(np.log(np.sort(distances(unit(z)), axis=1)[:, k - 1]).mean())


def kde_entropy(z: Array, *, concentration: float) -> float:
    u = unit(z)
    total = 0.0
    for i in range(len(u)):
        density = np.mean([np.exp(concentration * (u[i] @ u[j] - 1)) for j in range(len(u)) if j != i])
        total -= np.log(density)
    return float(total / len(u))


def twonn(z: Array) -> float:
    nearest = np.sort(distances(z), axis=1)[:, :2]
    return float((len(z) - 1) / np.log(nearest[:, 1] / nearest[:, 0]).sum())


# ── drift and grouping ──────────────────────────────────────────────────────────────────────────────────────────


def hsic(k: Array, l: Array) -> float:  # noqa: E741 (the letters of Song et al.)
    """Song et al. 2012, equation 5: the unbiased estimator, with N×N kernels."""
    n = len(k)
    k, l = k - np.diag(np.diag(k)), l - np.diag(np.diag(l))  # noqa: E741
    ones = np.ones(n)
    cross = ones @ k @ l @ ones
    terms = np.trace(k @ l) + (ones @ k @ ones) * (ones @ l @ ones) / ((n - 1) * (n - 2)) - 2 / (n - 2) * cross
    return float(terms / (n * (n - 3)))


def cka(x: Array, y: Array) -> float:
    k, l = x @ x.T, y @ y.T  # noqa: E741
    return hsic(k, l) / np.sqrt(hsic(k, k) * hsic(l, l))


def slide_leakage(z: Array, groups: Sequence[object]) -> float:
    """Σ_g n_g‖μ_g − μ‖² / Σ‖x − μ‖²."""
    mean = z.mean(axis=0)
    between = 0.0
    for name in set(groups):
        rows = z[[g == name for g in groups]]
        between += len(rows) * ((rows.mean(axis=0) - mean) ** 2).sum()
    return float(between / ((z - mean) ** 2).sum())


def neighbor_leakage(z: Array, groups: Sequence[object], *, k: int) -> float:
    order = np.argsort(distances(z), axis=1, kind="stable")[:, :k]
    rate = np.mean([[groups[j] == groups[i] for j in order[i]] for i in range(len(z))])
    chance = np.mean([(list(groups).count(g) - 1) / (len(z) - 1) for g in groups])
    return float(rate / chance)


# ── patch tokens ────────────────────────────────────────────────────────────────────────────────────────────────


def gram_drift(tokens: Array, anchor: Array) -> float:
    total = 0.0
    for image, reference in zip(tokens, anchor, strict=True):
        u, a = unit(image), unit(reference)
        for i, j in itertools.product(range(len(u)), repeat=2):
            total += (u[i] @ u[j] - a[i] @ a[j]) ** 2
    return total / tokens.shape[0] / tokens.shape[1] ** 2


def dse(tokens: Array, labels: NDArray[np.int64], orders: NDArray[np.int64]) -> dict[str, float]:
    """The terms of DSE for at most eight images whose clusters (B, T) are known, the same in each image.

    Draw j takes token orders[i, j] of image i.
    """
    u = np.stack([unit(image) for image in tokens])
    flat, flat_labels = u.reshape(-1, u.shape[-1]), labels.reshape(-1)
    spread = np.sqrt((center(flat) ** 2).sum(axis=1)).mean()
    names = np.unique(flat_labels)
    centroids = {c: flat[flat_labels == c].mean(axis=0) for c in names}

    def radius(rows: Array) -> float:
        return float(np.linalg.svd(center(rows), compute_uv=False).sum() / np.sqrt(max(len(rows) - 1, rows.shape[1])))

    inter = np.mean(
        [
            min(np.linalg.norm(row - centroids[c]) for c in names if c != label)
            for row, label in zip(flat, flat_labels, strict=True)
        ]
    )
    per_image = [np.mean([radius(image[of == c]) for c in names]) for image, of in zip(u, labels, strict=True)]
    batch = np.mean([radius(flat[flat_labels == c]) for c in names])
    terms = {
        "inter": float(inter / spread),
        "intra_image": float(np.mean(per_image) / spread),
        "intra_batch": float(batch / spread),
        "dimension": float(
            np.mean([rankme(np.stack([u[i, o[j]] for i, o in enumerate(orders)])) for j in range(u.shape[1])])
            / min(u.shape[0], u.shape[2])
        ),
    }
    terms["dse"] = terms["inter"] - (terms["intra_image"] + terms["intra_batch"]) / 2 + terms["dimension"]
    return terms


# ── retrieval, clusters, trees ──────────────────────────────────────────────────────────────────────────────────


def view_similarity(first: Array, second: Array, *, whiten: bool) -> Array:
    """(N, N) cosines of centered (and whitened) first views with second views; whitening by an SVD of both views."""
    both = center(np.concatenate([first, second]))
    if whiten:
        _, sigma, vectors = np.linalg.svd(both, full_matrices=False)
        both = both @ vectors.T / np.sqrt(np.maximum(sigma**2, 1e-4 * sigma[0] ** 2))
    lengths = np.sqrt((both**2).sum(axis=1))
    n = len(first)
    return both[:n] @ both[n:].T / np.outer(lengths[:n], lengths[n:])


def view_retrieval(first: Array, second: Array, *, whiten: bool = False) -> float:
    similarity = view_similarity(first, second, whiten=whiten)
    return float(np.mean([row.argmax() == i for i, row in enumerate(similarity)]))


def view_infonce(first: Array, second: Array) -> float:
    similarity = view_similarity(first, second, whiten=False) / 0.1
    return float(-np.mean([np.log(np.exp(row[i]) / np.exp(row).sum()) for i, row in enumerate(similarity)]))


def mutual_information(first: Sequence[int], second: Sequence[int]) -> float:
    """Σ p(a, b) ln[p(a, b)/(p(a) p(b))] over the pairs of labels that occur."""
    n = len(first)
    pairs = list(zip(first, second, strict=True))
    total = 0.0
    for a, b in set(pairs):
        joint = pairs.count((a, b)) / n
        total += joint * np.log(joint / (list(first).count(a) / n) / (list(second).count(b) / n))
    return float(total)


def adjusted_mutual_information(first: Sequence[int], second: Sequence[int]) -> float:
    """(I − E I)/(mean entropy − E I), E I as the mean over every permutation of the second labels."""
    expected = float(np.mean([mutual_information(first, p) for p in itertools.permutations(second)]))
    mean = (mutual_information(first, first) + mutual_information(second, second)) / 2  # H = I(X; X)
    return (mutual_information(first, second) - expected) / (mean - expected)
