"""The driver of sweeps, on fake trials: processes that behave like `fmtrain fit` but take a moment."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

import optuna
import pytest
import sweep_driver
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState, create_trial
from postgresql import PostgreSQL, server_binaries, until
from sweep_driver import FAKE, SPACE, make

from fmtrain.sweeps.decisions import finished, initial_crashes, is_spent, is_surplus, next_step
from fmtrain.sweeps.driver import SweepWorker
from fmtrain.sweeps.endings import ending, make_retry
from fmtrain.sweeps.journal import Journal
from fmtrain.sweeps.parameters import combinations
from fmtrain.sweeps.process import Evaluation, MeasurementsTail, TrialProcess, create_lock, last_lines, try_lock
from fmtrain.sweeps.pruning import MedianAtStep, PercentileAtStep, Stages, share_behind, standing_alarms
from fmtrain.sweeps.settings import NamedOptions, Seeds, Storage, Sweep
from fmtrain.sweeps.study import is_connection_error, sampler
from fmtrain.sweeps.trial_run import TrialRun


def drive(sweep: Sweep) -> tuple[list[FrozenTrial], list[str]]:
    lines: list[str] = []
    with closing(SweepWorker(sweep, log=lines.append)) as driver:
        return driver.run(), lines


def stored(sweep: Sweep) -> list[FrozenTrial]:
    """Trials in the study."""
    with closing(SweepWorker(sweep, log=print)) as driver:
        return driver.study.trials


# ── pure decisions ─────────────────────────────────────────────────────────────────────────────────────────────────


def trial(number: int, state: TrialState, **attrs: Any) -> FrozenTrial:
    frozen = create_trial(state=state, value=1.0 if state == TrialState.COMPLETE else None, user_attrs=attrs)
    frozen.number = number
    return frozen


DONE, PRUNED, FAILED = TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL
RUNNING, WAITING = TrialState.RUNNING, TrialState.WAITING


def test_what_counts() -> None:
    assert [finished(trial(0, state)) for state in (DONE, PRUNED, FAILED, RUNNING, WAITING)] == [True, True] + 3 * [
        False
    ]
    assert finished(trial(0, FAILED, crash="exit code 1"))


@pytest.mark.parametrize(
    ("states", "step"),
    [
        ([], "ask"),
        ([DONE, RUNNING], "ask"),
        ([DONE, RUNNING, RUNNING], "wait"),
        ([DONE, FAILED, WAITING, RUNNING], "ask"),  # the waiting trial is asked for first
        ([DONE, PRUNED, DONE], "done"),
        ([DONE, PRUNED, DONE, RUNNING], "done"),
    ],
)
def test_what_a_driver_does_next(states: Sequence[TrialState], step: str) -> None:
    assert next_step([trial(i, state) for i, state in enumerate(states)], wanted=3) == step


def test_two_drivers_that_ask_for_the_last_trial_run_it_once() -> None:
    trials = [trial(0, DONE), trial(1, FAILED), trial(2, RUNNING), trial(3, RUNNING), trial(4, RUNNING)]
    assert [is_surplus(trials, number, wanted=3) for number in (2, 3, 4)] == [False, False, True]


def test_three_crashes_end_the_driver_only_before_any_success() -> None:
    crashed = [trial(i, FAILED, crash="exit code 1") for i in range(3)]
    assert initial_crashes(crashed, wanted=9) == 3
    assert initial_crashes(crashed[:2], wanted=9) == 0
    assert initial_crashes([*crashed[:2], trial(2, FAILED)], wanted=9) == 0  # re-queued: not a crash
    assert initial_crashes(crashed[:1], wanted=1) == 1
    for state in (DONE, PRUNED):  # also one of an earlier call or another driver
        assert initial_crashes([*crashed, trial(3, state)], wanted=9) == 0


def attempt(number: int, *, step: int | None = None, before: FrozenTrial | None = None) -> FrozenTrial:
    """An attempt that ended after an evaluation at this step."""
    look = {} if step is None else {"look": {"step": step, "alarms": 0, "signals": {}}}
    system = {} if before is None else before.system_attrs
    frozen = create_trial(
        state=FAILED, params={"x": 0.25}, distributions={"x": SPACE}, user_attrs=look, system_attrs=system
    )
    frozen.number = number
    return frozen


def retried(kinds: Sequence[Any], steps: Sequence[int | None]) -> FrozenTrial:
    """What replaces a trial after attempts that ended so, at these steps."""
    retry = None
    for number, (kind, step) in enumerate(zip(kinds, steps, strict=True)):
        retry = make_retry(attempt(number, step=step, before=retry), kind, saved=False)
        assert retry.state == WAITING or number == len(kinds) - 1
    assert retry is not None
    return retry


def test_a_retry_keeps_settings_and_folder() -> None:
    retry = retried(["stopped", "ordered"], [10, 20])
    assert retry.params == {"x": 0.25}
    assert retry.user_attrs == {}
    assert retry.system_attrs["failed_trial"] == 0
    assert retry.system_attrs["retry_history"] == [0, 1]


def test_only_attempts_without_progress_count() -> None:
    assert retried(["stopped"] * 9, range(0, 90, 10)).state == WAITING
    assert retried(["ordered"] * 9, [None] * 9).state == WAITING  # an orderly interruption is no failure
    assert retried(["stopped"] * 4 + ["ordered"] * 3, [None] * 7).state == WAITING
    given_up = retried(["stopped"] * 5, [None] * 5)
    assert given_up.state == FAILED
    assert given_up.user_attrs["crash"] == "given up after 5 attempts without progress"
    assert finished(given_up)
    assert make_retry(attempt(1, before=retried(["stopped"] * 4, [None] * 4)), "stopped", saved=True).state == WAITING


def test_out_of_memory_twice_is_a_failed_setting() -> None:
    assert retried(["out of memory"], [40]).state == WAITING
    failed = retried(["out of memory"] * 2, [40, 40])
    assert failed.state == PRUNED  # the sampler learns from it
    assert failed.user_attrs["ending"] == ["out of memory", "memory did not suffice 2 times"]
    assert failed.user_attrs["look"]["step"] == 40
    assert retried(["out of memory"] * 3, [40, 80, 120]).state == WAITING  # it gets further each time


LINE = Evaluation(10, (), {"rankme": (9.0, 0.5)}, finite=True)
EMPTY = LINE._replace(step=20, values={"loss": (1.0, None)})


@pytest.mark.parametrize(
    ("code", "evaluations", "lines", "kind"),
    [
        (0, [LINE], [], "complete"),
        (0, [LINE._replace(alarms=("complete collapse",))], [], "collapsed"),
        (0, [LINE, EMPTY], [], "diverged"),
        (0, [EMPTY._replace(finite=False)], [], "diverged"),
        (0, [EMPTY], [], "crashed"),  # never measured
        (0, [], [], "crashed"),
        (1, [LINE], ["ValueError: the weights are not finite at step 9; nothing was written"], "diverged"),
        (1, [LINE], ["ValueError: The loss returned in `training_step` is nan or inf."], "diverged"),
        (1, [LINE], ["KeyError: 'banana'"], "crashed"),
        (1, [LINE], ["torch.OutOfMemoryError: CUDA out of memory."], "out of memory"),
        (137, [LINE], [], "out of memory"),
        (-9, [LINE], [], "out of memory"),
        (1, [LINE], ["  traceback : Signal 9 (SIGKILL) received by PID 7", "====="], "out of memory"),
        (1, [LINE], ["  traceback : Signal 15 (SIGTERM) received by PID 7", "====="], "stopped"),
        (0, [LINE], ["[rank: 0] Received SIGTERM: 15"], "stopped"),  # Lightning's own handler
        (
            1,
            [LINE],
            ["error: *** STEP 8.0 ON n CANCELLED AT 2026-08-12T02:06 DUE TO TIME LIMIT ***"],
            "stopped",
        ),
        (1, [LINE], ["slurmstepd: error: Detected 1 oom_kill event in StepId=8.0", "srun: error: n"], "out of memory"),
        (143, [LINE], [], "stopped"),
        (130, [LINE], [], "stopped"),
        (139, [LINE], [], "crashed"),  # a segmentation fault
        (255, [LINE], [], "crashed"),
    ],
)
def test_endings(code: int, evaluations: list[Evaluation], lines: list[str], kind: str) -> None:
    assert ending(code, evaluations, lines, metrics=["rankme"], pruned=None).kind == kind
    assert ending(code, evaluations, lines, metrics=["rankme"], pruned="at step 9").kind == "pruned"


def test_draws_depend_on_seed_and_number_alone(tmp_path: Path) -> None:
    def draw(seed: int, number: int, name: str = "random") -> float:
        sweep = make(tmp_path, sampler=NamedOptions(name, {"seed": seed}))
        return float(sampler(sweep, number).sample_independent(None, None, "x", SPACE))  # type: ignore[arg-type]

    assert draw(0, 3) == draw(0, 3)
    assert len({draw(0, 3), draw(0, 4), draw(1, 3), draw(1, 4)}) == 4


def test_a_tail_gives_each_whole_line_once(tmp_path: Path) -> None:
    path = tmp_path / "lightning_logs" / "version_0" / "measurements.jsonl"
    path.parent.mkdir(parents=True)
    tail = MeasurementsTail(tmp_path)

    def steps() -> list[int]:
        return [evaluation.step for evaluation in tail.new()]

    def lines(*numbers: int) -> str:
        return "".join(f'{{"step": {n}, "measurements": {{}}}}\n' for n in numbers)

    assert steps() == []
    path.write_text(lines(0) + '{"st')
    assert steps() == [0]
    assert steps() == []
    broken = '\0\0\n[1]\n{"step": 2}\n{"step": 3, "measurements": 0}\n{"step": Infinity, "measurements": {}}\n'
    broken += '{"step": -1, "measurements": {}}\n{"step": NaN, "measurements": {}}\n'
    broken += '{"step": 3, "measurements": {"a": {"value": 1' + 400 * "0" + "}}}\n" + 9999 * "[" + "\n"
    path.write_text(lines(0, 1) + broken + lines(4))
    assert steps() == [1, 4]
    assert tail.unreadable == 9
    temporary = tmp_path / "new"  # a resumed run writes its history again
    temporary.write_text(lines(*range(9)))
    temporary.replace(path)
    assert steps() == list(range(9))


def test_a_torn_journal_keeps_its_whole_records(tmp_path: Path) -> None:
    sweep = make(tmp_path, trials=1)
    drive(sweep)
    path = tmp_path / "journal.log"
    whole = path.read_bytes()
    first, second = whole.split(b"\n")[:2]
    for torn in (whole[:-20], whole + bytes(512), whole + b"{\xff", first + b"\n" + first[:9] + second + b"\n"):
        path.write_bytes(torn)
        said: list[str] = []
        Journal(path, log=said.append)
        assert whole.startswith(path.read_bytes())
        assert path.read_bytes().endswith(b"\n")
        assert "bytes of incomplete records removed" in said[0]
    path.write_bytes(whole.replace(b"\n", b"", 1))  # the first two records share a line
    Journal(path, log=print)
    assert path.read_bytes() == whole
    path.write_bytes(whole)
    with closing(SweepWorker(sweep, log=print)) as driver:
        path.write_bytes(whole + b'{"op_code":4,"worker')  # another driver was killed while this one works
        driver.study.set_user_attr("note", 1)
    assert [t.state for t in stored(sweep)] == [DONE]


def test_a_record_that_cannot_be_written_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(tmp_path / "journal.log", log=print)
    journal.append_logs([{"op_code": 1}])

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space") as caught:
            journal.append_logs([{"op_code": 2}])
    assert is_connection_error(caught.value)  # the driver waits for space
    journal.append_logs([{"op_code": 3}])
    assert [entry["op_code"] for entry in journal.read_logs(0)] == [1, 3]


def test_a_lock_is_free_after_its_holder_has_ended(tmp_path: Path) -> None:
    path = tmp_path / "locks" / "0000"
    with try_lock(path) as free:
        assert not free  # it does not exist yet
    with create_lock(path), try_lock(path) as free:
        assert not free
    with try_lock(path) as free:
        assert free


def test_last_lines_of_a_progress_bar(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("a\n\n1%\r2%\r3%\nb\n")
    assert last_lines(tmp_path / "log", 3) == ["2%", "3%", "b"]


# ── one driver ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_sweep_reports_values_errors_and_signals(tmp_path: Path) -> None:
    trials, lines = drive(make(tmp_path))
    assert [t.state for t in trials] == 3 * [DONE]
    for t in trials:
        assert t.value == pytest.approx(1 + 100 * (1 - (t.params["x"] - 0.7) ** 2))
        assert sorted(t.intermediate_values) == [10, 20, 30, 40, 50]  # not of step 0
        assert t.user_attrs["look"]["step"] == 50
        assert t.user_attrs["look"]["signals"]["rankme"] == [t.value, 0.5]
        assert t.user_attrs["look"]["signals"]["loss"] == [5.0, None]
        folder = Path(t.user_attrs["folder"])
        assert "--x" in json.loads((folder / "trial.json").read_text())["command"]
        assert "step 50" in (folder / "log.txt").read_text()
    assert any("has rankme" in line and "± 0.5" in line for line in lines)
    backend = JournalFileBackend(str(tmp_path / "journal.log"))  # as optuna-dashboard reads it
    shown = optuna.load_study(study_name="test", storage=JournalStorage(backend)).trials
    assert [(t.values, t.intermediate_values, t.params) for t in shown] == [
        (t.values, t.intermediate_values, t.params) for t in trials
    ]


def test_a_resumed_sweep_draws_as_an_uninterrupted_one(tmp_path: Path) -> None:
    whole, _ = drive(make(tmp_path / "whole", trials=4))
    drive(make(tmp_path / "parts", trials=2))
    parts, _ = drive(make(tmp_path / "parts", trials=4))
    assert [t.params for t in parts] == [t.params for t in whole]
    again, lines = drive(make(tmp_path / "parts", trials=4))
    assert len(again) == 4
    assert lines == []


def test_a_pruned_trial_is_stopped_saved_and_counted(tmp_path: Path) -> None:
    space = {"x": CategoricalDistribution([0.7, 0.1])}
    pruner = NamedOptions("threshold", {"lower": 30.0, "n_warmup_steps": 20})
    sweep = make(
        tmp_path, parameters=space, sampler=NamedOptions("grid", {}), trials=2, pruner=pruner, fit=("--config", "2")
    )
    trials, lines = drive(sweep)
    by = {t.params["x"]: t for t in trials}
    assert by[0.7].state == DONE
    assert by[0.1].state == PRUNED
    assert by[0.1].value == by[0.1].intermediate_values[by[0.1].last_step or 0]
    folder = Path(by[0.1].user_attrs["folder"])
    assert (folder / "run" / "checkpoints" / "last.ckpt").is_file()
    assert last_lines(folder / "log.txt")[-1] == "stopped by SIGTERM"
    assert any("was pruned at step 20: rankme 26.6" in line for line in lines)


def test_a_crash_is_shown_and_the_study_continues(tmp_path: Path) -> None:
    space = {"x": CategoricalDistribution([0.7, -1.0])}
    trials, lines = drive(make(tmp_path, parameters=space, sampler=NamedOptions("grid", {}), trials=2))
    assert Counter(t.state for t in trials) == {DONE: 1, FAILED: 1}
    assert any("ended with exit code 1" in line and "no such file" in line for line in lines)
    assert "no such file" in next(t.user_attrs["crash"] for t in trials if t.state == FAILED)


def test_all_crash_stop(tmp_path: Path) -> None:
    sweep = make(tmp_path, parameters={"x": FloatDistribution(-2.0, -1.0)}, trials=9)
    with pytest.raises(ValueError, match=r"the first 3 trials crashed and none succeeded: see the end of .*0002"):
        drive(sweep)


def test_a_missing_command_is_a_crash(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the first 1 trials crashed"):
        drive(make(tmp_path, launcher="no-such-launcher {command}", trials=1))
    assert "no-such-launcher cannot be started: No such file" in (tmp_path / "trials" / "0000" / "log.txt").read_text()


def test_several_metrics_are_reported_together(tmp_path: Path) -> None:
    sweep = make(tmp_path, metrics=("rankme", "odcorr"), directions=("maximize", "minimize"), trials=2)
    for t in drive(sweep)[0]:
        assert t.values == [t.user_attrs["look"]["signals"][name][0] for name in ("rankme", "odcorr")]
        assert t.intermediate_values == {}


def test_another_sweep_of_the_same_name_is_refused(tmp_path: Path) -> None:
    drive(make(tmp_path, trials=1))
    with pytest.raises(ValueError, match="study 'test' holds another sweep: parameters differ"):
        drive(make(tmp_path, parameters={"x": FloatDistribution(0.0, 0.5)}))
    with pytest.raises(ValueError, match="holds trials of another study"):
        drive(make(tmp_path, study="other"))


def test_an_unreachable_database_is_named_without_the_password(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"postgresql+psycopg://me:secret@127.0.0.1:{free.getsockname()[1]}/sweeps"
    lines: list[str] = []
    with pytest.raises(ConnectionError, match="is unreachable for") as caught:
        SweepWorker(make(tmp_path, storage=Storage(url, patience_seconds=0.2)), log=lines.append)
    assert "refused" in str(caught.value)
    assert "secret" not in " ".join([*lines, str(caught.value)])


def test_a_grid_runs_every_combination_once(tmp_path: Path) -> None:
    space = {"x": CategoricalDistribution([0.1, 0.7]), "y": IntDistribution(1, 3)}
    assert combinations(space) == {"x": [0.1, 0.7], "y": [1, 2, 3]}
    trials, _ = drive(make(tmp_path, parameters=space, sampler=NamedOptions("grid", {}), trials=6))
    assert len({tuple(t.params.values()) for t in trials if t.state == DONE}) == 6


def test_the_search_learns_from_divergence(tmp_path: Path) -> None:
    """Below x = 0 trials diverge. The first three do, the study goes on, and they rank below what is complete."""
    first = tuple({"x": x} for x in (-3.0, -2.0, -1.0))
    space = {"x": FloatDistribution(-4.0, 1.0)}
    sweep = make(
        tmp_path, parameters=space, trials=5, first=first, launcher=f"{{python}} {FAKE} {{out}} {{command}} nan"
    )
    trials, lines = drive(sweep)
    assert [t.params["x"] for t in trials[:3]] == [-3.0, -2.0, -1.0]
    assert [t.user_attrs["ending"][0] for t in trials[:3]] == 3 * ["diverged"]
    assert [t.state for t in trials[:3]] == 3 * [PRUNED]  # TPE ranks them below any that is complete
    assert any("diverged, ranked below all complete trials: rankme is not finite" in line for line in lines)


def test_a_trial_that_a_signal_ends_alone_is_resumed(tmp_path: Path) -> None:
    launcher = f"{{python}} {FAKE} {{out}} {{command}} killed"  # the first attempt kills itself at step 30
    trials, lines = drive(make(tmp_path, trials=1, launcher=launcher))
    assert [t.state for t in trials] == [FAILED, DONE]
    assert trials[1].system_attrs["retry_history"] == [0]
    assert "trial 0: trial re-queued" in lines
    assert [path.name for path in (tmp_path / "trials").iterdir()] == ["0000"]


def test_a_collapse_is_pruned_by_its_value_at_the_step(tmp_path: Path) -> None:
    study = optuna.create_study(direction="maximize")
    space = {"x": SPACE}

    def add(values: dict[int, float], state: TrialState = DONE) -> FrozenTrial:
        last = values[max(values)]
        frozen = create_trial(
            state=state,
            value=last if state == DONE else None,
            params={"x": 0.5},
            distributions=space,
            intermediate_values=values,
        )
        study.add_trial(frozen)
        return study.trials[-1]

    for k in range(3):
        add({10: 50.0 + k, 20: 40.0 + k, 30: 30.0 + k})
    collapsed = add({10: 60.0, 20: 4.0}, PRUNED)  # its best value is the best of all
    healthy = add({10: 20.0, 20: 50.0}, PRUNED)
    for pruner in (MedianAtStep(n_startup_trials=3), PercentileAtStep(50.0, 3), Stages(100, shares=(0.2,))):
        assert pruner.prune(study, collapsed)
        assert not pruner.prune(study, healthy)
        assert not pruner.prune(study, add({5: 1.0, 9: 1.0}, PRUNED)) or not isinstance(pruner, Stages)
    assert not MedianAtStep(n_startup_trials=4).prune(study, collapsed)
    assert not MedianAtStep(n_startup_trials=3, n_warmup_steps=20).prune(study, collapsed)
    assert not Stages(100, shares=(0.15,), n_min_trials=9).prune(study, collapsed)
    assert Stages(100, shares=(0.15,)).prune(study, collapsed)  # at the first evaluation after 15 steps
    assert not Stages(100, shares=(0.05,)).prune(study, collapsed)  # decided at step 10
    assert MedianAtStep(n_startup_trials=3).prune(study, add({10: 60.0, 25: math.nan}, PRUNED))


def test_the_confidence_in_pruning_is_a_share_of_draws_of_the_errors() -> None:
    study = optuna.create_study(direction="maximize")

    def add(value: float, error: float | None) -> FrozenTrial:
        attrs = {"look": {"signals": {"rankme": (value, error)}}}
        study.add_trial(create_trial(state=PRUNED, intermediate_values={20: value}, user_attrs=attrs))
        return study.trials[-1]

    def share(trial: FrozenTrial) -> float | None:
        return share_behind(Stages(100, shares=(0.2,), n_min_trials=1), study, trial, metric="rankme")

    add(2.0, 0.6)
    add(9.0, 0.1)
    behind = add(1.0, 0.8)  # two of three are kept; it differs from the second by 1 ± 1
    assert share(behind) == pytest.approx(0.841, abs=0.03)
    assert share(add(-90.0, 1.0)) == 1.0
    assert share_behind(optuna.pruners.MedianPruner(), study, behind, metric="rankme") is None
    add(3.0, None)
    assert share(behind) is None


def test_a_standing_alarm_prunes() -> None:
    calm, alarmed = (Evaluation(9, alarms, {}, finite=True) for alarms in ((), ("complete collapse",)))
    assert standing_alarms([calm, alarmed]) == ()
    assert standing_alarms([alarmed, alarmed]) == ("complete collapse",)
    assert standing_alarms([alarmed, calm]) == ()


def test_the_best_settings_are_repeated_with_other_seeds(tmp_path: Path) -> None:
    sweep = make(tmp_path, trials=3, seeds=Seeds(3, best=1))
    trials, _ = drive(sweep)
    best = max(trials[:3], key=lambda t: t.value or 0)
    assert [(t.user_attrs["repeats"], t.params) for t in trials[3:]] == 2 * [(best.number, best.params)]
    commands = [json.loads((Path(t.user_attrs["folder"]) / "trial.json").read_text())["command"] for t in trials]
    assert [command[command.index("--seed_everything") + 1] for command in commands[3:]] == [
        str(t.user_attrs["seed"]) for t in trials[3:]
    ]
    assert len({t.user_attrs["seed"] for t in trials[3:]}) == 2
    assert len(drive(sweep)[0]) == 5
    assert next_step(trials, wanted=9, spent=is_spent(trials, steps=250, hours=None)) == "done"
    assert not is_spent(trials, steps=251, hours=1.0)
    assert is_spent(trials, steps=None, hours=1e-9)


def test_a_grid_ends_with_its_combinations_and_ranges_can_grow(tmp_path: Path) -> None:
    space = {"x": IntDistribution(0, 1)}
    trials, lines = drive(make(tmp_path, parameters=space, sampler=NamedOptions("grid", {}), trials=7))
    assert sorted(t.params["x"] for t in trials) == [0, 1]
    assert lines[0] == "the grid has 2 combinations: it ends after 2 trials, not 7"
    wider = make(tmp_path, parameters={"x": IntDistribution(0, 2)}, sampler=NamedOptions("grid", {}), trials=7)
    trials, lines = drive(wider)
    assert lines[0] == "the ranges of x were extended"
    assert sorted(t.params["x"] for t in trials if t.state == DONE) == [0, 1, 2]


def test_steps_of_a_range_do_not_change(tmp_path: Path) -> None:
    drive(make(tmp_path, parameters={"x": IntDistribution(0, 4, step=2)}, trials=1))
    for other in (IntDistribution(0, 4), IntDistribution(-1, 5, step=2), IntDistribution(0, 2, step=2)):
        with pytest.raises(ValueError, match="study 'test' holds another sweep: parameters differ"):
            drive(make(tmp_path, parameters={"x": other}, trials=1))
    lines = drive(make(tmp_path, parameters={"x": IntDistribution(-2, 6, step=2)}, trials=1))[1]
    assert lines == ["the ranges of x were extended"]


def test_hours_do_not_count_after_an_attempt_was_interrupted() -> None:
    """The machine was switched off for two days, or the job waited for its next slot."""
    attrs = {"look": {"step": 10, "alarms": 0, "signals": {}, "seconds": 1800.0}}
    lost, crashed = trial(0, FAILED, driver="a:1", **attrs), trial(1, FAILED, crash="exit code 1", **attrs)
    for t in (lost, crashed):
        t.datetime_start, t.datetime_complete = datetime(2026, 1, 1), datetime(2026, 1, 3)
    assert not is_spent([lost], steps=None, hours=0.51)
    assert is_spent([lost], steps=None, hours=0.5)
    assert is_spent([crashed], steps=None, hours=48.0)


def test_an_interruption_after_the_end_of_a_trial_does_not_repeat_it(tmp_path: Path) -> None:
    """Ctrl-C arrives while the driver prints that the trial is complete."""
    sweep, lines = make(tmp_path, trials=2), list[str]()

    def log(line: str) -> None:
        lines.append(line)
        if "trial 0 has rankme" in line:
            raise KeyboardInterrupt

    with closing(SweepWorker(sweep, log=log)) as driver, pytest.raises(KeyboardInterrupt):
        driver.run()
    assert [t.state for t in stored(sweep)] == [DONE]
    assert [t.state for t in drive(sweep)[0]] == [DONE, DONE]


def test_an_interruption_before_the_trial_begins_keeps_its_settings(tmp_path: Path) -> None:
    sweep, asked = make(tmp_path, trials=1), list[float]()

    def log(line: str) -> None:
        if line.startswith("trial 0: x"):
            asked.append(1.0)
            raise KeyboardInterrupt

    with closing(SweepWorker(sweep, log=log)) as driver, pytest.raises(KeyboardInterrupt):
        driver.run()
    first, second = drive(sweep)[0]
    assert (first.state, second.state) == (FAILED, DONE)
    assert first.params == second.params
    assert asked == [1.0]


def test_a_trial_that_another_driver_took_over_is_left_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This driver lost contact between asking for a trial and starting it."""
    claim = TrialRun._claim

    def lose(run: TrialRun) -> bool:
        if run.number == 0:
            run.connection.study.tell(0, state=FAILED)
        return claim(run)

    monkeypatch.setattr(TrialRun, "_claim", lose)
    trials, lines = drive(make(tmp_path, trials=1))
    assert [t.state for t in trials] == [FAILED, DONE]
    assert any(line.startswith("trial 0 was given to another driver") for line in lines)


