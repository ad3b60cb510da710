from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loggers import CSVLogger
from small_runs import LIGHTNING_NOISE, HeldOutImages, fit, loader, simclr

from repmetrics.callbacks import evaluation_time, representation_monitor
from repmetrics.callbacks.representation_monitor import RepresentationMonitor
from repmetrics.monitoring import interval as interval_module
from repmetrics.monitoring.interval import Timing, default_interval, infer_batch_size

pytestmark = [pytest.mark.filterwarnings(line) for line in LIGHTNING_NOISE]


@pytest.mark.parametrize("samples", [96, 4096, 25_600])
@pytest.mark.parametrize("batch_size", [16, 256, 3000])
def test_evaluations_cost_at_most_one_percent_of_a_long_run(samples: int, batch_size: int):
    steps = 10_000_000
    interval = default_interval(samples=samples, batch_size=batch_size, total_steps=steps)
    evaluations = steps // interval
    assert evaluations * samples <= 0.01 * steps * 3 * batch_size
    more = steps // max(1, interval - 1)  # an interval shorter by one step exceeds the share
    assert interval == 1 or more * samples > 0.0099 * steps * 3 * batch_size


def test_a_short_run_gets_ten_evaluations_and_an_endless_run_its_share():
    assert default_interval(samples=10_000, batch_size=8, total_steps=200) == 20
    assert default_interval(samples=10_000, batch_size=8, total_steps=5) == 1
    assert default_interval(samples=10_000, batch_size=8, total_steps=float("inf")) == 41_667


def test_the_size_of_a_nested_batch():
    assert infer_batch_size({"views": [torch.zeros(4, 3), torch.zeros(4, 3)]}) == 4
    assert infer_batch_size([torch.tensor(3.0), torch.zeros(5)]) == 5
    assert infer_batch_size(["no tensor"]) is None


def evaluated_steps(root: Path, *callbacks: object, **options: object) -> list[int]:
    """40 epochs of 6 steps with a validation each; an evaluation is 96 passes, a step 3 × 16: 200 steps, at most 24."""
    monitor = RepresentationMonitor(HeldOutImages())
    fit(root, simclr(), monitor, *callbacks, max_epochs=40, logger=False, **options)
    return [record.step for record in monitor.history]


@pytest.mark.parametrize("val", ["default", None])
def test_validations_that_follow_too_soon_are_skipped(tmp_path: Path, val: object):
    assert evaluated_steps(tmp_path, val=val) == [0, *range(24, 241, 24)]


def test_a_callback_that_monitors_a_key_gets_every_validation(tmp_path: Path):
    patient = EarlyStopping("repmetrics/rankme", mode="max", patience=100)
    assert evaluated_steps(tmp_path, patient) == list(range(0, 241, 6))


def test_accumulated_batches_count_together(tmp_path: Path):
    steps = evaluated_steps(tmp_path, accumulate_grad_batches=2, train=loader(192))
    assert steps == [0, *range(24, 241, 24)]  # 6 optimizer steps of 2 × 16 per epoch


class Clock:
    """Time that passes only where the test says so: a step takes ``step`` seconds."""

    def __init__(self, step: float) -> None:
        self.now, self.step = 0.0, step

    def perf_counter(self) -> float:
        return self.now


def timed_run(
    root: Path, monkeypatch: pytest.MonkeyPatch, *callbacks: Any, evaluation: float = 2.0, **options: Any
) -> RepresentationMonitor:
    """Epochs of 6 steps of 0.5 s; an evaluation takes ``evaluation`` seconds."""
    monkeypatch.undo()  # the default of the tests, which counts passes
    clock = Clock(0.5)
    for module_with_clock in (evaluation_time, representation_monitor):
        monkeypatch.setattr(module_with_clock, "time", clock)
    monitor = RepresentationMonitor(HeldOutImages(), metrics=["rankme"])
    finish = monitor._monitor.finish

    def slow_finish(compute: Any) -> Any:
        clock.now += evaluation
        return replace(finish(compute), seconds=evaluation)

    monitor._monitor.finish = slow_finish  # type: ignore[method-assign]
    module = simclr()
    step = module.training_step

    def training_step(batch: Any, batch_idx: int) -> Any:
        clock.now += clock.step
        return step(batch, batch_idx)

    module.training_step = training_step
    fit(root, module, monitor, *callbacks, val=None, **options)
    return monitor


@pytest.mark.filterwarnings("ignore:an evaluation takes")
def test_evaluations_take_one_percent_of_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """0.06 s an evaluation, 0.5 s a step: 12 steps between evaluations, also after a resume, with another clock."""
    logger = CSVLogger(tmp_path)
    monitor = timed_run(tmp_path, monkeypatch, evaluation=0.06, max_epochs=5, logger=logger)
    assert [record.step for record in monitor.history] == [0, 12, 24, 30]
    lines = Path(logger.log_dir, "metrics.csv").read_text().splitlines()
    overhead = [value for row in csv.DictReader(lines) if (value := row["repmetrics/overhead"])]
    assert float(overhead[-1]) == pytest.approx(2 * 0.06 / (30 * 0.5 + 2 * 0.06))
    total = [value for row in csv.DictReader(lines) if (value := row["repmetrics/overhead_total"])]
    assert float(total[-1]) == pytest.approx(4 * 0.06 / (30 * 0.5 + 4 * 0.06))  # with those before and after
    path = next(tmp_path.rglob("*.ckpt"))
    resumed = timed_run(tmp_path, monkeypatch, evaluation=9.0, max_epochs=10, logger=False, ckpt_path=path)
    assert [record.step for record in resumed.history] == [0, 12, 24, 30, 42, 54, 60]


def test_a_run_with_few_evaluations_and_a_reader_that_costs_more_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.warns(UserWarning, match=r"takes 2 s and a step 0.5 s: one every 400 steps keeps to 1 %.*, 0 in this"):
        monitor = timed_run(tmp_path, monkeypatch, max_epochs=5, logger=False)
    assert [record.step for record in monitor.history] == [0, 30]
    stopping = EarlyStopping("repmetrics/rankme", mode="max", patience=9)
    with pytest.warns(UserWarning, match="before each reading of EarlyStopping takes about 40 % of the time"):
        monitor = timed_run(tmp_path, monkeypatch, stopping, max_epochs=2, logger=False)
    assert [record.step for record in monitor.history] == [0, 6, 12]


def test_the_interval_keeps_to_the_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    timing = Timing(evaluation=2.0, step=0.5)
    assert timing.share(timing.interval) <= interval_module.MAX_OVERHEAD < timing.share(timing.interval * 0.98)
    assert timing.describe(total_steps=4000) is None
    assert timing.is_short(9)
    assert not timing.is_short(10)
    assert not timing.is_short(float("inf"))
