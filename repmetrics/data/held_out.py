"""Held-out data: read the same way every time, shared out over the ranks, gathered in order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset

from repmetrics.data.features import Features, embed


def rank_and_world() -> tuple[int, int]:
    """This process's rank and how many there are; (0, 1) without torch.distributed."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


class HeldOutData:
    """A loader or dataset whose batches are fixed at the first reading and dealt out to ranks in turn.

    Rank r of w reads batches r, r + w, …: each batch is the one that a single process would see, no sample is
    read twice, and none is added to make shares equal. A loader's ``DistributedSampler`` is therefore passed over.

    Args:
        data: a DataLoader, a map-style dataset, or any iterable of batches that can be read again.
        batch_size: for a dataset.
        num_workers: for a dataset.
    """

    def __init__(self, data: Iterable[Any] | Dataset[Any], *, batch_size: int = 64, num_workers: int = 0) -> None:
        if isinstance(data, Dataset) or (hasattr(data, "__getitem__") and not isinstance(data, (Sequence, Tensor))):
            dataset: Any = data  # torch's, or any other library's with __getitem__ and __len__
            data = DataLoader(dataset, batch_size=batch_size, num_workers=num_workers)
        elif not isinstance(data, Iterable) or isinstance(data, (Iterator, Tensor, str)):
            raise TypeError(
                "held-out data must be a DataLoader, a Dataset or a re-readable iterable of batches, "
                f"got {type(data).__name__}"
            )
        self.data: Iterable[Any] = data
        self._batches: list[list[int]] | None = None

    @property
    def generators(self) -> list[torch.Generator]:
        """Those that a loader has of its own: reading it draws from them."""
        sampler = getattr(self.data, "sampler", None)
        owners = (self.data, sampler, getattr(self.data, "batch_sampler", None))
        found = [getattr(owner, "generator", None) for owner in owners]
        return list({id(g): g for g in found if isinstance(g, torch.Generator)}.values())

    def shard(self, rank: int, world: int) -> Iterable[Any]:
        """The batches of one rank."""
        loader = self.data
        if not isinstance(loader, DataLoader) or loader.batch_sampler is None:
            return islice(loader, rank, None, world)
        if isinstance(loader.dataset, IterableDataset):
            return islice(loader, rank, None, world)
        if self._batches is None:
            self._batches = _all_batches(loader)
        return DataLoader(
            loader.dataset,
            batch_sampler=self._batches[rank::world],
            num_workers=loader.num_workers,
            collate_fn=loader.collate_fn,
            pin_memory=loader.pin_memory,
            timeout=loader.timeout,
            worker_init_fn=loader.worker_init_fn,
            multiprocessing_context=loader.multiprocessing_context,
            prefetch_factor=loader.prefetch_factor,
        )


def _all_batches(loader: DataLoader[Any]) -> list[list[int]]:
    if isinstance(loader.sampler, DistributedSampler):
        size = len(loader.dataset)  # type: ignore[arg-type]
        return [list(range(i, min(i + (loader.batch_size or 1), size))) for i in range(0, size, loader.batch_size or 1)]
    return [list(batch) for batch in loader.batch_sampler or ()]


def gather_features(
    encode: Callable[[Tensor], Tensor],
    data: HeldOutData,
    *,
    device: torch.device | str = "cpu",
    limit_batches: int | None = None,
) -> Features:
    """Features of the whole held-out set, in its order, the same on every rank.

    Every rank must call; one that fails makes all of them fail, instead of leaving them waiting.

    Args:
        encode: images (B, …) → (B, D).
        data: what to read.
        device: where the images go.
        limit_batches: stop after so many of each rank.

    Raises:
        ValueError: no batch at all, or fewer than two samples.
        RuntimeError: another rank failed.
    """
    rank, world = rank_and_world()
    error: Exception | None = None
    mine: list[Features] = []
    try:
        mine = _embed_batches(encode, data.shard(rank, world), device=device, limit_batches=limit_batches)
    except Exception as caught:
        caught.add_note("This came up while reading and embedding held-out data for repmetrics.")
        if world == 1:
            raise
        error = caught
    shares: list[tuple[list[Features], str | None]] = [(mine, None if error is None else str(error))]
    if world > 1:
        shares *= world
        dist.all_gather_object(shares, (mine, None if error is None else f"{type(error).__name__}: {error}"))
    if error is not None:
        raise error
    for other, (_, message) in enumerate(shares):
        if message is not None:
            raise RuntimeError(f"rank {other} could not read its held-out batches: {message}")
    return _interleave([batches for batches, _ in shares])


def _embed_batches(
    encode: Callable[[Tensor], Tensor], batches: Iterable[Any], *, device: torch.device | str, limit_batches: int | None
) -> list[Features]:
    """Features batch by batch, so that the shares of several ranks can be dealt back into order."""
    return [embed(encode, [batch], device=device) for batch in islice(batches, limit_batches)]


def _interleave(shares: list[list[Features]]) -> Features:
    batches = [share[i] for i in range(max(map(len, shares))) for share in shares if i < len(share)]
    size = sum(len(batch.values) for batch in batches)
    if size < 2:
        raise ValueError(f"the held-out data yields {size} sample{'s' * (size != 1)}: it takes at least 2 to measure")
    widths = sorted({batch.values.shape[1] for batch in batches})
    if len(widths) > 1:
        raise ValueError(f"the encoder must give one D for all held-out batches, got {widths}")
    groups = [g for batch in batches for g in batch.groups or ()]
    labels = [batch.labels for batch in batches if batch.labels is not None]
    for name, count in (("groups", len(groups)), ("labels", sum(map(len, labels)))):
        if count not in (0, size):
            raise ValueError(f"{name} cover {count} of {size} held-out samples: give them for all or for none")
    return Features(
        torch.cat([batch.values for batch in batches]), tuple(groups) or None, torch.cat(labels) if labels else None
    )
