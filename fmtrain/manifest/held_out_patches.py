"""Choice of the frozen held-out patches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice, zip_longest
from typing import NamedTuple

import numpy as np

from fmtrain.manifest.tables import LabeledRegion
from fmtrain.rng import hash_order, stable_hash, uniforms, weighted_order
from fmtrain.slides.info import SlideInfo
from fmtrain.slides.resolution import choose_mpp, mpp_range
from fmtrain.slides.tissue import EligibleCells, Mask

_STREAM = 0x4E1D  # stream of random numbers for held-out patches


class HeldOutPatch(NamedTuple):
    """One frozen patch: name of the slide, upper left corner at level 0, mpp and label."""

    slide: str
    x: int
    y: int
    mpp: float
    label: str | None = None


def sampled_patches(
    info: SlideInfo,
    mask: Mask,
    *,
    size_px: int,
    mpps: Sequence[float],
    min_tissue: float,
    seed: int,
) -> Iterator[HeldOutPatch]:
    """All patches of one slide in random order. No two are centered on the same cell at the same mpp."""
    finest, coarsest = mpp_range(info, size_px=size_px)
    key = stable_hash(info.name)
    cells = {
        mpp: EligibleCells(mask, size=info.size, extent_px=size_px * mpp / info.mpp, min_tissue=min_tissue)
        for mpp in mpps
        if finest <= mpp <= coarsest
    }
    orders = {
        mpp: weighted_order(c.weights(), seed=seed, stream=key, index=k) for k, (mpp, c) in enumerate(cells.items())
    }
    taken = dict.fromkeys(cells, 0)
    for number in range(sum(map(len, cells.values()))):
        u, v, w = uniforms(seed ^ key, number, stream=_STREAM, n=3)
        mpp = choose_mpp(u, [mpp for mpp, c in cells.items() if taken[mpp] < len(c)])
        if mpp is None:
            return
        cell = cells[mpp].cell(orders[mpp][taken[mpp]])
        taken[mpp] += 1
        yield HeldOutPatch(info.name, *cells[mpp].corner(*cell, v, w), mpp)


def labeled_patches(
    info: SlideInfo, squares: Sequence[LabeledRegion], *, size_px: int, mpps: Sequence[float], seed: int
) -> Iterator[HeldOutPatch]:
    """Labeled squares of one slide as patches, in random order: same center, the mpp nearest in extent.

    A patch that crosses the border of the slide is shifted inside. A patch shifted by half the side of its square or
    more is dropped.
    """
    finest, coarsest = mpp_range(info, size_px=size_px)
    served = [mpp for mpp in mpps if finest <= mpp <= coarsest]
    if not served:
        return
    for k in hash_order([f"{info.name}/{square.x}/{square.y}" for square in squares], seed=seed):
        square = squares[k]
        mpp = min(served, key=lambda value: abs(np.log(value * size_px / (square.size * info.mpp))))
        extent = size_px * mpp / info.mpp
        center = (square.x + square.size / 2, square.y + square.size / 2)
        target = [value - extent / 2 for value in center]
        corner = [min(max(value, 0), side - extent) for value, side in zip(target, info.size, strict=True)]
        if max(abs(a - b) for a, b in zip(corner, target, strict=True)) < square.size / 2:
            yield HeldOutPatch(info.name, round(corner[0]), round(corner[1]), mpp, square.label)


def round_robin(streams: Sequence[Iterator[HeldOutPatch]], *, count: int) -> list[HeldOutPatch]:
    """One patch per slide in turn, up to `count` patches in total: as many slides as possible."""
    turns = zip_longest(*streams)
    return list(islice((patch for turn in turns for patch in turn if patch is not None), count))