# ── drivers that die ───────────────────────────────────────────────────────────────────────────────────────────────


def driver(sweep: Sweep, *before: str) -> subprocess.Popen[str]:
    """Start a driver in its own process, after the words of `before`."""
    given = [str(sweep.out), sweep.study, str(sweep.trials), sweep.fit[1], json.dumps(asdict(sweep.storage))]
    line = [*before, sys.executable, sweep_driver.__file__, *given]
    return subprocess.Popen(line, stderr=subprocess.PIPE, text=True)


def alive(out: Path) -> list[int]:
    """Processes that run trials of this folder."""
    pids = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if str(FAKE).encode() in words and any(str(out).encode() in word for word in words):
                pids.append(int(entry.name))
    return pids


def checked(trials: Sequence[FrozenTrial], wanted: int) -> None:
    """Check that the wanted number has finished, and that a retried trial counts once and keeps its settings."""
    assert sum(finished(t) for t in trials) == wanted
    assert all(t.state in (DONE, FAILED) for t in trials)
    assert len({t.params["x"] for t in trials if t.state == DONE}) == wanted
    for t in trials:
        if history := t.system_attrs.get("retry_history"):
            assert {trials[n].state for n in history} == {FAILED}
            assert {trials[n].params["x"] for n in history} == {t.params["x"]}


