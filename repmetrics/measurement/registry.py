"""METRICS: the table of all metrics and their properties."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from importlib import import_module
from operator import attrgetter
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

    from repmetrics.measurement.moments import Moments

Direction = Literal["higher", "lower", "neither"]

Inputs = Literal["moments", "directions", "features", "views", "groups", "previous", "tokens", "anchor", "turns"]
"""What a metric is computed from: moments of the features or of their directions; the features; the features and the
argument of that name; patch tokens (B, T, D); patch tokens and an anchor; or features (N, 4, D) of quarter-turns."""

ARGUMENTS: Mapping[str, str] = {
    "views": "the sample's id of each row",
    "groups": "the group's id of each row, such as its slide",
    "previous": "another checkpoint's features of the same rows",
    "anchor": "the anchor's tokens of the same images",
}
"""Arguments that a metric may need in addition to the features, and what each holds."""


@dataclass(frozen=True)
class Deferred:
    """Function that is imported when it is first called, so that a program can read the table without torch.

    Args:
        path: Name below ``repmetrics.functional``.

    Example:
        >>> Deferred("spectrum.rankme").function.__name__
        'rankme'
    """

    path: str

    @cached_property
    def function(self) -> Callable[..., Any]:
        """The function itself."""
        function: Callable[..., Any] = attrgetter(self.path)(import_module("repmetrics.functional"))
        return function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function."""
        return self.function(*args, **kwargs)


class WithReplicates(NamedTuple):
    """Computation of a metric's value together with its values without each block, for less than one at a time.

    Attributes:
        function: Function: features, ``blocks=`` the block of each row or None, and the metric's argument → result.
            Metrics with the same function share one result.
        field: Field of the result with the metric's values (1 + G,), of all rows and without each block. Empty: the
            result itself.
    """

    function: Callable[..., Any]
    field: str = ""


class MetricSpec(NamedTuple):
    """One row of :data:`METRICS`: all that the package knows of a metric.

    Attributes:
        function: Function that computes the metric.
        direction: Direction of an improvement.
        inputs: What the metric is computed from.
        convention: What is and is not done to the features; recorded with each value.
        reference: Source of the definition.
        summary: Meaning in a few words.
        centered: Whether the spectrum that the metric reads is centered, or None if it reads none. A metric that reads
            a spectrum is biased low where rows are few.
        undefined: Reason recorded where the value is NaN.
        null_floor: Value expected of unrelated features, from the numbers of rows and of groups.
        details: Further numbers to record, each from the moments of all rows.
        of_panel: Function: panel of the centered Gram matrix, reciprocal norms of the columns (D,) → the panel's sum,
            for a metric that is a mean over pairs of columns.
        with_replicates: Computation of the value and of those without each block, if there is a cheap one. A metric of
            moments uses it unless another metric of the same moments needs their spectrum.
        two_views: Whether a metric of views compares two views of each image, so that a part of the images suffices.
        one_width: Whether values compare only between features of the same D. Those from a spectrum always do.
        share: Whether values lie between 0 and 1, so that an interval ends there.
    """

    function: Callable[..., Tensor]
    direction: Direction
    inputs: Inputs
    convention: str
    reference: str
    summary: str
    centered: bool | None = None
    undefined: str = "the metric does not exist for these features"
    null_floor: Callable[[int, int], float] | None = None
    details: Mapping[str, Callable[[Moments], float]] = MappingProxyType({})
    of_panel: Callable[[Tensor, Tensor], Tensor] | None = None
    with_replicates: WithReplicates | None = None
    two_views: bool = False
    one_width: bool = False
    share: bool = False

    @property
    def higher_is_better(self) -> bool | None:
        """The direction as torchmetrics gives it; None for neither."""
        return {"higher": True, "lower": False}.get(self.direction)

    @property
    def reads_spectrum(self) -> bool:
        """Whether the metric is computed from the spectrum, which is wide for an untrained network."""
        return self.centered is not None

    @property
    def argument(self) -> str | None:
        """Name of the argument that ``function`` takes in addition to the features, if any."""
        return self.inputs if self.inputs in ARGUMENTS else None

    @property
    def from_moments(self) -> bool:
        """Whether moments suffice."""
        return self.inputs in ("moments", "directions")

    @property
    def from_tokens(self) -> bool:
        """Whether the metric takes several vectors per image (B, T, D), such as patch tokens, not features (N, D)."""
        return self.inputs in ("tokens", "anchor", "turns")


