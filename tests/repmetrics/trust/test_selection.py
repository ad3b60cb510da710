"""Selection among runs: known orders, chance, ties, and the bootstrap."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest

from repmetrics.trust.selection import Tournaments, pairwise_accuracy, successive_halving

TARGET = np.array([0.1, 0.5, 0.2, 0.4, 0.3, 0.6, 0.0, 0.7])


def test_pairwise_accuracy_by_hand() -> None:
    signal = np.array([1.0, 2, 2, math.nan])
    target = np.array([0.1, 0.3, 0.2, 0.4])
    # (0,1) and (0,2) right, (1,2) a tie, three pairs with NaN wrong
    assert pairwise_accuracy(signal, target)[0] == pytest.approx(2.5 / 6)
    assert pairwise_accuracy(signal, target, groups=["a", "a", "b", "b"])[0] == pytest.approx(1 / 2)


def test_pairwise_accuracy_with_weights_equals_repeated_runs() -> None:
    generator = np.random.default_rng(0)
    signal = generator.random(8)
    weights = np.array([[2.0, 0, 1, 3, 1, 0, 0, 1]])
    rows = np.repeat(np.arange(8), weights[0].astype(int))
    repeated = pairwise_accuracy(signal[rows], TARGET[rows])
    assert pairwise_accuracy(signal, TARGET, weights=weights) == pytest.approx(repeated)


def test_perfect_and_reversed_signals() -> None:
    tournaments = Tournaments(TARGET, k=5, draws=200)
    perfect = tournaments.selection("perfect", TARGET, groups=["a"] * 8)
    assert perfect.pairwise[:3] == (1, 1, 1)
    assert perfect.pairwise_within[:3] == (1, 1, 1)
    assert perfect.regret[:3] == pytest.approx((0, 0, 0))
    assert perfect.gain.sign() == 1
    reversed_signal = tournaments.selection("reversed", -TARGET)
    assert reversed_signal.pairwise.value == 0
    assert reversed_signal.gain.sign() == -1
    assert math.isnan(reversed_signal.pairwise_within.value)


def test_regret_equals_the_mean_over_all_sets() -> None:
    generator = np.random.default_rng(1)
    signal = generator.random(8)
    sets = [list(s) for s in combinations(range(8), 5)]
    exact = np.mean([TARGET[s].max() - TARGET[s][signal[s].argmax()] for s in sets])
    random = np.mean([TARGET[s].max() - TARGET[s].mean() for s in sets])
    tournaments = Tournaments(TARGET, k=5, draws=10)
    assert tournaments.regret(signal)[0] == pytest.approx(exact)
    assert tournaments.chance()[0] == pytest.approx(random)


def test_a_constant_signal_is_a_random_choice() -> None:
    selection = Tournaments(TARGET, k=3, draws=500).selection("constant", np.ones(8))
    assert selection.gain.value == pytest.approx(0)
    assert selection.gain.sign() == 0
    assert selection.pairwise.value == 0.5


def test_missing_targets_and_few_runs_are_refused() -> None:
    with pytest.raises(ValueError, match="NaN"):
        Tournaments(np.array([0.1, math.nan, 0.2]))
    with pytest.raises(ValueError, match="at least 3 runs"):
        Tournaments(np.array([0.1, 0.2]))


def test_halving_stops_the_best_run_where_it_starts_slowly() -> None:
    target = np.array([0.1, 0.2, 0.3, 0.4])
    early = np.array([4.0, 3, 2, 1])
    halving = successive_halving({0.5: early}, target, last=target)
    assert halving.saved == pytest.approx(0.25)
    assert halving.lost == halving.lost_probed == pytest.approx(0.2)
