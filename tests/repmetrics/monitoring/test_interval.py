from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping
from small_runs import LIGHTNING_NOISE, HeldOutImages, fit, loader, simclr

from repmetrics.callbacks.representation_monitor import RepresentationMonitor
from repmetrics.monitoring.interval import default_interval, infer_batch_size

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