def kill_one(out: Path, drivers: Sequence[subprocess.Popen[str]]) -> tuple[int, str]:
    """Kill the driver of a trial that is not its first and has just begun; return its number and the other's log."""

    def begun() -> Path | None:
        for folder in (out / "trials").glob("000[2-9]"):
            lines = folder / "run" / "measurements.jsonl"
            if lines.is_file() and 2 <= lines.read_text().count("\n") <= 3:
                return folder
        return None

    until(begun)
    time.sleep(0.15)  # if killed while writing a journal, Optuna's lock would persist for 30 seconds
    entry = json.loads((begun() or out).joinpath("trial.json").read_text())
    killed, left = sorted(drivers, key=lambda driver: not entry["driver"].endswith(f":{driver.pid}"))
    killed.kill()
    killed.communicate()
    _, log = left.communicate(timeout=180)
    assert left.returncode == 0, log
    return entry["number"], log


def test_a_driver_killed_with_a_journal_loses_nothing(tmp_path: Path) -> None:
    sweep = make(tmp_path, trials=4, fit=("--config", "3"))
    number, log = kill_one(tmp_path, [driver(sweep), driver(sweep)])
    assert f"trial {number}: its driver died" in log
    assert f"trial {number}: trial re-queued" in log
    assert "resumes" in log  # from the checkpoint that SIGTERM left
    trials = stored(sweep)
    checked(trials, wanted=4)
    assert [t.system_attrs["retry_history"] for t in trials if "retry_history" in t.system_attrs] == [[number]]
    assert alive(tmp_path) == []


