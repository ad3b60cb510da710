from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fmtrain.methods.schedules import Schedules, cosine, linear, scaled_lr, warmup_cosine


def published(base: float, final: float, steps: int, warmup: int = 0, start: float = 0.0) -> np.ndarray:
    """Values of facebookresearch/dino's cosine_scheduler, from its description: linspace, then half a cosine."""
    rise = np.linspace(start, base, warmup)
    k = np.arange(steps - warmup)
    return np.concatenate([rise, final + 0.5 * (base - final) * (1 + np.cos(np.pi * k / len(k)))])


@pytest.mark.parametrize(("steps", "warmup"), [(100, 0), (100, 1), (100, 10), (37, 36)])
def test_learning_rate_is_the_published_schedule(steps: int, warmup: int) -> None:
    values = [warmup_cosine(s, steps=steps, warmup_steps=warmup, peak=5e-4, end=1e-6) for s in range(steps)]
    np.testing.assert_allclose(values, published(5e-4, 1e-6, steps, warmup), rtol=1e-12)


@pytest.mark.parametrize(("start", "end"), [(0.04, 0.4), (0.996, 1.0), (1.0, 0.0)])
def test_weight_decay_and_momentum_are_the_published_cosine(start: float, end: float) -> None:
    values = [cosine(s, steps=50, start=start, end=end) for s in range(50)]
    np.testing.assert_allclose(values, published(start, end, 50), rtol=1e-12, atol=1e-15)


def test_teacher_temperature_is_a_linspace_and_then_constant() -> None:
    values = [linear(s, steps=30, start=0.04, end=0.07) for s in range(40)]
    np.testing.assert_allclose(values, np.r_[np.linspace(0.04, 0.07, 30), np.full(10, 0.07)], rtol=1e-12)


@given(st.integers(1, 1000), st.integers(0, 1000), st.integers(0, 2000))
def test_schedules_stay_between_their_ends(steps: int, warmup: int, step: int) -> None:
    assert 0 <= warmup_cosine(step, steps=steps, warmup_steps=min(warmup, steps), peak=1.0, end=0.1) <= 1
    assert 0.9 <= cosine(step, steps=steps, start=0.9, end=1.0) <= 1.0 + 1e-12
    assert 0.04 <= linear(step, steps=warmup, start=0.04, end=0.07) <= 0.07 + 1e-12


def test_values_are_constant_after_the_end() -> None:
    assert warmup_cosine(200, steps=100, warmup_steps=10, peak=1.0, end=0.1) == 0.1
    assert cosine(200, steps=100, start=0.9, end=1.0) == 1.0


def test_scaling_rules() -> None:
    assert scaled_lr(4e-3, batch_size=2048, reference=1024, rule="sqrt") == pytest.approx(4e-3 * 2**0.5)
    assert scaled_lr(5e-4, batch_size=64, reference=256, rule="linear") == pytest.approx(5e-4 / 4)
    assert scaled_lr(5e-4, batch_size=64, reference=256, rule="none") == 5e-4


def test_step_values_combine_the_schedules() -> None:
    schedules = Schedules(
        lr_warmup_steps=10,
        momentum_teacher=0.99,
        warmup_teacher_temp=0.04,
        teacher_temp=0.07,
        teacher_temp_warmup_steps=20,
    )
    lr = published(5e-4 * 512 / 256, 1e-6, 100, 10)
    decay, momentum = published(0.04, 0.4, 100), published(0.99, 1.0, 100)
    temperature = np.r_[np.linspace(0.04, 0.07, 20), np.full(80, 0.07)]
    for step in range(100):
        values = schedules.at(step, steps=100, batch_size=512)
        np.testing.assert_allclose(values, (lr[step], decay[step], momentum[step], temperature[step]), rtol=1e-12)


def test_the_teacher_temperature_of_dino_changes_from_epoch_to_epoch() -> None:
    schedules = Schedules(warmup_teacher_temp=0.04, teacher_temp=0.07, teacher_temp_warmup_steps=40)
    values = [schedules.at(s, steps=60, batch_size=1, teacher_temp_interval=10).teacher_temp for s in range(60)]
    np.testing.assert_allclose(values, np.repeat([*np.linspace(0.04, 0.07, 4), 0.07, 0.07], 10), rtol=1e-12)
    short = Schedules(warmup_teacher_temp=0.04, teacher_temp=0.07, teacher_temp_warmup_steps=4)
    values = [short.at(s, steps=60, batch_size=1, teacher_temp_interval=1250).teacher_temp for s in range(8)]
    assert values == [0.04] * 4 + [0.07] * 4


def test_lengths_may_be_shares_of_the_run() -> None:
    shares = Schedules(lr_warmup_steps=0.1, teacher_temp_warmup_steps=0.25, freeze_last_layer_steps=0.01)
    steps = Schedules(lr_warmup_steps=20, teacher_temp_warmup_steps=50, freeze_last_layer_steps=2)
    assert shares.resolved(200) == steps
    assert steps.resolved(1000) is steps
    for step in (0, 10, 19, 20, 120):
        assert shares.at(step, steps=200, batch_size=64) == steps.at(step, steps=200, batch_size=64)
    assert shares.longer_than(200) == []
    with pytest.raises(ValueError, match="lr_warmup_steps must be a whole number of steps, or a share of the run"):
        Schedules(lr_warmup_steps=2.5)
