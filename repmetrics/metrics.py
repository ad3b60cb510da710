"""torchmetrics classes, one per row of METRICS.

Log their computed values, not the objects. For several metrics of moments, use :func:`metric_collection`, whose compute
groups update one shared D×D state per batch, or :class:`Representation`, which also decomposes the state only once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection

from repmetrics.functional.checks import check_features, check_tokens
from repmetrics.measurement.moments import Moments
from repmetrics.measurement.registry import DEFAULT_METRICS, METRICS, check_metric_names


class _TableMetric(Metric):
    """Metric with the properties of its row of METRICS."""

    full_state_update = False
    is_differentiable = False
    name: ClassVar[str]

    def __init_subclass__(cls, *, name: str | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if name is not None:
            cls.name, cls.higher_is_better = name, METRICS[name].higher_is_better


class _MomentState(_TableMetric):
    """Float64 moments as states that add over batches and processes, exact for batches of unequal size.

    Args:
        num_features: D.
        kwargs: Arguments of :class:`torchmetrics.Metric`.
    """

    rows: Tensor
    total: Tensor
    outer: Tensor
    sum_norm4: Tensor

    def __init__(self, num_features: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if num_features < 1:
            raise ValueError(f"num_features must be the features' D ≥ 1, got {num_features}")
        self.num_features = num_features
        shapes = {"rows": (), "total": (num_features,), "outer": (num_features, num_features), "sum_norm4": ()}
        for name, shape in shapes.items():
            self.add_state(name, torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, features: Tensor, *, valid: Tensor | None = None) -> None:
        """Add features (N, D). ``valid`` (N,) is False for rows that a sampler added as padding.

        Raises:
            TypeError: Features are not floating.
            ValueError: Wrong shape, NaN or Inf, another D than ``num_features``.
        """
        check_features(features)
        if features.shape[1] != self.num_features:
            raise ValueError(f"features must have D = {self.num_features} as declared, got {features.shape[1]}")
        batch = features if valid is None else features[valid]
        if len(batch) == 0:
            return
        moments = self._empty().update(batch)
        self.rows += moments.n
        self.total += moments.sum
        self.outer += moments.outer
        self.sum_norm4 += moments.sum_norm4

    def moments(self) -> Moments:
        """Moments of all features seen."""
        moments = self._empty()
        moments.n, moments.sum_norm4 = int(self.rows), float(self.sum_norm4)
        moments.sum, moments.outer = self.total, self.outer
        return moments

    def _empty(self) -> Moments:
        return Moments(shift=torch.zeros_like(self.total))

    def set_dtype(self, dst_type: Any) -> Self:
        """Leave the state in float64: collapse cannot be detected in a lower precision."""
        return self


class _MomentMetric(_MomentState):
    """Metric of moments."""

    def compute(self) -> Tensor:
        """The metric of all features seen."""
        return METRICS[self.name].function(self.moments())

    def _empty(self) -> Moments:
        return Moments(shift=torch.zeros_like(self.total), unit=METRICS[self.name].inputs == "directions")


class RankMe(_MomentMetric, name="rankme"):
    """RankMe of all features seen; see :func:`repmetrics.functional.spectrum.rankme`.

    Example:
        >>> metric = RankMe(num_features=4)
        >>> metric.update(torch.eye(4))
        >>> metric.compute().item()
        4.0
    """


class RankMeCentered(_MomentMetric, name="rankme_centered"):
    """Centered RankMe of all features seen; see :func:`repmetrics.functional.spectrum.rankme_centered`."""


class EffectiveRank(_MomentMetric, name="effective_rank"):
    """Effective rank of all features seen; see :func:`repmetrics.functional.spectrum.effective_rank`."""


class ParticipationRatio(_MomentMetric, name="participation_ratio"):
    """Participation ratio of all features seen; see :func:`repmetrics.functional.spectrum.participation_ratio`."""


class StableRank(_MomentMetric, name="stable_rank"):
    """Stable rank of all features seen; see :func:`repmetrics.functional.spectrum.stable_rank`."""


class AlphaReQ(_MomentMetric, name="alpha_req"):
    """α-ReQ of all features seen; see :func:`repmetrics.functional.spectrum.alpha_req`."""


class AlphaDistance(_MomentMetric, name="alpha_distance"):
    """Distance of α-ReQ from 1; see :func:`repmetrics.functional.spectrum.alpha_distance`."""


class ODCorr(_MomentMetric, name="odcorr"):
    """Off-diagonal correlation of all features seen; see :func:`repmetrics.functional.correlation.odcorr`."""


class DeadFeatures(_MomentMetric, name="dead_features"):
    """Share of dead features; see :func:`repmetrics.functional.correlation.dead_features`."""


class UniformityW2(_MomentMetric, name="uniformity_w2"):
    """Wasserstein uniformity of all directions seen; see :func:`repmetrics.functional.hypersphere.uniformity_w2`."""


class MeanDirection(_MomentMetric, name="mean_direction"):
    """Length of the mean direction; see :func:`repmetrics.functional.hypersphere.mean_direction`."""


class Representation(_MomentState):
    """Several metrics of moments from one state and one decomposition; ``compute`` returns a dict by name.

    Args:
        num_features: D.
        metrics: Names from :data:`~repmetrics.measurement.registry.METRICS` of metrics of the features' moments.
        kwargs: Arguments of :class:`torchmetrics.Metric`.

    Example:
        >>> metric = Representation(num_features=4)
        >>> metric.update(torch.eye(4))
        >>> sorted(metric.compute())
        ['effective_rank', 'odcorr', 'rankme', 'rankme_centered']
    """

    def __init__(self, num_features: int, *, metrics: Sequence[str] = DEFAULT_METRICS, **kwargs: Any) -> None:
        super().__init__(num_features, **kwargs)
        check_metric_names(metrics)
        others = [name for name in metrics if METRICS[name].inputs != "moments"]
        if others:
            raise ValueError(f"{', '.join(others)} cannot be computed from moments of the features: use their classes")
        self.metrics = tuple(metrics)

    def compute(self) -> dict[str, Tensor]:
        """The metrics of all features seen, by name."""
        moments = self.moments()
        return {name: METRICS[name].function(moments) for name in self.metrics}


class _FeatureState(_TableMetric):
    """Metric of all rows with their ids or counterparts, gathered over processes."""

    features: list[Tensor]
    auxiliary: list[Tensor]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("features", [], dist_reduce_fx="cat")
        self.add_state("auxiliary", [], dist_reduce_fx="cat")

    def _keep(self, features: Tensor, auxiliary: Tensor | None = None) -> None:
        metric = METRICS[self.name]
        (check_tokens if metric.from_tokens else check_features)(features)
        if auxiliary is not None and len(auxiliary) != len(features):
            raise ValueError(f"{metric.argument} must have one entry per row, got {len(auxiliary)} for {len(features)}")
        self.features.append(features.detach())
        if auxiliary is not None:
            self.auxiliary.append(auxiliary.detach())

    def compute(self) -> Tensor:
        """The metric of all rows seen."""
        metric = METRICS[self.name]
        if isinstance(self.features, list) and not self.features:
            raise ValueError(f"{self.name} has seen no features: update() first")
        features, auxiliary = (
            torch.cat(x) if isinstance(x, list) and x else x for x in (self.features, self.auxiliary)
        )
        return metric.function(features, **({metric.argument: auxiliary} if metric.argument else {}))


class _FeaturesAlone(_FeatureState):
    def update(self, features: Tensor) -> None:
        """Add features (N, D), patch tokens (B, T, D) for the dense metrics, or quarter-turns (N, 4, D)."""
        self._keep(features)


class _FeaturesWithIds(_FeatureState):
    def update(self, features: Tensor, ids: Tensor) -> None:
        """Add features (N, D) and the integer id (N,) of each row's sample or slide."""
        self._keep(features, ids)


