"""Random numbers as a function of a seed and a counter."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Sequence

import numpy as np


def uniforms(seed: int, index: int, *, attempt: int = 0, stream: int = 0, n: int) -> list[float]:
    """Uniform numbers in [0, 1), a pure function of all arguments.

    Args:
        seed: of the run, 0 … 2⁶⁴ − 1.
        index: which patch.
        attempt: which try at this patch, if earlier ones failed.
        stream: what the numbers are for; different streams are independent.
        n: how many.

    Example:
        >>> uniforms(1, 5, n=2) == uniforms(1, 5, n=3)[:2]
        True
    """
    generator = np.random.Philox(
        key=np.array([seed, stream], np.uint64), counter=np.array([0, attempt, index, 0], np.uint64)
    )
    return [int(raw >> 11) * 2.0**-53 for raw in generator.random_raw(n)]


def stable_hash(text: str) -> int:
    """63 bits of a text, the same in every process and version."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def choose(ends: Sequence[float], u: float) -> int:
    """Which interval a uniform number falls into, given the cumulative shares.

    Example:
        >>> [choose([0.5, 0.5, 1.0], u) for u in (0.0, 0.49, 0.5, 0.99)]
        [0, 0, 2, 2]
    """
    return min(bisect_right(ends, u * ends[-1]), len(ends) - 1)
