"""The streaming state: any split of the rows, merged in any order, on any process, is one pass."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from draws import features, gaussian, orthonormal_centered
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import run_ranks
from torch import Tensor

from repmetrics.functional.correlation import dead_features, odcorr
from repmetrics.functional.hypersphere import mean_direction, uniformity_w2
from repmetrics.functional.linalg import symmetric_eigenvalues
from repmetrics.functional.spectrum import alpha_req, effective_rank, participation_ratio, rankme, rankme_centered
from repmetrics.measurement.moments import Moments

# Sums of float64 in another order: relative 1e-15 of the largest term, a little more after a shift.
CLOSE = {"rtol": 1e-11, "atol": 1e-9}


def assert_same(moments: Moments, expected: Moments) -> None:
    assert moments.n == expected.n
    assert moments.sum_norm4 == pytest.approx(expected.sum_norm4, rel=1e-11)
    torch.testing.assert_close(moments.mean, expected.mean, **CLOSE)
    for centered in (False, True):
        torch.testing.assert_close(moments.gram(centered=centered), expected.gram(centered=centered), **CLOSE)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(1, 3), (7, 5), (2500, 4)], ids=str)
def test_moments_are_those_of_the_rows(shape, dtype) -> None:
    x = (gaussian(*shape) + 2).to(dtype)
    z = x.to(torch.float64)
    m = Moments(x)
    assert (m.n, m.dim) == shape
    assert m.sum_norm4 == pytest.approx(sum(float(row @ row) ** 2 for row in z), rel=1e-12)
    torch.testing.assert_close(m.mean, z.mean(0), **CLOSE)
    torch.testing.assert_close(m.gram(), z.T @ z, **CLOSE)
    torch.testing.assert_close(m.gram(centered=True), (z - z.mean(0)).T @ (z - z.mean(0)), **CLOSE)
    torch.testing.assert_close(m.covariance(), torch.cov(z.T, correction=0).reshape(shape[1], shape[1]), **CLOSE)
    torch.testing.assert_close(m.variances(), z.var(0, correction=0), **CLOSE)


@given(features(min_rows=6), st.lists(st.integers(1, 5), min_size=1, max_size=6), st.randoms(use_true_random=False))
@settings(max_examples=50, deadline=None)
def test_any_split_merged_in_any_order_is_one_pass(x, sizes, random) -> None:
    cuts = [min(sum(sizes[:i]), len(x)) for i in range(len(sizes) + 1)] + [len(x)]
    parts = [Moments(x[a:b]) for a, b in itertools.pairwise(cuts) if b > a]
    random.shuffle(parts)
    whole = Moments()
    for part in parts:
        whole = whole + part
    assert_same(whole, Moments(x))
    streamed = Moments()
    for batch in x.split(sizes[0]):
        streamed.update(batch)
    assert_same(streamed, Moments(x))


@given(features(min_rows=6), st.integers(1, 4))
@settings(max_examples=30, deadline=None)
def test_added_rows_can_be_subtracted(x, size) -> None:
    whole, part = Moments(x), Moments(x[:size])
    assert_same(whole - part, Moments(x[size:]))
    assert_same((whole + part) - part, whole)


def test_combining_changes_neither_side() -> None:
    a, b = Moments(gaussian(9, 3)), Moments(gaussian(5, 3, seed=1) + 4)
    before = [m.gram().clone() for m in (a, b)]
    for combined in (a + b, (a + b) - b, Moments() + a, a + Moments()):
        combined.update(gaussian(4, 3, seed=2))
    for m, was in zip((a, b), before, strict=True):
        torch.testing.assert_close(m.gram(), was, rtol=0, atol=0)


def test_updates_are_seen_after_a_first_reading() -> None:
    x = gaussian(60, 5) * torch.arange(1, 6)
    m = Moments(x[:20])
    for function in (rankme, rankme_centered, odcorr):
        function(m)
    m.update(x[20:])
    for function in (rankme, rankme_centered, odcorr):
        assert function(m).item() == pytest.approx(function(x).item(), rel=1e-10)


def test_all_metrics_share_one_decomposition(monkeypatch) -> None:
    calls = []
    monkeypatch.setattr(
        "repmetrics.measurement.moments.symmetric_eigenvalues",
        lambda square: calls.append(square.shape) or symmetric_eigenvalues(square),
    )
    m = Moments(gaussian(300, 120))
    for function in (rankme, rankme_centered, effective_rank, participation_ratio, alpha_req, odcorr, dead_features):
        function(m)
        function(m)
    assert len(calls) == 2  # not centered, and centered


def test_memory_does_not_grow_with_the_rows() -> None:
    m = Moments()
    for seed in range(3):
        m.update(gaussian(100, 6, seed=seed))
    sizes = [t.numel() for t in vars(m).values() if isinstance(t, Tensor)]
    assert sum(sizes) == 6 * 6 + 6 + 6


@pytest.mark.parametrize("offset", [1e3, 1e5])
def test_the_variance_keeps_its_digits_under_a_common_offset(offset) -> None:
    # With an offset of 1e5, float64 resolves steps of 1e-11. Without a shift, its square would leave steps of 1e-6.
    x = orthonormal_centered(400, 5) * 20 * torch.tensor([1, 0.5, 0.2, 0.1, 0.05])
    m = Moments()
    for batch in (x + offset).split(90):
        m.update(batch)
    assert rankme_centered(m).item() == pytest.approx(rankme_centered(x).item(), rel=1e-8)
    assert odcorr(m).item() == pytest.approx(0, abs=1e-8)


def test_moments_of_directions() -> None:
    x = gaussian(300, 6) * torch.exp(gaussian(300, 1, seed=1)) + 0.5
    m = Moments(x[:100], unit=True) + Moments(x[100:], unit=True)
    assert m.sum_norm4 == pytest.approx(300, rel=1e-12)
    assert mean_direction(m).item() == pytest.approx(mean_direction(x).item(), rel=1e-10)
    assert uniformity_w2(m).item() == pytest.approx(uniformity_w2(x).item(), rel=1e-10)
    with pytest.raises(ValueError, match=r"moments of features and moments of their directions .* cannot be combined"):
        m + Moments(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_block_float32_products_are_near_and_float64_ones_nearer(dtype) -> None:
    x = (gaussian(4000, 32) * torch.logspace(0, -3, 32)).to(dtype)
    exact = (x.double().T @ x.double()).norm()
    errors = {
        precision: (Moments(x, precision=precision).gram() - x.double().T @ x.double()).norm() / exact
        for precision in ("float64", "block_float32")
    }
    assert errors["float64"] < 1e-14
    assert 1e-10 < errors["block_float32"] < 1e-6  # the resolution of float32 is 6e-8


# ── bad input ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_another_width_or_device_is_refused() -> None:
    m = Moments(gaussian(5, 3))
    with pytest.raises(ValueError, match="features had D = 3 columns before, now 4: use one state per encoder"):
        m.update(gaussian(5, 4))
    with pytest.raises(ValueError, match="moments of D = 3 and D = 4 cannot be combined"):
        m + Moments(gaussian(5, 4))
    with pytest.raises(ValueError, match="cannot subtract 9 rows from 5: subtract a part from its whole"):
        m - Moments(gaussian(9, 3))
    with pytest.raises(ValueError, match="precision must be one of float64, block_float32, got 'bfloat16'"):
        Moments(precision="bfloat16")  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_another_device_is_refused() -> None:
    m = Moments(gaussian(5, 3).cuda())
    with pytest.raises(ValueError, match="features were on cuda:0 before, now on cpu: move them first"):
        m.update(gaussian(5, 3))


def test_an_empty_state_says_so() -> None:
    for function in (rankme, odcorr, dead_features):
        with pytest.raises(ValueError, match=r"this needs at least \d rows?, the moments hold 0: update\(\) first"):
            function(Moments())


def zero_row_late() -> Tensor:
    x = gaussian(3000, 3)
    x[2500] = 0
    return x


@pytest.mark.parametrize(
    ("batch", "unit"),
    [
        (torch.ones(2, 4), False),
        (torch.ones(2, 3, 3), False),
        (torch.tensor([[1.0, math.nan, 1.0]]), False),
        (torch.ones(0, 3), False),
        (zero_row_late(), True),
    ],
    ids=["D", "rank", "NaN", "empty", "length 0"],
)
def test_a_refused_batch_leaves_the_state_as_it_was(batch, unit) -> None:
    x = gaussian(50, 3)
    m, untouched = Moments(x, unit=unit), Moments(x, unit=unit)
    with pytest.raises(ValueError, match=r"features"):
        m.update(batch)
    assert_same(m, untouched)
    empty = Moments(unit=unit)
    if batch.shape[1] == 3 or batch.ndim == 3:
        with pytest.raises(ValueError, match=r"features"):
            empty.update(batch)
        empty.update(gaussian(5, 2))
        assert empty.dim == 2


# ── processes ───────────────────────────────────────────────────────────────────────────────────────────────────


CASES = [((23, 40), False), ((23, 40), True), ((0, 30), False), ((30, 0), True), ((30, 0), False)]
"""Rows of each of two processes, and whether their directions are accumulated."""


def rows_of(sizes: tuple[int, int]) -> Tensor:
    return gaussian(sum(sizes), 5) + 100


def reduce_shards(out: Path) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    try:
        torch.set_num_threads(1)
        for case, (sizes, unit) in enumerate(CASES):
            local = Moments(unit=unit)
            for batch in rows_of(sizes).split(list(sizes))[rank].split(7):
                if len(batch):
                    local.update(batch)
            reduced = local.all_reduce()
            assert local.n == sizes[rank]  # the state of the process does not change
            torch.save(
                [reduced.n, reduced.sum_norm4, reduced.mean, reduced.gram(centered=True)], out / f"{case}-{rank}.pt"
            )
        with pytest.raises(
            ValueError, match="none of 2 processes has a row: give each a shard of the held-out samples"
        ):
            Moments().all_reduce()
    finally:
        dist.destroy_process_group()


def test_two_processes_with_unequal_or_no_rows_equal_one(tmp_path: Path) -> None:
    run_ranks(reduce_shards, tmp_path, folder=tmp_path)
    for (case, (sizes, unit)), rank in itertools.product(enumerate(CASES), range(2)):
        whole = Moments(rows_of(sizes), unit=unit)
        n, fourth, mean, gram = torch.load(tmp_path / f"{case}-{rank}.pt", weights_only=True)
        assert n == whole.n
        assert fourth == pytest.approx(whole.sum_norm4, rel=1e-12)
        torch.testing.assert_close(mean, whole.mean, **CLOSE)
        torch.testing.assert_close(gram, whole.gram(centered=True), **CLOSE)


def test_another_dtype_midway_is_refused() -> None:
    m = Moments(gaussian(20, 3).float())
    with pytest.raises(ValueError, match=r"features were torch\.float32 before, now torch\.bfloat16: cast all batches"):
        m.update(gaussian(20, 3).bfloat16())
    assert m.n == 20