def test_ctrl_c_ends_the_trial_and_the_next_call_resumes_it(tmp_path: Path) -> None:
    sweep = make(tmp_path, trials=2, fit=("--config", "3"))
    process = driver(sweep)
    until(lambda: (tmp_path / "trials" / "0000" / "run" / "measurements.jsonl").is_file())
    assert len(alive(tmp_path)) == 2  # the watchdog and the trial
    process.send_signal(signal.SIGINT)
    _, log = process.communicate(timeout=180)
    assert process.returncode != 0
    assert "stopping trial 0, which saves first" in log
    assert "interrupted: fmtrain sweep sweep.toml resumes from this point" in log
    assert alive(tmp_path) == []
    assert last_lines(tmp_path / "trials" / "0000" / "log.txt")[-1] == "stopped by SIGTERM"
    trials, lines = drive(sweep)
    checked(trials, wanted=2)
    assert any("resumes" in line for line in lines)
    assert sorted(entry.name for entry in (tmp_path / "trials").iterdir()) == ["0000", "0002"]


def test_a_hang_up_is_ignored_under_nohup(tmp_path: Path) -> None:
    sweep = make(tmp_path, trials=1, fit=("--config", "2"))
    process = driver(sweep, "nohup")
    until(lambda: (tmp_path / "trials" / "0000" / "run" / "measurements.jsonl").is_file())
    process.send_signal(signal.SIGHUP)
    _, log = process.communicate(timeout=180)
    assert process.returncode == 0, log
    assert [t.state for t in stored(sweep)] == [DONE]


