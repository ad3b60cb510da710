"""torchmetrics classes, one for each row of METRICS: thin over Moments and the functions.

Log their computed values, not the objects. In a ``MetricCollection`` take :func:`metric_collection`, whose explicit compute
groups update one shared D×D state a batch; :class:`Representation` goes further and decomposes it once as well.
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


class _MomentState(Metric):
    """Float64 moments as states that add over batches and processes; exact with unequal batches.

    Args:
        num_features: D.
        kwargs: passed to :class:`torchmetrics.Metric`.
    """

    full_state_update = False
    is_differentiable = False
    inputs: ClassVar[str] = "moments"

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
        """Add features (N, D); ``valid`` (N,) leaves out rows that a sampler padded with.

        Raises:
            TypeError: features are not floating.
            ValueError: wrong shape, NaN or Inf, another D than logged_metrics.
        """
        check_features(features)
        if features.shape[1] != self.num_features:
            raise ValueError(f"features must have D = {self.num_features} as logged_metrics, got {features.shape[1]}")
        chosen = features if valid is None else features[valid]
        if len(chosen) == 0:
            return
        seen = self._state().update(chosen)
        self.rows += seen.n
        self.total += seen.sum
        self.outer += seen.outer
        self.sum_norm4 += seen.sum_norm4

    def moments(self) -> Moments:
        """What has been seen, as :class:`~repmetrics.measurement.moments.Moments`."""
        found = self._state()
        found.n, found.sum_norm4, found.sum, found.outer = int(self.rows), float(self.sum_norm4), self.total, self.outer
        return found

    def _state(self) -> Moments:
        return Moments(shift=torch.zeros_like(self.total), unit=self.inputs == "directions")

    def set_dtype(self, dst_type: Any) -> Self:
        """Leave the state in float64: a lower precision would lose what collapse is recognised by."""
        return self


class _MomentMetric(_MomentState):
    """One metric of the catalogue from moments."""

    name: ClassVar[str]

    def compute(self) -> Tensor:
        """The metric of all features seen."""
        return METRICS[self.name].function(self.moments())


class RankMe(_MomentMetric):
    """RankMe of all features seen; see :func:`repmetrics.functional.spectrum.rankme`.

    Example:
        >>> metric = RankMe(num_features=4)
        >>> metric.update(torch.eye(4))
        >>> metric.compute().item()
        4.0
    """

    name = "rankme"
    higher_is_better = True


class RankMeCentered(_MomentMetric):
    """Centred RankMe of all features seen; see :func:`repmetrics.functional.spectrum.rankme_centered`."""

    name = "rankme_centered"
    higher_is_better = True


class EffectiveRank(_MomentMetric):
    """Effective rank of all features seen; see :func:`repmetrics.functional.spectrum.effective_rank`."""

    name = "effective_rank"
    higher_is_better = True


class ParticipationRatio(_MomentMetric):
    """Participation ratio of all features seen; see :func:`repmetrics.functional.spectrum.participation_ratio`."""

    name = "participation_ratio"
    higher_is_better = True


class StableRank(_MomentMetric):
    """Stable rank of all features seen; see :func:`repmetrics.functional.spectrum.stable_rank`."""

    name = "stable_rank"
    higher_is_better = True


class AlphaReQ(_MomentMetric):
    """α-ReQ of all features seen; see :func:`repmetrics.functional.spectrum.alpha_req`."""

    name = "alpha_req"
    higher_is_better = None


class ODCorr(_MomentMetric):
    """Off-diagonal correlation of all features seen; see :func:`repmetrics.functional.correlation.odcorr`."""

    name = "odcorr"
    higher_is_better = False


class DeadFeatures(_MomentMetric):
    """Share of dead features; see :func:`repmetrics.functional.correlation.dead_features`."""

    name = "dead_features"
    higher_is_better = False


class UniformityW2(_MomentMetric):
    """Wasserstein uniformity of all directions seen; see :func:`repmetrics.functional.hypersphere.uniformity_w2`."""

    name = "uniformity_w2"
    inputs = "directions"
    higher_is_better = False


class MeanDirection(_MomentMetric):
    """Length of the mean direction; see :func:`repmetrics.functional.hypersphere.mean_direction`."""

    name = "mean_direction"
    inputs = "directions"
    higher_is_better = False


class Representation(_MomentState):
    """Several moments-fed metrics from one state and one decomposition; ``compute`` returns a dict by name.

    Args:
        num_features: D.
        metrics: names from :data:`~repmetrics.measurement.registry.METRICS` computed from moments of the features.
        kwargs: passed to :class:`torchmetrics.Metric`.

    Example:
        >>> metric = Representation(num_features=4)
        >>> metric.update(torch.eye(4))
        >>> sorted(metric.compute())
        ['effective_rank', 'odcorr', 'rankme', 'rankme_centered']
    """

    higher_is_better = None

    def __init__(self, num_features: int, *, metrics: Sequence[str] = DEFAULT_METRICS, **kwargs: Any) -> None:
        super().__init__(num_features, **kwargs)
        check_metric_names(metrics)
        others = [name for name in metrics if METRICS[name].inputs != "moments"]
        if others:
            raise ValueError(f"{', '.join(others)} cannot be computed from moments of the features: use their classes")
        self.metrics = tuple(metrics)

    def compute(self) -> dict[str, Tensor]:
        """The metrics of all features seen, by name."""
        seen = self.moments()
        return {name: METRICS[name].function(seen) for name in self.metrics}


class _FeatureState(Metric):
    """Keeps every row, gathered over processes; ids and counterparts travel with their rows."""

    full_state_update = False
    is_differentiable = False
    name: ClassVar[str]

    features: list[Tensor]
    auxiliary: list[Tensor]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("features", [], dist_reduce_fx="cat")
        self.add_state("auxiliary", [], dist_reduce_fx="cat")

    def _keep(self, features: Tensor, auxiliary: Tensor | None = None) -> None:
        inputs = METRICS[self.name].inputs
        (check_tokens if inputs in ("tokens", "anchor") else check_features)(features)
        if auxiliary is not None and len(auxiliary) != len(features):
            raise ValueError(f"{inputs} must go with the features row by row, got {len(auxiliary)} for {len(features)}")
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
        beside_needed = metric.inputs in ("views", "groups", "previous", "anchor")
        return metric.function(features, **({metric.inputs: auxiliary} if beside_needed else {}))


class _FeaturesAlone(_FeatureState):
    def update(self, features: Tensor) -> None:
        """Add features (N, D), or patch tokens (B, T, D) for the dense metrics."""
        self._keep(features)


class _FeaturesWithIds(_FeatureState):
    def update(self, features: Tensor, ids: Tensor) -> None:
        """Add features (N, D) and the integer id (N,) of each row's sample or slide."""
        self._keep(features, ids)