METRICS: Mapping[str, MetricSpec] = {
    "rankme": MetricSpec(
        Deferred("rankme"),
        "higher",
        "moments",
        "exp H(σ/Σσ); not centred, σ not squared, ε = 0",
        "arXiv 2210.02885 eq. 1",
        "effective number of directions of the features as they come",
        centered=False,
    ),
    "rankme_centered": MetricSpec(
        Deferred("rankme_centered"),
        "higher",
        "moments",
        "exp H(σ/Σσ); centred, σ not squared, ε = 0",
        "arXiv 2210.02885 eq. 1, centered",
        "RankMe without the effect of a common offset",
        centered=True,
    ),
    "effective_rank": MetricSpec(
        Deferred("effective_rank"),
        "higher",
        "moments",
        "exp H(λ/Σλ); not centred, λ = σ²",
        "Roy & Vetterli 2007",
        "effective number of directions by variance; numerically the safest rank",
        centered=False,
    ),
    "participation_ratio": MetricSpec(
        Deferred("participation_ratio"),
        "higher",
        "moments",
        "(Σλ)²/Σλ²; not centred",
        "Gao et al. 2017",
        "number of equal eigenvalues that would be as concentrated",
        centered=False,
        details={"unbiased": lambda moments: float(Deferred("participation_ratio")(moments, unbiased=True))},
    ),
    "stable_rank": MetricSpec(
        Deferred("stable_rank"),
        "higher",
        "moments",
        "Σλ/λ₁; not centred",
        "Rudelson & Vershynin 2007",
        "energy of all directions in units of the strongest",
        centered=False,
    ),
    "alpha_req": MetricSpec(
        Deferred("alpha_req"),
        "neither",
        "moments",
        "−slope of ln λ on ln k, ranks 11–100, weights 1/k; centred; best near 1",
        "arXiv 2202.05808",
        "decay of the covariance spectrum",
        centered=True,
        undefined="fewer than 100 eigenvalues above rounding: no power law can be fitted",
        details={"r_squared": lambda moments: float(Deferred("spectrum.power_law")(moments).r_squared)},
    ),
    "alpha_distance": MetricSpec(
        Deferred("alpha_distance"),
        "lower",
        "moments",
        "|α − 1|, α as alpha_req; centred",
        "arXiv 2202.05808",
        "distance of the spectrum's decay from 1",
        centered=True,
        undefined="fewer than 100 eigenvalues above rounding: no power law can be fitted",
        details={"r_squared": lambda moments: float(Deferred("spectrum.power_law")(moments).r_squared)},
    ),
    "odcorr": MetricSpec(
        Deferred("odcorr"),
        "lower",
        "moments",
        "mean over i ≠ j of |corr_ij|; constant features excluded",
        "arXiv 2404.15217",
        "redundancy between features",
        undefined="fewer than two features vary: no correlation exists",
        null_floor=lambda rows, _groups: Deferred("correlation.odcorr_null_floor")(rows),
        details={"excluded": lambda moments: moments.correlation().excluded},
        of_panel=Deferred("correlation.add_pairs"),
        one_width=True,
        share=True,
    ),
    "dead_features": MetricSpec(
        Deferred("dead_features"),
        "lower",
        "moments",
        "share of columns with variance < 1e-6 × the median",
        "—",
        "constant feature columns",
        share=True,
    ),
    "uniformity_w2": MetricSpec(
        Deferred("uniformity_w2"),
        "lower",
        "directions",
        "√(‖m‖² + 1 + trΣ − 2·trΣ^½/√D); rows scaled to length 1",
        "arXiv 2403.00642",
        "distance of the directions to the uniform sphere",
        centered=True,
    ),
    "mean_direction": MetricSpec(
        Deferred("mean_direction"),
        "lower",
        "directions",
        "‖E u‖; rows scaled to length 1",
        "—",
        "→ 1 when all features point the same way",
        with_replicates=WithReplicates(Deferred("hypersphere.mean_directions")),
        share=True,
    ),
    "knn_entropy": MetricSpec(
        Deferred("knn_entropy"),
        "neither",
        "features",
        "E ln‖u − u₍₁₎‖; rows scaled to length 1",
        "Kozachenko & Leonenko 1987; arXiv 1806.03198",
        "minus the KoLeo loss",
    ),
    "kde_entropy": MetricSpec(
        Deferred("kde_entropy"),
        "neither",
        "features",
        "−E ln E exp(κ(u·u′ − 1)), κ = 5; rows scaled to length 1",
        "arXiv 2408.00738",
        "entropy of the directions by a kernel density",
    ),
    "twonn": MetricSpec(
        Deferred("twonn"),
        "neither",
        "features",
        "(N − 1)/Σ ln(r₂/r₁); features as they come",
        "Facco et al. 2017",
        "intrinsic dimension",
        undefined="fewer than three distinct rows",
    ),
    "mst_dimension": MetricSpec(
        Deferred("mst_dimension"),
        "neither",
        "features",
        "1/(1 − slope) of ln E(n) on ln n, 8 sizes N/16 … N, 3 draws; rows scaled to length 1",
        "Costa & Hero 2004; arXiv 2606.03338",
        "intrinsic dimension by minimum spanning trees",
        undefined="fewer than 64 rows, constant features, or trees that grow as fast as the number of rows",
    ),
    "cluster_agreement": MetricSpec(
        Deferred("cluster_agreement"),
        "higher",
        "features",
        "adjusted mutual information of k-means on two halves, k = 10 and 50; centred, rows scaled to length 1",
        "arXiv 2409.06612",
        "whether two halves of the rows yield the same clusters",
        undefined="fewer than four rows per cluster, or constant features",
        with_replicates=WithReplicates(Deferred("clusters.mean_agreement")),
    ),
    "cluster_learnability": MetricSpec(
        Deferred("cluster_learnability"),
        "higher",
        "features",
        "10 nearest neighbors predict held-out k-means clusters, k = 10 and 50; centred, rows scaled to length 1",
        "arXiv 2206.01251",
        "how well clusters can be read from neighbors",
        undefined="fewer than four rows per cluster, or constant features",
        with_replicates=WithReplicates(Deferred("clusters.mean_learnability")),
        share=True,
    ),
    "view_retrieval": MetricSpec(
        Deferred("view_retrieval"),
        "higher",
        "views",
        "share of first views nearest to their own second view by cosine; centred, ties share a hit",
        "arXiv 1805.01978",
        "whether two views of an image are closer than other images",
        with_replicates=WithReplicates(Deferred("retrieval.mean_matches"), "hits"),
        two_views=True,
        share=True,
    ),
    "view_retrieval_whitened": MetricSpec(
        Deferred("view_retrieval_whitened"),
        "higher",
        "views",
        "as view_retrieval; centred and whitened, eigenvalues ≥ 1e-4 of the largest",
        "arXiv 1805.01978",
        "view retrieval in which weak directions count as much as strong ones",
        with_replicates=WithReplicates(partial(Deferred("retrieval.mean_matches"), whiten=True), "hits"),
        two_views=True,
        share=True,
    ),
    "view_infonce": MetricSpec(
        Deferred("view_infonce"),
        "lower",
        "views",
        "−E ln softmax of cosines over all second views, τ = 0.1; centred",
        "arXiv 1807.03748",
        "smooth view retrieval; ln N at collapse",
        with_replicates=WithReplicates(Deferred("retrieval.mean_matches"), "losses"),
        two_views=True,
    ),
    "lidar": MetricSpec(
        Deferred("lidar"),
        "higher",
        "views",
        "exp H(eig Σw^-½ΣbΣw^-½), δ = 1e-4·tr Σw/D, ε = 0",
        "arXiv 2312.04000",
        "effective rank of the differences between samples beyond augmentation",
        one_width=True,
    ),
    "alignment": MetricSpec(
        Deferred("alignment"),
        "neither",
        "views",
        "E‖u − u⁺‖²; rows scaled to length 1",
        "arXiv 2005.10242",
        "distance between views; must not select models alone",
    ),
    "slide_leakage": MetricSpec(
        Deferred("slide_leakage"),
        "lower",
        "groups",
        "tr Σ_between / tr Σ; features as they come",
        "—",
        "share of the variance that lies between slides",
        undefined="the features are constant",
        null_floor=lambda rows, groups: (groups - 1) / (rows - 1),
        share=True,
    ),
    "neighbor_leakage": MetricSpec(
        Deferred("neighbor_leakage"),
        "lower",
        "groups",
        "same-slide rate among 10 nearest ÷ chance; features as they come",
        "—",
        "how often neighbors share a slide",
    ),
    "cka_drift": MetricSpec(
        Deferred("cka_drift"),
        "neither",
        "previous",
        "debiased linear CKA to the previous features of the same rows; 1 = no drift",
        "arXiv 1905.00414; Song et al. 2012",
        "change of the representation",
        undefined="one of the two representations is constant",
    ),
    "dse": MetricSpec(
        Deferred("dse"),
        "higher",
        "tokens",
        "inter − (intra_image + intra_batch)/2 + dimension; tokens scaled to length 1, λ = 1",
        "arXiv 2510.17299",
        "cluster structure of patch tokens, for dense tasks",
        one_width=True,
    ),
    "dse_inter": MetricSpec(
        Deferred("dse_inter"),
        "higher",
        "tokens",
        "mean distance to the nearest other centroid of 24 in 8 images ÷ spread; tokens scaled to length 1",
        "arXiv 2510.17299",
        "separation of clusters of patch tokens, a term of DSE",
    ),
    "dse_intra": MetricSpec(
        Deferred("dse_intra"),
        "lower",
        "tokens",
        "mean Σσ/√max(n − 1, D) of clusters, 3 per image and 24 per 8 images, ÷ spread; tokens scaled to length 1",
        "arXiv 2510.17299",
        "radius of clusters of patch tokens, a term of DSE",
    ),
    "dse_dimension": MetricSpec(
        Deferred("dse_dimension"),
        "higher",
        "tokens",
        "RankMe/min(B, D) of one token per image, mean over T draws; tokens scaled to length 1",
        "arXiv 2510.17299",
        "effective dimension of patch tokens, a term of DSE",
        one_width=True,
    ),
    "rotation_probe": MetricSpec(
        Deferred("rotation_probe"),
        "higher",
        "turns",
        "accuracy of the quarter-turn by a shrunk linear discriminant, 5 folds over images; chance 0.25",
        "arXiv 1803.07728; 2009.07724",
        "how well the orientation of an image can be read",
        with_replicates=WithReplicates(Deferred("rotation.mean_accuracy")),
        share=True,
    ),
    "gram_drift": MetricSpec(
        Deferred("gram_drift"),
        "neither",
        "anchor",
        "E‖UUᵀ − AAᵀ‖²/T²; tokens scaled to length 1; 0 = no drift",
        "arXiv 2508.10104",
        "change of the similarities between patches",
    ),
    "high_norm_share": MetricSpec(
        Deferred("high_norm_share"),
        "lower",
        "tokens",
        "share of tokens longer than 3 × the median",
        "arXiv 2309.16588",
        "artifact tokens",
    ),
}

