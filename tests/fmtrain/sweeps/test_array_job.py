"""Drivers as an array job, under a stub of SLURM: printed, submitted, ended by its signal, and continued."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import optuna
import pytest
import slurm_stub
from fit_runs import call
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from postgresql import until
from sweep_driver import FAKE

from fmtrain.sweeps.process import last_lines

SWEEP: dict[str, Any] = {
    "study": "array",
    "command": f"{{python}} {FAKE} {{out}} fmtrain fit --config SECONDS --resume --x {{x}}",
    "metric": "rankme",
    "domain": "custom",
    "trials": 4,
    "jobs": 2,
    "slurm": {"time": "12:00:00", "gpus-per-node": 8, "partition": "long one"},
    "parameters": {"x": {"low": 0.0, "high": 1.0}},
}


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, value in slurm_stub.install(tmp_path / "slurm").items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "slurm"


def write(seconds: float = 0, **changes: Any) -> str:
    entries = {**SWEEP, **changes}
    entries["command"] = entries["command"].replace("SECONDS", f"{seconds:g}")
    Path("sweep.yaml").write_text(json.dumps(entries))
    return "sweep.yaml"


def states() -> list[str]:
    """States of the trials, as optuna-dashboard would show them."""
    storage = JournalStorage(JournalFileBackend("array/journal.log"))
    return [t.state.name for t in optuna.load_study(study_name="array", storage=storage).trials]


def codes(slurm: Path) -> list[str]:
    return (slurm / "codes").read_text().split() if (slurm / "codes").exists() else []


def test_the_script_holds_an_array_of_drivers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        assert call("sweep", write(stop_seconds=90.0), "--slurm", "16", "--until", "11h30m") == 0
    printed = capsys.readouterr()
    shebang, *options, line = printed.out.splitlines()
    assert shebang == "#!/bin/bash"
    assert set(options) == {
        "#SBATCH --job-name=array",
        "#SBATCH --nodes=1",
        "#SBATCH --ntasks-per-node=1",
        f"#SBATCH --output={tmp_path}/array-%A_%a.log",
        "#SBATCH --open-mode=append",
        "#SBATCH --requeue",
        "#SBATCH --time=12:00:00",
        "#SBATCH --gpus-per-node=8",
        "#SBATCH --partition='long one'",
        "#SBATCH --array=0-15",
        "#SBATCH --signal=B:TERM@150",  # a trial may take 90 seconds to stop
    }
    driver = ["exec", sys.executable, "-m", "fmtrain", "sweep", f"{tmp_path}/sweep.yaml", "--until", "11h30m"]
    assert shlex.split(line) == driver
    assert "the drivers need a file system on which flock works between nodes" in printed.err


def test_slurm_ends_the_drivers_in_time_and_the_next_job_continues(
    slurm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("sweep", write(seconds=60), "--slurm", "2") == 0
    text = capsys.readouterr().out
    assert "--signal=B:TERM@120" in text
    Path("job.sh").write_text(text)
    job = subprocess.Popen(["sbatch", "--wait", "job.sh"])
    until(lambda: len(list(tmp_path.glob("array/trials/*/run/measurements.jsonl"))) == 4)
    subprocess.run(["scancel", "--batch", "--signal=TERM", slurm_stub.JOB], check=True)
    assert job.wait(60) == 130
    assert codes(slurm) == ["130", "130"]
    assert sorted(states()) == 4 * ["FAIL"] + 4 * ["WAITING"]
    logs = [last_lines(folder / "log.txt")[-1] for folder in tmp_path.glob("array/trials/*")]
    assert logs == 4 * ["stopped by SIGTERM"]
    for number in range(2):
        assert "interrupted: fmtrain sweep" in (tmp_path / f"array-7_{number}.log").read_text()
    # Trials resume near their beginning, so that the rest runs with `--until`, which ends in order.
    Path("job.sh").write_text(text.rstrip() + " --until 4s\n")
    assert subprocess.run(["sbatch", "--wait", "job.sh"], check=False).returncode == 0
    assert "the time is over: fmtrain sweep" in (tmp_path / "array-7_0.log").read_text()
    assert states().count("WAITING") == 4


def test_submitit_submits_the_drivers(slurm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("sweep", write(), "--slurm", "2", "--submit") == 0
    assert capsys.readouterr().out == f"job 7: 2 drivers; logs in {tmp_path}/array-%A_%a.log\n"
    options = dict(line.partition("=")[::2] for line in (slurm / "options").read_text().splitlines())
    assert options["signal"] == "B:TERM@120"
    assert options["array"] == "0-1"
    assert options["time"] == "12:00:00"
    until(lambda: len(codes(slurm)) == 2)
    log = (tmp_path / "array-7_0.log").read_text()
    assert codes(slurm) == ["0", "0"], log
    assert sorted(states()) == 4 * ["COMPLETE"]
    assert "2 trials at a time" in log
    assert "confidence" in log or "trial 0" in log  # the table


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"slurm": {"array": "0-3"}}, ["--slurm", "2"], "slurm must not hold array: --slurm gives the array"),
        ({}, ["--slurm", "2", "--until", "tomorrow"], "a duration is written like 1d, 11h30m, 90m or 45s"),
        ({}, ["--submit"], "--submit needs --slurm with the number of drivers"),
        ({}, ["--slurm", "2", "--table"], "--slurm starts drivers elsewhere"),
        ({}, ["--slurm", "2", "--submit"], 'the drivers were not submitted: Could not detect "srun"'),
    ],
)
def test_what_cannot_be_submitted_is_refused(
    change: dict[str, Any],
    options: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert call("sweep", write(**change), *options) != 0
    assert message in " ".join(capsys.readouterr().err.replace("│", "").split())


def test_submitit_must_be_there(
    slurm: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "submitit", None)
    assert call("sweep", write(), "--slurm", "2", "--submit") == 1
    assert "--submit needs submitit: pip install 'repmetrics[slurm]'" in capsys.readouterr().err
