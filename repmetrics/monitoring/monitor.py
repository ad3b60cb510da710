"""Monitor: one evaluation of an encoder on held-out data, and the history of evaluations; no Lightning."""

from __future__ import annotations

import itertools
import math
import time
import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import Dataset

from repmetrics.data.derived import PAIRED, PAIRS, TURNS, add_turns, add_view_pairs, view_pairs
from repmetrics.data.features import Encode, FeatureDict, Features, concatenate, embed_batch
from repmetrics.data.held_out import HeldOutData, gather_features, rank_and_world
from repmetrics.data.interruption import Interruption
from repmetrics.data.kept_batches import Cache
from repmetrics.data.parse_batch import Batch, Keys, check_keys, parse_batch
from repmetrics.data.views import ViewSet, find_view_set, random_view
from repmetrics.decisions.alarms import alarms, collapse_stats
from repmetrics.encoders.extractor import EncoderSpec, FeatureExtractor, Pool
from repmetrics.functional.linalg import single_torch_thread
from repmetrics.measurement.blocks import INDEPENDENT_SAMPLES, Independent, declared_independent
from repmetrics.measurement.moments import Moments
from repmetrics.measurement.registry import DEFAULT_SIGNALS, METRICS, PROBES, check_metric_names
from repmetrics.measurement.result import Measurement
from repmetrics.monitoring.history import History
from repmetrics.monitoring.isolation import isolated, user_hooks
from repmetrics.monitoring.measure_features import measure_features, measure_probes
from repmetrics.monitoring.pictures import PARTS, Pictures, add_pictures
from repmetrics.monitoring.record import Record, sample_spectrum
from repmetrics.monitoring.sink import Sink, send
from repmetrics.probes.common import color_statistics
from repmetrics.probes.linear import linear_probe
from repmetrics.progress import ProgressLines, print_line

# Names in a batch's features in addition to layers; a submodule's path has no spaces.
COLORS = "color statistics"
VIEWS = "views of "


