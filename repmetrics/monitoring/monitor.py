"""One look at an encoder: held-out data in, measurements out; a history of such looks. No Lightning here."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import Dataset

from repmetrics.data.features import Batch, Features, embed, parse_batch
from repmetrics.data.held_out import HeldOutData, gather_features, rank_and_world
from repmetrics.data.views import random_view
from repmetrics.decisions.alarms import alarms, collapse_stats
from repmetrics.encoders.extractor import EncoderSpec, FeatureExtractor, Pool
from repmetrics.measurement.measure import measure
from repmetrics.measurement.moments import Moments
from repmetrics.measurement.registry import DEFAULT_METRICS, METRICS, check_metric_names
from repmetrics.measurement.result import Measurement
from repmetrics.monitoring.isolation import isolated
from repmetrics.monitoring.record import Record
from repmetrics.probes.common import PROBES, colour_statistics
from repmetrics.probes.knn import knn_probe
from repmetrics.probes.linear import linear_probe


def measure_features(
    features: Features,
    *,
    metrics: Sequence[str] = DEFAULT_METRICS,
    probes: Features | None = None,
    views: Tensor | None = None,
    previous: Tensor | None = None,
    strict: bool = True,
) -> dict[str, Measurement]:
    """Every metric of the features, and the probes where labels are known.

    Args:
        features: (N, D) of the held-out set.
        metrics: names from :data:`~repmetrics.measurement.registry.METRICS`.
        probes: labelled features for the probes; default: ``features`` if they have labels.
        views: (N·q, D), the q views of each row one after the other, for metrics that need them.
        previous: (N, D′) of the look before; without it, metrics that need it are left out.
        strict: raise where the features cannot give a metric; otherwise it is NaN, and the reason says why.

    Returns:
        Measurements by name; ``linear_probe`` and ``knn`` beside the metrics.
    """
    of_views = [name for name in metrics if METRICS[name].inputs == "views"]
    absent = {"views"} if previous is not None else {"views", "previous"}
    plain = [name for name in metrics if METRICS[name].inputs not in absent]
    found = _measured(features.values, plain, strict=strict, groups=features.groups, previous=previous)
    if of_views and views is not None:
        count = len(views) // len(features.values)
        groups = None if features.groups is None else [group for group in features.groups for _ in range(count)]
        ids = [row // count for row in range(len(views))]
        for name, m in _measured(views, of_views, strict=strict, groups=groups, views=ids).items():
            found[name] = replace(m, details={**m.details, "views": count})
    labelled = features if probes is None else probes
    if labelled.labels is not None:
        for probe in (linear_probe, knn_probe):
            result = probe(labelled.values, labelled.labels, groups=labelled.groups)
            found[result.name] = result
    return found


def _measured(features: Tensor, metrics: Sequence[str], *, strict: bool, **given: Any) -> dict[str, Measurement]:
    """Measured together; where that fails and a run must go on, one by one, NaN for those that do not exist.

    A collapsed encoder has no directions, and views that do not differ: the moment to raise an alarm, not an error.
    """
    try:
        return measure(features, metrics=metrics, **given)
    except ValueError as error:
        if strict:
            raise
        if len(metrics) > 1:
            return {name: _measured(features, [name], strict=False, **given)[name] for name in metrics}
        (name,) = metrics
        metric, dtype = METRICS[name], str(features.dtype).removeprefix("torch.")
        n, d = features.shape
        return {
            name: Measurement(name, math.nan, None, str(error), metric.direction, n, d, None, metric.convention, dtype)
        }


class Monitor:
    """Measures an encoder on held-out data without disturbing its training; for loops of one's own.

    Under torch.distributed every rank calls :meth:`measure`, reads its own share of the data, and gets the same
    record.

    Args:
        metrics: label-free metrics, names from :data:`~repmetrics.measurement.registry.METRICS`.
        labelled: data with labels for the probes, if not the held-out data itself.
        layers: dotted paths of submodules measured too, each apart.
        pool: "cls" or "mean" for encoders and layers that return tokens.
        batch_size: where a dataset is given in place of a loader.
        num_workers: likewise.
        warmup_steps: no alarm before this step.
        views: so many views of each image, at least 2, for metrics that need them (lidar, alignment); a look then
            costs as many forward passes more.
        augmentation: a batch of images as the loader gives it, on the encoder's device → one view of each. Run with
            fixed seeds: the same views at each look. The default takes uint8 or floats in 0 … 1 and crops, flips
            and jitters colours (:data:`repmetrics.data.views.AUGMENTATION`).

    Attributes:
        history: all records so far.

    Example:
        >>> encoder = nn.Sequential(nn.Flatten(), nn.Linear(12, 4))
        >>> images = torch.randn(64, 3, 2, 2, generator=torch.Generator().manual_seed(0))
        >>> record = Monitor().measure(encoder, [images], step=0)
        >>> 1 <= record.measurements["rankme"].value <= 4
        True
    """

    def __init__(
        self,
        *,
        metrics: Sequence[str] = DEFAULT_METRICS,
        probe_data: Iterable[Any] | Dataset[Any] | None = None,
        layers: Sequence[str] = (),
        pool: Pool | None = None,
        batch_size: int = 64,
        num_workers: int = 0,
        warmup_steps: int = 0,
        views: int = 0,
        augmentation: Callable[[Tensor], Tensor] = random_view,
    ) -> None:
        check_metric_names(metrics)
        if isinstance(layers, str):
            raise ValueError(f"layers must be a list of paths, got the text {layers!r}")
        if pool not in (None, *get_args(Pool)):
            raise ValueError(f"pool must be one of {', '.join(get_args(Pool))}, got {pool!r}")
        _check_supported(metrics, views=views)
        self.metrics = tuple(metrics)
        self.layers = tuple(layers)
        self.pool = pool
        self.warmup_steps = warmup_steps
        self.history: list[Record] = []
        self._loading = {"batch_size": batch_size, "num_workers": num_workers}
        self._labelled = None if probe_data is None else HeldOutData(probe_data, **self._loading)
        self._heldout: tuple[Any, HeldOutData] | None = None
        self._colour_floor: float | None = None  # of the probe, found at the first look
        self._views = views if any(METRICS[name].inputs == "views" for name in metrics) else 0
        self._augmentation = augmentation
        self._previous: dict[str, Tensor] = {}  # features of the look before, by layer, on the rank that measures

    @property
    def delayed_metrics(self) -> list[str]:
        """Measurements that compare two looks; a monitor's first has none to compare with."""
        names = [name for name in self.metrics if METRICS[name].inputs == "previous"]
        return [f"{layer}/{name}" if layer else name for layer in ("", *self.layers) for name in names]

    @property
    def forward_passes(self) -> int:
        """Samples that pass forward through the encoder in a look, once there was one: held-out, views, labelled."""
        seen = self.history[-1].measurements if self.history else {}
        held_out = min((m.n for name, m in seen.items() if name not in PROBES), default=0)
        probed = max((m.n for name, m in seen.items() if name in PROBES), default=0)
        return held_out * (1 + self._views) + (0 if self._labelled is None else probed)

    def reset_previous(self) -> None:
        """The next look compares with none: the weights are those of another run."""
        self._previous = {}

    def measure(
        self,
        encoder: nn.Module,
        data: Iterable[Any] | Dataset[Any],
        *,
        step: int = 0,
        epoch: int = 0,
        path: EncoderSpec = None,
        device: torch.device | str | None = None,
    ) -> Record:
        """Measure once and add the record to the history.

        Args:
            encoder: images → features (B, D). Its modes and all random generators are left as they were.
            data: DataLoader, dataset, or iterable of batches; the same each time.
            step: optimizer steps so far.
            epoch: epochs so far.
            path: what of ``encoder`` to run, as ``encoder=`` of the callback; default: itself.
            device: where the images go; default: that of the encoder's parameters.

        Raises:
            TypeError: batches or outputs that cannot be read; the message says how to choose.
            ValueError: fewer than two samples, wrong shapes, labels of one class, NaN at the first look.
        """
        taps = FeatureExtractor(encoder, path, layers=self.layers, pool=self.pool)
        if device is None:
            device = next((p.device for p in encoder.parameters()), torch.device("cpu"))
        record = self.evaluate(taps, taps, data, step=step, epoch=epoch, device=device)
        self.history.append(record)
        return record

    def evaluate(
        self,
        taps: FeatureExtractor,
        encode: Callable[[Tensor], Tensor],
        data: Iterable[Any] | Dataset[Any],
        *,
        step: int,
        epoch: int,
        device: torch.device | str,
        loss: float | None = None,
    ) -> Record:
        """A record, not kept: :meth:`measure` with ``encode`` standing for ``taps`` in a context of the caller's."""
        start = time.perf_counter()
        coloured = encode if self._colour_floor is not None else _with_colours(encode)
        with self._isolated(taps, data):
            if self._labelled is None:
                features, probes = self._collect(coloured, encode, data, device=device), None
            else:
                features = self._collect(encode, encode, data, device=device)
                probes = gather_features(coloured, self._labelled, device=device)
                if probes.labels is None:
                    raise ValueError(
                        "labelled= is for the probes, and its batches hold no labels: give (images, labels)"
                    )

        def described() -> Record:
            record = self._describe(taps, features, probes, step=step, epoch=epoch)
            return replace(record, seconds=time.perf_counter() - start, loss=loss)

        record = _on_rank_zero(described)
        if (probe := record.measurements.get("linear_probe")) is not None:
            self._colour_floor = probe.details["null_floor"]
        points = [*(seen.alarm_input() for seen in self.history), record.alarm_input()]
        record = replace(record, alarms=alarms(points, warmup_steps=self.warmup_steps))
        if record.nonfinite and not self.history:
            raise ValueError(
                f"{record.nonfinite} of {len(features.values)} held-out samples have NaN or Inf features at the first "
                "look: check the images' scale and the encoder's weights"
            )
        return record

    def samples(
        self,
        taps: FeatureExtractor,
        encode: Callable[[Tensor], Tensor],
        data: Iterable[Any] | Dataset[Any],
        *,
        count: int,
        device: torch.device | str,
    ) -> tuple[Features, Tensor]:
        """The encoder's features of the first ``count`` held-out samples, and their images, on this rank alone."""
        kept: list[Batch] = []
        with self._isolated(taps, data):
            for item in self._held_out(data).shard(0, 1):
                kept.append(parse_batch(item))
                if sum(len(batch.images) for batch in kept) >= count:
                    break
            features = embed(encode, kept, device=device)
        _, own = next(taps.split(features.values))
        groups = None if features.groups is None else features.groups[:count]
        labels = None if features.labels is None else features.labels[:count]
        return Features(own[:count], groups, labels), torch.cat([batch.images for batch in kept])[:count]

    def check(
        self, taps: FeatureExtractor, encode: Callable[[Tensor], Tensor], data: Any, *, device: torch.device | str
    ) -> None:
        """Run two batches and look at shapes only."""
        with self._isolated(taps, data):
            self._collect(encode, encode, data, device=device, limit_batches=2)

    def _collect(
        self,
        first: Callable[[Tensor], Tensor],
        encode: Callable[[Tensor], Tensor],
        data: Any,
        *,
        device: torch.device | str,
        limit_batches: int | None = None,
    ) -> Features:
        """The columns of ``first``, and after them those of each view where a metric needs views."""
        if self._views:
            first = append_views(first, encode, count=self._views, augmentation=self._augmentation)
        return gather_features(first, self._held_out(data), device=device, limit_batches=limit_batches)

    def _isolated(self, taps: FeatureExtractor, data: Any) -> AbstractContextManager[None]:
        read = [self._held_out(data), *([] if self._labelled is None else [self._labelled])]
        return isolated(taps.roots, generators=[own for held_out in read for own in held_out.generators])

    def _held_out(self, data: Any) -> HeldOutData:
        if self._heldout is None or self._heldout[0] is not data:
            self._heldout = data, HeldOutData(data, **self._loading)
        return self._heldout[1]

    def _describe(
        self, taps: FeatureExtractor, features: Features, probes: Features | None, *, step: int, epoch: int
    ) -> Record:
        broken = sum(int((~torch.isfinite(f.values).all(1)).sum()) for f in (features, probes) if f is not None)
        if broken:
            return Record(step, epoch, 0.0, nonfinite=broken)
        width = sum(columns for columns, _ in taps.widths.values())
        features, views = _split_views(features, columns=self._views * width, width=width)
        labelled = features if probes is None else probes
        floor = self._colour_floor
        if floor is None:
            floor = _colour_floor(labelled, columns_from=width)
        measurements: dict[str, Measurement] = {}
        by_layer = (taps.split(values) for values in (features.values, labelled.values, views))
        for (layer, values), (_, marked), (_, seen) in zip(*by_layer, strict=True):
            found = measure_features(
                features._replace(values=values),
                metrics=self.metrics,
                probes=labelled._replace(values=marked),
                views=seen,
                previous=self._previous.get(layer),
                strict=not self.history,
            )
            if self.delayed_metrics:
                self._previous[layer] = values.clone()  # not a slice that would keep all columns alive
            if "linear_probe" in found:
                details = {**found["linear_probe"].details, "null_floor": floor}
                found["linear_probe"] = replace(found["linear_probe"], details=details)
            measurements |= {f"{layer}/{name}" if layer else name: m for name, m in found.items()}
        _, own = next(taps.split(features.values))
        return Record(
            step,
            epoch,
            0.0,
            measurements,
            collapse_stats=collapse_stats(own),
            singular_values=tuple((Moments(own).spectrum(centered=True).eigenvalues / len(own)).sqrt().tolist()),
        )


