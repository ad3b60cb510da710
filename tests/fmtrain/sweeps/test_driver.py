"""The driver of sweeps, on fake trials: processes that behave like `fmtrain fit` but take a moment."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import sweep_driver
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial
from sweep_driver import FAKE, SPACE, make

from fmtrain.sweeps.config import NamedOptions, Storage, Sweep, combinations
from fmtrain.sweeps.driver import SweepWorker
from fmtrain.sweeps.process import JsonlTail, TrialProcess, create_lock, last_lines, try_lock
from fmtrain.sweeps.study import finished, initial_crashes, is_surplus, make_retry, next_step, sampler


def drive(sweep: Sweep) -> tuple[list[FrozenTrial], list[str]]:
    lines: list[str] = []
    with closing(SweepWorker(sweep, log=lines.append)) as driver:
        return driver.run(), lines


def stored(sweep: Sweep) -> list[FrozenTrial]:
    """Trials in the study."""
    with closing(SweepWorker(sweep, log=print)) as driver:
        return driver.study.trials


def until(true: Callable[[], object], seconds: float = 180) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.02)


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


def test_a_trial_is_requeued_with_its_settings_five_times() -> None:
    before = create_trial(
        state=FAILED, params={"x": 0.25}, distributions={"x": SPACE}, user_attrs={"driver": "gone", "crash": "no"}
    )
    before.number, given = 7, 0
    while (retry := make_retry(before)) is not None:
        assert retry.state == WAITING
        assert retry.params == {"x": 0.25}
        assert retry.user_attrs == {}
        assert retry.system_attrs["failed_trial"] == 7
        before, given = retry, given + 1
        before.number = 10 + given
    assert given == 5
    assert before.system_attrs["retry_history"] == [7, 11, 12, 13, 14]


def test_draws_depend_on_seed_and_number_alone(tmp_path: Path) -> None:
    def draw(seed: int, number: int, name: str = "random") -> float:
        sweep = make(tmp_path, sampler=NamedOptions(name, {"seed": seed}))
        return float(sampler(sweep, number).sample_independent(None, None, "x", SPACE))  # type: ignore[arg-type]

    assert draw(0, 3) == draw(0, 3)
    assert len({draw(0, 3), draw(0, 4), draw(1, 3), draw(1, 4)}) == 4


def test_a_tail_gives_each_whole_line_once(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    tail = JsonlTail(path)
    assert tail.new() == []
    path.write_text('{"step": 0}\n{"st')
    assert tail.new() == [{"step": 0}]
    assert tail.new() == []
    path.write_text('{"step": 0}\n{"step": 1}\n{"step": 2}\n')
    assert tail.new() == [{"step": 1}, {"step": 2}]


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
    assert any("ended with exit code 1" in line and "CUDA out of memory" in line for line in lines)
    assert "CUDA out of memory" in next(t.user_attrs["crash"] for t in trials if t.state == FAILED)


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
        drive(make(tmp_path, parameters={"x": FloatDistribution(0.0, 2.0)}))
    with pytest.raises(ValueError, match="holds trials of another study"):
        drive(make(tmp_path, study="other"))


def test_an_unreachable_database_is_named_without_the_password(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"postgresql+psycopg://me:secret@127.0.0.1:{free.getsockname()[1]}/sweeps"
    with pytest.raises(ValueError, match="cannot open a study at postgresql") as caught:
        drive(make(tmp_path, storage=Storage(url)))
    assert "refused" in str(caught.value)
    assert "secret" not in str(caught.value)


def test_a_grid_runs_every_combination_once(tmp_path: Path) -> None:
    space = {"x": CategoricalDistribution([0.1, 0.7]), "y": IntDistribution(1, 3)}
    assert combinations(space) == {"x": [0.1, 0.7], "y": [1, 2, 3]}
    trials, _ = drive(make(tmp_path, parameters=space, sampler=NamedOptions("grid", {}), trials=6))
    assert len({tuple(t.params.values()) for t in trials if t.state == DONE}) == 6


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
    assert f"trial {number}: its driver died; trial re-queued" in log
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


class PostgreSQL:
    """A server on loopback, run by an ordinary user."""

    def __init__(self, binaries: Path, folder: Path) -> None:
        self.binaries, self.data = binaries, folder / "data"
        self.user = "postgres" if os.getuid() == 0 else None  # it refuses to run as root
        if self.user:
            shutil.chown(folder, self.user)
        options = ["--pgdata", str(self.data), "--username", "sweeper", "--auth", "trust", "--no-sync"]
        subprocess.run([binaries / "initdb", *options], check=True, capture_output=True, user=self.user, cwd=folder)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.start()

    @property
    def url(self) -> str:
        return f"postgresql+psycopg://sweeper@127.0.0.1:{self.port}/postgres"

    def start(self) -> None:
        options = ["-D", self.data, "-p", str(self.port), "-c", "listen_addresses=127.0.0.1"]
        options += ["-c", "unix_socket_directories=", "-c", "fsync=off"]
        self.server = subprocess.Popen(
            [self.binaries / "postgres", *options], stderr=subprocess.DEVNULL, user=self.user, cwd=self.data
        )
        until(self.answers)

    def answers(self) -> bool:
        assert self.server.poll() is None, "postgres has ended"
        ready = [self.binaries / "pg_isready", "-h", "127.0.0.1", "-p", str(self.port)]
        return subprocess.run(ready, capture_output=True, check=False).returncode == 0

    def stop(self) -> None:
        self.server.send_signal(signal.SIGQUIT)  # at once, as a crash would
        self.server.wait(30)


@pytest.fixture(scope="module")
def database() -> Iterator[PostgreSQL]:
    binaries = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))
    if not binaries:
        reason = "no /usr/lib/postgresql/*/bin/postgres: apt-get install postgresql"
        if os.environ.get("REPMETRICS_REQUIRE_ALL"):
            pytest.fail(f"{reason}, and REPMETRICS_REQUIRE_ALL is set")
        pytest.skip(reason)
    folder = Path(tempfile.mkdtemp(prefix="repmetrics-postgresql-"))  # other users cannot enter pytest's folder
    server = PostgreSQL(binaries[-1].parent, folder)
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


@pytest.mark.parametrize("seconds", [2, pytest.param(20, marks=pytest.mark.slow)])
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
    assert "ConnectionError: the database has been unreachable for 1 seconds" in log
    assert last_lines(tmp_path / "trials" / "0000" / "log.txt")[-1] == "stopped by SIGTERM"
    assert alive(tmp_path) == []
