"""Weights and subsets of the slides, and the numbering of patches. Pure functions, no torch.

A counter-based generator (Philox) draws every patch from the seed of the run and the number of the patch. Therefore any
number of workers and ranks reads the same patches, a run resumes from its step alone, and any process can compute what
another one reads.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from fmtrain.rng import hash_order

SlideChoice = Literal["slide", "patient", "area"]


def slide_shares(
    patients: Sequence[str], areas: Sequence[float], *, by: SlideChoice = "slide"
) -> npt.NDArray[np.float64]:
    """Probability of each slide: equal per slide, equal per patient, or by tissue area. Sums to one.

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
        raise ValueError(f"slide_weighting must be 'slide', 'patient' or 'area', got {by!r}")
    shares: npt.NDArray[np.float64] = weights / weights.sum()
    return shares


def subset(names: Sequence[str], fraction: float, *, seed: int) -> list[int]:
    """Indices of a random fraction of the slides, at least one. Smaller fractions are subsets of larger ones.

    Example:
        >>> names = [f"slide {k}" for k in range(100)]
        >>> set(subset(names, 0.1, seed=0)) <= set(subset(names, 0.3, seed=0))
        True
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"slide_fraction must be in (0, 1], got {fraction}")
    return sorted(hash_order(names, seed=seed)[: max(1, round(fraction * len(names)))])


def patch_number(step: int, slot: int, *, global_batch: int, crops: int = 1) -> int:
    """Number of the patch in a slot of a step's global batch.

    Patches are numbered block by block, `crops` from each block of pixels. The crops of one block go to consecutive
    steps: over a window of `crops` steps, each batch contains one crop of every block. So neighbors never share a
    batch.

    Example:
        >>> [[patch_number(step, slot, global_batch=3, crops=2) for slot in range(3)] for step in range(4)]
        [[0, 2, 4], [1, 3, 5], [6, 8, 10], [7, 9, 11]]
    """
    window, crop = divmod(step, crops)
    return (window * global_batch + slot) * crops + crop
