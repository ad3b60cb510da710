"""Metrics as functions of features (N, D) or :class:`~repmetrics.measurement.moments.Moments`; torch and SciPy only.

Example:
    >>> import torch
    >>> from repmetrics.functional import odcorr, rankme
    >>> x = torch.eye(4, dtype=torch.float64)
    >>> print(f"{rankme(x):.1f} {odcorr(x):.2f}")
    4.0 0.33
"""

from repmetrics.functional.clusters import cluster_agreement, cluster_learnability
from repmetrics.functional.correlation import dead_features, odcorr
from repmetrics.functional.dense import dse, dse_dimension, dse_inter, dse_intra, gram_drift, high_norm_share
from repmetrics.functional.drift import cka_drift
from repmetrics.functional.hypersphere import mean_direction, uniformity_w2
from repmetrics.functional.leakage import neighbor_leakage, slide_leakage
from repmetrics.functional.multiview import alignment, lidar
from repmetrics.functional.neighbors import kde_entropy, knn_entropy, twonn
from repmetrics.functional.retrieval import view_infonce, view_retrieval, view_retrieval_whitened
from repmetrics.functional.rotation import rotation_probe
from repmetrics.functional.spanning_tree import mst_dimension
from repmetrics.functional.spectrum import (
    alpha_distance,
    alpha_req,
    effective_rank,
    participation_ratio,
    rankme,
    rankme_centered,
    stable_rank,
)

__all__ = [
    "alignment",
    "alpha_distance",
    "alpha_req",
    "cka_drift",
    "cluster_agreement",
    "cluster_learnability",
    "dead_features",
    "dse",
    "dse_dimension",
    "dse_inter",
    "dse_intra",
    "effective_rank",
    "gram_drift",
    "high_norm_share",
    "kde_entropy",
    "knn_entropy",
    "lidar",
    "mean_direction",
    "mst_dimension",
    "neighbor_leakage",
    "odcorr",
    "participation_ratio",
    "rankme",
    "rankme_centered",
    "rotation_probe",
    "slide_leakage",
    "stable_rank",
    "twonn",
    "uniformity_w2",
    "view_infonce",
    "view_retrieval",
    "view_retrieval_whitened",
]
