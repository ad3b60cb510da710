"""Settings and finished runs that are known before a study begins."""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
from optuna.distributions import CategoricalDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState
from sweep_driver import make

from fmtrain.sweeps import results
from fmtrain.sweeps.config import known_setting
from fmtrain.sweeps.driver import SweepWorker
from fmtrain.sweeps.settings import NamedOptions, Sweep


def drive(sweep: Sweep) -> tuple[list[FrozenTrial], list[str]]:
    lines: list[str] = []
    with closing(SweepWorker(sweep, log=lines.append)) as driver:
        return driver.run(), lines


def write_run(folder: Path, values: Sequence[Any], *, x: float, alarms: Sequence[Any] = ()) -> None:
    """A finished run with these values of RankMe at steps 0, 10, 20 …"""
    folder.mkdir(parents=True)
    (folder / "hparams.yaml").write_text(f"x: {x}\n")
    with (folder / "measurements.jsonl").open("w") as file:
        for k, value in enumerate(values):
            measured = {"rankme": {"value": value, "standard_error": 0.5, "details": {}, "d": 8}}
            line = {"step": 10 * k, "loss": 1.0, "alarms": list(alarms), "measurements": measured}
            file.write(json.dumps(line) + "\n")


def test_finished_runs_are_imported_once(tmp_path: Path) -> None:
    """A run that diverged and one with an alarm teach the sampler too: they rank below complete ones."""
    write_run(tmp_path / "old" / "a", [60.0, 40.0, 99.0], x=0.5)
    write_run(tmp_path / "old" / "b", [60.0, 70.0, None], x=0.1)
    write_run(tmp_path / "old" / "c", [60.0, 70.0, float("nan")], x=0.2)
    write_run(tmp_path / "old" / "d", [60.0, 3.0], x=0.9, alarms=[["complete collapse", 10]])
    sweep = make(tmp_path / "new", trials=1, finished=(tmp_path / "old",))
    trials, lines = drive(sweep)
    assert sum(line.startswith("imported ") for line in lines) == 4
    assert len(trials) == 5  # they are no trials to run
    a, b, c, d, _ = trials
    assert (a.params["x"], a.value, a.intermediate_values) == (0.5, 99.0, {10: 40.0, 20: 99.0})
    assert [t.state for t in (b, c, d)] == 3 * [TrialState.PRUNED]
    rows = {row.number: row.state for row in results.rows(trials, sweep)}
    assert [rows[number] for number in range(4)] == ["complete", "diverged", "diverged", "collapsed"]
    assert len(drive(sweep)[0]) == 5


def test_a_run_that_never_measured_the_metric_is_refused(tmp_path: Path) -> None:
    write_run(tmp_path / "old" / "a", [None, None], x=0.5)
    with pytest.raises(ValueError, match=r"old/a has no rankme: it cannot be imported"):
        SweepWorker(make(tmp_path / "new", finished=(tmp_path / "old",)), log=print)


def test_drivers_that_start_together_add_what_is_known_once(tmp_path: Path) -> None:
    for k in range(4):
        write_run(tmp_path / "old" / str(k), [60.0, 40.0], x=0.1 * k)
    first = tuple({"x": 0.2 + 0.1 * k} for k in range(4))
    sweep = make(tmp_path / "new", first=first, finished=(tmp_path / "old",))
    barrier = Barrier(4)

    def start(_: int) -> None:
        barrier.wait()
        with closing(SweepWorker(sweep, log=lambda line: None)):
            pass

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(start, range(4)))
    with closing(SweepWorker(sweep, log=print)) as driver:
        trials = driver.study.trials
    assert [t.state for t in trials] == 4 * [TrialState.WAITING] + 4 * [TrialState.COMPLETE]


def test_a_grid_does_not_repeat_what_was_tried_first(tmp_path: Path) -> None:
    sweep = make(
        tmp_path,
        parameters={"x": IntDistribution(0, 2), "flag": CategoricalDistribution([True, False, None])},
        sampler=NamedOptions("grid", {}),
        trials=None,
        first=({"x": 1, "flag": False},),
    )
    trials, _ = drive(sweep)
    assert trials[0].params == {"x": 1, "flag": False}
    complete = [tuple(t.params.values()) for t in trials if t.state == TrialState.COMPLETE]
    assert len(complete) == len(set(complete)) == 9


@pytest.mark.parametrize(("value", "inside"), [(32, True), (24, False), (32.5, False), (True, False), ("32", False)])
def test_a_known_setting_is_one_that_the_range_can_give(value: object, inside: bool) -> None:
    space = {"data.batch_size": IntDistribution(16, 64, step=16)}
    if inside:
        assert known_setting({"data": {"batch_size": value}}, space) == {"data.batch_size": value}
    else:
        with pytest.raises(ValueError, match=r"first: data.batch_size = .* is outside its range"):
            known_setting({"data": {"batch_size": value}}, space)
