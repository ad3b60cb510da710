"""(seed, index) → slide, magnification, place. Pure functions, no torch.

Every patch is drawn by a counter-based generator (Philox) from the run's seed and the patch's own number. So any
number of workers and ranks makes the same patches, a run resumes from its step alone, and any process can say
what another one reads.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from fmtrain.rng import stable_hash

SlideChoice = Literal["slide", "patient", "area"]
MAX_ATTEMPTS = 64


def slide_shares(
    patients: Sequence[str], areas: Sequence[float], *, by: SlideChoice = "slide"
) -> npt.NDArray[np.float64]:
    """How likely each slide is drawn: all alike, all patients alike, or by tissue area. Sums to one.

    Example:
        >>> slide_shares(["a", "a", "b"], [1.0, 1.0, 6.0], by="patient")
        array([0.25, 0.25, 0.5 ])
        >>> slide_shares(["a", "a", "b"], [1.0, 1.0, 6.0], by="area")
        array([0.125, 0.125, 0.75 ])
    """
    if by == "slide":
        weights = np.ones(len(patients))
    elif by == "patient":
        slides = Counter(patients)
        weights = np.array([1 / slides[patient] for patient in patients])
    elif by == "area":
        weights = np.asarray(areas, np.float64)
    else:
        raise ValueError(f"slides are drawn by 'slide', 'patient' or 'area', got {by!r}")
    shares: npt.NDArray[np.float64] = weights / weights.sum()
    return shares


def subset(names: Sequence[str], fraction: float, *, seed: int) -> list[int]:
    """Indices of a random fraction of the slides, at least one. Smaller fractions lie within larger ones.

    Example:
        >>> names = [f"slide {k}" for k in range(100)]
        >>> set(subset(names, 0.1, seed=0)) <= set(subset(names, 0.3, seed=0))
        True
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"the fraction of slides must be in (0, 1], got {fraction}")
    order = sorted(range(len(names)), key=lambda k: stable_hash(f"{seed}/{names[k]}"))
    return sorted(order[: max(1, round(fraction * len(names)))])


def patch_number(step: int, slot: int, *, global_batch: int, crops: int = 1) -> int:
    """Which patch stands in a slot of a step's global batch.

    Patches are numbered block by block, `crops` from each block of pixels read. The crops of one block go to
    consecutive steps, so that neighbours never meet in a batch: over a window of `crops` steps, each batch holds
    one crop of every block.

    Example:
        >>> [[patch_number(step, slot, global_batch=3, crops=2) for slot in range(3)] for step in range(4)]
        [[0, 2, 4], [1, 3, 5], [6, 8, 10], [7, 9, 11]]
    """
    window, crop = divmod(step, crops)
    return (window * global_batch + slot) * crops + crop
