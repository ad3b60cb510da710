"""What a sweep file may say, what is refused, and what is made of the results; one sweep of real runs."""

from __future__ import annotations

import json
import math
import runpy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fit_runs import SMALL, call
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial
from paths import ROOT
from scipy.stats import norm
from small_runs import LIGHTNING_NOISE
from sweep_driver import make

from fmtrain.manifest.manifest import Manifest
from fmtrain.sweeps import results
from fmtrain.sweeps.config import parse_sweep, read
from fmtrain.sweeps.preflight import check_runs
from repmetrics.cli import main as repmetrics

pytestmark = [
    *(pytest.mark.filterwarnings(line) for line in LIGHTNING_NOISE),
    pytest.mark.filterwarnings("ignore:.*args parameter is intended to run.*"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:lightning"),
]

FILE: dict[str, Any] = {
    "study": "lr",
    "fit": "--config demo --data.manifest m.json",
    "metric": "rankme",
    "trials": 4,
    "parameters": {"model": {"schedules": {"lr": {"low": 1e-4, "high": 1e-2, "log": True}}}},
}


def test_toml_and_yaml_say_the_same(tmp_path: Path) -> None:
    (tmp_path / "s.toml").write_text(
        'study = "lr"\nfit = "--config demo"\nmetric = "odcorr"\ntrials = 4\n'
        'pruner = {name = "median", n_warmup_steps = 9}\n'
        'storage = "postgresql+psycopg://me@db/sweeps"\n[parameters]\nmodel.schedules.lr = {low = 1e-4, high = 1e-2}\n'
        '"data.batch_size" = {low = 16, high = 64, step = 16}\n"model.regularizer" = {choices = ["koleo", "kde"]}\n'
    )
    (tmp_path / "s.yaml").write_text(
        "{study: lr, fit: [--config, demo], metric: odcorr, trials: 4, pruner: {name: median, n_warmup_steps: 9},\n"
        "storage: {url: 'postgresql+psycopg://me@db/sweeps'},\n"
        "parameters: {model.schedules: {lr: {low: 1.0e-4, high: 1.0e-2}},"
        "data.batch_size: {low: 16, high: 64, step: 16},"
        "model.regularizer: {choices: [koleo, kde]}}}"
    )
    one, other = (parse_sweep(read(tmp_path / name)) for name in ("s.toml", "s.yaml"))
    assert one == other
    assert one.directions == ("minimize",)
    assert isinstance(one.parameters["data.batch_size"], IntDistribution)
    assert isinstance(one.parameters["model.regularizer"], CategoricalDistribution)


UPWARDS = {"direction": "maximize"}


def lr(**entry: Any) -> dict[str, Any]:
    return {"parameters": {"model.schedules.lr": entry}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"paramters": {}}, "a sweep has no 'paramters': did you mean parameters?"),
        (lr(low=1e-2, high=1e-4), "model.schedules.lr: low must be below high, got 0.01 and 0.0001"),
        (lr(low="1e-4", high=1e-2), "low must be a number, got '1e-4': YAML reads 1e-4 as text"),
        (lr(low=0.0, high=1.0, log=True), "model.schedules.lr: "),
        (lr(low=0.0, hihg=1.0), "has no 'hihg': did you mean high?"),
        (lr(choices=[]), "choices must be a list of values"),
        ({"parameters": {}}, "parameters must be a table of ranges"),
        ({"metric": "rankme_centred"}, "rankme_centred is not in the catalogue: give its direction"),
        ({"metric": "alpha_req"}, "alpha_req has no better direction"),
        ({"metric": "loss", "direction": "down"}, "direction must be maximize or minimize, one a metric, got 'down'"),
        ({"metric": ["rankme", "odcorr"], "pruner": "median"}, "2 metrics and pruner 'median' exclude each other"),
        ({"pruner": "medain"}, "pruner must be one of none, median"),
        ({"pruner": {"name": "median", "warmup": 3}}, "pruner median has no 'warmup'"),
        ({"sampler": "grid"}, "a grid needs choices for model.schedules.lr"),
        ({"trials": 0}, "trials must be a number of at least 1, got 0"),
        ({"fit": "--config demo --out there"}, "fit must not hold --out"),
        ({"fit": "--data.manifest m.json"}, "fit must name a configuration"),
        ({"launcher": "sbatch job.sh"}, "the launcher must hold {command}"),
        ({"storage": "sqlite:///s.db"}, "storage must begin with postgresql+psycopg://"),
        ({"storage": {"grace_seconds": 5}}, "grace_seconds must be above heartbeat_seconds, got 5 and 30"),
        ({"probe": {"best": 3}}, "probe must be a labelled data set"),
        ({"probe": {"data": "d", "best": "three"}}, "probe: best must be a whole number, got 'three'"),
        ({"study": ""}, "study must be a name"),
        ({"study": 5}, "a sweep: study must be text, got 5"),
        ({"fit": 5}, "a sweep: fit must be text or a list, got 5"),
        ({"trials": "many"}, "a sweep: trials must be a whole number, got 'many'"),
        ({"trials": True}, "trials must be a whole number, got True"),
        ({"stop_seconds": "1e2"}, "stop_seconds must be a number, got '1e2': YAML reads 1e-4 as text"),
        ({"storage": {"heartbeat_seconds": "x"}}, "storage: heartbeat_seconds must be a whole number, got 'x'"),
        ({"pruner": "percentile"}, "pruner percentile: PercentilePruner.__init__() missing 1 required"),
        ({"pruner": "threshold"}, "pruner threshold: Either lower or upper must be specified"),
        ({"pruner": {"name": "median", "n_startup_trials": -1}}, "pruner median: Number of startup trials"),
        (lr(low=0.1), "model.schedules.lr has no high: a range is"),
        (lr(low=0.1, high=0.2, log="yes"), "model.schedules.lr: log must be true or false, got 'yes'"),
    ],
)
def test_bad_files_are_refused_in_a_sentence(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse_sweep({**FILE, **change})
    assert message in str(caught.value)


# ── against `fmtrain fit` ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lr(low=0.1, high=0.2) | {"metric": "lidar"},
            "odcorr, loss, or add it to --monitor.metrics in fit",
        ),
        (
            lr(low=0.1, high=0.2) | {"metric": "knn"} | UPWARDS,
            "odcorr, loss, or give them labels by --data.probe in fit",
        ),
        ({"parameters": {"model.schedules.lrr": {"low": 0.1, "high": 0.2}}}, "'schedules.lrr': did you mean lr"),
        ({"parameters": {"data.batch_size": {"low": 1.5, "high": 2.5}}}, "Expected a <class 'int'>. Got value: 1.5"),
        ({"parameters": {"model.regularizer": {"choices": ["koleo", "kdd"]}}}, "Got value: kdd"),
        ({"fit": "--config no-such"}, "no configuration no-such"),
        ({"fit": "--config demo --data.manifest none.json"}, "none.json"),
    ],
)
def test_what_fit_would_not_understand_is_refused_before_any_trial(
    manifest: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: dict[str, Any],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    read_back = Manifest.load(manifest)
    assert read_back.classes
    labelled = parse_sweep({**FILE, "fit": f"--config demo --data.manifest {manifest}", "metric": "knn"} | UPWARDS)
    check_runs(labelled)
    bare = tuple(patch._replace(label=None) for patch in read_back.held_out)
    replace(read_back, path=tmp_path / "m.json", held_out=bare).save(root=manifest.parent / "slides")
    check_runs(parse_sweep(FILE))
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        check_runs(parse_sweep({**FILE, **change}))
    assert message in str(caught.value)


@pytest.mark.slow
def test_a_sweep_of_real_runs(
    manifest: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first is pruned at its first look, and the checkpoint that it leaves is scored; the second is completed."""
    monkeypatch.chdir(tmp_path)
    Path("small.yaml").write_text(SMALL)
    stated: dict[str, Any] = {
        "study": "real",
        "fit": f"--config small.yaml --data.manifest {manifest} --trainer.max_steps 60",
        "metric": "rankme",
        "trials": 1,
        "pruner": {"name": "threshold", "upper": 1.0},
        "parameters": {"model.schedules.lr": {"low": 1e-4, "high": 1e-3}},
    }
    Path("sweep.yaml").write_text(json.dumps(stated))
    assert call("sweep", "sweep.yaml") == 1
    told = capsys.readouterr().err
    assert "trial 0 was pruned at step 3: rankme" in told
    assert "none of 1 trials was completed" in told
    checkpoint = "real/trials/0000/run/checkpoints/last.ckpt"
    with pytest.raises(SystemExit, match="0"):
        repmetrics(["score", checkpoint, "--data", str(manifest), "--json", "--no-cache"])
    assert 3 <= json.loads(capsys.readouterr().out)["scores"][0]["step"] < 60
    Path("sweep.yaml").write_text(json.dumps(stated | {"trials": 2, "pruner": "none", "probe": str(manifest)}))
    assert call("sweep", "sweep.yaml", "--json") == 0
    rows = json.loads(capsys.readouterr().out)["trials"]
    assert [(row["number"], row["state"]) for row in rows] == [(1, "complete"), (0, "pruned")]
    assert rows[0]["step"] == 60
    assert rows[0]["probe"]["linear_probe"]["value"] > 0
    assert rows[0]["signals"]["rankme"][1] > 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the libraries have their own
def test_an_objective_of_ones_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    example = ROOT / "docs" / "examples" / "optuna_objective.py"
    study = runpy.run_path(str(example))["main"](tmp_path)
    states = [trial.state for trial in study.trials]
    assert states.count(TrialState.COMPLETE) + states.count(TrialState.PRUNED) == len(states) == 6
    assert TrialState.PRUNED in states
    for trial in study.trials:
        lines = [json.loads(line) for line in next((tmp_path / f"{trial.number}").rglob("*.jsonl")).open()]
        seen = {line["step"]: line["measurements"]["rankme"]["value"] for line in lines if line["step"]}
        assert trial.intermediate_values == pytest.approx(seen)
    assert "not worse than the best beyond noise: lr" in capsys.readouterr().out


# ── what is made of the results ────────────────────────────────────────────────────────────────────────────────────


def done(
    number: int, x: float, rank: float, error: float | None, *, odcorr: float = 0.5, alarms: int = 0
) -> FrozenTrial:
    look = {"step": 9, "alarms": alarms, "signals": {"rankme": [rank, error], "odcorr": [odcorr, None]}}
    space: dict[str, BaseDistribution] = {"x": FloatDistribution(0, 1)}
    attrs = {"look": look, "folder": f"trials/{number:04}"}
    made = create_trial(params={"x": x}, distributions=space, value=rank, user_attrs=attrs)
    made.number = number
    return made


def test_the_best_come_first_and_what_does_not_count_is_left_out(tmp_path: Path) -> None:
    crashed = create_trial(state=TrialState.FAIL, user_attrs={"crash": "ended with exit code 1: no room"})
    given_on, pruned = create_trial(state=TrialState.FAIL), done(2, 0.5, 60.0, 1.0)
    crashed.number, given_on.number, pruned.state = 3, 4, TrialState.PRUNED
    trials = [done(0, 0.1, 40.0, 1.0), done(1, 0.2, 50.0, 1.0), pruned, crashed, given_on]
    rows = results.rows(trials, make(tmp_path))
    assert [(row.number, row.state) for row in rows] == [
        (1, "complete"),
        (0, "complete"),
        (2, "pruned"),
        (3, "crashed"),
    ]
    assert rows[3].why == "ended with exit code 1: no room"


def test_a_plateau_is_told_and_its_smallest_setting_named(tmp_path: Path) -> None:
    trials = [done(0, 0.9, 45.0, 1.0), done(1, 0.3, 44.0, 1.0), done(2, 0.1, 30.0, 1.0)]
    said = results.conclusion(results.rows(trials, make(tmp_path)), make(tmp_path))
    assert said[0] == "trial 0 has the highest rankme"
    assert said[1] == "noise cannot tell apart trials 0, 1"
    assert said[2] == "RankMe's rule takes the smallest x among them: trial 1"


def test_a_trial_with_an_alarm_is_not_counted_and_a_gamed_axis_is_named(tmp_path: Path) -> None:
    trials = [done(0, 0.9, 45.0, None, odcorr=0.1, alarms=1), done(1, 0.3, 44.0, None), done(2, 0.1, 30.0, None)]
    alarmed = [done(k, 0.1 * k, 40.0 + k, None, alarms=1) for k in range(3)]
    sweep = make(tmp_path, parameters={"model.regularizer_weight": FloatDistribution(0, 1)})
    said = results.conclusion(results.rows(trials, sweep), sweep)
    assert "whether others are as good is not known: the runs give no standard errors" in said
    assert "Borda's count over rankme, odcorr prefers trial 1" in said
    assert "a collapse alarm stood at the end of: 0; do not take one of these unseen" in said
    assert said[-1].startswith("regularizer_weight presses features apart")
    assert not any("Borda" in line for line in results.conclusion(results.rows(alarmed, sweep), sweep))


def test_a_front_holds_what_no_other_beats(tmp_path: Path) -> None:
    sweep = make(tmp_path, metrics=("rankme", "odcorr"), directions=("maximize", "minimize"))
    trials = [done(0, 0.1, 40, 1, odcorr=0.2), done(1, 0.2, 50, 1, odcorr=0.3), done(2, 0.3, 45, 1, odcorr=0.35)]
    assert [row.number for row in results.pareto_front(results.rows(trials, sweep), sweep)] == [1, 0]


@pytest.mark.parametrize("noise", [0.5, 2.0, 8.0])
def test_the_rule_finds_the_known_best_as_often_as_noise_allows(tmp_path: Path, noise: float) -> None:
    """Eight settings whose true ranks are known, measured with known errors, 400 sweeps.

    The best measured is the truly best one in a share of sweeps that is an integral over the best one's noise; the
    plateau holds the truly best one more often, and a single other setting leaves it only by more than two errors of
    the difference, i.e. in at most 2.3 % of sweeps.
    """
    settings = np.linspace(0.05, 0.95, 8)
    truth = 40 - 60 * (settings - 0.7) ** 2
    best = int(truth.argmax())
    grid = np.linspace(-8, 8, 4001)
    others = np.prod([norm.cdf((truth[best] - other) / noise + grid) for other in np.delete(truth, best)], axis=0)
    expected = float(np.trapezoid(norm.pdf(grid) * others, grid))
    generator, sweep = np.random.default_rng(0), make(tmp_path)
    found, held, sweeps = 0, 0, 400
    for _ in range(sweeps):
        seen = truth + noise * generator.standard_normal(8)
        rows = results.rows([done(k, x, seen[k], noise) for k, x in enumerate(settings)], sweep)
        found += results.pareto_front(rows, sweep)[0].number == best
        held += best in {row.number for row in results.tied_rows(rows, sweep)}
    assert abs(found / sweeps - expected) < 4 * math.sqrt(expected * (1 - expected) / sweeps) + 1e-9
    assert held / sweeps >= max(1 - 7 * norm.sf(2), found / sweeps)
