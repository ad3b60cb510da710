"""Several trials at a time in one driver: GPUs and threads of each, on eight fake devices, and without torch."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from optuna.distributions import FloatDistribution
from optuna.trial import TrialState
from sweep_driver import FAKE, make

from fmtrain.sweeps.command_line import fill
from fmtrain.sweeps.driver import SweepWorker, run_sweep
from fmtrain.sweeps.process import last_lines
from fmtrain.sweeps.settings import Sweep
from fmtrain.sweeps.slots import THREADS, free_gpus, make_slots, visible_gpus

EIGHT = ",".join("01234567")
VARIABLES = ("CUDA_VISIBLE_DEVICES", *THREADS)
TRIAL = f"""import glob, json, os, runpy, sys, time
entry = {{"trial": sys.argv[1], "start": time.time(), **{{name: os.environ.get(name) for name in {VARIABLES}}}}}
open("MARK" + sys.argv[1].partition(":")[0], "w").close()
until = time.monotonic() + 120
while len(glob.glob("MARK*")) < TOGETHER and time.monotonic() < until:
    time.sleep(0.02)
entry["together"] = time.monotonic() < until
sys.argv = [{str(FAKE)!r}, *sys.argv[2:]]
try:
    runpy.run_path({str(FAKE)!r}, run_name="__main__")
finally:
    entry["end"] = time.time()
    with open(LOG, "a") as file:
        file.write(json.dumps(entry) + "\\n")
"""


def recording(folder: Path, *, together: int = 1, **changes: Any) -> Sweep:
    """A sweep whose trials write their times and their variables to log.jsonl. The first wait for one another."""
    script, text = folder / "trial.py", TRIAL.replace("TOGETHER", str(together))
    script.write_text(text.replace("LOG", repr(str(folder / "log.jsonl"))).replace("MARK", str(folder / "trial-")))
    launcher = f"{{python}} {script} {{number}}:{{gpu}} {{out}} {{command}}"
    return make(folder / "sweep", launcher=launcher, **changes)


def entries(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.fixture
def eight_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", EIGHT)
    for name in THREADS:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("eight_gpus")
def test_eight_trials_run_at_a_time_each_on_its_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(32)))
    lines: list[str] = []
    sweep = recording(tmp_path, together=8, jobs="auto", trials=20)
    with closing(SweepWorker(sweep, log=lines.append)) as driver:
        trials = driver.run()
    assert [t.state for t in trials] == 20 * [TrialState.COMPLETE]
    assert lines[0] == "8 trials at a time; GPUs 0, 1, 2, 3, 4, 5, 6, 7; 4 CPU threads each"
    ran = entries(tmp_path)
    assert {tuple(entry[name] for name in THREADS) for entry in ran} == {("4", "4", "4")}
    assert all(entry["trial"].partition(":")[2] == entry["CUDA_VISIBLE_DEVICES"] for entry in ran)  # {gpu}
    assert {entry["CUDA_VISIBLE_DEVICES"] for entry in ran} == set("01234567")
    for gpu in "01234567":  # one after the other
        on_it = sorted((entry["start"], entry["end"]) for entry in ran if entry["CUDA_VISIBLE_DEVICES"] == gpu)
        assert all(end <= start for (_, end), (start, _) in pairwise(on_it))
    assert all(entry["together"] for entry in ran)


@pytest.mark.usefixtures("eight_gpus")
def test_gpus_of_another_driver_are_left_to_it(tmp_path: Path) -> None:
    sweep = recording(tmp_path, jobs="auto", trials=1)
    with free_gpus(sweep.out / "locks", ["0", "1", "2", "3", "4", "5", "7"]) as taken:
        assert len(taken) == 7
        with closing(SweepWorker(sweep, log=print)) as driver:
            assert [(slot.gpus, slot.pinned) for slot in driver.slots] == [(("6",), True)]
            with pytest.raises(ValueError, match="all 8 visible GPUs belong to other drivers of this sweep"):
                SweepWorker(sweep, log=print)
    with closing(SweepWorker(sweep, log=print)) as driver:
        assert len(driver.slots) == 8


def test_one_job_starts_a_trial_as_a_run_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", EIGHT)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    with closing(SweepWorker(recording(tmp_path, trials=1), log=print)) as driver:
        driver.run()
    (entry,) = entries(tmp_path)
    assert (entry["CUDA_VISIBLE_DEVICES"], entry["OMP_NUM_THREADS"]) == (EIGHT, "3")


def test_slots_share_gpus_evenly_or_are_refused() -> None:
    gpus = EIGHT.split(",")
    assert [slot.gpu for slot in make_slots(2, gpus, cores=64)] == ["0,1,2,3", "4,5,6,7"]
    assert [slot.threads for slot in make_slots(2, gpus, cores=64)] == [8, 8]  # of each of its processes
    assert Counter(slot.gpu for slot in make_slots(16, gpus, cores=64)) == dict.fromkeys(gpus, 2)
    assert [(slot.gpu, slot.threads) for slot in make_slots(4, [], cores=2)] == 4 * [("", 1)]
    assert len(make_slots("auto", [], cores=2)) == 1
    with pytest.raises(ValueError, match="jobs must divide the 8 visible GPUs evenly, or be a multiple of them, got 3"):
        make_slots(3, gpus, cores=64)


LISTED = """GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-aa)
  MIG 3g.40gb     Device  0: (UUID: MIG-11)
  MIG 3g.40gb     Device  1: (UUID: MIG-22)