class _FeaturesWithCounterpart(_FeatureState):
    def update(self, features: Tensor, counterpart: Tensor) -> None:
        """Add features and the other checkpoint's features of the same rows, or tokens and those of the anchor."""
        self._keep(features, counterpart)


class KNNEntropy(_FeaturesAlone, name="knn_entropy"):
    """Mean log distance to the nearest direction; see :func:`repmetrics.functional.neighbors.knn_entropy`."""


class KDEEntropy(_FeaturesAlone, name="kde_entropy"):
    """Entropy of the directions by a kernel density; see :func:`repmetrics.functional.neighbors.kde_entropy`."""


class TwoNN(_FeaturesAlone, name="twonn"):
    """Intrinsic dimension; see :func:`repmetrics.functional.neighbors.twonn`."""


class MSTDimension(_FeaturesAlone, name="mst_dimension"):
    """Dimension by spanning trees; see :func:`repmetrics.functional.spanning_tree.mst_dimension`."""


class ClusterAgreement(_FeaturesAlone, name="cluster_agreement"):
    """Agreement of the clusters of two halves; see :func:`repmetrics.functional.clusters.cluster_agreement`."""


class ClusterLearnability(_FeaturesAlone, name="cluster_learnability"):
    """Accuracy of neighbors on clusters; see :func:`repmetrics.functional.clusters.cluster_learnability`."""


class ViewRetrieval(_FeaturesWithIds, name="view_retrieval"):
    """View retrieval; one sample id per row; see :func:`repmetrics.functional.retrieval.view_retrieval`.

    Example:
        >>> metric = ViewRetrieval()
        >>> metric.update(torch.eye(3), torch.tensor([0, 1, 2]))
        >>> metric.update(torch.eye(3), torch.tensor([0, 1, 2]))
        >>> metric.compute().item()
        1.0
    """


class ViewRetrievalWhitened(_FeaturesWithIds, name="view_retrieval_whitened"):
    """Whitened view retrieval; see :func:`repmetrics.functional.retrieval.view_retrieval_whitened`."""


