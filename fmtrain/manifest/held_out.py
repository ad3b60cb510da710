"""Choice of the frozen held-out patches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from fmtrain.manifest.tables import LabeledRegion
from fmtrain.rng import stable_hash, uniforms
from fmtrain.slides.info import SlideInfo
from fmtrain.slides.resolution import choose_mpp, mpp_range
from fmtrain.slides.tissue import EligibleCells, Mask

_STREAM = 0x4E1D  # of random numbers, for held-out patches


class HeldOutPatch(NamedTuple):
    """One frozen patch: which slide (by name), its upper left corner at level 0, its mpp and label."""

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
    """Patches of one slide in random order, no two centred on the same cell at the same mpp, until they run out."""
    finest, coarsest = mpp_range(info, size_px=size_px)
    key = stable_hash(info.name)
    cells = {
        mpp: EligibleCells(mask, size=info.size, extent_px=size_px * mpp / info.mpp, min_tissue=min_tissue)
        for mpp in mpps
        if finest <= mpp <= coarsest
    }
    orders = {
        mpp: np.random.Generator(np.random.Philox(key=np.array([seed, key], np.uint64), counter=k)).permutation(len(c))
        for k, (mpp, c) in enumerate(cells.items())
    }
    taken = dict.fromkeys(cells, 0)
    for number in range(sum(map(len, cells.values()))):
        u, v, w = uniforms(seed ^ key, number, stream=_STREAM, n=3)
        mpp = choose_mpp(u, [mpp for mpp, c in cells.items() if taken[mpp] < len(c)])
        if mpp is None:
            return
        rank = (int(orders[mpp][taken[mpp]]) + 0.5) / len(cells[mpp])
        taken[mpp] += 1
        yield HeldOutPatch(info.name, *cells[mpp].location(rank, v, w), mpp)


def labeled_patches(
    info: SlideInfo, squares: Sequence[LabeledRegion], *, size_px: int, mpps: Sequence[float], seed: int
) -> Iterator[HeldOutPatch]:
    """Labelled squares of one slide as patches, in random order: same centre, the mpp nearest in extent.

    A patch that sticks out over the slide's border is moved in; one that this takes half its side away is left out.
    """
    finest, coarsest = mpp_range(info, size_px=size_px)
    served = [mpp for mpp in mpps if finest <= mpp <= coarsest]
    if not served:
        return
    order = sorted(range(len(squares)), key=lambda k: stable_hash(f"{seed}/{info.name}/{squares[k].x}/{squares[k].y}"))
    for k in order:
        square = squares[k]
        mpp = min(served, key=lambda value: abs(np.log(value * size_px / (square.size * info.mpp))))
        extent = size_px * mpp / info.mpp
        centre = (square.x + square.size / 2, square.y + square.size / 2)
        wanted = [value - extent / 2 for value in centre]
        corner = [min(max(value, 0), side - extent) for value, side in zip(wanted, info.size, strict=True)]
        if max(abs(a - b) for a, b in zip(corner, wanted, strict=True)) < square.size / 2:
            yield HeldOutPatch(info.name, round(corner[0]), round(corner[1]), mpp, square.label)


def round_robin(streams: Sequence[Iterator[HeldOutPatch]], *, count: int) -> list[HeldOutPatch]:
    """One of each slide in turn, until there are enough or all have run out: as many slides as possible."""
    chosen: list[HeldOutPatch] = []
    alive = list(streams)
    while alive and len(chosen) < count:
        still = []
        for stream in alive:
            patch = next(stream, None)
            if patch is not None:
                still.append(stream)
                chosen.append(patch)
                if len(chosen) == count:
                    break
        alive = still
    return chosen
