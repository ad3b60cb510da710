"""Block masks for iBOT with DINOv2's rules, as functions of (seed, step, sample). No torch.

lightly's `random_block_mask` has the same rules. But it draws from Python's global generator, so a step cannot be
repeated, and it refuses grids where the smallest ratio is below four tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from fmtrain.rng import generator

MIN_BLOCK = 4  # tokens
MIN_ASPECT = 0.3
ATTEMPTS = 10
Mask = npt.NDArray[np.bool_]


def batch_masks(
    samples: Sequence[int],
    *,
    total: int,
    grid: tuple[int, int],
    probability: float,
    ratio: tuple[float, float],
    seed: int,
    step: int,
    rank: int = 0,
) -> Mask:
    """Masks for some samples of a batch. A share of the batch is masked, with ratios spread evenly over the range.

    Args:
        samples: Indices of the samples in the batch, 0 … total − 1.
        total: Number of samples in the batch: of this rank, or of all ranks.
        grid: Height and width in tokens.
        probability: Share of the batch that is masked.
        ratio: Range of the share of tokens that is masked.
        seed: Seed of the run.
        step: Number of the batch.
        rank: Number of the random stream: the rank, if each rank masks a share of its own samples.

    Returns:
        (len(samples), height, width), True where masked.
    """
    masked = int(total * probability)
    edges = np.linspace(*ratio, masked + 1)
    stream = (rank,) if rank else ()
    position = generator(seed, step, 0x3A5C, *stream).permutation(total)  # of each sample in the sorted ratios
    masks = np.zeros((len(samples), *grid), np.bool_)
    for row, sample in enumerate(samples):
        if position[sample] < masked:
            rng = generator(seed, step, 0x3A5D, sample, *stream)
            share = rng.uniform(edges[position[sample]], edges[position[sample] + 1])
            masks[row] = block_mask(rng, grid=grid, count=int(share * grid[0] * grid[1]))
    return masks


def block_mask(rng: np.random.Generator, *, grid: tuple[int, int], count: int) -> Mask:
    """Mask of at most `count` tokens: rectangles of aspect 0.3 … 3.3, added until no further one fits."""
    height, width = grid
    mask = np.zeros(grid, np.bool_)
    missing = count
    while missing > 0:
        for _ in range(ATTEMPTS):
            area = rng.uniform(min(MIN_BLOCK, missing), missing)
            aspect = math.exp(rng.uniform(math.log(MIN_ASPECT), -math.log(MIN_ASPECT)))
            h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if not (0 < h < height and 0 < w < width):
                continue
            top, left = rng.integers(height - h + 1), rng.integers(width - w + 1)
            block = mask[top : top + h, left : left + w]
            new = block.size - int(block.sum())
            if 0 < new <= missing:
                block[:] = True
                missing -= new
                break
        else:
            return mask
    return mask
