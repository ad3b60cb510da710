"""Held-out data: the same batches at every reading, divided among ranks and gathered in order."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import nullcontext
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset

from repmetrics.data.features import Encode, FeatureDict, concatenate, embed_batch
from repmetrics.data.interruption import EvaluationInterruptedError, Interruption
from repmetrics.data.kept_batches import Cache, KeptBatches
from repmetrics.data.parse_batch import Batch, Keys, parse_batch


def rank_and_world() -> tuple[int, int]:
    """Rank of this process and number of ranks; (0, 1) without torch.distributed."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


class HeldOutData:
    """A loader or dataset whose batches are fixed at the first reading and assigned to ranks in turn.

    Rank r of w reads batches r, r + w, …. Each batch equals that of a single process. No sample is read twice, and
    none is added to make shares equal. A loader's ``DistributedSampler`` is therefore ignored. Data that give each rank
    a share of their own, as streams may do, are not divided again.

    Args:
        data: A DataLoader, a map-style dataset, or any iterable of batches that can be read again.
        batch_size: Batch size for a dataset.
        num_workers: Number of worker processes for a dataset.
        collate_fn: Function that makes a dataset's items one batch; None: torch's.
        keys: Keys or positions of images, labels and groups in a batch, see
            :func:`~repmetrics.data.parse_batch.parse_batch`.
        cache: Where to keep the batches of the first whole reading, from which later ones are served.
    """

    def __init__(
        self,
        data: Iterable[Any] | Dataset[Any],
        *,
        batch_size: int = 64,
        num_workers: int = 0,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        keys: Keys | None = None,
        cache: Cache | None = None,
    ) -> None:
        if isinstance(data, Dataset) or (hasattr(data, "__getitem__") and not isinstance(data, (Sequence, Tensor))):
            dataset: Any = data  # torch's, or any other library's with __getitem__ and __len__
            data = DataLoader(dataset, batch_size=batch_size, num_workers=num_workers, collate_fn=collate_fn)
        elif not isinstance(data, Iterable) or isinstance(data, (Iterator, Tensor, str)):
            raise TypeError(
                "held-out data must be a DataLoader, a Dataset or a re-readable iterable of batches, "
                f"got {type(data).__name__}"
            )
        self.data: Iterable[Any] = data
        self.keys = keys
        self._batches: list[list[int]] | None = None
        self._divides_itself: bool | None = None
        self._first: bytes | None = None  # digest of this rank's first batch
        self._warned = False
        self._cache = cache
        self._kept: tuple[int, int, KeptBatches] | None = None  # of a rank and a number of ranks

    def read(self, rank: int, world: int, *, limit: int | None = None) -> Iterator[Batch]:
        """Batches of one rank, from the cache if there is one."""
        if self._kept is not None and self._kept[:2] == (rank, world):
            yield from islice(self._kept[2], limit)
            return
        kept = None if self._cache is None or limit is not None else KeptBatches(self._cache)
        for item in islice(self.shard(rank, world), limit):
            batch = parse_batch(item, keys=self.keys)
            if kept is not None:
                kept.add(batch)
            yield batch
        self._kept = self._kept if kept is None else (rank, world, kept)

    def prepare(self) -> None:
        """Draw the batches of a loader once, and read whether ranks have shares of their own: a collective call.

        Call it before random generators are seeded for a reading: a shuffling sampler advances them.
        """
        loader = self.data
        if self._batches is None and isinstance(loader, DataLoader) and _has_batches(loader):
            self._batches = _all_batches(loader)
        world = rank_and_world()[1]
        if world > 1 and self._divides_itself is None:
            first: list[bytes | None] = [None] * world
            try:
                digest = next((_digest(parse_batch(item, keys=self.keys).images) for item in self.shard(0, 1)), None)
            except Exception:  # the reading raises it on every rank
                digest = None
            dist.all_gather_object(first, digest)
            self._divides_itself = len(set(first)) > 1

    def check_first(self, images: Tensor) -> None:
        """Warn once if the first batch of this rank is not that of the first evaluation."""
        digest = _digest(images)
        if self._first is None:
            self._first = digest
        elif self._first != digest and not self._warned:
            self._warned = True
            warnings.warn(
                "the held-out images are not those of the first evaluation, so that values differ without any change "
                "of the encoder: a dataset or a transform draws from a random generator of its own, or data changed",
                stacklevel=2,
            )

    @property
    def generators(self) -> list[torch.Generator]:
        """Random generators of the loader, which reading it advances."""
        sampler = getattr(self.data, "sampler", None)
        owners = (self.data, sampler, getattr(self.data, "batch_sampler", None))
        generators = [getattr(owner, "generator", None) for owner in owners]
        return list({id(g): g for g in generators if isinstance(g, torch.Generator)}.values())

    @property
    def size(self) -> int | None:
        """Number of samples that this rank reads, rounded up; None if unknown."""
        world = 1 if self._divides_itself else rank_and_world()[1]
        return None if self.total is None else -(-self.total // world)

    @property
    def total(self) -> int | None:
        """Number of samples that all ranks read, of each its own if it has a share; None if unknown."""
        loader = self.data
        if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
            return None
        try:
            return len(loader.dataset)  # type: ignore[arg-type]
        except TypeError:
            return None

    def shard(self, rank: int, world: int) -> Iterable[Any]:
        """Batches of one rank."""
        loader = self.data
        if self._divides_itself:
            rank, world = 0, 1
        if not isinstance(loader, DataLoader) or not _is_plain(loader):
            return islice(loader, rank, None, world)
        if not _has_batches(loader):
            return islice(_reader(loader, batch_size=loader.batch_size, **_order(loader)), rank, None, world)
        if self._batches is None:
            self._batches = _all_batches(loader)
        return _reader(loader, batch_sampler=self._batches[rank::world])


def _has_batches(loader: DataLoader[Any]) -> bool:
    """Whether a loader reads a map-style dataset in batches of indices."""
    stream = isinstance(loader.dataset, IterableDataset)
    return _is_plain(loader) and loader.batch_sampler is not None and not stream


def _is_plain(loader: DataLoader[Any]) -> bool:
    """Whether a loader iterates as torch's does; a subclass may have its own iteration."""
    return type(loader).__iter__ is DataLoader.__iter__


def _order(loader: DataLoader[Any]) -> dict[str, Any]:
    """Arguments of a loader without batches of indices: a stream has no sampler."""
    if isinstance(loader.dataset, IterableDataset):
        return {"drop_last": loader.drop_last}
    return {"sampler": loader.sampler}


def _reader(loader: DataLoader[Any], **order: Any) -> DataLoader[Any]:
    """A loader with the data and the workers of another one, for one reading.

    Training may be reading the other loader, and persistent workers would go on drawing random numbers where their last
    reading ended.
    """
    return DataLoader(
        loader.dataset,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        generator=loader.generator,
        prefetch_factor=loader.prefetch_factor,
        **order,
    )


def _all_batches(loader: DataLoader[Any]) -> list[list[int]]:
    if isinstance(loader.sampler, DistributedSampler):
        size = len(loader.dataset)  # type: ignore[arg-type]
        return [list(range(i, min(i + (loader.batch_size or 1), size))) for i in range(0, size, loader.batch_size or 1)]
    return [list(batch) for batch in loader.batch_sampler or ()]


def _digest(images: Tensor) -> bytes:
    return hashlib.sha256(images.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()).digest()


def gather_features(
    encode: Encode,
    data: HeldOutData,
    *,
    device: torch.device | str = "cpu",
    limit_batches: int | None = None,
    on_batch: Callable[[int], None] | None = None,
    interruption: Interruption | None = None,
    together: bool = False,
    partial: Collection[str] = (),
) -> FeatureDict:
    """Features of all held-out data, in its order, the same on every rank.

    Every rank must call this function. If one rank fails, all of them raise, so that none waits forever.

    Args:
        encode: Function: images (B, …) → tensors (B, …) by name.
        data: Data to read.
        device: Device of the images.
        limit_batches: Maximum number of batches per rank.
        on_batch: Function called with the number of samples of each batch of this rank, to show progress.
        interruption: Active while this rank reads; if a rank is interrupted, all ranks raise.
        together: Whether every rank reads all data, so that each calls ``encode`` as often as the others. An encoder
            with sharded parameters waits in each call for all ranks.
        partial: Names that ``encode`` need not give for every batch.
    """
    rank, world = (0, 1) if together else rank_and_world()
    error: Exception | None = None
    batches: list[FeatureDict] = []
    try:
        with interruption or nullcontext():
            for batch in data.read(rank, world, limit=limit_batches):
                if not batches:
                    data.check_first(batch.images)
                batches.append(embed_batch(encode, batch, device=device))
                if on_batch is not None:
                    on_batch(len(batch.images))
    except Exception as caught:
        caught.add_note("This came up while reading and embedding held-out data for repmetrics.")
        if world == 1:
            raise
        error = caught
    shards: list[tuple[list[FeatureDict], str | None]] = [(batches, None)] * world
    if world > 1:
        dist.all_gather_object(shards, (batches, None if error is None else f"{type(error).__name__}: {error}"))
    if error is not None:
        raise error
    for other, (_, message) in enumerate(shards):
        if message is not None and message.startswith(EvaluationInterruptedError.__name__):
            raise EvaluationInterruptedError
        if message is not None:
            raise RuntimeError(f"rank {other} could not read its held-out batches: {message}")
    return _interleave([shard for shard, _ in shards], partial)


def _interleave(shards: list[list[FeatureDict]], partial: Collection[str]) -> FeatureDict:
    batches = [shard[i] for i in range(max(map(len, shards))) for shard in shards if i < len(shard)]
    features = concatenate(batches, partial=partial) if batches else None
    size = 0 if features is None else len(next(iter(features.values.values())))
    if features is None or size < 2:
        raise ValueError(f"the held-out data yields {size} sample{'s' * (size != 1)}: it takes at least 2 to measure")
    return features
