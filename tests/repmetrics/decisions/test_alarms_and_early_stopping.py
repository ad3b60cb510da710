"""The rules as pure functions, then the callbacks over them in real Trainers."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.callbacks import EMAWeightAveraging
from small_runs import LIGHTNING_NOISE, HeldOutImages, fit, loader, simclr

from repmetrics.callbacks.early_stopping import RepresentationEarlyStopping, default_metric
from repmetrics.callbacks.model_checkpoint import LocalMaximaCheckpoint
from repmetrics.callbacks.representation_monitor import RepresentationMonitor
from repmetrics.decisions.alarms import AlarmInput, CollapseStats, alarms, collapse_stats
from repmetrics.decisions.early_stopping import PATIENCE, best_local_maxima, local_maxima, should_stop
from repmetrics.decisions.slide_draws import draw_values
from repmetrics.functional.correlation import dead_features
from repmetrics.measurement.measure import measure
from repmetrics.measurement.result import Measurement
from repmetrics.monitoring.monitor import Monitor
from repmetrics.monitoring.record import Record

pytestmark = [pytest.mark.filterwarnings(line) for line in LIGHTNING_NOISE]

HEALTHY = CollapseStats(spread=0.9, variance_share=0.5, dead_features=0.0, offset_ratio=1.0, bfloat16=False)


def value(number: float, *, error: float | None = None, better: str = "higher", n: int = 1000, d: int = 100) -> Any:
    common = {"reason": None, "n": n, "d": d, "groups": None, "convention": "", "dtype": "float32"}
    return Measurement("rankme_centered", number, error, direction=better, **common)


def evaluations(*ranks: float, stats: CollapseStats = HEALTHY, error: float | None = None) -> list[AlarmInput]:
    return [AlarmInput(10 * (i + 1), value(rank, error=error), stats, 0) for i, rank in enumerate(ranks)]


def kinds(history: list[AlarmInput], **options: Any) -> list[str]:
    return [alarm.kind for alarm in alarms(history, **options)]


@pytest.mark.parametrize("name", ["spread", "variance_share"])
def test_a_network_that_starts_collapsed_alarms_only_while_it_does_not_spread(name: str) -> None:
    def history(*values: float) -> list[AlarmInput]:
        return [AlarmInput(10 * i, value(20), HEALTHY._replace(**{name: v}), 0) for i, v in enumerate(values)]

    assert kinds(history(1e-11, 2e-11, 5e-11, 1e-9, 1e-6)) == []  # layer scale of 1e-5: features start at one point
    assert kinds(history(1e-11, 2e-11, 1e-11, 1e-11)) == ["complete collapse"]
    assert kinds(history(0.5, 1e-11, 2e-11, 5e-11)) == ["complete collapse"]  # it did not start there


# ── collapse statistics of real features ─────────────────────────────────────────────────────────────────────────────


def noise(n: int = 4000, d: int = 16) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(0))


def test_collapse_stats_of_healthy_features() -> None:
    stats = collapse_stats(noise())
    assert stats.spread == pytest.approx(1, abs=0.01)  # ‖E u‖² of N independent directions is about 1/N
    assert stats.variance_share == pytest.approx(1, abs=0.01)
    assert (stats.dead_features, stats.bfloat16) == (0.0, False)
    assert stats.offset_ratio > 10


def test_collapse_stats_of_an_offset() -> None:
    """Mean 10 in each column, deviation 1: variance is 1/101 of the energy, std/|mean| 1/10."""
    stats = collapse_stats((noise() + 10).bfloat16())
    assert stats.variance_share == pytest.approx(1 / 101, rel=0.02)
    assert stats.offset_ratio == pytest.approx(0.1, rel=0.05)
    assert stats.bfloat16


def test_collapse_stats_of_dead_columns() -> None:
    features = noise()
    features[:, :4] = 3.0
    assert collapse_stats(features).dead_features == 0.25
    assert collapse_stats(torch.zeros(8, 3)).dead_features == 1.0
    assert collapse_stats(torch.zeros(8, 3)).variance_share == 0.0


def test_dead_features_of_the_alarm_are_those_of_the_metric() -> None:
    """An offset of 1e8 deviations hides a column from float32, though its variance is 1e-4 of the median."""
    features = noise().double()
    features[:, :4] = 1e6 + 0.01 * features[:, :4]
    assert collapse_stats(features).dead_features == dead_features(features).item() == 0
    narrow = features.float()
    assert collapse_stats(narrow).dead_features == dead_features(narrow).item() == 0.25


# ── alarms ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("stats", "kind"),
    [
        (HEALTHY._replace(spread=0.009), "complete collapse"),
        (HEALTHY._replace(variance_share=0.9e-3), "complete collapse"),
        (HEALTHY._replace(dead_features=0.26), "dead features"),
        (HEALTHY._replace(offset_ratio=0.003, bfloat16=True), "precision"),
    ],
)
def test_each_alarm_needs_two_consecutive_evaluations(stats: CollapseStats, kind: str) -> None:
    good, bad = evaluations(50)[0], evaluations(50, stats=stats)[0]
    history = [p._replace(step=10 * i) for i, p in enumerate([good, bad, good, bad], start=1)]
    assert kinds(history) == []
    assert kinds([*history, bad._replace(step=50)]) == [kind]
    assert kinds([*history, bad._replace(step=50)], warmup_steps=40) == []


@pytest.mark.parametrize(
    "stats",
    [
        HEALTHY._replace(spread=0.011, variance_share=1.1e-3, dead_features=0.25),
        HEALTHY._replace(offset_ratio=0.003, bfloat16=False),
        HEALTHY._replace(offset_ratio=0.004, bfloat16=True),
    ],
)
def test_just_inside_the_limits_is_no_alarm(stats: CollapseStats) -> None:
    assert kinds(evaluations(50, 50, 50, stats=stats)) == []


def test_a_low_rank_and_a_fall_are_dimensional_collapse() -> None:
    assert kinds(evaluations(4.9, 4.9)) == ["dimensional collapse"]  # below 5 % of min(N − 1, D) = 100
    assert kinds(evaluations(5.1, 5.1)) == []
    level = [50.0] * 4
    assert kinds(evaluations(*level, 29, 29)) == ["dimensional collapse"]  # 42 % under the maximum
    assert kinds(evaluations(*level, 31, 31)) == []
    assert kinds(evaluations(*level, 29, 45, 29)) == []  # not in a row
    assert kinds(evaluations(*level, 29, 29, error=8.0)) == []  # a fall of 21, within 3 errors of 8


def test_the_first_fall_of_the_rank_is_no_collapse() -> None:
    """Evaluated often, a healthy network falls from the wide spectrum of its initial weights over many evaluations."""
    falling = [90.0, 70, 50, 40, 30, 24, 22]
    for length in range(1, len(falling) + 1):
        assert kinds(evaluations(*falling[:length])) == []
    settled = [*falling, 22, 22, 23, 30]
    assert kinds(evaluations(*settled)) == []
    assert kinds(evaluations(*settled, 17, 17)) == ["dimensional collapse"]  # 43 % under 30, and below the lowest


def test_the_start_does_not_count_for_the_maximum() -> None:
    """Random features often rank above trained ones: step 0 does not count for the running maximum."""
    start = AlarmInput(0, value(90), HEALTHY, 0)
    assert kinds([start, *evaluations(50, 50)]) == []


def with_views(*pairs: tuple[float, float], rank: float = 50, stats: CollapseStats = HEALTHY) -> list[AlarmInput]:
    """Evaluations from step 0 on with raw and whitened view retrieval of 1000 images."""
    return [
        AlarmInput(10 * i, value(rank), stats, 0, tuple(value(number, n=2000) for number in pair))
        for i, pair in enumerate(pairs)
    ]


def test_degraded_features_tell_images_apart_less_well_than_before() -> None:
    assert kinds(with_views((0.2, 0.3), (0.11, 0.17), (0.11, 0.17))) == ["degraded features"]  # also below untrained
    assert kinds(with_views((0.05, 0.1), (0.4, 0.6), (0.2, 0.3), (0.2, 0.3))) == ["degraded features"]
    assert kinds(with_views((0.2, 0.3), (0.13, 0.17), (0.13, 0.17))) == []  # the raw one keeps 65 %
    assert kinds(with_views((0.2, 0.3), (0.11, 0.2), (0.11, 0.2))) == []  # the whitened one keeps two thirds
    assert kinds(with_views((0.2, 0.3), (0.11, 0.17), (0.2, 0.3), (0.11, 0.17))) == []  # not in a row
    assert kinds(with_views((0.01, 0.02), (0.005, 0.01), (0.005, 0.01))) == []  # 1.3 and 1.9 errors of 1000 images


def test_where_views_are_measured_a_fall_of_the_rank_alone_is_no_collapse() -> None:
    steady = [(0.2, 0.3)] * 6
    falling = [e._replace(rank=value(r)) for e, r in zip(with_views(*steady), [90, 50, 50, 50, 20, 20], strict=True)]
    assert kinds(falling) == []
    assert kinds([*falling, *(falling[-1]._replace(step=s, rank=value(4)) for s in (60, 70))]) == [
        "dimensional collapse"
    ]


def test_features_that_start_with_an_offset_are_collapsed_once_they_do_not_tell_images_apart() -> None:
    offset = HEALTHY._replace(spread=0.001)
    assert kinds(with_views(*[(0.2, 0.3)] * 6, stats=offset)) == []
    lost = with_views((0.2, 0.3), *[(0.001, 0.001)] * 2, stats=offset)
    assert kinds(lost) == ["complete collapse", "degraded features"]
    assert kinds(with_views(*[(0.001, 0.004)] * 3, stats=offset)) == ["complete collapse"]  # at chance from the start
    assert kinds([*with_views((0.2, 0.3)), *with_views(*[(0.2, 0.3)] * 3, stats=offset)[1:]]) == ["complete collapse"]


def test_not_finite_needs_no_second_evaluation() -> None:
    assert kinds([AlarmInput(10, None, None, 3)]) == ["not finite"]
    assert kinds([*evaluations(50), AlarmInput(20, None, None, 3), *evaluations(50)]) == []


def test_a_fall_is_judged_by_the_paired_error() -> None:
    """The slides differ much, and the fall is the same on each: unpaired errors would hide it."""
    generator = torch.Generator().manual_seed(0)
    slide = torch.arange(32).repeat_interleave(64)
    rank = torch.randint(2, 16, (32,), generator=generator)[slide]
    wide = torch.randn(2048, 16, generator=generator) * (torch.arange(16) < rank[:, None])
    narrow = wide * torch.where(torch.arange(16) < 4, 1.0, 0.05)
    before, after = (measure(x, groups=slide.tolist())["rankme_centered"] for x in (wide, narrow))
    assert kinds([AlarmInput(s, m, HEALTHY, 0) for s, m in enumerate([*[before] * 4, after, after], start=1)]) == [
        "dimensional collapse"
    ]


# ── stopping ────────────────────────────────────────────────────────────────────────────────────────────────────────


def decide(*numbers: float, better: str = "higher", error: float | None = None, **options: Any) -> bool:
    return should_stop([value(x, better=better, error=error) for x in numbers], **options).stop


def test_stops_after_patience_and_not_before() -> None:
    rising = [1.0, 2.0, 3.0, 4.0, 5.0]
    assert not decide(*rising, *[4.0] * 4, patience=5)  # medians: 1, 1.5, 2, 3, 4, 4, …: the best is the fifth
    assert decide(*rising, *[4.0] * 5, patience=5)
    assert decide(*[-x for x in rising], *[-4.0] * 5, better="lower", patience=5)
    assert not decide(*[float(i) for i in range(30)])


def test_one_outlier_neither_stops_nor_saves() -> None:
    flat = [5.0] * 6
    assert decide(*flat[:3], 9.0, *flat[:3])  # the spike is not in any median of three
    assert not decide(1, 2, 3, 4, 0.0, 5, 6, 7, 8, patience=2)


def test_an_improvement_within_two_errors_is_none() -> None:
    creeping = [5 + 0.01 * i for i in range(12)]
    assert not decide(*creeping)
    assert decide(*creeping, error=0.2)


def test_the_patience_of_a_rank_starts_where_its_first_fall_ends() -> None:
    falling = [30.0 - i for i in range(12)]
    assert not decide(*falling, patience=3)
    assert not decide(*falling, 19.5, 20, 20.5, patience=3)
    assert decide(*falling, *[19.0] * 5, patience=3)  # a plateau at the lowest value
    assert decide(
        *falling, 22, 24, 23, 22, 23, 22, 21, patience=3
    )  # a maximum after the fall, and below the first value
    assert decide(30, 25, 20, 16, 14, 12, 10, 8, 6, patience=3)  # more than half is lost
    probe = [replace(value(x), name="linear_probe") for x in falling]
    assert should_stop(probe, patience=3).stop  # a probe does not fall first


def test_the_confidence_of_a_stop_is_the_share_of_slides_that_stop_too() -> None:
    x = torch.randn(96, 4, generator=torch.Generator().manual_seed(0))
    first = measure(x, groups=[row // 4 for row in range(96)])["rankme_centered"]
    noise = torch.randn(9, 24, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def series(spread: float) -> list[Measurement]:
        """A rise and a plateau, of which slides differ by `spread`."""
        values = (1.0, 2.0, 3.0, 4.0, 3.9, 3.88, 3.86, 3.84, 3.82)
        return [
            replace(first, value=v, replicates=tuple((v + spread * z).tolist()))
            for v, z in zip(values, noise, strict=True)
        ]

    alike = should_stop(series(1e-6), patience=3)
    assert alike.share == 1.0
    assert alike.reason.endswith("; it stops in more than 99% of draws over groups")
    different = series(0.1)
    decision = should_stop(different, patience=4, min_delta_errors=0)
    assert decision.share is not None
    assert 0.05 < decision.share < 0.95
    drawn = draw_values(different, draws=400)
    assert drawn is not None
    expected = [decide(*row.tolist(), patience=4, min_delta_errors=0) for row in drawn]
    assert decision.share == pytest.approx(sum(expected) / 400, abs=0.07)
    assert should_stop([replace(m, replicates=None) for m in different], patience=4, min_delta_errors=0).share is None


def test_a_metric_without_direction_cannot_stop() -> None:
    with pytest.raises(ValueError, match="rankme_centered has no better direction"):
        decide(1.0, better="neither")


def test_nan_is_passed_over() -> None:
    assert should_stop([value(math.nan)]).reason == "nothing measured yet"
    assert decide(*[5.0] * 6, math.nan) == decide(*[5.0] * 6)


@given(st.lists(st.floats(-100, 100), min_size=1, max_size=30), st.integers(1, 6))
def test_never_before_patience_and_once_stalled_only_a_new_best_helps(numbers: list[float], patience: int) -> None:
    assert not any(decide(*numbers[: i + 1], patience=patience) for i in range(min(patience, len(numbers))))
    worse = [*numbers, *[min(numbers)] * (patience + 2)]
    assert decide(*worse, patience=patience)
    assert not decide(*worse, *[max(numbers) + 1] * 2, patience=patience)


# ── keeping ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_local_maxima() -> None:
    assert local_maxima([]) == []
    assert local_maxima([1]) == [0]
    assert local_maxima([3, 2, 1]) == [0]
    assert local_maxima([1, 2, 2, 1]) == [1]  # the first of a plateau
    assert local_maxima([1, 5, 2, 4, 3, 6]) == [1, 3, 5]


def test_worth_keeping() -> None:
    ranks = [value(x) for x in (1, 5, 2, 4, 3, 6, 1, 2, 1)]
    assert best_local_maxima(ranks, k=2) == [1, 5, 8]  # the two best, and the last, which may become one
    assert best_local_maxima([value(-m.value, better="lower") for m in ranks], k=2) == [1, 5, 8]
    assert best_local_maxima([], k=2) == []


@given(st.lists(st.floats(-10, 10, allow_nan=False), min_size=1, max_size=20), st.integers(1, 4))
def test_the_global_maximum_is_always_kept(numbers: list[float], k: int) -> None:
    assert max(numbers) in [numbers[i] for i in best_local_maxima([value(x) for x in numbers], k=k)]


# ── in a Trainer ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("first", [True, False])
def test_stops_inside_an_epoch_in_any_order(tmp_path: Path, first: bool) -> None:
    monitor = RepresentationMonitor(HeldOutImages(), every_n_steps=4, on_alarm="log")
    stopping = RepresentationEarlyStopping("rankme", patience=3)
    callbacks = [stopping, monitor] if first else [monitor, stopping]
    run = fit(tmp_path, simclr(collapse=True, lr=0.1), *callbacks, train=loader(1600), max_epochs=1, val=None)
    assert stopping.stopped_step == monitor.history[-1].step == run.global_step
    assert run.global_step < 100  # of one epoch
    assert "rankme has not risen beyond" in stopping.reason


def test_a_healthy_rise_is_not_stopped(tmp_path: Path) -> None:
    monitor = RepresentationMonitor(HeldOutImages(), every_n_steps=2)
    stopping = RepresentationEarlyStopping("linear_probe", patience=PATIENCE, warmup_steps=1000)
    fit(tmp_path, simclr(), monitor, stopping, max_epochs=3, val=None)
    assert stopping.stopped_step is None
    assert len(monitor.history) == 10


def test_the_rule_of_the_experiment_stops_by_default() -> None:
    with_views = Record(9, 0, 0.0, measurements={"view_retrieval_whitened": value(0.5)})
    without = Record(9, 0, 0.0, measurements={"rankme_centered": value(9.0)})
    assert default_metric([without, with_views]) == "view_retrieval_whitened"
    assert default_metric([without]) == "rankme_centered"


def test_stopping_names_what_it_could_look_at(tmp_path: Path) -> None:
    monitor = RepresentationMonitor(HeldOutImages())
    with pytest.raises(ValueError, match=r"uses 'rank', which is not measured: choose among rankme, "):
        fit(tmp_path, simclr(), monitor, RepresentationEarlyStopping("rank"))
    with pytest.raises(ValueError, match=r"no RepresentationMonitor with prefix 'repmetrics'.*found: none"):
        fit(tmp_path, simclr(), RepresentationEarlyStopping())
    with pytest.raises(
        ValueError, match=r"LocalMaximaCheckpoint uses 'rank', which is not measured: choose among rankme, "
    ):
        fit(tmp_path, simclr(), RepresentationMonitor(HeldOutImages()), LocalMaximaCheckpoint(metric="rank"))
    undirected = RepresentationMonitor(HeldOutImages(), metrics=["twonn"])
    with pytest.raises(ValueError, match=r"uses 'twonn', which is neither better higher nor lower"):
        fit(tmp_path, simclr(), undirected, LocalMaximaCheckpoint(metric="twonn"))


def test_local_maxima_are_kept_on_disk(tmp_path: Path) -> None:
    monitor = RepresentationMonitor(HeldOutImages(), every_n_steps=1)
    keeper = LocalMaximaCheckpoint(tmp_path / "maxima", k=2)
    fit(tmp_path, simclr(), monitor, keeper, max_epochs=2, val=None, enable_checkpointing=False)
    ranks = [(record.step, record.measurements["rankme"]) for record in monitor.history if record.step]
    expected = {ranks[i][0] for i in best_local_maxima([m for _, m in ranks], k=2)}
    assert set(keeper.kept) == expected
    assert {path.name for path in (tmp_path / "maxima").iterdir()} == {f"step={step}.ckpt" for step in expected}
    state = torch.load(keeper.kept[ranks[-1][0]], weights_only=True)
    assert state["global_step"] == ranks[-1][0]


def test_what_is_kept_is_what_was_measured(tmp_path: Path) -> None:
    """Averaged weights are measured in a validation; the checkpoint holds them once they are swapped out again."""
    monitor, keeper = RepresentationMonitor(HeldOutImages()), LocalMaximaCheckpoint(tmp_path / "maxima", k=9)
    fit(tmp_path, simclr(), monitor, keeper, EMAWeightAveraging(decay=0.9), val_check_interval=0.5, max_epochs=3)
    assert len(keeper.kept) >= 2
    for step, path in keeper.kept.items():
        module = simclr()
        module.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
        again = Monitor().measure(module, HeldOutImages()).measurements["rankme"]
        (measured,) = (r.measurements["rankme"] for r in monitor.history if r.step == step)
        assert again.value == measured.value


def constant(module: Any, images: torch.Tensor) -> torch.Tensor:
    """Features that all point the same way after the first evaluation."""
    features: torch.Tensor = module(images)
    return features if module.global_step == 0 else torch.ones_like(features) + 1e-3 * features


def test_an_alarm_warns_once_and_is_logged(tmp_path: Path) -> None:
    monitor = RepresentationMonitor(HeldOutImages(), encoder=constant)
    with pytest.warns(UserWarning, match=r"complete collapse at step 12: 1 − ‖E u‖² = .*: all features point one way"):
        run = fit(tmp_path, simclr(), monitor, max_epochs=4)
    assert [len(record.alarms) for record in monitor.history] == [0, 0, 1, 1, 1]
    assert float(run.callback_metrics["repmetrics/alarm"]) == 1


def test_an_alarm_stops_or_calls_back(tmp_path: Path) -> None:
    monitor = RepresentationMonitor(HeldOutImages(), encoder=constant, on_alarm="stop")
    with pytest.warns(UserWarning, match="complete collapse"):
        run = fit(tmp_path, simclr(), monitor, max_epochs=9)
    assert run.global_step == 12
    called: list[tuple[str, int]] = []
    monitor = RepresentationMonitor(
        HeldOutImages(), encoder=constant, on_alarm=lambda alarm, record: called.append((alarm.kind, record.step))
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", ".*Checkpoint directory.*|.*workers.*|.*eval mode.*|.*LeafSpec.*|.*batches.*")
        fit(tmp_path, simclr(), monitor, max_epochs=3)
    assert called == [("complete collapse", 12), ("complete collapse", 18)]
