from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fmtrain.patches.sampling import patch_number, slide_shares, subset
from fmtrain.rng import choose, derive_seed, generator, stable_hash, uniforms, weighted_order
from fmtrain.slides.resolution import choose_mpp

FROZEN = {
    (0, 0, 0, 0): [0.011546754286331562, 0.24154919656271812],
    (7, 123_456, 1, 2): [0.40639192378108957, 0.4892195766981031],
}
FROZEN_HASH = 2721558484649597309
FROZEN_ORDER = [1, 0, 3, 5, 2, 4]
FROZEN_SEED = 5061563556724077661
FROZEN_DRAW = 0.5472309998230492


def test_the_stream_is_frozen() -> None:
    """A run resumed with a later version must draw the same patches: these numbers never change."""
    assert uniforms(0, 0, n=2) == FROZEN[(0, 0, 0, 0)]
    assert uniforms(7, 123_456, attempt=1, stream=2, n=2) == FROZEN[(7, 123_456, 1, 2)]
    assert stable_hash("TCGA-18-5592") == FROZEN_HASH
    weights = np.array([1.0, 0.5, 1.0, 1.0, 0.25, 1.0])
    assert weighted_order(weights, seed=7, stream=3, index=2) == FROZEN_ORDER
    assert derive_seed(7, 3) == FROZEN_SEED
    assert generator(7, 3, 0x3A5C).random() == FROZEN_DRAW


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**63), st.integers(0, 100), st.integers(0, 10))
def test_uniforms_depend_on_every_argument_and_stay_in_the_unit_interval(
    seed: int, index: int, attempt: int, stream: int
) -> None:
    values = uniforms(seed, index, attempt=attempt, stream=stream, n=5)
    assert all(0 <= value < 1 for value in values)
    assert values == uniforms(seed, index, attempt=attempt, stream=stream, n=5)
    others = [
        uniforms((seed + 1) % 2**64, index, attempt=attempt, stream=stream, n=5),
        uniforms(seed, index + 1, attempt=attempt, stream=stream, n=5),
        uniforms(seed, index, attempt=attempt + 1, stream=stream, n=5),
        uniforms(seed, index, attempt=attempt, stream=stream + 1, n=5),
    ]
    assert not any(set(values) & set(other) for other in others)


def test_uniforms_are_uniform_over_indices() -> None:
    values = np.array([uniforms(3, index, n=4) for index in range(5000)])
    # 5 standard errors of a mean of 5000 uniforms: √(1/12/5000)·5 = 0.020; of a correlation: 5/√5000 = 0.071
    assert np.abs(values.mean(0) - 0.5).max() < 0.020
    assert np.abs(np.corrcoef(values.T) - np.eye(4)).max() < 0.071
    assert abs(np.corrcoef(values[:-1, 0], values[1:, 0])[0, 1]) < 0.071


def test_slides_are_drawn_by_their_shares() -> None:
    patients, areas = ["a", "a", "a", "b", "c"], [1.0, 2.0, 3.0, 4.0, 0.0]
    for by, expected in {
        "slide": [0.2] * 5,
        "patient": [1 / 9, 1 / 9, 1 / 9, 1 / 3, 1 / 3],
        "area": [0.1, 0.2, 0.3, 0.4, 0.0],
    }.items():
        ends = np.cumsum(slide_shares(patients, areas, by=by)).tolist()  # type: ignore[arg-type]
        counts = Counter(choose(ends, (k + 0.5) / 9000) for k in range(9000))
        assert [counts[k] / 9000 for k in range(5)] == pytest.approx(expected, abs=1e-3)
    with pytest.raises(ValueError, match="'slide', 'patient' or 'area', got 'site'"):
        slide_shares(patients, areas, by="site")  # type: ignore[arg-type]


def test_magnifications_a_slide_can_serve() -> None:
    mpps = [0.25, 0.5, 1.0, 2.0]
    counts = Counter(choose_mpp((k + 0.5) / 1000, mpps, weights=[1, 2, 3, 4]) for k in range(1000))
    assert counts == {0.25: 100, 0.5: 200, 1.0: 300, 2.0: 400}
    assert {choose_mpp(u / 10, mpps, finest=0.4, coarsest=1.2) for u in range(10)} == {0.5, 1.0}
    assert choose_mpp(0.5, mpps, finest=3.0) is None
    assert choose_mpp(0.5, [0.25, 1.0], continuous_mpp=True, finest=2.0) is None
    drawn = [choose_mpp(k / 100, [2.0, 0.25, 0.5], continuous_mpp=True, coarsest=1.0) for k in range(100)]
    logs = [math.log2(value) for value in drawn if value is not None]
    assert (min(logs), max(logs)) == (-2.0, pytest.approx(0, abs=0.03))
    assert np.diff(logs) == pytest.approx(0.02)


def test_subsets_are_nested_and_of_the_right_size() -> None:
    names = [f"slide {k}" for k in range(200)]
    sets = [set(subset(names, fraction, seed=1)) for fraction in (0.01, 0.1, 0.3, 1.0)]
    assert [len(s) for s in sets] == [2, 20, 60, 200]
    assert sets[0] < sets[1] < sets[2] < sets[3]
    assert set(subset(names, 0.1, seed=2)) != sets[1]
    reordered = subset(names[::-1], 0.1, seed=1)
    assert {names[::-1][k] for k in reordered} == {names[k] for k in sets[1]}
    assert len(subset(names[:3], 0.01, seed=0)) == 1
    for fraction in (0.0, 1.1, math.nan):
        with pytest.raises(ValueError, match=r"must be in \(0, 1\]"):
            subset(names, fraction, seed=0)


@given(st.integers(1, 40), st.integers(1, 8), st.integers(0, 30))
def test_every_patch_once_and_never_two_of_a_block_in_a_batch(batch: int, crops: int, start: int) -> None:
    windows = [
        [patch_number(step, slot, global_batch=batch, crops=crops) for slot in range(batch)]
        for step in range(start * crops, (start + 2) * crops)
    ]
    for numbers in windows:
        assert len({number // crops for number in numbers}) == batch
    everything = sorted(number for numbers in windows for number in numbers)
    assert everything == list(range(start * crops * batch, (start + 2) * crops * batch))
