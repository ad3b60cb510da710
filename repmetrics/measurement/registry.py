"""METRICS: the one table of what repmetrics measures; command line, monitor, docs and tests iterate it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Literal, NamedTuple

from torch import Tensor

from repmetrics.functional import (
    alignment,
    alpha_req,
    cka_drift,
    dead_features,
    dse,
    effective_rank,
    gram_drift,
    high_norm_share,
    kde_entropy,
    knn_entropy,
    lidar,
    mean_direction,
    neighbor_leakage,
    odcorr,
    participation_ratio,
    rankme,
    rankme_centered,
    slide_leakage,
    stable_rank,
    twonn,
    uniformity_w2,
)

Direction = Literal["higher", "lower", "neither"]

Needs = Literal["moments", "directions", "features", "views", "groups", "previous", "tokens", "anchor"]
"""What a metric is computed from: streaming moments of the features, or of their directions; the features themselves;
features and an argument of that name; or patch tokens (B, T, D), with an anchor's."""


class MetricSpec(NamedTuple):
    """One row of :data:`METRICS`."""

    function: Callable[..., Tensor]
    direction: Direction
    inputs: Needs
    convention: str
    reference: str
    summary: str


METRICS: Mapping[str, MetricSpec] = {
    "rankme": MetricSpec(
        rankme,
        "higher",
        "moments",
        "exp H(σ/Σσ); not centred, σ not squared, ε = 0",
        "arXiv 2210.02885 eq. 1",
        "effective number of directions of the features as they come",
    ),
    "rankme_centered": MetricSpec(
        rankme_centered,
        "higher",
        "moments",
        "exp H(σ/Σσ); centred, σ not squared, ε = 0",
        "arXiv 2210.02885 eq. 1, centred",
        "RankMe blind to a common offset",
    ),
    "effective_rank": MetricSpec(
        effective_rank,
        "higher",
        "moments",
        "exp H(λ/Σλ); not centred, λ = σ²",
        "Roy & Vetterli 2007",
        "RankMe's numerically safest relative, weighted by variance",
    ),
    "participation_ratio": MetricSpec(
        participation_ratio,
        "higher",
        "moments",
        "(Σλ)²/Σλ²; not centred",
        "Gao et al. 2017",
        "how many equal eigenvalues would be as concentrated",
    ),
    "stable_rank": MetricSpec(
        stable_rank,
        "higher",
        "moments",
        "Σλ/λ₁; not centred",
        "Rudelson & Vershynin 2007",
        "energy of all directions in units of the strongest",
    ),
    "alpha_req": MetricSpec(
        alpha_req,
        "neither",
        "moments",
        "−slope of ln λ on ln k, ranks 11–100, weights 1/k; centred; best near 1",
        "arXiv 2202.05808",
        "decay of the covariance spectrum",
    ),
    "odcorr": MetricSpec(
        odcorr,
        "lower",
        "moments",
        "mean over i ≠ j of |corr_ij|; constant features excluded",
        "arXiv 2404.15217",
        "how much the features repeat one another",
    ),
    "dead_features": MetricSpec(
        dead_features,
        "lower",
        "moments",
        "share of columns with variance < 1e-6 × the median",
        "—",
        "columns that say nothing",
    ),
    "uniformity_w2": MetricSpec(
        uniformity_w2,
        "lower",
        "directions",
        "√(‖m‖² + 1 + trΣ − 2·trΣ^½/√D); rows scaled to length 1",
        "arXiv 2403.00642",
        "distance of the directions to the uniform sphere",
    ),
    "mean_direction": MetricSpec(
        mean_direction,
        "lower",
        "directions",
        "‖E u‖; rows scaled to length 1",
        "—",
        "→ 1 when all features point the same way",
    ),
    "knn_entropy": MetricSpec(
        knn_entropy,
        "neither",
        "features",
        "E ln‖u − u₍₁₎‖; rows scaled to length 1",
        "Kozachenko & Leonenko 1987; arXiv 1806.03198",
        "minus the KoLeo loss",
    ),
    "kde_entropy": MetricSpec(
        kde_entropy,
        "neither",
        "features",
        "−E ln E exp(κ(u·u′ − 1)), κ = 5; rows scaled to length 1",
        "arXiv 2408.00738",
        "entropy of the directions by a kernel density",
    ),
    "twonn": MetricSpec(
        twonn,
        "neither",
        "features",
        "(N − 1)/Σ ln(r₂/r₁); features as they come",
        "Facco et al. 2017",
        "intrinsic dimension",
    ),
    "lidar": MetricSpec(
        lidar,
        "higher",
        "views",
        "exp H(eig Σw^-½ΣbΣw^-½), δ = 1e-4·tr Σw/D, ε = 0",
        "arXiv 2312.04000",
        "effective rank of what tells samples apart beyond augmentation",
    ),
    "alignment": MetricSpec(
        alignment,
        "neither",
        "views",
        "E‖u − u⁺‖²; rows scaled to length 1",
        "arXiv 2005.10242",
        "distance between views; never a selector alone",
    ),
    "slide_leakage": MetricSpec(
        slide_leakage,
        "lower",
        "groups",
        "tr Σ_between / tr Σ; features as they come",
        "—",
        "share of the variance that lies between slides",
    ),
    "neighbor_leakage": MetricSpec(
        neighbor_leakage,
        "lower",
        "groups",
        "same-slide rate among 10 nearest ÷ chance; features as they come",
        "—",
        "how often neighbours share a slide",
    ),
    "cka_drift": MetricSpec(
        cka_drift,
        "neither",
        "previous",
        "debiased linear CKA to the previous features of the same rows; 1 = no drift",
        "arXiv 1905.00414; Song et al. 2012",
        "how far the representation has moved",
    ),
    "dse": MetricSpec(
        dse,
        "higher",
        "tokens",
        "inter − (intra_image + intra_batch)/2 + dimension; tokens scaled to length 1, λ = 1",
        "arXiv 2510.17299",
        "cluster structure of patch tokens, for dense tasks",
    ),
    "gram_drift": MetricSpec(
        gram_drift,
        "neither",
        "anchor",
        "E‖UUᵀ − AAᵀ‖²/T²; tokens scaled to length 1; 0 = no drift",
        "arXiv 2508.10104",
        "how far the similarities between patches have moved",
    ),
    "high_norm_share": MetricSpec(
        high_norm_share,
        "lower",
        "tokens",
        "share of tokens longer than 3 × the median",
        "arXiv 2309.16588",
        "artefact tokens",
    ),
}

DEFAULT_METRICS = ("rankme", "rankme_centered", "effective_rank", "odcorr")
"""What the monitor and ``repmetrics score`` measure unless told otherwise."""


def check_metric_names(names: Iterable[str]) -> None:
    """Raise ValueError naming the unknown metrics and the known ones."""
    if isinstance(names, str):
        raise ValueError(f"metrics must be a list of names, got the text {names!r}")
    unknown = [name for name in names if name not in METRICS]
    if unknown:
        raise ValueError(f"unknown metric {', '.join(map(repr, unknown))}: choose among {', '.join(METRICS)}")
