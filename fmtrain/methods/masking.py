"""Block masks for iBOT as DINOv2 draws them, as a function of (seed, step, sample). No torch.

lightly's `random_block_mask` follows the same rules but draws from Python's global generator, refuses grids where the
smallest ratio is below four tokens, and could not repeat a step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

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
) -> Mask:
    """Masks for some samples of a batch: a share of the batch is masked, by ratios spread evenly over the range.

    Args:
        samples: Which of the batch are wanted, 0 … total − 1.
        total: Samples of the whole batch, over all ranks.
        grid: Height and width in tokens.
        probability: Share of the batch that is masked.
        ratio: Range of the share of tokens that is masked.
        seed: Of the run.
        step: Counts batches.

    Returns:
        (len(samples), height, width), True where masked.
    """
    masked = int(total * probability)
    edges = np.linspace(*ratio, masked + 1)
    place = np.random.default_rng([seed, step, 0x3A5C]).permutation(total)  # which of the ratios each sample gets
    masks = np.zeros((len(samples), *grid), np.bool_)
    for row, sample in enumerate(samples):
        if place[sample] < masked:
            rng = np.random.default_rng([seed, step, 0x3A5D, sample])
            share = rng.uniform(edges[place[sample]], edges[place[sample] + 1])
            masks[row] = block_mask(rng, grid=grid, count=int(share * grid[0] * grid[1]))
    return masks


def block_mask(rng: np.random.Generator, *, grid: tuple[int, int], count: int) -> Mask:
    """One mask of at most `count` tokens, as rectangles of aspect 0.3 … 3.3 laid until no further one fits."""
    height, width = grid
    mask = np.zeros(grid, np.bool_)
    left = count
    while left > 0:
        for _ in range(ATTEMPTS):
            area = rng.uniform(min(MIN_BLOCK, left), left)
            aspect = math.exp(rng.uniform(math.log(MIN_ASPECT), -math.log(MIN_ASPECT)))
            h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if not (0 < h < height and 0 < w < width):
                continue
            top, side = rng.integers(height - h + 1), rng.integers(width - w + 1)
            block = mask[top : top + h, side : side + w]
            new = block.size - int(block.sum())
            if 0 < new <= left:
                block[:] = True
                left -= new
                break
        else:
            return mask
    return mask