class Monitor:
    """Measures an encoder on held-out data without changing its training. For custom training loops.

    Under torch.distributed, every rank calls :meth:`measure`, reads its own share of the data, and gets the same
    record.

    Args:
        metrics: Label-free metrics, names from :data:`~repmetrics.measurement.registry.METRICS`.
        probe_data: Labeled data for the probes, if not the held-out data itself.
        layers: Dotted paths of submodules, each measured separately.
        pool: "cls" or "mean" for encoders and layers that return tokens.
        batch_size: Batch size for a dataset given in place of a loader.
        num_workers: Number of worker processes for a dataset given in place of a loader.
        keys: Where a batch has its parts "image", "label" and "group": keys of a mapping, positions in a sequence, or
            None for a part to ignore. Default: known names, and images, labels, groups in this order.
        groups: "independent" declares that no two held-out samples have a common source, so that values have errors
            without group ids. The errors are too small where some have one: a patient, a slide, a scene or a video.
        cache: Where to keep the held-out batches after the first evaluation: "memory", "disk" (a temporary file), or
            None to read them again each time. Images keep their dtype: uint8 takes a byte per value.
        warmup_steps: Steps before which no alarm is raised.
        view_set: View set of view retrieval, which compares two views of every second image: its name, or a
            :class:`~repmetrics.data.views.ViewSet`. It is recorded with the values. A fixed set, the same for all
            runs, that changes what the classes may ignore: "geometry", "turned", "natural", "weak"; in fmtrain "stain".
        views: Number of views of each image, at least 2, for metrics that need them (lidar, alignment). Each view adds
            a forward pass to an evaluation.
        augmentation: Function: a batch of images as the loader returns it, on the encoder's device → one view of each.
            It runs with fixed seeds, so that views are the same at each evaluation. The default takes uint8 or floats
            in 0 … 1 and crops, flips and jitters colors (:data:`repmetrics.data.views.AUGMENTATION`).
        transform: Function: a batch of images on the encoder's device → the encoder's input, such as a normalization
            that training does on the device. It runs after the augmentation.
        sink: Function called on rank 0 with the numbers of each record by log key, such as ``wandb.log``
            (:func:`repmetrics.monitoring.sink.send`). Pictures and tables never go to it.
        prefix: Prefix of the log keys for the sink.
        pictures: Whether to make pictures of some held-out images in the same forward pass, in :attr:`pictures`
            (:class:`repmetrics.monitoring.pictures.Pictures`); its ``save`` writes them next to the records of a run.
        progress: Function that prints a line of progress of a long evaluation, on rank 0; default: to stderr. None:
            nothing is printed.

    Attributes:
        history: All records so far, a list that plots (:class:`~repmetrics.monitoring.history.History`).
        pictures: Pictures of the run, complete on rank 0; None without.
        interruption: Ends the evaluation in progress, if a signal handler requests it.

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
        metrics: Sequence[str] = DEFAULT_SIGNALS,
        probe_data: Iterable[Any] | Dataset[Any] | None = None,
        layers: Sequence[str] = (),
        pool: Pool | None = None,
        batch_size: int = 64,
        num_workers: int = 0,
        keys: Keys | None = None,
        groups: Independent | None = None,
        cache: Cache | None = None,
        warmup_steps: int = 0,
        view_set: str | ViewSet = "geometry",
        views: int = 0,
        augmentation: Callable[[Tensor], Tensor] = random_view,
        transform: Callable[[Tensor], Tensor] | None = None,
        sink: Sink | None = None,
        prefix: str = "repmetrics",
        pictures: bool = False,
        progress: Callable[[str], None] | None = print_line,
    ) -> None:
        check_metric_names(metrics)
        if isinstance(layers, str):
            raise ValueError(f"layers must be a list of paths, got the text {layers!r}")
        if pool not in (None, *get_args(Pool)):
            raise ValueError(f"pool must be one of {', '.join(get_args(Pool))}, got {pool!r}")
        if groups is not None and not declared_independent(groups):
            raise ValueError(f"groups must be 'independent' or None, got {groups!r}: the held-out data hold ids")
        _check_supported(metrics, views=views)
        self.metrics = tuple(metrics)
        self.layers = tuple(dict.fromkeys(layers))
        self._independent = groups is not None
        self.pool = pool
        self.transform = transform
        self.sink = sink
        self.prefix = prefix
        self.progress = progress
        self.interruption = Interruption()
        self.warmup_steps = warmup_steps
        if cache not in (None, *get_args(Cache)):
            raise ValueError(f"cache must be memory, disk or None, got {cache!r}")
        self._load = partial(
            HeldOutData, batch_size=batch_size, num_workers=num_workers, keys=check_keys(keys), cache=cache
        )
        self._probe_data = None if probe_data is None else self._load(probe_data)
        self._held_out: tuple[Any, HeldOutData] | None = None
        self._with_pictures = pictures
        self.reset()
        of_views = [METRICS[name].two_views for name in metrics if METRICS[name].inputs == "views"]
        self._views = 0 if all(of_views) else views
        self._view_set = find_view_set(view_set) if isinstance(view_set, str) else view_set
        self._paired = any(of_views)
        self._turned = any(METRICS[name].inputs == "turns" for name in metrics)
        self._augmentation = augmentation

    def reset(self, history: Sequence[Record] = ()) -> None:
        """Begin another run, or continue the one with this history."""
        self.history = History(history)
        self._run = history[-1].run if history else uuid.uuid4().hex[:12]  # rank 0's is recorded
        self._color_floor: float | None = None  # of the probe, measured at the first evaluation
        self._warned: set[str] = set()
        self.pictures = Pictures() if self._with_pictures else None
        self._pictured = False  # whether the thumbnails were read
        self._previous: dict[str, Tensor] = {}  # features of the previous evaluation by layer, on rank 0

    @property
    def delayed_metrics(self) -> list[str]:
        """Measurements that compare two evaluations, which the first one lacks."""
        names = [name for name in self.metrics if METRICS[name].inputs == "previous"]
        return [f"{layer}/{name}" if layer else name for layer in ("", *self.layers) for name in names]

    @property
    def forward_passes(self) -> int:
        """Samples that pass through the encoder per evaluation (held-out, views, labeled), after the first one."""
        last = self.history[-1].measurements if self.history else {}
        held_out = min((m.n for name, m in last.items() if name not in PROBES), default=0)
        probed = max((m.n for name, m in last.items() if name in PROBES), default=0)
        passes = 1 + self._views + self._paired + 4 * self._turned
        return held_out * passes + (0 if self._probe_data is None else probed)

    def make_extractor(self, root: nn.Module, encoder: EncoderSpec) -> FeatureExtractor:
        """Extractor of the encoder and the layers of this monitor."""
        return FeatureExtractor(root, encoder, layers=self.layers, pool=self.pool, transform=self.transform)

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
            encoder: Module: images → features (B, D). Its modes and all random generators are restored.
            data: DataLoader, dataset, or iterable of batches; the same at each call.
            step: Number of optimizer steps so far.
            epoch: Number of epochs so far.
            path: Part of ``encoder`` to run, as ``encoder=`` of the callback; default: the module itself.
            device: Device of the images; default: that of the encoder's parameters.

        Raises:
            TypeError: Batches or outputs cannot be read; the message says how to choose.
            ValueError: Fewer than two samples, wrong shapes, labels of one class, or NaN at the first evaluation.
        """
        extractor = self.make_extractor(encoder, path)
        if device is None:
            device = next((p.device for p in encoder.parameters()), torch.device("cpu"))
        record = self.finish(self.begin(extractor, extractor, data, step=step, epoch=epoch, device=device))
        self.history.append(record)
        if self.sink is not None and rank_and_world()[0] == 0:
            send(self.sink, record, prefix=self.prefix)
        return record

    def begin(
        self,
        extractor: FeatureExtractor,
        encode: Encode,
        data: Iterable[Any] | Dataset[Any],
        *,
        step: int,
        epoch: int,
        device: torch.device | str,
        loss: float | None = None,
    ) -> Callable[[], Record]:
        """Run the encoder, and return the computation of the record, which is not added to the history.

        ``encode`` calls ``extractor``, in a context of the caller's such as autocast. Rank 0 runs the computation, in
        any thread, before the next evaluation begins; :meth:`finish` takes its result.
        """
        start = time.perf_counter()
        if not self.history and (hooks := user_hooks(extractor.roots)):
            self._warn(
                f"forward hooks run in evaluations too, and what they change is not restored: {', '.join(hooks)}"
            )
        encode_probed = encode if self._color_floor is not None else add_colors(encode)
        encode_held_out = encode_probed if self._probe_data is None else encode
        if self.pictures is not None:
            encode_held_out = add_pictures(
                encode_held_out,
                self.pictures,
                extractor.module or extractor.roots[0],
                size=self._held_out_data(data).total,
                again=self._pictured,
                together=extractor.sharded,
            )
        progress = self._make_progress(data, step=step)
        with self._isolated(extractor, data):
            features = self._gather(
                encode_held_out, encode, data, device=device, on_batch=progress.advance, together=extractor.sharded
            )
            probed = None
            if self._probe_data is not None:
                probed = gather_features(
                    encode_probed,
                    self._probe_data,
                    device=device,
                    on_batch=progress.advance,
                    interruption=self.interruption,
                    together=extractor.sharded,
                )
                if probed.labels is None:
                    raise ValueError(
                        "probe_data= is for the probes, and its batches hold no labels: give (images, labels)"
                    )

        def compute() -> Record:
            n = len(features.values[""])
            progress.add(f"computing metrics of {n} images")
            shown = {name: features.values.pop(name) for name in PARTS if name in features.values}
            with self.interruption, single_torch_thread():
                record = self._measure(features, probed, step=step, epoch=epoch)
                if record.nonfinite and not self.history:
                    raise ValueError(
                        f"{record.nonfinite} of {n} held-out samples have NaN or Inf features at the first "
                        "evaluation: check the images' scale and the encoder's weights"
                    )
                if self.pictures is not None and not record.nonfinite:
                    self.pictures.update(features, shown, step=step, run=self._run)
            return replace(record, seconds=time.perf_counter() - start, loss=loss, run=self._run)

        return compute

    def finish(self, compute: Callable[[], Record]) -> Record:
        """Record of a computation that :meth:`begin` returned, or of one that waits for it, with its alarms.

        Rank 0 calls it, and all ranks get the same record.
        """
        record = _on_rank_zero(compute)
        self._pictured |= self.pictures is not None and not record.nonfinite
        if (probe := record.measurements.get("linear_probe")) is not None:
            self._color_floor = probe.details["null_floor"]
        inputs = [past.alarm_input() for past in (*self.history, record)]
        return replace(record, alarms=alarms(inputs, warmup_steps=self.warmup_steps))

    def samples(
        self,
        extractor: FeatureExtractor,
        encode: Encode,
        data: Iterable[Any] | Dataset[Any],
        *,
        count: int,
        device: torch.device | str,
    ) -> tuple[Features, Tensor]:
        """Features of the encoder and images of the first ``count`` held-out samples, on this rank alone."""
        batches: list[Batch] = []
        with self._isolated(extractor, data):
            keys = self._held_out_data(data).keys
            for item in self._held_out_data(data).shard(0, 1):
                batches.append(parse_batch(item, keys=keys))
                if sum(len(batch.images) for batch in batches) >= count:
                    break
            features = concatenate([embed_batch(encode, batch, device=device) for batch in batches]).select("")
        groups = None if features.groups is None else features.groups[:count]
        labels = None if features.labels is None else features.labels[:count]
        return Features(features.values[:count], groups, labels), torch.cat([b.images for b in batches])[:count]

    def restore_previous(
        self, extractor: FeatureExtractor, encode: Encode, data: Any, *, device: torch.device | str
    ) -> None:
        """Read the held-out features of a resumed run again, which metrics of two evaluations compare with."""
        with self._isolated(extractor, data):
            features = gather_features(encode, self._held_out_data(data), device=device, together=extractor.sharded)
        self._previous = {layer: features.values[layer] for layer in ("", *self.layers)}

    def restore_pictures(self, path: Path) -> None:
        """Continue the pictures of a resumed run, if a file holds those of its first evaluations."""
        if self.pictures is None or not path.exists():
            return
        try:
            pictures = Pictures.load(path)
        except ValueError as error:
            self._warn(f"pictures begin anew: {error}")
            return
        if pictures.run == self._run and self.history:
            pictures.stages = [stage for stage in pictures.stages if stage.step <= self.history[-1].step]
            self.pictures = pictures

    def check(self, extractor: FeatureExtractor, encode: Encode, data: Any, *, device: torch.device | str) -> None:
        """Run two batches to check their shapes."""
        with self._isolated(extractor, data):
            self._gather(encode, encode, data, device=device, limit_batches=2, together=extractor.sharded)

    def _gather(
        self,
        encode: Encode,
        encode_view: Encode,
        data: Any,
        *,
        device: torch.device | str,
        limit_batches: int | None = None,
        on_batch: Callable[[int], None] | None = None,
        together: bool = False,
    ) -> FeatureDict:
        """Features of the held-out data, and of its views and turns if a metric needs them."""
        if self._views:
            encode = add_views(
                encode, encode_view, count=self._views, augmentation=self._augmentation, together=together
            )
        if self._paired:
            encode = add_view_pairs(encode, encode_view, view_set=self._view_set)
        if self._turned:
            encode = add_turns(encode, encode_view)
        return gather_features(
            encode,
            self._held_out_data(data),
            device=device,
            limit_batches=limit_batches,
            on_batch=on_batch,
            interruption=self.interruption,
            together=together,
            partial=PARTS,
        )

    def _make_progress(self, data: Any, *, step: int) -> ProgressLines:
        sizes = [data.size for data in (self._held_out_data(data), self._probe_data) if data is not None]
        total = None if None in sizes else sum(size for size in sizes if size is not None)
        write = self.progress if rank_and_world()[0] == 0 else None
        return ProgressLines(f"evaluation at step {step}", total=total, write=write)

    @contextmanager
    def _isolated(self, extractor: FeatureExtractor, data: Any) -> Iterator[None]:
        """Isolation with the generators of the data, which are seeded again after the batches are drawn."""
        readers = [self._held_out_data(data), *([] if self._probe_data is None else [self._probe_data])]
        generators = [g for reader in readers for g in reader.generators]
        with isolated((), generators=generators):
            for reader in readers:
                reader.prepare()
        with isolated(extractor.roots, generators=generators):
            yield

    def _held_out_data(self, data: Any) -> HeldOutData:
        if self._held_out is None or self._held_out[0] is not data:
            self._held_out = data, self._load(data)
        return self._held_out[1]

    def _measure(self, features: FeatureDict, probed: FeatureDict | None, *, step: int, epoch: int) -> Record:
        if self._independent:
            if any(each is not None and each.groups is not None for each in (features, probed)):
                raise ValueError("the held-out samples have group ids: leave groups='independent' out")
            self._warn(INDEPENDENT_SAMPLES)
        broken = sum(_count_nonfinite(each) for each in (features, probed) if each is not None)
        if broken:
            return Record(step, epoch, 0.0, nonfinite=broken)
        probed = features if probed is None else probed
        measurements: dict[str, Measurement] = {}
        output = features.values[""]
        moments = Moments()
        for layer in ("", *self.layers):
            probes = self._probe(probed, layer, moments=None if layer or probed is not features else moments)
            if not moments.n:
                moments.update(output)
            measured = (
                measure_features(
                    features.select(layer),
                    metrics=self.metrics,
                    views=features.values.get(VIEWS + layer),
                    pairs=view_pairs(features, layer),
                    view_set=str(self._view_set),
                    turns=features.values.get(TURNS + layer),
                    previous=self._previous.get(layer),
                    independent=self._independent,
                    strict=not self.history,
                    jackknife="first_order",  # exact ones decompose 32 times; repmetrics score has them
                    moments=None if layer else moments,
                )
                | probes
            )
            if self.delayed_metrics:
                self._previous[layer] = features.values[layer]
            for name, m in measured.items():
                if name in METRICS and METRICS[name].inputs == "views" and not METRICS[name].two_views:
                    m = replace(m, details={**m.details, "views": self._views})
                measurements[f"{layer}/{name}" if layer else name] = m
        try:
            singular_values = (moments.spectrum(centered=True).eigenvalues / len(output)).sqrt().tolist()
        except np.linalg.LinAlgError:  # LAPACK did not converge; the metrics are NaN with that reason
            singular_values = []
        return Record(
            step,
            epoch,
            0.0,
            measurements,
            collapse_stats=collapse_stats(output, moments=moments),
            singular_values=tuple(singular_values),
            spectrum=sample_spectrum(singular_values),
        )

    def _probe(self, probed: FeatureDict, layer: str, *, moments: Moments | None) -> dict[str, Measurement]:
        """Probes of a layer; none where the labels allow none, since labels are optional in held-out data.

        Empty ``moments`` are filled if the probes need those of all rows.
        """
        features = probed.select(layer)
        try:
            probes = measure_probes(features, independent=self._independent, moments=moments)
        except ValueError as error:
            if self._probe_data is not None:
                raise
            self._warn(f"no probe: {error}")
            return {}
        if (probe := probes.get("linear_probe")) is not None:
            if self._color_floor is None:
                self._color_floor = _color_floor(probed)
            probes[probe.name] = replace(probe, details={**probe.details, "null_floor": self._color_floor})
            if (missing := len(features.values) - probe.n) > 0:
                self._warn(f"{missing} of {len(features.values)} held-out samples have no label: the probes skip them")
        return probes

    def _warn(self, text: str) -> None:
        """Warn once per text."""
        if text not in self._warned:
            self._warned.add(text)
            warnings.warn(text, stacklevel=2)


