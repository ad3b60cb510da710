"""Features of a source's images, and of images derived from them, from the cache or computed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain, islice
from typing import Any

import torch
from torch.utils.data import Dataset

from repmetrics.data.batches import ReadReport, ResizeCrop, load_batches
from repmetrics.data.derived import PAIR_STRIDE, DerivedImages, draw_view, turn
from repmetrics.data.features import Features, embed
from repmetrics.data.source import Source, Unreadable, hash_strings
from repmetrics.data.views import AUGMENTATION, MultiViewDataset, find_view_set
from repmetrics.encoders.encoder import Encoder, IdentifiedEncoder
from repmetrics.functional.rotation import TURNS
from repmetrics.measurement.registry import METRICS
from repmetrics.progress import Meter
from repmetrics.scoring.embedded import Embedded
from repmetrics.scoring.feature_cache import join, load_or_compute, versions
from repmetrics.scoring.parts import PART_BATCHES, Derive, PartTask, PartWorkers, embed_parts, tf32_disabled
from repmetrics.scoring.settings import EmbedSettings


def embed_source(
    source: Source,
    encoder: Encoder | IdentifiedEncoder | None,
    settings: EmbedSettings,
    meter: Meter | None = None,
    *,
    tag: str = "features",
    derive: Derive | None = None,
    workers: PartWorkers | None = None,
) -> Embedded:
    """Features of a source of images, or of images derived from them.

    The cache is used for an identified encoder and a source with a fingerprint. The network is built only to compute
    features that are not cached. An interrupted computation continues.

    Args:
        source: Source of images.
        encoder: Encoder of images.
        settings: Settings for computing the features.
        meter: Meter of the images.
        tag: What is embedded, as a part of the cache's key.
        derive: Function from the images of the source to those that are embedded; default: they are the same.
        workers: Where parts of the features are computed; default: in this process.
    """
    if source.images is None or encoder is None:
        raise ValueError(f"{source.path.name} holds images: name a checkpoint to embed them with")
    if derive is not None:
        source = replace(source, images=derive(source.images))
    total, size = count_images(source), image_size(source, encoder, settings)
    meter = meter or Meter(total)
    compute: Callable[[int], Iterator[Embedded]] = partial(_compute, source, encoder, settings, size, meter)
    if workers is not None:
        task = PartTask(workers.recipe, derive, settings, size, torch.get_num_threads())
        compute = partial(embed_parts, workers.executor, task, total, meter)
    inputs = encoder.inputs if isinstance(encoder, IdentifiedEncoder) else None
    if settings.cache is None or inputs is None or source.fingerprint is None:
        embedded = join(list(compute(0)))
    else:
        preprocessing = [str(encoder.mean), str(encoder.std), str(size)]
        execution = [str(settings.batch_size), torch.device(settings.device).type, *versions()]
        key = hash_strings([*inputs, *preprocessing, source.fingerprint(), tag, *execution])
        embedded = load_or_compute(settings.cache, key, compute, total=total)
    if embedded.from_cache:
        meter.skip(total)
    embedded.report.unreadable = list(dict.fromkeys(embedded.report.unreadable))
    return embedded


def count_images(source: Source) -> int:
    """Number of images of a source; 0 if it has features."""
    return 0 if source.images is None else len(source.images)  # type: ignore[arg-type]  # map-style: has a length


def image_size(source: Source, encoder: Encoder | IdentifiedEncoder, settings: EmbedSettings) -> int | None:
    """Side to resize images to; None if the source fixes it."""
    return settings.image_size or (encoder.image_size if source.resize else None)


def size_note(source: Source, encoder: Encoder | IdentifiedEncoder, settings: EmbedSettings) -> str | None:
    """What is assumed of the size of images of any size; None if the user or the source states it."""
    if settings.image_size is not None or not source.resize:
        return None
    assert source.images is not None
    first = source.images[0]
    read = "" if isinstance(first, Unreadable) else " (the first image is {2} × {1})".format(*first["image"].shape)
    return f"images are resized to {encoder.image_size} px, the network's own size{read}: --image-size gives another"


def _compute(
    source: Source,
    encoder: Encoder | IdentifiedEncoder,
    settings: EmbedSettings,
    size: int | None,
    meter: Meter,
    start: int,
) -> Iterator[Embedded]:
    """Features from image ``start`` on, in parts of `PART_BATCHES` batches."""
    network = encoder.encoder if isinstance(encoder, IdentifiedEncoder) else encoder
    report = ReadReport()
    batches = load_batches(
        source,
        image_size=size,
        batch_size=settings.batch_size,
        num_workers=settings.num_workers,
        start=start,
        report=report,
    )
    meter.skip(start)
    with tf32_disabled(settings.device):
        network = network.to(settings.device)
        first = next(batches, None)
        if first is None and not start:
            raise ValueError(f"{source.path.name} yields no image that can be read: at least 2 are needed")
        while first is not None:
            part = chain([first], islice(batches, PART_BATCHES - 1))
            features = embed(network, part, device=settings.device, on_batch=meter.advance)
            done = report.take()
            first = next(batches, None)
            if first is None:
                done.add(report.take())  # images at the end that cannot be read
            yield Embedded(features, done)


def embed_derived(
    source: Source,
    encoder: Encoder | IdentifiedEncoder,
    settings: EmbedSettings,
    meter: Meter,
    *,
    count: int,
    metrics: Sequence[str],
    workers: PartWorkers | None = None,
) -> dict[str, Any]:
    """Features of images derived from those of the source, as arguments of `measure_features`, and notes on them.

    Args:
        source: Source of images.
        encoder: Encoder of images.
        settings: Settings for computing the features.
        meter: Meter of the images.
        count: Number of images that could be read.
        metrics: Names of metrics.
        workers: Where parts of the features are computed; default: in this process.
    """
    assert source.images is not None
    size = image_size(source, encoder, settings)
    arguments: dict[str, Any] = {"notes": []}
    of_views, of_pairs, of_turns = derived_metrics(metrics)

    def embed_as(derive: Derive, per_image: int, tag: str, *, whole: bool = True) -> Features:
        features = embed_source(source, encoder, settings, meter, tag=tag, derive=derive, workers=workers).features
        rows = len(features.values)
        if rows % per_image or (whole and rows != count * per_image):
            raise ValueError(f"{rows} views of {count} images: an image was read only some of the times")
        groups = None if features.groups is None else features.groups[::per_image]
        return Features(features.values.unflatten(0, (-1, per_image)), groups)

    if of_views:
        views = partial(MultiViewDataset, count=settings.views, size=size)
        tag = f"{settings.views} views, {AUGMENTATION}"
        arguments["views"] = embed_as(views, settings.views, tag).values
        arguments["notes"].append(
            f"{', '.join(of_views)}: {settings.views} views of each image, {AUGMENTATION}, seed 0"
        )
    if of_pairs:
        chosen = find_view_set(settings.view_set or source.view_set)
        pairs = partial(_derived, size, derive=partial(draw_view, view_set=chosen), count=2, stride=PAIR_STRIDE)
        arguments["pairs"] = embed_as(pairs, 2, f"pairs of {chosen}", whole=False)
        arguments["view_set"] = str(chosen)
        arguments["notes"].append(f"{', '.join(of_pairs)}: two views of every second image, {chosen}, seed 0")
    if of_turns:
        turned = partial(_derived, size, derive=turn, count=TURNS)
        arguments["turns"] = embed_as(turned, TURNS, "quarter-turns").values
    return arguments


def _derived(size: int | None, images: Dataset[Any], **arguments: Any) -> Dataset[Any]:
    """`DerivedImages` of images, which are made square first unless their size is fixed."""
    return DerivedImages(images if size is None else ResizeCrop(images, size), **arguments)


def derived_metrics(metrics: Sequence[str]) -> tuple[list[str], list[str], list[str]]:
    """The metrics that need views of each image, pairs of views, and quarter-turns."""
    of_views = [name for name in metrics if METRICS[name].inputs == "views"]
    return (
        [name for name in of_views if not METRICS[name].two_views],
        [name for name in of_views if METRICS[name].two_views],
        [name for name in metrics if METRICS[name].inputs == "turns"],
    )


def count_embeddings(images: int, metrics: Sequence[str], *, views: int) -> int:
    """Number of images that the encoder sees for these metrics: those of the source, and those derived from them."""
    of_views, of_pairs, of_turns = derived_metrics(metrics)
    pairs = 2 * -(-images // PAIR_STRIDE)
    return images + bool(of_views) * views * images + bool(of_pairs) * pairs + bool(of_turns) * TURNS * images
