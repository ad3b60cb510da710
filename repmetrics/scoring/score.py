"""Score: measurements of one encoder, or one file of embeddings, on one source."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.utils.data import Dataset

from repmetrics.data.batches import ResizeCrop, load_batches
from repmetrics.data.derived import PAIR_STRIDE, DerivedImages, draw_view, turn
from repmetrics.data.features import Features, embed
from repmetrics.data.open import open_data
from repmetrics.data.source import Source, Unreadable, hash_strings
from repmetrics.data.views import AUGMENTATION, MultiViewDataset, find_view_set
from repmetrics.encoders.checkpoint import identify
from repmetrics.encoders.encoder import Encoder, IdentifiedEncoder
from repmetrics.encoders.files import read_checkpoint_file
from repmetrics.functional.rotation import TURNS
from repmetrics.measurement.registry import DEFAULT_METRICS, METRICS, check_metric_names
from repmetrics.measurement.result import Measurement
from repmetrics.monitoring.measure_features import measure_features, measure_probes
from repmetrics.scoring.checkpoints import SUFFIXES
from repmetrics.scoring.feature_cache import load_or_compute, versions

MEASURABLE = ("moments", "directions", "features", "groups", "views", "turns")


class EmbedSettings(NamedTuple):
    """Settings for computing features from images.

    Attributes:
        image_size: Side of the images; None: the encoder's, unless the source fixes the size.
        batch_size: Images per batch. The default is the monitor's: both compute the same features to the last bit.
        num_workers: Processes that decode images.
        device: Device of the encoder.
        views: Augmented views of each image, for metrics that need them.
        cache: Folder of cached features; None caches nothing.
        view_set: Name of the view set of view retrieval; default: that of the source.
    """

    image_size: int | None = None
    batch_size: int = 64
    num_workers: int = 0
    device: str = "cpu"
    views: int = 10
    cache: Path | None = None
    view_set: str | None = None


@dataclass(frozen=True)
class Score:
    """Measurements of one encoder, or one file of embeddings, on one source.

    Attributes:
        name: Name of the checkpoint or of the file of embeddings.
        encoder: Architecture of the encoder; None for embeddings.
        step: Training step recorded in the checkpoint.
        data: Description of the source.
        measurements: Measurements by name.
        classes: Names of the labels, by index.
        unreadable: Images that could not be read.
        notes: What was inferred or assumed.
        seconds: Time for embedding and measuring.
        from_cache: Whether the features come from the cache.
        run: Folder of the file, if files of several folders are scored together.
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
    """Check that metrics can be measured on one checkpoint and one source.

    Raises:
        ValueError: A name is unknown, or the metric needs patch tokens or another checkpoint.
    """
    check_metric_names(names)
    for name in names:
        if METRICS[name].inputs not in MEASURABLE:
            raise ValueError(f"{name} needs {METRICS[name].inputs}, which score does not have: use repmetrics.measure")


def check_device(name: str) -> None:
    """Check that a device exists.

    Raises:
        ValueError: There is no such device; the message lists the devices.
    """
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        devices = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        raise ValueError(f"no device {name!r} on this machine: choose among {', '.join(devices)}") from error


