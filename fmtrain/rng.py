"""Random numbers as pure functions of a seed and counters such as the step. NumPy only."""

from __future__ import annotations

import hashlib
import threading
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt


def uniforms(seed: int, index: int, *, attempt: int = 0, stream: int = 0, n: int) -> list[float]:
    """Uniform numbers in [0, 1), a pure function of all arguments.

    Args:
        seed: Seed of the run, 0 … 2⁶⁴ − 1.
        index: Number of the patch.
        attempt: Number of earlier attempts at this patch that failed.
        stream: Purpose of the numbers; different streams are independent.
        n: Count of the numbers.

    Example:
        >>> uniforms(1, 5, n=2) == uniforms(1, 5, n=3)[:2]
        True
    """
    raw = _reused.at((seed, stream), (0, attempt, index, 0)).random_raw(n)
    numbers: list[float] = ((raw >> np.uint64(11)) * 2.0**-53).tolist()
    return numbers


def weighted_order(weights: npt.NDArray[np.float64], *, seed: int, stream: int, index: int) -> list[int]:
    """Random order of items, drawn one by one in proportion to their weights (Efraimidis & Spirakis 2006).

    Example:
        >>> sorted(weighted_order(np.array([1.0, 0.5, 1.0]), seed=0, stream=1, index=2))
        [0, 1, 2]
    """
    u = np.random.Generator(_philox(seed, stream, [index, 0, 0, 0])).random(len(weights))
    order: list[int] = np.argsort(np.log1p(-u) / -weights, kind="stable").tolist()
    return order


def _philox(seed: int, stream: int, counter: Sequence[int]) -> np.random.Philox:
    return np.random.Philox(key=np.array([seed, stream], np.uint64), counter=np.array(counter, np.uint64))


class _ReusedPhilox(threading.local):
    """One bit generator per thread, set to a key and a counter: a new one would first collect entropy it never uses."""

    def __init__(self) -> None:
        self.generator = np.random.Philox(key=0)
        self.state: Any = self.generator.state

    def at(self, key: Sequence[int], counter: Sequence[int]) -> np.random.Philox:
        """The generator, as if it were created with this key and this counter."""
        self.state["state"] = {"key": np.array(key, np.uint64), "counter": np.array(counter, np.uint64)}
        self.generator.state = self.state
        return self.generator


_reused = _ReusedPhilox()


def generator(*key: int) -> np.random.Generator:
    """Generator whose stream is a pure function of the key, such as (seed, step, purpose)."""
    return np.random.default_rng(key)


def derive_seed(*key: int) -> int:
    """Seed of 64 bits for a generator of another library, a pure function of the key, such as (seed, step)."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])


def stable_hash(text: str) -> int:
    """Hash of a text in 63 bits, equal in every process and version."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def hash_order(names: Sequence[str], *, seed: int) -> list[int]:
    """Indices of names in random order. New names do not change the order of the others.

    Example:
        >>> hash_order(["a", "b", "c"], seed=0), hash_order(["a", "b"], seed=0)
        ([2, 1, 0], [1, 0])
    """
    return sorted(range(len(names)), key=lambda k: stable_hash(f"{seed}/{names[k]}"))


def choose(ends: Sequence[float], u: float) -> int:
    """Index of the interval that a uniform number falls into, from the cumulative shares.

    Example:
        >>> [choose([0.5, 0.5, 1.0], u) for u in (0.0, 0.49, 0.5, 0.99)]
        [0, 0, 2, 2]
    """
    return min(bisect_right(ends, u * ends[-1]), len(ends) - 1)