def _count_nonfinite(features: FeatureDict) -> int:
    """Number of samples with NaN or Inf in any of their features."""
    finite = torch.ones(len(features.values[""]), dtype=torch.bool)
    paired = features.values.get(PAIRED)
    for name, values in features.values.items():
        if math.isfinite(values.sum()):  # then all terms are; a sum may overflow where they are too
            continue
        rows = torch.isfinite(values).reshape(len(values), -1).all(1)
        if name.startswith(PAIRS) and paired is not None:
            finite[paired] &= rows
        else:
            finite &= rows
    return int((~finite).sum())


def _color_floor(features: FeatureDict) -> float:
    """Balanced accuracy of a linear probe on color statistics alone; NaN without images."""
    colors = features.select(COLORS).labeled()
    if colors.labels is None or not colors.values.shape[1]:
        return math.nan
    return linear_probe(colors.values, colors.labels, groups=colors.groups).value


def _check_supported(metrics: Sequence[str], *, views: int) -> None:
    for name in metrics:
        if METRICS[name].inputs in ("tokens", "anchor"):
            supported = [key for key, metric in METRICS.items() if metric.inputs not in ("tokens", "anchor")]
            raise ValueError(
                f"{name} takes patch tokens (B, T, D), and a monitor keeps one vector per image: choose among "
                f"{', '.join(supported)}, or give the tokens to repmetrics.measure"
            )
        if METRICS[name].inputs == "views" and not METRICS[name].two_views and views < 2:
            raise ValueError(
                f"{name} needs at least 2 views of each image, got views={views}: give views=10 for ten more forward "
                "passes at each evaluation"
            )


