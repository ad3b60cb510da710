"""A source and an encoder → measurements, with all that is needed to read them."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from repmetrics.data.batches import load_batches
from repmetrics.data.features import Features, embed
from repmetrics.data.open import open_data
from repmetrics.data.source import Source, Unreadable, file_digest, hash_strings
from repmetrics.data.views import AUGMENTATION, MultiViewDataset
from repmetrics.encoders.checkpoint import SIDECARS, Encoder, load_encoder
from repmetrics.measurement.measure import measure
from repmetrics.measurement.registry import DEFAULT_METRICS, METRICS, check_metric_names
from repmetrics.measurement.result import Measurement
from repmetrics.probes.knn import knn_probe
from repmetrics.probes.linear import linear_probe
from repmetrics.scoring.checkpoints import SUFFIXES
from repmetrics.scoring.feature_cache import load_or_compute, versions

MEASURABLE = ("moments", "directions", "features", "groups", "views")


class EmbedSettings(NamedTuple):
    """How images become features.

    Attributes:
        image_size: side of the images; None: the encoder's, unless the source fixed its own.
        batch_size: the monitor's default too: the same features to the last bit.
        num_workers: processes that decode images.
        device: where the encoder runs.
        views: augmented views of each image, for metrics that need them.
        cache: folder for features; None keeps none.
    """

    image_size: int | None = None
    batch_size: int = 64
    num_workers: int = 0
    device: str = "cpu"
    views: int = 10
    cache: Path | None = None


@dataclass(frozen=True)
class Score:
    """The measurements of one encoder (or one file of embeddings) on one source.

    Attributes:
        name: the checkpoint, or the embeddings' file.
        run: the folder it lies in, where files of several folders are scored together.
        encoder: its architecture; None for embeddings.
        step: the training step the checkpoint states.
        data: what was embedded.
        measurements: by name.
        classes: names of the labels, by index.
        unreadable: images that had to be left out.
        notes: what was inferred or assumed on the way.
        seconds: for embedding and measuring.
        from_cache: no image was embedded for this.
    """

    name: str
    encoder: str | None
    step: int | None
    data: str
    measurements: dict[str, Measurement]
    classes: tuple[str, ...] = ()
    unreadable: tuple[Unreadable, ...] = ()
    notes: tuple[str, ...] = ()
    seconds: float = 0.0
    from_cache: bool = False
    run: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain types for JSON."""
        return {
            "name": self.name,
            "run": self.run,
            "encoder": self.encoder,
            "step": self.step,
            "data": self.data,
            "measurements": {name: m.to_json() for name, m in self.measurements.items()},
            "classes": list(self.classes),
            "unreadable": [item._asdict() for item in self.unreadable],
            "notes": list(self.notes),
            "seconds": self.seconds,
            "from_cache": self.from_cache,
        }


def check_measurable(names: Sequence[str]) -> None:
    """Refuse, before anything is embedded, metrics that one checkpoint and one source cannot give.

    Raises:
        ValueError: unknown names, or metrics of patch tokens or of another checkpoint.
    """
    check_metric_names(names)
    for name in names:
        if METRICS[name].inputs not in MEASURABLE:
            raise ValueError(f"{name} needs {METRICS[name].inputs}, which score does not have: use repmetrics.measure")


def check_device(name: str) -> None:
    """Refuse a device that is not there, before anything is read.

    Raises:
        ValueError: no such device; says which there are.
    """
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        there = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
        raise ValueError(f"there is no device {name!r} here: choose among {', '.join(['cpu', *there])}") from error


