"""The contract of every torchmetrics class, over the whole METRICS table."""

from __future__ import annotations

import json
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import run_ranks
from torch import Tensor

from repmetrics.functional.linalg import symmetric_eigenvalues
from repmetrics.measurement.moments import Moments
from repmetrics.measurement.registry import METRICS
from repmetrics.metrics import METRIC_CLASSES, ODCorr, RankMe, Representation, metric_collection

N, D = 240, 6


def arguments(name: str, *, seed: int = 0, rows: int = N) -> tuple[Tensor, ...]:
    """Arguments of ``update``: features, and ids or a counterpart if the metric needs them."""
    random = torch.Generator().manual_seed(seed)
    needs = METRICS[name].inputs
    if needs in ("tokens", "anchor"):
        tokens = torch.randn(rows // 4, 9, D, generator=random)
        return (tokens,) if needs == "tokens" else (tokens, tokens + 0.1 * torch.randn(tokens.shape, generator=random))
    if needs == "turns":
        return (torch.randn(rows // 4, 4, D, generator=random) + 2 * torch.eye(4, D),)
    if name in ("alpha_req", "alpha_distance"):
        return (torch.randn(rows, 120, generator=random) / torch.arange(1, 121) ** 0.5,)
    features = torch.randn(rows, D, generator=random) * torch.arange(1, D + 1) + 1
    if needs in ("views", "groups"):
        return features, torch.arange(rows) // 4
    if needs == "previous":
        return features, features + torch.randn(features.shape, generator=random)
    return (features,)


def make(name: str) -> Any:
    moments = METRICS[name].inputs in ("moments", "directions")
    return METRIC_CLASSES[name](num_features=arguments(name)[0].shape[-1]) if moments else METRIC_CLASSES[name]()


def part(args: tuple[Tensor, ...], rows: slice) -> tuple[Tensor, ...]:
    return tuple(a[rows] for a in args)


def direct(name: str) -> float:
    args, needs = arguments(name), METRICS[name].inputs
    extra = {needs: args[1]} if len(args) == 2 else {}
    return float(METRICS[name].function(args[0], **extra))


def test_the_table_and_the_classes_are_one() -> None:
    assert set(METRIC_CLASSES) == set(METRICS)


@pytest.mark.parametrize("name", METRICS)
def test_better_is_the_tables(name: str) -> None:
    assert (
        METRIC_CLASSES[name].higher_is_better
        is {"higher": True, "lower": False, "neither": None}[METRICS[name].direction]
    )


@pytest.mark.parametrize("name", METRICS)
def test_batches_of_unequal_size_equal_the_function(name: str) -> None:
    metric, args = make(name), arguments(name)
    cut = len(args[0]) // 3 // 8 * 8
    metric.update(*part(args, slice(0, cut)))
    metric.update(*part(args, slice(cut, None)))
    # float64 sums in another order: rounding only
    assert float(metric.compute()) == pytest.approx(direct(name), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("name", METRICS)
def test_pickle_and_reset(name: str) -> None:
    metric = make(name)
    metric.update(*arguments(name, seed=1))
    metric = pickle.loads(pickle.dumps(metric))
    metric.reset()
    metric.update(*arguments(name))
    assert float(metric.compute()) == pytest.approx(direct(name), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("name", METRICS)
def test_merge_state(name: str) -> None:
    first, second, args = make(name), make(name), arguments(name)
    cut = len(args[0]) // 2 // 8 * 8
    first.update(*part(args, slice(0, cut)))
    second.update(*part(args, slice(cut, None)))
    second.merge_state(first)
    assert float(second.compute()) == pytest.approx(direct(name), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", METRICS)
def test_other_precisions_are_taken_as_they_are(name: str, dtype: torch.dtype) -> None:
    args = arguments(name)
    cast = tuple(a.to(dtype) if a.is_floating_point() else a for a in args)
    same = tuple(a.to(torch.float64) if a.is_floating_point() else a for a in cast)
    low, high = make(name), make(name)
    low.update(*cast)
    high.update(*same)
    # everything is float64 arithmetic, whatever came
    assert float(low.compute()) == pytest.approx(float(high.compute()), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("name", METRICS)
def test_bad_rows_are_refused(name: str) -> None:
    args = list(arguments(name))
    metric = make(name)
    args[0] = args[0].clone()
    args[0].view(-1)[5] = float("nan")
    with pytest.raises(ValueError, match="NaN or Inf"):
        metric.update(*args)
    with pytest.raises(ValueError, match="must"):
        metric.update(*part(tuple(args), slice(0, 0)))


@pytest.mark.parametrize("name", METRICS)
def test_nothing_seen_is_an_error(name: str) -> None:
    metric = make(name)
    with pytest.warns(UserWarning, match="before the"), pytest.raises(ValueError, match="update"):
        metric.compute()


def test_casting_the_model_leaves_the_state_in_float64() -> None:
    metric = RankMe(num_features=D)
    metric.update(*arguments("rankme"))
    before = float(metric.compute())
    metric.half()
    metric.set_dtype(torch.float16)
    metric._computed = None
    assert metric.outer.dtype == torch.float64
    assert float(metric.compute()) == before


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_to_dtype_moves_the_state_and_keeps_its_dtype(name: str, dtype: torch.dtype) -> None:
    """Lightning casts a module with "bf16-true" and "16-true": D×D sums and the row count would lose their digits."""
    module = torch.nn.ModuleDict({"metric": make(name), "line": torch.nn.Linear(2, 2)})
    module["metric"].update(*arguments(name))
    module.to(dtype)
    assert module["line"].weight.dtype == dtype
    assert float(module["metric"].compute()) == pytest.approx(direct(name), rel=1e-9, abs=1e-12)
    module["metric"].reset()
    module["metric"].update(*arguments(name))
    assert float(module["metric"].compute()) == pytest.approx(direct(name), rel=1e-9, abs=1e-12)
    assert module["metric"].to("meta").device.type == "meta"


def test_padding_is_left_out() -> None:
    (features,) = arguments("rankme")
    padded = torch.cat([features, features[:7]])
    valid = torch.arange(len(padded)) < len(features)
    for mask in (valid, valid.long(), valid.to(torch.uint8)):  # attention masks are of integers
        metric = RankMe(num_features=D)
        metric.update(padded, valid=mask)
        assert int(metric.rows) == len(features)
        assert float(metric.compute()) == pytest.approx(direct("rankme"), rel=1e-12)


@pytest.mark.parametrize(
    ("valid", "message"),
    [
        (torch.arange(N), "valid must be a mask of 0 and 1: rows cannot be chosen by index"),
        (torch.ones(N), "valid must be a tensor of bool, or of 0 and 1, got torch.float32"),
        ([True] * N, "valid must be a tensor of bool, or of 0 and 1, got list"),
        (torch.ones(N, 1, dtype=torch.bool), r"valid must be \(240,\), one entry per row, got \(240, 1\)"),
        (torch.ones(7, dtype=torch.bool), r"valid must be \(240,\), one entry per row, got \(7,\)"),
        (torch.tensor(True), r"valid must be \(240,\), one entry per row, got \(\)"),
    ],
)
def test_what_is_no_mask_is_refused(valid: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        RankMe(num_features=D).update(arguments("rankme")[0], valid=valid)


@pytest.mark.parametrize("offset", [0.0, 1e8])
def test_sums_keep_their_digits_under_an_offset(offset: float) -> None:
    """Each process sums about the mean of its own first batch."""
    features = arguments("odcorr")[0].double() + offset
    first, second = ODCorr(num_features=D), ODCorr(num_features=D)
    for batch in features[:100].split(30):
        first.update(batch)
    second.update(features[100:])
    first.merge_state(second)
    expected = float(METRICS["odcorr"].function(features - features.mean(0)))
    assert float(first.compute()) == pytest.approx(expected, rel=1e-6)  # 1e8·2⁻⁵² ≈ 2e-8 of the inputs' digits


@pytest.mark.parametrize("name", METRICS)
def test_ids_must_be_one_per_row(name: str) -> None:
    if METRICS[name].inputs not in ("views", "groups"):
        return
    features, ids = arguments(name)
    with pytest.raises(ValueError, match=rf"{METRICS[name].inputs} must be \(240,\), got \(240, 1\)"):
        make(name).update(features, ids[:, None])
    with pytest.raises(ValueError, match=f"{METRICS[name].inputs} are missing for 1 of 240 rows"):
        make(name).update(features, ids.double().masked_fill(ids == 0, torch.nan).masked_fill(torch.arange(N) > 0, 0))


def test_every_metric_plots_as_torchmetrics_own() -> None:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    together = [Representation(D), metric_collection(D, metrics=["rankme", "odcorr"])]
    for metric in [*map(make, METRICS), *together]:
        metric.update(*arguments(getattr(metric, "name", "rankme")))
        assert metric.plot()
        matplotlib.pyplot.close("all")
    _, axes = RankMe(num_features=D).plot([torch.tensor(2.0), torch.tensor(3.0)])
    assert list(axes.lines[0].get_ydata()) == [2, 3]
    matplotlib.pyplot.close("all")


def test_a_collection_updates_one_state_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = metric_collection(D, metrics=["rankme", "odcorr", "effective_rank", "mean_direction"])
    (features,) = arguments("rankme")
    updates: list[int] = []
    update = Moments.update
    monkeypatch.setattr(Moments, "update", lambda self, rows: updates.append(len(rows)) or update(self, rows))
    for batch in features.split(50):
        metrics.update(batch)
    # one update for the features' state, one for the directions', whatever number of metrics
    assert updates == [50, 50] * 4 + [40, 40]
    assert {name: float(v) for name, v in metrics.compute().items()} == pytest.approx(
        {name: float(METRICS[name].function(features)) for name in metrics.keys()},  # noqa: SIM118
        rel=1e-6,
    )


def test_representation_decomposes_once(monkeypatch: pytest.MonkeyPatch) -> None:
    metric = Representation(D, metrics=["rankme", "effective_rank", "participation_ratio", "stable_rank"])
    metric.update(*arguments("rankme"))
    calls = []
    monkeypatch.setattr(
        "repmetrics.measurement.moments.symmetric_eigenvalues",
        lambda square: calls.append(1) or symmetric_eigenvalues(square),
    )
    value = metric.compute()["rankme"]
    assert len(calls) == 1
    assert float(value) == pytest.approx(direct("rankme"), rel=1e-9)


def test_what_moments_cannot_give_is_refused() -> None:
    with pytest.raises(ValueError, match="lidar cannot be computed from moments"):
        metric_collection(D, metrics=["rankme", "lidar"])
    with pytest.raises(ValueError, match="mean_direction cannot be computed from moments of the features"):
        Representation(D, metrics=["mean_direction"])
    with pytest.raises(ValueError, match="unknown metric 'rankmee'"):
        metric_collection(D, metrics=["rankmee"])
    with pytest.raises(ValueError, match="D = 6 as declared, got 5"):
        RankMe(num_features=6).update(torch.randn(4, 5))


def _one_of_two(out: Path) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # a process without rows computes before its first update
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    values = {}
    for name in METRICS:
        args = arguments(name)
        cut = len(args[0]) // 3 // 8 * 8  # unequal shares
        for end, kind in ((cut, ""), (0, " of one process"), (len(args[0]), " of the other process")):
            metric, share = make(name), part(args, slice(0, end) if rank == 0 else slice(end, None))
            if len(share[0]):
                metric.update(*share)
            values[name + kind] = float(metric.compute())
    (out / f"{rank}.json").write_text(json.dumps(values))
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path: Path) -> None:
    run_ranks(_one_of_two, tmp_path, folder=tmp_path)
    kinds = ("", " of one process", " of the other process")
    values = {name: direct(name) for name in METRICS}
    expected = {name + kind: value for name, value in values.items() for kind in kinds}
    for rank in (0, 1):
        results = json.loads((tmp_path / f"{rank}.json").read_text())
        assert results == pytest.approx(expected, rel=1e-9, abs=1e-12)