def score(
    source: Source,
    *,
    encoder: Encoder | IdentifiedEncoder | None = None,
    metrics: Sequence[str] = DEFAULT_METRICS,
    settings: EmbedSettings | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> Score:
    """Embed a source of images, measure the features, and probe them if the source has labels.

    Args:
        source: Features or images.
        encoder: Encoder of images; None for a source of features. Features of an identified encoder can be cached.
        metrics: Names from :data:`~repmetrics.measurement.registry.METRICS`.
        settings: Settings for computing the features.
        on_batch: Function called with the number of images of each batch.
    """
    settings = settings or EmbedSettings()
    check_measurable(metrics)
    start = time.perf_counter()
    if source.features is not None and encoder is not None:
        raise ValueError(f"{source.path.name} holds features already: leave the checkpoint out")
    features, unreadable, cached = embed_source(source, encoder, settings, on_batch)
    if len(features.values) < 2:
        raise ValueError(f"{source.path.name} yields {len(features.values)} samples: at least 2 are needed")
    notes: list[str] = []
    try:
        probed = measure_probes(features)
    except ValueError as error:
        probed = {}
        notes.append(f"no probe: {error}")
    derived = _embed_derived(source, encoder, settings, on_batch, count=len(features.values), metrics=metrics)
    notes += derived.pop("notes")
    measurements = measure_features(features, metrics=metrics, **derived)
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
    encoder: Encoder | IdentifiedEncoder | None,
    settings: EmbedSettings,
    on_batch: Callable[[int], None] | None,
    *,
    tag: str = "features",
) -> tuple[Features, tuple[Unreadable, ...], bool]:
    """Features of a source, what could not be read, and whether the features come from the cache.

    The cache is used for an identified encoder and a source with a fingerprint. The network is built only to compute
    features that are not cached.
    """
    if source.features is not None:
        return source.features, (), False
    if encoder is None:
        raise ValueError(f"{source.path.name} holds images: name a checkpoint to embed them with")
    size = settings.image_size or (encoder.image_size if source.resize else None)

    def compute() -> tuple[Features, tuple[Unreadable, ...]]:
        network = encoder.encoder if isinstance(encoder, IdentifiedEncoder) else encoder
        unreadable: list[Unreadable] = []
        batches = load_batches(
            source,
            image_size=size,
            batch_size=settings.batch_size,
            num_workers=settings.num_workers,
            on_unreadable=unreadable.append,
        )
        with tf32_disabled(settings.device):
            features = embed(network.to(settings.device), batches, device=settings.device, on_batch=on_batch)
        return features, tuple(dict.fromkeys(unreadable))

    inputs = encoder.inputs if isinstance(encoder, IdentifiedEncoder) else None
    if settings.cache is None or inputs is None or source.fingerprint is None:
        return *compute(), False
    preprocessing = [str(encoder.mean), str(encoder.std), str(size)]
    execution = [str(settings.batch_size), torch.device(settings.device).type, *versions()]
    key = hash_strings([*inputs, *preprocessing, source.fingerprint(), tag, *execution])
    return load_or_compute(settings.cache, key, compute)


def _embed_derived(
    source: Source,
    encoder: Encoder | IdentifiedEncoder | None,
    settings: EmbedSettings,
    on_batch: Callable[[int], None] | None,
    *,
    count: int,
    metrics: Sequence[str],
) -> dict[str, Any]:
    """Features of images derived from those of the source, as arguments of `measure_features`, and notes on them."""
    arguments: dict[str, Any] = {"notes": []}
    needs = [name for name in metrics if METRICS[name].inputs in ("views", "turns")]
    if needs and (source.images is None or encoder is None):
        raise ValueError(f"{', '.join(needs)} need views of images: {source.path.name} holds features only")
    if source.images is None or encoder is None:
        return arguments
    size = settings.image_size or (encoder.image_size if source.resize else None)

    def embed_as(images: Dataset[Any], per_image: int, tag: str, *, whole: bool = True) -> Features:
        features, _, _ = embed_source(replace(source, images=images), encoder, settings, on_batch, tag=tag)
        rows = len(features.values)
        if rows % per_image or (whole and rows != count * per_image):
            raise ValueError(f"{rows} views of {count} images: an image was read only some of the times")
        groups = None if features.groups is None else features.groups[::per_image]
        return Features(features.values.unflatten(0, (-1, per_image)), groups)

    if of_views := [name for name in needs if METRICS[name].inputs == "views" and not METRICS[name].two_views]:
        views = MultiViewDataset(source.images, count=settings.views, size=size)
        tag = f"{settings.views} views, {AUGMENTATION}"
        arguments["views"] = embed_as(views, settings.views, tag).values
        arguments["notes"].append(
            f"{', '.join(of_views)}: {settings.views} views of each image, {AUGMENTATION}, seed 0"
        )
    square = source.images if size is None else ResizeCrop(source.images, size)
    if of_pairs := [name for name in needs if METRICS[name].two_views]:
        chosen = find_view_set(settings.view_set or source.view_set)
        pairs = DerivedImages(square, partial(draw_view, view_set=chosen), count=2, stride=PAIR_STRIDE)
        arguments["pairs"] = embed_as(pairs, 2, f"pairs of {chosen}", whole=False)
        arguments["view_set"] = str(chosen)
        arguments["notes"].append(f"{', '.join(of_pairs)}: two views of every second image, {chosen}, seed 0")
    if any(METRICS[name].inputs == "turns" for name in needs):
        turned = DerivedImages(square, turn, count=TURNS)
        arguments["turns"] = embed_as(turned, TURNS, "quarter-turns").values
    return arguments