def score(
    source: Source,
    *,
    encoder: Encoder | None = None,
    metrics: Sequence[str] = DEFAULT_METRICS,
    probe: bool = True,
    settings: EmbedSettings | None = None,
    key: str | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> Score:
    """Embed the source if it holds images, measure, and probe where there are labels.

    Args:
        source: features or images.
        encoder: needed for images, refused for features.
        metrics: names from the catalogue.
        probe: fit a linear probe and ask nearest neighbours where the source has labels.
        settings: how to embed.
        key: digest of the encoder, to find its features in the cache.
        on_batch: called with the number of images of each batch.
    """
    settings = settings or EmbedSettings()
    check_measurable(metrics)
    start = time.perf_counter()
    if source.features is not None and encoder is not None:
        raise ValueError(f"{source.path.name} holds features already: leave the checkpoint out")
    features, unreadable, cached = embed_source(source, encoder, settings, key, on_batch)
    if len(features.values) < 2:
        raise ValueError(f"{source.path.name} yields {len(features.values)} samples: at least 2 are needed")
    plain = [name for name in metrics if METRICS[name].inputs != "views"]
    measurements = measure(features.values, groups=features.groups, metrics=plain)
    probed, notes = probes(features) if probe else ({}, ())
    if of_views := [name for name in metrics if METRICS[name].inputs == "views"]:
        measurements |= _measure_views(source, encoder, settings, key, on_batch, features, of_views)
        notes = (*notes, f"{', '.join(of_views)}: {settings.views} views of each image, {AUGMENTATION}, seed 0")
    return Score(
        name=encoder.source if encoder else source.path.name,
        encoder=encoder.arch if encoder else None,
        step=encoder.step if encoder else None,
        data=f"{source.path.name} ({source.kind})",
        measurements={name: measurements[name] for name in metrics} | probed,
        classes=source.classes,
        unreadable=unreadable,
        notes=(*(encoder.notes if encoder else ()), *source.notes, *notes),
        seconds=time.perf_counter() - start,
        from_cache=cached,
    )


def embed_source(
    source: Source,
    encoder: Encoder | None,
    settings: EmbedSettings,
    key: str | None,
    on_batch: Callable[[int], None] | None,
    *,
    what: str = "features",
) -> tuple[Features, tuple[Unreadable, ...], bool]:
    """The source's own features, or the encoder's of its images, from the cache where both have a digest."""
    if source.features is not None:
        return source.features, (), False
    if encoder is None:
        raise ValueError(f"{source.path.name} holds images: name a checkpoint to embed them with")
    size = settings.image_size or (encoder.image_size if source.resize else None)

    def make() -> tuple[Features, tuple[Unreadable, ...]]:
        unreadable: list[Unreadable] = []
        batches = load_batches(
            source,
            image_size=size,
            batch_size=settings.batch_size,
            num_workers=settings.num_workers,
            on_unreadable=unreadable.append,
        )
        with tf32_disabled(settings.device):
            features = embed(encoder.to(settings.device), batches, device=settings.device, on_batch=on_batch)
        return features, tuple(dict.fromkeys(unreadable))

    if settings.cache is None or key is None or source.fingerprint is None:
        return *make(), False
    how = [what, str(size), str(settings.batch_size), torch.device(settings.device).type]
    return load_or_compute(settings.cache, hash_strings([key, source.fingerprint(), *how, *versions()]), make)


def _measure_views(
    source: Source,
    encoder: Encoder | None,
    settings: EmbedSettings,
    key: str | None,
    on_batch: Callable[[int], None] | None,
    features: Features,
    names: Sequence[str],
) -> dict[str, Measurement]:
    """Metrics of several views of each image."""
    if source.images is None or encoder is None:
        raise ValueError(f"{', '.join(names)} need views of images: {source.path.name} holds features only")
    size = settings.image_size or (encoder.image_size if source.resize else None)
    views = replace(source, images=MultiViewDataset(source.images, count=settings.views, size=size))
    many, _, _ = embed_source(views, encoder, settings, key, on_batch, what=f"{settings.views} views, {AUGMENTATION}")
    count = len(features.values)
    if len(many.values) != count * settings.views:
        raise ValueError(f"{len(many.values)} views of {count} images: an image was read only some of the times")
    ids = [row // settings.views for row in range(len(many.values))]
    return measure(many.values, groups=many.groups, views=ids, metrics=names)


def tf32_disabled(device: str) -> AbstractContextManager[Any]:
    """On CUDA, convolutions in float32 and not TF32: added rounding is added rank."""
    if torch.device(device).type != "cuda":
        return nullcontext()
    return torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)


def probes(features: Features) -> tuple[dict[str, Measurement], tuple[str, ...]]:
    """Linear probe and nearest neighbours where there are labels; or the reason why there are none."""
    if features.labels is None:
        return {}, ()
    try:
        measured = [
            probe(features.values, features.labels, groups=features.groups) for probe in (linear_probe, knn_probe)
        ]
    except ValueError as error:
        return {}, (f"no probe: {error}",)
    return {m.name: m for m in measured}, ()


@contextmanager
def progress(text: str, *, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on stderr, fed with counts; nothing moves where stderr is no terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(text, total=total)
        yield lambda count: bar.advance(task, count)


def with_run_name(score: Score, file: Path, *, base: Path) -> Score:
    """The score under the name that its file has from `base`, so that equal file names stay apart."""
    run = Path(os.path.relpath(file.parent, base)).as_posix()
    return score if run == "." else replace(score, name=f"{run}/{score.name}", run=run)


def drop_duplicates(scores: Sequence[Score]) -> list[Score]:
    """The first of those in one run that state the same step and measure the same: "last.ckpt" copies another."""
    kept: list[Score] = []
    for one in scores:
        if one.step is None or not any(_same(one, other) for other in kept):
            kept.append(one)
    return kept


def _same(first: Score, second: Score) -> bool:
    def told(score: Score) -> tuple[Any, ...]:
        return score.run, score.step, {name: m.to_json() for name, m in score.measurements.items()}

    return told(first) == told(second)


def content_digests(file: Path) -> list[str]:
    """Digests of a checkpoint and of the JSON beside it, on which its encoder depends as well."""
    beside = (file.with_name(name) for name in SIDECARS)
    return [file_digest(file), *(file_digest(side) for side in beside if side.is_file())]


def score_checkpoint(
    file: Path,
    source: Source,
    *,
    overrides: Mapping[str, Any],
    channels: Mapping[str, Sequence[float] | None],
    metrics: Sequence[str],
    settings: EmbedSettings,
) -> Score:
    """Score one checkpoint, with progress on stderr.

    Args:
        file: the checkpoint.
        source: what to embed.
        overrides: arguments of `load_encoder`.
        channels: "mean" and "std" in place of those found with the checkpoint.
        metrics: names.
        settings: how to embed.
    """
    if source.images is None:
        raise ValueError(f"{source.path.name} holds features already: leave the checkpoint out")
    encoder = load_encoder(file, **overrides)
    for name, values in channels.items():
        if values is not None:
            setattr(encoder, name, tuple(values))
    key = None
    if settings.cache is not None:
        stated = json.dumps([dict(overrides), encoder.mean, encoder.std], sort_keys=True)
        key = hash_strings([*content_digests(file), stated])
    total = len(source.images)  # type: ignore[arg-type]  # map-style datasets have a length
    with progress(f"embedding {source.path.name} with {encoder.source}", total=total) as on_batch:
        return score(source, encoder=encoder, metrics=metrics, settings=settings, key=key, on_batch=on_batch)


def score_embeddings(
    file: Path, *, labels: str | None, groups: str | None, metrics: Sequence[str], settings: EmbedSettings
) -> Score:
    """Score a file (or a folder, one file a slide) of embeddings."""
    try:
        source = open_data(file, labels=labels, groups=groups)
    except ValueError as error:
        if file.suffix.lower() not in SUFFIXES:
            raise
        raise ValueError(f"{error}; a checkpoint is scored on images: name them with --data") from error
    if source.features is None:
        raise ValueError(f"{file.name} holds images: pass it as --data, and a checkpoint to embed them with")
    return score(source, metrics=metrics, settings=settings)