class ViewInfoNCE(_FeaturesWithIds, name="view_infonce"):
    """InfoNCE of two views; one sample id per row; see :func:`repmetrics.functional.retrieval.view_infonce`."""


class LiDAR(_FeaturesWithIds, name="lidar"):
    """LiDAR, with the sample's id of each row; see :func:`repmetrics.functional.multiview.lidar`.

    Example:
        >>> metric = LiDAR()
        >>> random = torch.Generator().manual_seed(0)
        >>> samples, jitter = torch.randn(64, 3, generator=random), torch.randn(256, 3, generator=random)
        >>> metric.update(samples.repeat(4, 1) + 0.1 * jitter, torch.arange(64).repeat(4))
        >>> 2.5 < metric.compute().item() <= 3
        True
    """


class Alignment(_FeaturesWithIds, name="alignment"):
    """Distance between views; one sample id per row; see :func:`~repmetrics.functional.multiview.alignment`."""


class SlideLeakage(_FeaturesWithIds, name="slide_leakage"):
    """Variance between slides; see :func:`repmetrics.functional.leakage.slide_leakage`."""


class NeighborLeakage(_FeaturesWithIds, name="neighbor_leakage"):
    """Same-slide neighbors over chance; see :func:`repmetrics.functional.leakage.neighbor_leakage`."""


class CKADrift(_FeaturesWithCounterpart, name="cka_drift"):
    """Debiased CKA to another checkpoint's features; see :func:`repmetrics.functional.drift.cka_drift`."""


class DSE(_FeaturesAlone, name="dse"):
    """Dense structure of patch tokens; see :func:`repmetrics.functional.dense.dse`."""


class DSEInter(_FeaturesAlone, name="dse_inter"):
    """Separation of clusters of patch tokens; see :func:`repmetrics.functional.dense.dse_inter`."""


class DSEIntra(_FeaturesAlone, name="dse_intra"):
    """Radius of clusters of patch tokens; see :func:`repmetrics.functional.dense.dse_intra`."""


class DSEDimension(_FeaturesAlone, name="dse_dimension"):
    """Effective dimension of patch tokens; see :func:`repmetrics.functional.dense.dse_dimension`."""


class RotationProbe(_FeaturesAlone, name="rotation_probe"):
    """Accuracy of a probe on quarter-turns (N, 4, D); see :func:`repmetrics.functional.rotation.rotation_probe`."""


class GramDrift(_FeaturesWithCounterpart, name="gram_drift"):
    """Gram drift of patch tokens to an anchor; see :func:`repmetrics.functional.dense.gram_drift`."""


class HighNormShare(_FeaturesAlone, name="high_norm_share"):
    """Share of artifact tokens; see :func:`repmetrics.functional.dense.high_norm_share`."""


METRIC_CLASSES: dict[str, type[_MomentMetric] | type[_FeatureState]] = {
    cls.name: cls
    for cls in (
        *(RankMe, RankMeCentered, EffectiveRank, ParticipationRatio, StableRank, AlphaReQ, AlphaDistance, ODCorr),
        *(DeadFeatures, UniformityW2, MeanDirection, KNNEntropy, KDEEntropy, TwoNN, MSTDimension, ClusterAgreement),
        *(ClusterLearnability, ViewRetrieval, ViewRetrievalWhitened, ViewInfoNCE, LiDAR, Alignment, SlideLeakage),
        *(NeighborLeakage, CKADrift, DSE, DSEInter, DSEIntra, DSEDimension, RotationProbe, GramDrift, HighNormShare),
    )
}
"""Class of each metric, by its name in METRICS."""


def metric_collection(num_features: int, *, metrics: Sequence[str] = DEFAULT_METRICS) -> MetricCollection:
    """Build a ``MetricCollection`` of metrics of moments that share one state, updated once per batch.

    The compute groups are explicit: the automatic ones of torchmetrics merge metrics whose states are equal after the
    first batch only by chance.

    Args:
        num_features: D.
        metrics: Names of metrics that are computed from moments (of the features, or of their directions).

    Raises:
        ValueError: Unknown metric, or one that is not computed from moments.

    Example:
        >>> metrics = metric_collection(4, metrics=["rankme", "odcorr", "mean_direction"])
        >>> metrics.update(torch.eye(4))
        >>> {name: round(value.item(), 3) for name, value in sorted(metrics.compute().items())}
        {'mean_direction': 0.5, 'odcorr': 0.333, 'rankme': 4.0}
    """
    check_metric_names(metrics)
    others = [name for name in metrics if not METRICS[name].from_moments]
    if others:
        raise ValueError(f"{', '.join(others)} cannot be computed from moments: use their classes alone")
    groups = [[n for n in metrics if METRICS[n].inputs == kind] for kind in ("moments", "directions")]
    members: dict[str, Metric] = {n: METRIC_CLASSES[n](num_features=num_features) for n in metrics}
    return MetricCollection(members, compute_groups=[group for group in groups if group])  # type: ignore[arg-type]