DEFAULT_METRICS = ("rankme", "rankme_centered", "effective_rank", "odcorr")
"""Default metrics of ``measure``."""

DEFAULT_SIGNALS = (
    *DEFAULT_METRICS,
    *("participation_ratio", "mean_direction", "alpha_distance", "cluster_agreement", "cluster_learnability"),
    *("view_retrieval", "view_retrieval_whitened", "view_infonce"),
)
"""Default metrics of the monitor and ``repmetrics score``: each family that can decide, for at most one more pass over
the held-out images."""


PROBES = ("linear_probe", "knn")
"""Names of the probes' measurements."""


def depends_on_width(name: str) -> bool:
    """Whether a metric's values compare only between features of the same D; those of probes do not depend on it.

    Example:
        >>> [depends_on_width(name) for name in ("rankme", "odcorr", "dead_features", "linear_probe")]
        [True, True, False, False]
    """
    metric = METRICS.get(name)
    return metric is not None and (metric.one_width or metric.centered is not None)


def check_metric_names(names: Iterable[str]) -> None:
    """Raise ValueError for unknown metrics, with the names of the known ones."""
    if isinstance(names, str):
        raise ValueError(f"metrics must be a list of names, got the text {names!r}")
    unknown = [name for name in names if name not in METRICS]
    if unknown:
        raise ValueError(f"unknown metric {', '.join(map(repr, unknown))}: choose among {', '.join(METRICS)}")