def test_a_trial_that_does_not_stop_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "ignores_sigterm.py"
    script.write_text(
        "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nprint('up', flush=True)\ntime.sleep(99)"
    )
    with create_lock(tmp_path / "lock") as lock:
        process = TrialProcess([sys.executable, str(script)], log=tmp_path / "log", lock=lock, grace_seconds=0.3)
        until(lambda: last_lines(tmp_path / "log"))
        process.stop()
        assert process.wait() == -signal.SIGKILL


# ── a database ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def database() -> Iterator[PostgreSQL]:
    binaries = server_binaries()
    if binaries is None:
        reason = "no /usr/lib/postgresql/*/bin/postgres: apt-get install postgresql"
        if os.environ.get("REPMETRICS_REQUIRE_ALL"):
            pytest.fail(f"{reason}, and REPMETRICS_REQUIRE_ALL is set")
        pytest.skip(reason)
    folder = Path(tempfile.mkdtemp(prefix="repmetrics-postgresql-"))  # other users cannot enter pytest's folder
    server = PostgreSQL(binaries, folder)
    yield server
    server.stop()
    shutil.rmtree(folder)


def test_a_driver_killed_with_a_database_loses_nothing(database: PostgreSQL, tmp_path: Path) -> None:
    storage = Storage(database.url, heartbeat_seconds=1, grace_seconds=5)
    sweep = make(tmp_path, study="killed", trials=4, fit=("--config", "3"), storage=storage)
    number, log = kill_one(tmp_path, [driver(sweep), driver(sweep)])
    assert "resumes" in log
    trials = stored(sweep)
    checked(trials, wanted=4)
    # On a busy machine the other driver's heartbeat may be late too, and its trial is re-queued as well.
    assert [number] in [t.system_attrs.get("retry_history") for t in trials]
    assert alive(tmp_path) == []