def _with_colours(encode: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The encoder's columns, and after them what the probe must beat."""

    def both(images: Tensor) -> Tensor:
        features = encode(images)
        return torch.cat([features, colour_statistics(images).to(features.device)], dim=1)

    return both


def _split_views(features: Features, *, columns: int, width: int) -> tuple[Features, Tensor]:
    """The features without their last ``columns``, and those as rows of ``width``, the views of a sample together."""
    own = features.values.shape[1] - columns
    return features._replace(values=features.values[:, :own]), features.values[:, own:].reshape(-1, width)


def _colour_floor(labelled: Features, *, columns_from: int) -> float:
    """What a linear probe reads from colour alone; NaN where there are no labels or no images."""
    colours = labelled.values[:, columns_from:]
    if labelled.labels is None or not colours.shape[1]:
        return math.nan
    return linear_probe(colours, labelled.labels, groups=labelled.groups).value


def _check_supported(metrics: Sequence[str], *, views: int) -> None:
    for name in metrics:
        needs = METRICS[name].inputs
        if needs in ("tokens", "anchor"):
            possible = [key for key, m in METRICS.items() if m.inputs not in ("tokens", "anchor")]
            raise ValueError(
                f"{name} takes patch tokens (B, T, D), and a monitor keeps one vector an image: choose among "
                f"{', '.join(possible)}, or give the tokens to repmetrics.measure"
            )
        if needs == "views" and views < 2:
            raise ValueError(
                f"{name} needs at least 2 views of each image, got views={views}: give views=10 for ten forward passes "
                "more at each look"
            )


def _on_rank_zero(compute: Callable[[], Record]) -> Record:
    """Computed once, the same bits everywhere: ranks must not decide differently over a rounding error."""
    rank, world = rank_and_world()
    if world == 1:
        return compute()
    box: list[Any] = [None]
    if rank == 0:
        try:
            box = [compute()]
        except Exception as error:
            box = [error]
    dist.broadcast_object_list(box, src=0)
    if isinstance(box[0], Exception):
        raise box[0]
    assert isinstance(box[0], Record)
    return box[0]


def append_views(
    first: Callable[[Tensor], Tensor],
    encode: Callable[[Tensor], Tensor],
    *,
    count: int,
    augmentation: Callable[[Tensor], Tensor],
) -> Callable[[Tensor], Tensor]:
    """Images → the columns of ``first``, and after them those of ``encode`` for each of ``count`` views.

    The views of this rank's i-th batch come from a seed that is the batch's place in the whole set: they are the same
    at each look and on any number of ranks.
    """
    rank, world = rank_and_world()
    batches = itertools.count(rank, world)

    def all_of_them(images: Tensor) -> Tensor:
        seed = count * next(batches)
        parts = [first(images)]
        for view in range(count):
            with isolated((), seed=seed + view):
                seen = augmentation(images)
            if not isinstance(seen, Tensor) or len(seen) != len(images):
                got = tuple(seen.shape) if isinstance(seen, Tensor) else type(seen).__name__
                raise ValueError(f"augmentation must return one view of each of {len(images)} images, got {got}")
            parts.append(encode(seen))
        return torch.cat(parts, dim=1)

    return all_of_them