def _on_rank_zero(compute: Callable[[], Record]) -> Record:
    """Compute on rank 0 and broadcast: ranks must not decide differently because of a rounding error."""
    rank, world = rank_and_world()
    if world == 1:
        return compute()
    payload: list[Any] = [None]
    if rank == 0:
        try:
            payload = [compute()]
        except Exception as error:
            payload = [error]
    dist.broadcast_object_list(payload, src=0)
    if isinstance(payload[0], Exception):
        raise payload[0]
    assert isinstance(payload[0], Record)
    return payload[0]


def add_colors(encode: Encode) -> Encode:
    """Images → features of ``encode``, and the color statistics that the probe must exceed."""
    return lambda images: {**encode(images), COLORS: color_statistics(images)}


def add_views(
    encode: Encode, encode_view: Encode, *, count: int, augmentation: Callable[[Tensor], Tensor], together: bool
) -> Encode:
    """Images → features of ``encode``, and those (B, count, D) of views by ``encode_view``.

    The seed of the views of this rank's i-th batch is the batch's position in the whole set. The views are therefore
    the same at each evaluation and on any number of ranks.
    """
    rank, world = (0, 1) if together else rank_and_world()
    batches = itertools.count(rank, world)

    def encode_with_views(images: Tensor) -> dict[str, Tensor]:
        seed = count * next(batches)
        features = encode(images)
        views = []
        for view in range(count):
            with isolated((), seed=seed + view):
                augmented = augmentation(images)
            if not isinstance(augmented, Tensor) or len(augmented) != len(images):
                got = tuple(augmented.shape) if isinstance(augmented, Tensor) else type(augmented).__name__
                raise ValueError(f"augmentation must return one view of each of {len(images)} images, got {got}")
            views.append(encode_view(augmented))
        return features | {VIEWS + layer: torch.stack([v[layer] for v in views], dim=1) for layer in views[0]}

    return encode_with_views
