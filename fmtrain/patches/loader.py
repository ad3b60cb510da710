"""Batches of training patches: a function of the step."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from fmtrain.patches.dataset import TrainingPatches
from fmtrain.patches.sampling import patch_number

PREFETCH_FACTOR = 2  # windows in flight per worker
KEPT_WINDOWS = 2  # whose batches may be in use while further ones are read without a copy


class StepSampler(Sampler[int]):
    """Numbers of the patches of one rank, step by step from any step on, without end.

    The global batch of a step is the same for any number of ranks with the same world × batch_size.

    Args:
        rank: Rank of this process.
        world: Number of ranks.
        batch_size: Number of patches per rank and step.
        start_step: First step; resuming needs nothing else.
        crops_per_block: Number of patches per block, as in the dataset.

    Example:
        >>> from itertools import islice
        >>> list(islice(StepSampler(rank=1, world=2, batch_size=2, start_step=10), 4))
        [41, 43, 45, 47]
    """

    def __init__(
        self, *, rank: int = 0, world: int = 1, batch_size: int, start_step: int = 0, crops_per_block: int = 1
    ) -> None:
        if not 0 <= rank < world or batch_size < 1 or start_step < 0:
            raise ValueError(f"invalid rank or step: rank {rank} of {world}, batch {batch_size}, step {start_step}")
        self.rank, self.world, self.batch_size = rank, world, batch_size
        self.start_step = start_step
        self.crops_per_block = crops_per_block

    def batch(self, step: int) -> list[int]:
        """Numbers of this rank's patches at a step."""
        total = self.world * self.batch_size
        return [
            patch_number(step, slot * self.world + self.rank, global_batch=total, crops=self.crops_per_block)
            for slot in range(self.batch_size)
        ]

    def __iter__(self) -> Iterator[int]:
        step = self.start_step
        while True:
            yield from self.batch(step)
            step += 1

    def windows(self) -> Iterator[list[int]]:
        """Numbers of the patches of steps that share their blocks, one list per window: one work item of a worker."""
        step = self.start_step
        while True:
            end = (step // self.crops_per_block + 1) * self.crops_per_block
            yield [number for k in range(step, end) for number in self.batch(k)]
            step = end


def training_batches(
    patches: TrainingPatches,
    *,
    batch_size: int,
    rank: int = 0,
    world: int = 1,
    start_step: int = 0,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> Iterator[Tensor]:
    """Batches of one rank from a step on, uint8 (batch_size, 3, S, S), without end.

    A worker reads whole windows: `crops_per_block` steps that share their blocks of pixels. It writes them into a slot
    of a ring in shared memory, where fresh shared memory per window would cost a third of decoding in page faults. A
    batch, channels last in memory as decoded, is a view of its slot, which is written to again once no tensor refers to
    it. Where batches of more than two windows are kept, further ones are copies; those in pinned memory always are.
    """
    steps = StepSampler(
        rank=rank, world=world, batch_size=batch_size, start_step=start_step, crops_per_block=patches.crops_per_block
    )
    # Before the loader returns a window it requests the next one, for which a slot must be free: one that is received
    # when none is free is copied, and its slot is free again.
    slots = num_workers * PREFETCH_FACTOR + 1 + KEPT_WINDOWS
    shape = (slots, patches.crops_per_block * batch_size, patches.size_px, patches.size_px, 3)
    ring = torch.empty(shape, dtype=torch.uint8)
    if num_workers:
        ring.share_memory_()
    free = deque(range(slots))
    loader = DataLoader(
        _Windows(patches, ring),
        sampler=((free.popleft(), window) for window in steps.windows()),  # any iterable works
        batch_size=None,
        num_workers=num_workers,
        prefetch_factor=PREFETCH_FACTOR if num_workers else None,
    )
    for slot, count in loader:
        pixels = ring[slot, :count].numpy()  # a new array, which lives as long as tensors of its memory
        if pin_memory or not free:
            batches = [
                torch.empty(batch.shape, dtype=torch.uint8, pin_memory=pin_memory).copy_(batch)
                for batch in torch.from_numpy(pixels).split(batch_size)
            ]
            free.append(slot)
        else:
            weakref.finalize(pixels, free.append, slot)
            batches = list(torch.from_numpy(pixels).split(batch_size))
        del pixels
        while batches:
            yield batches.pop(0).permute(0, 3, 1, 2)


class _Windows(Dataset[tuple[int, int]]):
    """A window of patches as one item, read into its slot of the ring; returns the slot and the number of patches."""

    def __init__(self, patches: TrainingPatches, ring: Tensor) -> None:
        self.patches, self.ring = patches, ring

    def __getitem__(self, item: tuple[int, list[int]]) -> tuple[int, int]:
        slot, indices = item
        self.patches.read_into(indices, self.ring[slot, : len(indices)].numpy())
        return slot, len(indices)
