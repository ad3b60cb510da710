from __future__ import annotations

import math

import numpy as np
import pytest

from repmetrics.decisions.run_selection import borda, choose_setting, plateau, unfair


def test_the_plateau_is_two_errors_of_the_difference_wide():
    values = [45.0, 45.0 - 2 * math.hypot(0.3, 0.4) + 1e-9, 45.0 - 2 * math.hypot(0.3, 0.4) - 1e-6]
    assert plateau(values, [0.3, 0.4, 0.4], better="higher") == [0, 1]
    assert plateau([-v for v in values], [0.3, 0.4, 0.4], better="lower") == [0, 1]


def test_without_errors_the_best_stands_alone():
    assert plateau([44.9, 45.0], [None, None], better="higher") == [1]


def test_nan_is_never_chosen():
    assert plateau([math.nan, 3.0, math.nan], [1.0, 1.0, 1.0], better="higher") == [1]
    with pytest.raises(ValueError, match="no run has a value"):
        plateau([math.nan], [1.0], better="higher")


def test_a_metric_without_direction_cannot_choose():
    with pytest.raises(ValueError, match="needs a direction"):
        plateau([1.0, 2.0], [None, None], better="neither")


def test_the_first_setting_of_the_plateau_from_either_side():
    settings, values, errors = [1e-2, 1e-4, 1e-3], [44.8, 45.0, 44.9], [0.2] * 3
    assert choose_setting(settings, values, errors, better="higher") == 1
    assert choose_setting(settings, values, errors, better="higher", prefer="largest") == 0
    with pytest.raises(ValueError, match="smallest or largest"):
        choose_setting(settings, values, errors, better="higher", prefer="first")


def test_the_rule_finds_the_best_setting_as_often_as_noise_allows():
    """An axis with one best setting, 3 errors above its neighbours: the best draws highest in about 96 % of trials.

    The plateau takes the neighbour in when it falls within two errors of the difference: a difference of 3 errors with
    a spread of √2 errors stays above 2√2 in half the trials. Checked with 1,000 draws: ± 3 standard errors are 0.05.
    """
    rng = np.random.default_rng(0)
    truth, kept, highest = np.array([40.0, 43.0, 40.0]), 0, 0
    for _ in range(1000):
        drawn = truth + rng.normal(size=3)
        highest += int(drawn.argmax()) == 1
        kept += choose_setting([1, 2, 3], drawn.tolist(), [1.0] * 3, better="higher") == 1
    # P(z > (2√2 − 3)/√2) for the left neighbour, and that the middle is highest
    expected = 0.5 * math.erfc((2 * math.sqrt(2) - 3) / math.sqrt(2) / math.sqrt(2))
    assert kept / 1000 == pytest.approx(expected, abs=0.05)
    assert highest / 1000 > 0.95


def test_borda_counts_runs_beaten_and_shares_ties():
    points = borda(
        {"rankme": [1.0, 2.0, 3.0], "odcorr": [0.5, 0.5, 0.1]}, better={"rankme": "higher", "odcorr": "lower"}
    )
    assert points.tolist() == [0.5, 1.5, 4.0]


def test_borda_is_blind_to_scale():
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(2, 9))
    better = {"a": "higher", "b": "lower"}
    assert np.array_equal(
        borda({"a": a, "b": b}, better=better), borda({"a": np.exp(3 * a), "b": 100 * b - 7}, better=better)
    )


def test_a_run_with_an_alarm_or_without_a_value_cannot_win():
    points = borda({"rankme": [9.0, math.nan, 5.0]}, better={"rankme": "higher"}, alarms=[1, 0, 0])
    assert points.tolist() == [-math.inf, 0.0, 1.0]


@pytest.mark.parametrize("signals", [{}, {"twonn": [1.0]}])
def test_borda_refuses_what_it_cannot_count(signals: dict[str, list[float]]):
    with pytest.raises(ValueError, match=r"signal|direction"):
        borda(signals, better={"twonn": "neither"})


def test_unfair_comparisons_are_named():
    said = unfair(["model.init_args.spread_weight", "model.init_args.arch", "model.init_args.schedules.lr"],
                  methods=["DINO", "DINOv2"], widths=[128, 192, None])  # fmt: skip
    assert len(said) == 4
    assert "spread_weight presses" in said[0]
    assert "arch changes" in said[1]
    assert "DINO, DINOv2" in said[2]
    assert "128, 192 wide" in said[3]
    assert unfair(["model.init_args.schedules.lr"], methods=["DINO"], widths=[128, 128]) == []
