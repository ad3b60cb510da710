"""torchmetrics classes, one per row of METRICS.

Log their computed values, not the objects. For several metrics of moments, use :func:`metric_collection`, whose compute
groups update one shared D×D state per batch, or :class:`Representation`, which also decomposes the state only once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import reduce
from operator import add
from typing import Any, ClassVar, Self

import torch
import torch.distributed as dist
from torch import Tensor
from torchmetrics import Metric, MetricCollection
from torchmetrics.utilities.distributed import gather_all_tensors

from repmetrics.functional.checks import check_features, check_tokens
from repmetrics.functional.ids import check_ids
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

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Plot a value, or several over time, as torchmetrics' own metrics do; needs matplotlib.

        Args:
            val: Result of ``compute`` or ``forward``, or a list of them; default: the current value.
            ax: Axes of matplotlib to draw on.

        Returns:
            Figure and axes.
        """
        return self._plot(val, ax)

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> Self:
        """Move the states, and keep their dtype: collapse cannot be detected in a lower precision.

        ``Module.to(dtype)`` comes here, also from Lightning's "bf16-true" and "16-true".
        """

        def move(state: Tensor) -> Tensor:
            moved = fn(torch.empty(0, dtype=state.dtype, device=state.device))
            return fn(state) if moved.dtype == state.dtype else state.to(moved.device)

        super()._apply(move, *args, **kwargs)
        return self

    def set_dtype(self, dst_type: Any) -> Self:
        """Leave the states in their dtype."""
        return self