class _FeaturesWithCounterpart(_FeatureState):
    def update(self, features: Tensor, counterpart: Tensor) -> None:
        """Add features and what the other checkpoint gives for the same rows."""
        self._keep(features, counterpart)


class KNNEntropy(_FeaturesAlone):
    """Mean log distance to the nearest direction; see :func:`repmetrics.functional.neighbors.knn_entropy`."""

    name = "knn_entropy"
    higher_is_better = None


class KDEEntropy(_FeaturesAlone):
    """Entropy of the directions by a kernel density; see :func:`repmetrics.functional.neighbors.kde_entropy`."""

    name = "kde_entropy"
    higher_is_better = None


class TwoNN(_FeaturesAlone):
    """Intrinsic dimension; see :func:`repmetrics.functional.neighbors.twonn`."""

    name = "twonn"
    higher_is_better = None


class LiDAR(_FeaturesWithIds):
    """LiDAR, with the sample's id of each row; see :func:`repmetrics.functional.multiview.lidar`.

    Example:
        >>> metric = LiDAR()
        >>> random = torch.Generator().manual_seed(0)
        >>> samples, jitter = torch.randn(64, 3, generator=random), torch.randn(256, 3, generator=random)
        >>> metric.update(samples.repeat(4, 1) + 0.1 * jitter, torch.arange(64).repeat(4))
        >>> 2.5 < metric.compute().item() <= 3
        True
    """

    name = "lidar"
    higher_is_better = True


