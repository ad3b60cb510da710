"""Better beyond noise, and the first checkpoint on the plateau."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from repmetrics.decisions.checkpoint_selection import choice_share, compare, select_checkpoint
from repmetrics.measurement.measure import measure
from repmetrics.measurement.result import Measurement, difference

SLIDES = [f"s{i // 20}" for i in range(640)]


def features(rank: int, *, noise: float = 0.02, seed: int = 0) -> Tensor:
    """64 slides' worth of rows on `rank` strong directions of 16; other seeds move them only a little."""
    base = torch.randn(640, 16, generator=torch.Generator().manual_seed(0))
    scale = torch.where(torch.arange(16) < rank, 1.0, 0.1)
    return base * scale + noise * torch.randn(640, 16, generator=torch.Generator().manual_seed(seed))


def scores(rank: int, *, groups: list[str] | None = SLIDES, **options: Any) -> dict[str, Measurement]:
    return measure(features(rank, **options), groups=groups, metrics=["rankme", "odcorr", "alpha_req"])


def named(value: float, **options: Any) -> dict[str, Measurement]:
    measured = scores(4, groups=None)["rankme"]
    return {"rankme": replace(measured, value=value, **options)}


def test_a_real_change_is_told_from_noise() -> None:
    comparisons = {v.name: v for v in compare(scores(4), scores(8, seed=1))}
    assert comparisons["rankme"].outcome == "better"
    assert comparisons["rankme"].z > 2
    assert {v.name: v.outcome for v in compare(scores(8), scores(4, seed=1))}["rankme"] == "worse"
    again = {v.name: v for v in compare(scores(8), scores(8))}
    assert again["rankme"].outcome == "no difference"
    assert (again["rankme"].change, again["rankme"].z) == (0, 0)


def test_pairing_sees_what_the_separate_errors_hide() -> None:
    first, second = scores(8), scores(8, noise=0.06)
    (comparison,) = [v for v in compare(first, second) if v.name == "rankme"]
    separate = (first["rankme"].standard_error or 0) + (second["rankme"].standard_error or 0)
    assert comparison.standard_error is not None
    assert comparison.standard_error < separate / 2


def test_lower_is_better_for_odcorr() -> None:
    correlated = features(16) + 2 * features(16)[:, :1]
    comparisons = compare(scores(16), measure(correlated, groups=SLIDES, metrics=["odcorr"]))
    assert [(v.name, v.outcome) for v in comparisons] == [("odcorr", "worse")]


def test_without_groups_nothing_is_claimed() -> None:
    comparison = compare(scores(4, groups=None), scores(8, groups=None))[0]
    assert (comparison.outcome, comparison.standard_error) == ("unknown", None)
    assert "no group ids" in str(comparison.reason)


def test_other_rows_are_no_comparison() -> None:
    half = measure(features(4)[:320], groups=SLIDES[:320])
    with pytest.raises(ValueError, match="rankme was measured on 640 and on 320 rows"):
        compare(scores(4), half)
    with pytest.raises(ValueError, match="no metric in common"):
        compare({}, scores(4))
    shuffled = measure(features(4), groups=SLIDES[::-1], metrics=["rankme"])
    with pytest.raises(ValueError, match="the same rows in the same order"):
        compare(scores(4), shuffled)


def test_the_best_is_chosen_when_it_stands_out() -> None:
    choice = select_checkpoint([scores(2), scores(12), scores(6)])
    assert (choice.position, choice.peak, choice.tied) == (1, 1, (1,))
    assert choice.reason.startswith("it has the highest rankme, ")
    assert "paired standard errors away" in choice.confidence


def test_on_a_plateau_the_first_is_chosen() -> None:
    run = [scores(2), scores(8, seed=1), scores(8, seed=2), scores(8, seed=3)]
    choice = select_checkpoint(run)
    assert choice.position == 1
    assert choice.tied == (1, 2, 3)
    assert choice.confidence.startswith("3 of 4 checkpoints cannot be told apart; it is chosen in ")
    if choice.peak != 1:
        assert choice.reason.startswith("the first whose rankme")


def test_the_share_is_that_of_the_normal_distribution() -> None:
    """The second of two is better by exactly the margin: half of the draws are within it."""
    first, second = scores(6)["rankme"], scores(6, seed=1, noise=0.05)["rankme"]
    change = difference(first, second)
    assert change.standard_error
    second = replace(second, value=first.value + change.margin)
    moved = replace(
        second, replicates=tuple(r + second.value - change.value - first.value for r in second.replicates or ())
    )
    share = choice_share([first, moved], chosen=0, sign=1)
    assert share == pytest.approx(0.5, abs=0.04)
    assert choice_share([first, first], chosen=0, sign=1) == 1.0
    assert choice_share([first, replace(second, replicates=None)], chosen=0, sign=1) is None


def test_without_errors_the_best_value_stands_alone() -> None:
    choice = select_checkpoint([named(1.0), named(3.0), named(2.0)])
    assert (choice.position, choice.tied) == (1, (1,))
    assert choice.confidence.startswith("not known: no group ids")


def test_nan_is_never_chosen() -> None:
    choice = select_checkpoint([named(float("nan"), reason="why"), named(1.0)])
    assert (choice.position, choice.confidence) == (1, "it is the only one that has a value")
    with pytest.raises(ValueError, match="NaN for every checkpoint: why"):
        select_checkpoint([named(float("nan"), reason="why")] * 2)


@pytest.mark.parametrize(
    ("run", "by", "message"),
    [
        ([named(1.0)], "rankme", "at least 2 checkpoints, got 1"),
        ([named(1.0), {}], "rankme", "'rankme' was not measured for 1 of 2"),
        ([scores(2), scores(4)], "alpha_req", "alpha_req has no better direction"),
    ],
)
def test_no_choice(run: list[dict[str, Measurement]], by: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        select_checkpoint(run, by=by)


def test_other_widths_do_not_compare() -> None:
    wide, narrow = (measure(features(16)[:, :d], groups=SLIDES, metrics=["rankme", "dead_features"]) for d in (16, 8))
    by_name = {c.name: c for c in compare(wide, narrow)}
    assert (by_name["rankme"].outcome, by_name["rankme"].reason) == (
        "unknown",
        "D = 16 and D = 8: it compares only at one D",
    )
    assert by_name["dead_features"].outcome == "no difference"


@pytest.mark.parametrize("sizes", [[100, 100], [150, 30], [60, 60, 60], [140, 30, 15, 10], [12] * 12])
def test_equals_are_not_called_different(sizes: list[int]) -> None:
    """Two encoders with features of the same distribution, on the same slides, at 2 to 12 slides, equal or not.

    Two standard errors are exceeded in 80 % of such draws with two slides. A rate of 6 % over 40 draws has an error of
    3.8 %. ``benchmarks/coverage.py`` has the rates of 400 draws.
    """
    slide = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    scale = torch.arange(1, 9) ** -0.5
    claims: dict[str, int] = {}
    for seed in range(40):
        random = torch.Generator().manual_seed(seed)

        def noise(random: torch.Generator = random) -> Tensor:
            return torch.randn(len(sizes), 8, generator=random)[slide] + torch.randn(len(slide), 8, generator=random)

        common = noise()
        first, second = (measure((common + 0.7 * noise()) * scale, groups=slide) for _ in range(2))
        for c in compare(first, second):
            claims[c.name] = claims.get(c.name, 0) + (c.outcome != "no difference")
            assert c.degrees_of_freedom is not None
            assert c.degrees_of_freedom <= len(sizes) - 1 + 1e-9
    assert max(claims.values()) <= 6, claims