def test_a_user_that_the_database_refuses_is_named_at_once(database: PostgreSQL, tmp_path: Path) -> None:
    lines: list[str] = []
    storage = Storage(database.url.replace("sweeper", "nobody:secret"), patience_seconds=600.0)
    with pytest.raises(ValueError, match=r'cannot open a study at postgresql.*role "nobody" does not exist') as caught:
        SweepWorker(make(tmp_path, storage=storage), log=lines.append)
    assert lines == []
    assert "secret" not in str(caught.value)


def test_known_settings_are_queued_once_in_a_database(database: PostgreSQL, tmp_path: Path) -> None:
    storage, first = Storage(database.url), tuple({"x": 0.2 + 0.1 * k} for k in range(4))
    sweep = make(tmp_path, study="known", storage=storage, first=first)

    def start(_: int) -> None:
        with closing(SweepWorker(sweep, log=print)):
            pass

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(start, range(3)))
    assert [t.system_attrs["fixed_params"] for t in stored(sweep)] == list(first)


@pytest.mark.parametrize("seconds", [2, pytest.param(8, marks=pytest.mark.slow)])
def test_a_database_that_is_unreachable_for_a_while(database: PostgreSQL, tmp_path: Path, seconds: int) -> None:
    storage = Storage(database.url, heartbeat_seconds=1, grace_seconds=60)
    sweep = make(tmp_path, study=f"unreachable {seconds}", trials=2, fit=("--config", "3"), storage=storage)
    process = driver(sweep)
    lines = tmp_path / "trials" / "0000" / "run" / "measurements.jsonl"
    until(lambda: lines.is_file() and lines.read_text().count("\n") >= 2)
    database.stop()
    before = alive(tmp_path)
    time.sleep(seconds / 2)
    assert process.poll() is None
    if seconds == 2:
        assert alive(tmp_path) == before  # training continues
    time.sleep(seconds / 2)
    database.start()
    _, log = process.communicate(timeout=180)
    assert process.returncode == 0, log
    assert log.count("the database is unreachable: retrying") >= 1
    trials = stored(sweep)
    assert [t.state for t in trials] == [DONE, DONE]
    assert [sorted(t.intermediate_values) for t in trials] == 2 * [[10, 20, 30, 40, 50]]


def test_a_database_that_stays_unreachable_ends_the_driver_and_its_trial(database: PostgreSQL, tmp_path: Path) -> None:
    storage = Storage(database.url, heartbeat_seconds=1, grace_seconds=60, patience_seconds=1.0)
    sweep = make(tmp_path, study="away", trials=1, fit=("--config", "20"), storage=storage)
    process = driver(sweep)
    until(lambda: (tmp_path / "trials" / "0000" / "run" / "measurements.jsonl").is_file())
    database.stop()
    try:
        _, log = process.communicate(timeout=180)
    finally:
        database.start()
    assert process.returncode == 1
    assert "ConnectionError: the database is unreachable, for 1 seconds" in log
    assert last_lines(tmp_path / "trials" / "0000" / "log.txt")[-1] == "stopped by SIGTERM"
    assert alive(tmp_path) == []