class _MomentState(_TableMetric):
    """Float64 moments as one state that adds over batches and processes, exact for batches of unequal size.

    Sums keep their digits only about a point near the rows, the mean of the first batch. Each process has its own such
    point, so that its sums mean nothing without it: one state holds all, and :func:`_add_packed` adds such states.

    Args:
        num_features: D.
        kwargs: Arguments of :class:`torchmetrics.Metric`.
    """

    packed: Tensor

    def __init__(self, num_features: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if num_features < 1:
            raise ValueError(f"num_features must be the features' D ≥ 1, got {num_features}")
        self.num_features = num_features
        empty = torch.zeros(num_features * (num_features + 2) + 3, dtype=torch.float64)
        self.add_state("packed", empty, dist_reduce_fx=_add_packed)

    @property
    def rows(self) -> Tensor:
        """Number of rows seen."""
        return self.packed[0]

    @property
    def outer(self) -> Tensor:
        """(D, D) sum of (x − s)(x − s)ᵀ about the shift s, in the lower triangle."""
        return _unpack(self.packed, unit=self._unit).outer

    @property
    def _unit(self) -> bool:
        return False

    def update(self, features: Tensor, *, valid: Tensor | None = None) -> None:
        """Add features (N, D). ``valid`` (N,), bool or 0 and 1, is False for rows that a sampler added as padding.

        Raises:
            TypeError: Features are not floating, or the mask is not a tensor of bool or integers.
            ValueError: Wrong shape, NaN or Inf, another D than ``num_features``, a mask with other values than 0 and 1.
        """
        check_features(features)
        if features.shape[1] != self.num_features:
            raise ValueError(f"features must have D = {self.num_features} as declared, got {features.shape[1]}")
        batch = features if valid is None else features[_check_mask(valid, rows=len(features))]
        if len(batch):
            moments = self.moments()
            before, moments.dtype = moments.dtype, None  # batches may differ in it
            moments.update(batch)
            moments.dtype = torch.float32 if before == torch.float32 else moments.dtype
            self.packed = _pack(moments)

    def moments(self) -> Moments:
        """Moments of all features seen."""
        return _unpack(self.packed, unit=self._unit)


def _check_mask(valid: Tensor, *, rows: int) -> Tensor:
    """The mask as bool."""
    if not isinstance(valid, Tensor) or valid.is_floating_point() or valid.is_complex():
        kind = valid.dtype if isinstance(valid, Tensor) else type(valid).__name__
        raise TypeError(f"valid must be a tensor of bool, or of 0 and 1, got {kind}")
    if valid.shape != (rows,):
        raise ValueError(f"valid must be ({rows},), one entry per row, got {tuple(valid.shape)}")
    if valid.dtype != torch.bool and not ((valid == 0) | (valid == 1)).all():
        raise ValueError("valid must be a mask of 0 and 1: rows cannot be chosen by index")
    return valid.bool()


def _pack(moments: Moments) -> Tensor:
    """Moments as one vector: n, Σ‖x‖⁴, whether features were float64, shift, Σ(x − s), Σ(x − s)(x − s)ᵀ."""
    scalars = [moments.n, moments.sum_norm4, moments.dtype == torch.float64]
    counts = torch.tensor(scalars, dtype=torch.float64, device=moments.shift.device)
    return torch.cat([counts, moments.shift, moments.sum, moments.outer.flatten()])


def _unpack(packed: Tensor, *, unit: bool = False) -> Moments:
    """Inverse of :func:`_pack`, with a copy of the sums; an empty state has no shift yet."""
    n, sum_norm4 = int(packed[0]), float(packed[1])
    if n == 0:
        return Moments(unit=unit)
    dim = math.isqrt(len(packed) - 2) - 1  # D² + 2D + 3 = (D + 1)² + 2
    shift, total, outer = packed[3:].clone().split([dim, dim, dim * dim])
    moments = Moments(shift=shift, unit=unit)
    moments.n, moments.sum_norm4, moments.sum, moments.outer = n, sum_norm4, total, outer.view(dim, dim)
    moments.dtype = torch.float64 if packed[2] else torch.float32
    return moments


def _add_packed(states: Tensor) -> Tensor:
    """Reduce the states (processes, …) of all processes to one."""
    moments = [_unpack(state) for state in states]
    filled = [each for each in moments if each.n]
    return _pack(reduce(add, filled)) if filled else states[0]


class _MomentMetric(_MomentState):
    """Metric of moments."""

    def compute(self) -> Tensor:
        """The metric of all features seen."""
        return METRICS[self.name].function(self.moments())

    @property
    def _unit(self) -> bool:
        return METRICS[self.name].inputs == "directions"


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


def _gather_rows(rows: Tensor, group: Any = None) -> list[Tensor]:
    """Rows of all processes; torchmetrics' own function fails on a process that has none.

    An empty state there is a vector of float32, whatever the shape and dtype of the other processes' rows.
    """
    kinds: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(kinds, (tuple(rows.shape), rows.dtype), group=group)
    shape, dtype = next((kind for kind in kinds if kind[0][0]), kinds[0])
    if not len(rows):
        rows = torch.empty(0, *shape[1:], dtype=dtype, device=rows.device)
    gathered: list[Tensor] = gather_all_tensors(rows, group)
    return gathered


class _FeatureState(_TableMetric):
    """Metric of all rows with their ids or counterparts, gathered over processes."""

    features: list[Tensor]
    auxiliary: list[Tensor]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**{"dist_sync_fn": _gather_rows} | kwargs)
        self.add_state("features", [], dist_reduce_fx="cat")
        self.add_state("auxiliary", [], dist_reduce_fx="cat")

    def _keep(self, features: Tensor, auxiliary: Tensor | None = None) -> None:
        metric = METRICS[self.name]
        (check_tokens if metric.from_tokens else check_features)(features)
        if auxiliary is not None and len(auxiliary) != len(features):
            raise ValueError(f"{metric.argument} must have one entry per row, got {len(auxiliary)} for {len(features)}")
        if metric.inputs in ("views", "groups") and auxiliary is not None:
            if auxiliary.ndim != 1:
                raise ValueError(f"{metric.argument} must be ({len(features)},), got {tuple(auxiliary.shape)}")
            check_ids(auxiliary.tolist(), name=metric.inputs)
        self.features.append(features.detach())
        if auxiliary is not None:
            self.auxiliary.append(auxiliary.detach())

    def compute(self) -> Tensor:
        """The metric of all rows seen."""
        metric = METRICS[self.name]
        if not len(self.features):
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
