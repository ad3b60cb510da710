"""The ranking of finished runs: exclusion, seeds, confidence, and settings that make a comparison unfair."""

from __future__ import annotations

import math

import pytest
from scipy.stats import norm

from repmetrics.decisions.comparability import axis_warning, comparison_warnings
from repmetrics.decisions.run_ranking import RunSummary, borda_winner, conclusions, confidence, rank_runs


def run(name: str, value: float, error: float | None = 1.0, **fields: object) -> RunSummary:
    return RunSummary(name, "complete", {}, 9, {"rankme": (value, error)})._replace(**fields)  # type: ignore[arg-type]


def test_confidence_is_the_probability_that_the_first_is_best() -> None:
    share = confidence([3.0, 2.0], [1.0, 1.0])
    assert share == pytest.approx(norm.cdf(1 / math.sqrt(2)), abs=4 * math.sqrt(0.25 / 4000))
    assert confidence([3.0], [1.0]) is None
    assert confidence([3.0, 2.0], [0.0, 0.0]) == 1.0


def test_only_complete_runs_without_an_alarm_are_chosen() -> None:
    runs = [
        run("alarmed", 90.0, alarms=("complete collapse",)),
        run("diverged", 80.0, state="diverged", reason="rankme has no value at its end"),
        run("infinite", math.inf),
        run("good", 50.0),
        run("other", 40.0),
    ]
    ranking = rank_runs(runs, metric="rankme", direction="higher")
    assert [s.name for s in ranking.settings] == ["good", "other"]
    assert [r.name for r in ranking.excluded] == ["alarmed", "diverged", "infinite"]
    lines = conclusions(ranking)
    assert lines[0] == "good has the highest rankme"
    assert "excluded, alarm at its end: alarmed (complete collapse): inspect before using it" in lines
    assert "diverged diverged: rankme has no value at its end" in lines
    assert "infinite has no value to rank" in lines
    assert any(line.startswith("seed noise is not in the errors") for line in lines)
    nothing = rank_runs(runs[:3], metric="rankme", direction="higher")
    assert conclusions(nothing)[0] == "no run can be chosen"
    assert borda_winner(nothing) is None


def test_equal_values_choose_nothing() -> None:
    ranking = rank_runs([run("a", 3.0), run("b", 3.0), run("c", 1.0)], metric="rankme", direction="higher")
    assert conclusions(ranking)[0] == "a, b have the same rankme, the highest: it does not choose among them"


def test_lower_is_better_where_the_metric_says_so() -> None:
    ranking = rank_runs([run("a", 3.0), run("b", 1.0)], metric="rankme", direction="lower")
    assert [s.name for s in ranking.settings] == ["b", "a"]
    with pytest.raises(ValueError, match="has no better direction"):
        rank_runs([run("a", 3.0)], metric="rankme", direction="neither")


def test_a_repeat_of_an_excluded_run_stands_for_itself() -> None:
    runs = [run("a", 3.0, alarms=("alarm",)), run("b", 2.0, repeats="a"), run("c", 1.0)]
    assert [s.name for s in rank_runs(runs, metric="rankme", direction="higher").settings] == ["b", "c"]


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("model.class_path", "methods"),
        ("model.init_args.arch", "architecture"),
        ("model.init_args.arch_kwargs.embed_dim", "architecture"),
        ("monitor.encoder", "which features"),
        ("monitor.layers", "which features"),
        ("data.manifest", "samples"),
        ("model.init_args.augment.global_crops_size", "resolution"),
        ("img_size", "resolution"),
        ("model.init_args.n_prototypes", "head"),
        ("proj_hidden_dim", "head"),
        ("data.batch_size", "images seen in each step"),
        ("per_device_train_batch_size", "images seen in each step"),
        ("weight_decay", "spectrum"),
        ("model.init_args.augment.brightness", "augmentation"),
        ("model.init_args.augment.local_crops_scale", "augmentation"),
        ("trainer.max_steps", "length of training"),
        ("num_train_epochs", "length of training"),
        ("seed_everything", "noise"),
        ("model.init_args.koleo_weight", "rank"),
        ("variance_weight", "rank"),
        ("model._target_", "methods"),
        ("model.init_args.layer_scale", "architecture"),
        ("embedDim", "architecture"),
        ("monitor.data", "samples"),
        ("batchSize", "images seen in each step"),
        ("weightDecay", "spectrum"),
        ("num_views", "augmentation"),
        ("mixup", "augmentation"),
        ("n_iterations", "length of training"),
        ("model.init", "starts"),
        ("pretrained", "starts"),
    ],
)
def test_an_unfair_axis_is_named_with_the_reason(name: str, word: str) -> None:
    warning = axis_warning(name)
    assert warning is not None
    assert warning.startswith(name.rpartition(".")[2])
    assert word in warning


def test_a_setting_that_is_called_name_is_known_by_its_parent() -> None:
    assert str(axis_warning("backbone.name")).startswith("backbone changes the architecture")
    assert axis_warning("optimizer.name") is None
    assert axis_warning("name") is None


FAIR = ["model.schedules.lr", "schedules.lr_batch_size", "teacher_temp", "momentum_teacher", "optimizer", "beta1"]


@pytest.mark.parametrize("name", FAIR)
def test_a_fair_axis_passes(name: str) -> None:
    assert axis_warning(name) is None
    assert comparison_warnings([name]) == []