class Alignment(_FeaturesWithIds):
    """Distance between views; one sample id per row; see :func:`~repmetrics.functional.multiview.alignment`."""

    name = "alignment"
    higher_is_better = None


class SlideLeakage(_FeaturesWithIds):
    """Variance between slides; see :func:`repmetrics.functional.leakage.slide_leakage`."""

    name = "slide_leakage"
    higher_is_better = False


class NeighborLeakage(_FeaturesWithIds):
    """Same-slide neighbours over chance; see :func:`repmetrics.functional.leakage.neighbor_leakage`."""

    name = "neighbor_leakage"
    higher_is_better = False


class CKADrift(_FeaturesWithCounterpart):
    """Debiased CKA to another checkpoint's features; see :func:`repmetrics.functional.drift.cka_drift`."""

    name = "cka_drift"
    higher_is_better = None


class DSE(_FeaturesAlone):
    """Dense structure of patch tokens; see :func:`repmetrics.functional.dense.dse`."""

    name = "dse"
    higher_is_better = True


class GramDrift(_FeaturesWithCounterpart):
    """Gram drift of patch tokens to an anchor; see :func:`repmetrics.functional.dense.gram_drift`."""

    name = "gram_drift"
    higher_is_better = None


class HighNormShare(_FeaturesAlone):
    """Share of artefact tokens; see :func:`repmetrics.functional.dense.high_norm_share`."""

    name = "high_norm_share"
    higher_is_better = False


METRIC_CLASSES: dict[str, type[_MomentMetric] | type[_FeatureState]] = {
    cls.name: cls
    for cls in (
        *(RankMe, RankMeCentered, EffectiveRank, ParticipationRatio, StableRank, AlphaReQ, ODCorr, DeadFeatures),
        *(UniformityW2, MeanDirection, KNNEntropy, KDEEntropy, TwoNN, LiDAR, Alignment, SlideLeakage),
        *(NeighborLeakage, CKADrift, DSE, GramDrift, HighNormShare),
    )
}
"""The class of each metric, by its name in METRICS."""


def metric_collection(num_features: int, *, metrics: Sequence[str] = DEFAULT_METRICS) -> MetricCollection:
    """A ``MetricCollection`` whose moments-fed metrics share one state, updated once a batch.

    The groups are explicit: torchmetrics' automatic ones merge metrics whose states merely agree on the first batch.

    Args:
        num_features: D.
        metrics: names of metrics that are computed from moments (of the features, or of their directions).

    Raises:
        ValueError: unknown metric, or one that is not computed from moments.

    Example:
        >>> metrics = metric_collection(4, metrics=["rankme", "odcorr", "mean_direction"])
        >>> metrics.update(torch.eye(4))
        >>> {name: round(value.item(), 3) for name, value in sorted(metrics.compute().items())}
        {'mean_direction': 0.5, 'odcorr': 0.333, 'rankme': 4.0}
    """
    check_metric_names(metrics)
    others = [name for name in metrics if METRICS[name].inputs not in ("moments", "directions")]
    if others:
        raise ValueError(f"{', '.join(others)} cannot be computed from moments: use their classes alone")
    groups = [[n for n in metrics if METRICS[n].inputs == kind] for kind in ("moments", "directions")]
    members: dict[str, Metric] = {n: METRIC_CLASSES[n](num_features=num_features) for n in metrics}
    return MetricCollection(members, compute_groups=[group for group in groups if group])  # type: ignore[arg-type]