def tf32_disabled(device: str) -> AbstractContextManager[Any]:
    """Context in which CUDA's convolutions use float32 instead of TF32, whose rounding adds rank."""
    if torch.device(device).type != "cuda":
        return nullcontext()
    return torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)


@contextmanager
def progress(text: str, *, total: int) -> Iterator[Callable[[int], None]]:
    """Progress bar on stderr, advanced by counts; invisible if stderr is not a terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(text, total=total)
        yield lambda count: bar.advance(task, count)


def with_run_name(score: Score, file: Path, *, base: Path) -> Score:
    """The score, named by the path of its file relative to `base`, so that equal file names differ."""
    run = Path(os.path.relpath(file.parent, base)).as_posix()
    return score if run == "." else replace(score, name=f"{run}/{score.name}", run=run)


def drop_duplicates(scores: Sequence[Score]) -> list[Score]:
    """The first of the scores of one run with equal steps and measurements: "last.ckpt" copies another checkpoint."""
    kept: list[Score] = []
    for candidate in scores:
        if not any(is_copy(candidate, other) for other in kept):
            kept.append(candidate)
    return kept


def is_copy(first: Score, second: Score) -> bool:
    """Whether two scores are of one run and one step, and have the same measurements."""
    a, b = ({name: m.to_json() for name, m in score.measurements.items()} for score in (first, second))
    return first.step is not None and (first.run, first.step, a) == (second.run, second.step, b)


def score_checkpoint(
    file: Path,
    source: Source,
    *,
    overrides: Mapping[str, Any],
    metrics: Sequence[str],
    settings: EmbedSettings,
) -> Score:
    """Score one checkpoint, with progress on stderr.

    Args:
        file: Checkpoint.
        source: Images to embed.
        overrides: Arguments of `identify`.
        metrics: Names of metrics.
        settings: Settings for computing the features.
    """
    if source.images is None:
        raise ValueError(f"{source.path.name} holds features already: leave the checkpoint out")
    encoder = identify(read_checkpoint_file(file, digests=settings.cache is not None), **overrides)
    total = len(source.images)  # type: ignore[arg-type]  # map-style datasets have a length
    with progress(f"embedding {source.path.name} with {encoder.source}", total=total) as on_batch:
        return score(source, encoder=encoder, metrics=metrics, settings=settings, on_batch=on_batch)


def score_embeddings(
    file: Path, *, labels: str | None, groups: str | None, metrics: Sequence[str], settings: EmbedSettings
) -> Score:
    """Score a file of embeddings, or a folder with one file per slide."""
    try:
        source = open_data(file, labels=labels, groups=groups)
    except ValueError as error:
        if file.suffix.lower() not in SUFFIXES:
            raise
        raise ValueError(f"{error}; a checkpoint is scored on images: name them with --data") from error
    if source.features is None:
        raise ValueError(f"{file.name} holds images: pass it as --data, and a checkpoint to embed them with")
    return score(source, metrics=metrics, settings=settings)