GPU 1: NVIDIA H100 80GB HBM3 (UUID: GPU-bb)
"""


def test_gpus_are_those_that_nvidia_smi_lists(tmp_path: Path) -> None:
    program = tmp_path / "nvidia-smi"

    def write(text: str, code: int = 0) -> None:
        program.write_text(f"#!/bin/sh\ncat <<'end'\n{text}\nend\nexit {code}\n")
        program.chmod(0o755)

    path = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    write(LISTED)
    assert visible_gpus(path) == ("MIG-11", "MIG-22", "1")
    assert visible_gpus({**path, "CUDA_VISIBLE_DEVICES": "1"}) == ("1",)
    assert visible_gpus({**path, "CUDA_VISIBLE_DEVICES": ""}) == ()
    assert visible_gpus({"PATH": str(tmp_path / "none")}) == ()
    write("NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.", 9)
    with pytest.raises(ValueError, match="nvidia-smi -L failed \\(NVIDIA-SMI has failed"):
        visible_gpus(path)


def test_a_gpu_that_is_named_must_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(ValueError, match=r"\{gpu\} needs a visible GPU, and there is none"):
        SweepWorker(recording(tmp_path), log=print)


VALUES = {"out": "/a b/it's", "x": '[1, "two"]', "empty": "", "gpu": "3"}
COMMAND = ["train", "--x", VALUES["x"], "--out", VALUES["out"]]
PRINT = "import sys, json; print(json.dumps(sys.argv[1:]))"


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("run {command} {gpu}", [*COMMAND, "3"]),
        ("run '{out}' --y={x} \"{x}\" {empty}", [VALUES["out"], f"--y={VALUES['x']}", VALUES["x"], ""]),
        ("sh -c 'run {out} {x} {empty}'", [VALUES["out"], VALUES["x"]]),
        ("sh -c '{command}'", COMMAND[1:]),
        ("sh -c 'cd / && {command} >&1'", COMMAND[1:]),
        ('sh -c "cd / && {command}"', COMMAND[1:]),
        ('sh -c \'run "{out}" "{x}"\'', [VALUES["out"], VALUES["x"]]),
        ("sh -c 'cd / && sh -c \"{command}\"'", COMMAND[1:]),
        ("sh -c \"cd / && sh -c '{command}'\"", COMMAND[1:]),
        ("sh -c 'run ${HOME} {{x}} {x}'", ["/home", "{x}", VALUES["x"]]),
    ],
)
def test_values_reach_the_program_as_one_word_each(template: str, words: list[str], tmp_path: Path) -> None:
    for name in ("run", "train"):
        program = tmp_path / name
        program.write_text(f'#!/bin/sh\nexec {sys.executable} -S -c {shlex.quote(PRINT)} "$@"\n')
        program.chmod(0o755)
    command = fill(template, VALUES, command=COMMAND)
    variables = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "HOME": "/home"}
    printed = subprocess.run(command, env=variables, capture_output=True, text=True, check=True).stdout
    assert json.loads(printed) == words


def test_ssh_joins_its_words_to_a_script() -> None:
    words = fill("ssh -p 22 gpu{gpu} {command}", VALUES, command=COMMAND)
    assert words[:4] == ["ssh", "-p", "22", "gpu3"]
    assert shlex.split(" ".join(words[4:])) == COMMAND


def test_crashes_end_the_driver_and_the_other_trial_is_resumed_later(tmp_path: Path) -> None:
    space, first = {"x": FloatDistribution(-3.0, 1.0)}, tuple({"x": x} for x in (0.5, -1.0, -2.0, -3.0))
    sweep = make(tmp_path, parameters=space, first=first, jobs=2, trials=9, fit=("--config", "60"))
    with (
        closing(SweepWorker(sweep, log=print)) as driver,
        pytest.raises(ValueError, match="the first 3 trials crashed"),
    ):
        driver.run()
    with closing(SweepWorker(sweep, log=print)) as driver:
        trials = driver.study.trials
    assert [t.state.name for t in trials] == ["FAIL", "FAIL", "FAIL", "FAIL", "WAITING"]
    assert (trials[4].params, trials[4].system_attrs["retry_history"]) == ({"x": 0.5}, [0])


def test_the_time_ends_all_trials_at_once_and_the_next_call_resumes_them(tmp_path: Path) -> None:
    sweep, lines = make(tmp_path, jobs=2, trials=2, fit=("--config", "30")), list[str]()
    start = time.monotonic()
    assert run_sweep(sweep, log=lines.append, again="sweep.toml", seconds=3.0) == []
    assert time.monotonic() - start < 25
    assert "stopping trials 0, 1, which save first; press Ctrl-C again to kill them" in lines
    assert lines[-1] == "the time is over: fmtrain sweep sweep.toml resumes from this point"
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    logs = [last_lines(tmp_path / "trials" / f"{k:04}" / "log.txt")[-1] for k in range(2)]
    assert logs == 2 * ["stopped by SIGTERM"]
    with closing(SweepWorker(sweep, log=lines.append)) as driver:
        assert [t.state for t in driver.study.trials].count(TrialState.WAITING) == 2


DRIVER_WITHOUT_TORCH = """
import sys
from fmtrain.cli import main
try:
    main(["sweep", "sweep.json.yaml"])
finally:
    heavy = sorted({"torch", "lightning", "timm"} & set(sys.modules))
    print("heavy:", heavy, file=sys.stderr)
"""


def test_a_driver_loads_no_torch(tmp_path: Path) -> None:
    """From the file to the table with its conclusions."""
    sweep = {
        "study": "light",
        "command": f"{{python}} {FAKE} {{out}} fmtrain fit --config 0 --x {{x}}",
        "metric": "rankme",
        "trials": 2,
        "jobs": 2,
        "parameters": {"x": {"low": 0.0, "high": 1.0}},
    }
    (tmp_path / "sweep.json.yaml").write_text(json.dumps(sweep))
    done = subprocess.run(
        [sys.executable, "-c", DRIVER_WITHOUT_TORCH], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert "heavy: []" in done.stderr, done.stderr
    assert done.returncode == 0, done.stderr
    assert "trial 1" in done.stdout


def test_a_sweep_returns_all_its_trials(tmp_path: Path) -> None:
    trials = run_sweep(make(tmp_path / "o", trials=2), log=lambda line: None, again="sweep.toml")
    assert [trial.state for trial in trials] == 2 * [TrialState.COMPLETE]
