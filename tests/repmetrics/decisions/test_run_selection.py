from __future__ import annotations

import math

import numpy as np
import pytest

from repmetrics.decisions.comparability import comparison_warnings
from repmetrics.decisions.run_selection import borda_count, select_setting, tied_with_best


def test_the_plateau_is_two_errors_of_the_difference_wide():
    values = [45.0, 45.0 - 2 * math.hypot(0.3, 0.4) + 1e-9, 45.0 - 2 * math.hypot(0.3, 0.4) - 1e-6]
    assert tied_with_best(values, [0.3, 0.4, 0.4], direction="higher") == [0, 1]
    assert tied_with_best([-v for v in values], [0.3, 0.4, 0.4], direction="lower") == [0, 1]


def test_without_errors_the_best_stands_alone():
    assert tied_with_best([44.9, 45.0], [None, None], direction="higher") == [1]


def test_nan_is_never_chosen():
    assert tied_with_best([math.nan, 3.0, math.nan], [1.0, 1.0, 1.0], direction="higher") == [1]
    with pytest.raises(ValueError, match="no run has a value"):
        tied_with_best([math.nan], [1.0], direction="higher")


def test_a_metric_without_direction_cannot_choose():
    with pytest.raises(ValueError, match="needs a direction"):
        tied_with_best([1.0, 2.0], [None, None], direction="neither")


def test_the_first_setting_of_the_plateau_from_either_side():
    settings, values, errors = [1e-2, 1e-4, 1e-3], [44.8, 45.0, 44.9], [0.2] * 3
    assert select_setting(settings, values, errors, direction="higher") == 1
    assert select_setting(settings, values, errors, direction="higher", prefer="largest") == 0
    with pytest.raises(ValueError, match="smallest or largest"):
        select_setting(settings, values, errors, direction="higher", prefer="first")


def test_the_rule_finds_the_best_setting_as_often_as_noise_allows():
    """An axis with one best setting, 3 errors above its neighbors: the best draws highest in about 96 % of trials.

    The plateau includes the neighbor if it is within two errors of the difference: a difference of 3 errors with a
    spread of √2 errors stays above 2√2 in half the trials. Checked with 1,000 draws: ± 3 standard errors are 0.05.
    """
    rng = np.random.default_rng(0)
    truth, kept, highest = np.array([40.0, 43.0, 40.0]), 0, 0
    for _ in range(1000):
        drawn = truth + rng.normal(size=3)
        highest += int(drawn.argmax()) == 1
        kept += select_setting([1, 2, 3], drawn.tolist(), [1.0] * 3, direction="higher") == 1
    # P(z > (2√2 − 3)/√2) for the left neighbor, and that the middle is highest
    expected = 0.5 * math.erfc((2 * math.sqrt(2) - 3) / math.sqrt(2) / math.sqrt(2))
    assert kept / 1000 == pytest.approx(expected, abs=0.05)
    assert highest / 1000 > 0.95


def test_borda_counts_runs_beaten_and_shares_ties():
    points = borda_count(
        {"rankme": [1.0, 2.0, 3.0], "odcorr": [0.5, 0.5, 0.1]}, direction={"rankme": "higher", "odcorr": "lower"}
    )
    assert points.tolist() == [0.5, 1.5, 4.0]


def test_borda_is_blind_to_scale():
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(2, 9))
    better = {"a": "higher", "b": "lower"}
    assert np.array_equal(
        borda_count({"a": a, "b": b}, direction=better),
        borda_count({"a": np.exp(3 * a), "b": 100 * b - 7}, direction=better),
    )


def test_a_run_with_an_alarm_or_without_a_value_cannot_win():
    points = borda_count({"rankme": [9.0, math.nan, 5.0]}, direction={"rankme": "higher"}, alarms=[1, 0, 0])
    assert points.tolist() == [-math.inf, 0.0, 1.0]


@pytest.mark.parametrize("signals", [{}, {"twonn": [1.0]}])
def test_borda_refuses_what_it_cannot_count(signals: dict[str, list[float]]):
    with pytest.raises(ValueError, match=r"signal|direction"):
        borda_count(signals, direction={"twonn": "neither"})


def test_unfair_comparisons_are_named():
    axes = [f"model.init_args.{name}" for name in ("regularizer_weight", "arch", "schedules.lr")]
    warnings = comparison_warnings(axes, methods=["DINO", "DINOv2"], widths=[128, 192, None])
    assert len(warnings) == 4
    assert "regularizer_weight raises" in warnings[0]
    assert "arch changes" in warnings[1]
    assert "DINO, DINOv2" in warnings[2]
    assert "128, 192 wide" in warnings[3]
    assert comparison_warnings(["model.init_args.schedules.lr"], methods=["DINO"], widths=[128, 128]) == []
