"""Parts of a source's features, computed by the workers of an executor."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import lru_cache, partial
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch.utils.data import Dataset

from repmetrics.data.batches import ReadReport, load_batches
from repmetrics.data.features import Features, embed
from repmetrics.data.source import Source
from repmetrics.encoders.encoder import IdentifiedEncoder
from repmetrics.executor import in_order
from repmetrics.progress import Meter
from repmetrics.scoring.embedded import Embedded
from repmetrics.scoring.settings import EmbedSettings

PART_BATCHES = 16
"""Batches of a part: after each part, the features so far are stored."""

Derive = Callable[[Dataset[Any]], Dataset[Any]]


class PartWorkers(NamedTuple):
    """Workers that open the source and the encoder by themselves: both may be too large to send.

    Attributes:
        executor: Where parts are computed.
        recipe: Pickled pair of functions, which open the source and identify the encoder.
    """

    executor: Executor
    recipe: bytes

    @classmethod
    def of(
        cls, executor: Executor, open_source: Callable[[], Source], open_encoder: Callable[[], IdentifiedEncoder]
    ) -> PartWorkers:
        """Workers that call these functions."""
        return cls(executor, pickle.dumps((open_source, open_encoder)))


class PartTask(NamedTuple):
    """What all parts of a computation share.

    Attributes:
        recipe: That of `PartWorkers`.
        derive: Function from the images of the source to those that are embedded.
        settings: Settings for computing the features.
        size: Side to resize images to.
        threads: Threads of torch: their number decides the last bit of some results.
    """

    recipe: bytes
    derive: Derive | None
    settings: EmbedSettings
    size: int | None
    threads: int


def embed_parts(executor: Executor, task: PartTask, total: int, meter: Meter, start: int) -> Iterator[Embedded]:
    """Features from image ``start`` on, in parts of `PART_BATCHES` batches, in their order.

    The batches are those of one process, so that the features are the same to the last bit. Images that cannot be read
    are reported with a part that has readable ones.
    """
    step = PART_BATCHES * task.settings.batch_size
    spans = [(first, min(first + step, total)) for first in range(start, total, step)]
    report, last = ReadReport(), None
    meter.skip(start)
    for features, read in in_order(executor, partial(_embed_part, task), spans, died=_died):
        report.add(read)
        meter.advance(len(read.readable))
        if features is not None:
            if last is not None:
                yield last
            last, report = Embedded(features, report), ReadReport()
    if last is not None:
        last.report.add(report)
        yield last
    elif not start:
        raise ValueError("no image can be read: at least 2 are needed")


def _died(span: tuple[int, int]) -> tuple[Features | None, ReadReport]:
    raise OSError(f"the process that embedded images {span[0]} to {span[1]} died twice, as for lack of memory")


def _embed_part(task: PartTask, span: tuple[int, int]) -> tuple[Features | None, ReadReport]:
    """Features of some images, or None if none of them can be read, and what became of each."""
    torch.set_num_threads(task.threads)
    source, encoder = _opened(task.recipe)
    assert source.images is not None
    images = source.images if task.derive is None else task.derive(source.images)
    report, settings = ReadReport(), task.settings
    batches = load_batches(
        replace(source, images=images),
        image_size=task.size,
        batch_size=settings.batch_size,
        num_workers=settings.num_workers,
        start=span[0],
        stop=span[1],
        report=report,
    )
    with tf32_disabled(settings.device):
        network = encoder.encoder.to(settings.device)
        first = next(batches, None)
        if first is None:
            return None, report
        return embed(network, chain([first], batches), device=settings.device), report


@lru_cache(maxsize=1)
def _opened(recipe: bytes) -> tuple[Source, IdentifiedEncoder]:
    open_source, open_encoder = pickle.loads(recipe)
    return open_source(), open_encoder()


def tf32_disabled(device: str) -> AbstractContextManager[Any]:
    """Context in which CUDA's convolutions use float32 instead of TF32, whose rounding adds rank."""
    if torch.device(device).type != "cuda":
        return nullcontext()
    return torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)
