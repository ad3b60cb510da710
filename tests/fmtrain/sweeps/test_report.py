"""What `fmtrain sweep` prints: in a terminal while it runs, after Ctrl-C, at its end, and on request."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from fit_runs import call
from optuna.distributions import FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial
from rich.console import Console
from sweep_driver import FAKE, make

from fmtrain.sweeps import results
from fmtrain.sweeps.report import live_table

ENTRIES: dict[str, Any] = {
    "study": "s",
    "command": "{python} trial.py {out} fmtrain fit --config 0 --resume --x {x} --y {y}",
    "metric": "rankme",
    "trials": 2,
    "domain": "custom",
    "parameters": {"x": {"low": 0.0, "high": 1.0}, "y": {"low": 0.0, "high": 1.0}},
}


class Terminal:
    """A pseudo terminal that reads what is written to it.

    Attributes:
        descriptor: File descriptor to write to.
    """

    def __init__(self) -> None:
        self._reading, self.descriptor = os.openpty()
        self.content = b""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        while True:
            try:
                self.content += os.read(self._reading, 65536)
            except OSError:  # all writers have closed it
                return

    def close(self) -> str:
        """Text without control sequences."""
        os.close(self.descriptor)
        self._reader.join(9)
        os.close(self._reading)
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.content.decode())


@pytest.fixture
def sweep_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A sweep file beside its script. The working folder is another one."""
    (tmp_path / "shell").mkdir()
    monkeypatch.chdir(tmp_path / "shell")
    shutil.copy(FAKE, tmp_path / "trial.py")
    (tmp_path / "sweep.yaml").write_text(json.dumps(ENTRIES))
    return Path("../sweep.yaml")


def test_a_terminal_shows_the_trials_while_they_run_and_after_ctrl_c(
    sweep_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    slow = ENTRIES | {"command": ENTRIES["command"].replace("--config 0", "--config 3")}
    sweep_file.write_text(json.dumps(slow))
    lines = sweep_file.resolve().parent / "s/trials/0000/run/measurements.jsonl"

    ended = threading.Event()

    def interrupt() -> None:
        while not (lines.is_file() and lines.read_text().count("\n") >= 2):
            time.sleep(0.02)
        if not ended.wait(0.5):
            os.kill(os.getpid(), signal.SIGINT)

    terminal = Terminal()
    threading.Thread(target=interrupt, daemon=True).start()
    with monkeypatch.context() as patch, open(terminal.descriptor, "w", closefd=False) as stream:
        patch.setattr(sys, "stderr", stream)
        patch.setenv("COLUMNS", "120")
        code = call("sweep", sweep_file)
        ended.set()
    shown = terminal.close()
    assert code == 130, shown
    assert "trial 0: x " in shown
    assert re.search(r"│ trial 0 │ running │", shown)
    assert "stopping trial 0, which saves first" in shown
    assert f"interrupted: fmtrain sweep {sweep_file} resumes from this point" in shown
    assert "no trial is finished yet" in shown
    capsys.readouterr()
    sweep_file.write_text(json.dumps(ENTRIES | {"command": slow["command"]} | {"trials": 1}))
    assert call("sweep", sweep_file) == 0
    printed = capsys.readouterr()
    assert "trial 1 resumes: x " in printed.err
    assert "trial 1 has the highest rankme" in printed.out


def test_a_table_of_a_study_changes_nothing(sweep_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("sweep", sweep_file, "--table") == 1
    assert "no study 's' in" in capsys.readouterr().err
    assert not (sweep_file.parent / "s").exists()
    assert call("sweep", sweep_file) == 0  # the script and the folder are relative to the file
    printed = capsys.readouterr()
    assert "trial 1 has rankme" in printed.err
    before = {path: path.stat().st_mtime_ns for path in (sweep_file.parent / "s").rglob("*") if path.is_file()}
    for form in ((), ("--csv",), ("--json",)):
        assert call("sweep", sweep_file, "--table", *form) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(printed.out)
    table, _, rest = shown.partition("run,state,")
    header, _, rest = rest.partition("\r\n")
    rows = list(csv.reader(io.StringIO(rest.partition("{")[0])))
    assert header == "step,alarms,param.x,param.y,rankme,rankme_se,odcorr,loss"
    assert [row[1:3] for row in rows] == 2 * [["complete", "50"]]
    stored = json.loads("{" + rest.partition("{")[2])
    assert [row["state"] for row in stored["trials"]] == 2 * ["complete"]
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert table.count("complete") == 2
    again = ENTRIES | {"study": "again", "finished": ["s/trials"], "trials": 1}
    sweep_file.write_text(json.dumps(again))
    assert call("sweep", sweep_file, "--json") == 0
    rows = json.loads(capsys.readouterr().out)["trials"]
    assert {row["params"]["x"] for row in stored["trials"]} < {row["params"]["x"] for row in rows}


def test_a_sweep_without_a_result_shows_its_trials(sweep_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    divergent = {"command": ENTRIES["command"].replace("--x {x} --y {y}", "--y {y} --x {x} nan")}
    divergent["parameters"] = {**ENTRIES["parameters"], "x": {"low": -1.0, "high": -0.5}}
    sweep_file.write_text(json.dumps(ENTRIES | divergent))
    assert call("sweep", sweep_file) == 1
    printed = capsys.readouterr()
    assert "none of 2 trials was completed: nothing can be chosen" in printed.err
    assert printed.out.count("│ diverged │") == 2
    assert "trial 0 diverged: rankme is not finite at its end" in printed.out


def test_crashed_trials_run_again_on_request(sweep_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A defect ends every trial but one of a grid. It is corrected: no combination is lost."""
    grid = {"sampler": "grid", "trials": None, "parameters": {"x": {"choices": [0.7, 0.2, 0.4]}}}
    command = ENTRIES["command"].replace(" --y {y}", "")
    sweep_file.write_text(json.dumps(ENTRIES | grid | {"command": command}))
    script = sweep_file.parent / "trial.py"
    working = script.read_text()
    script.write_text(working.replace("diverges =", "x = -1 if x < 0.5 else x\n    diverges ="))
    assert call("sweep", sweep_file, "--json") == 0
    states = [row["state"] for row in json.loads(capsys.readouterr().out)["trials"]]
    assert sorted(states) == ["complete", "crashed", "crashed"]
    script.write_text(working)
    assert call("sweep", sweep_file) == 0  # they count as finished
    assert capsys.readouterr().out.count("crashed") >= 2
    assert call("sweep", sweep_file, "--retry-crashed", "--json") == 0
    rows = json.loads(capsys.readouterr().out)["trials"]
    assert [(row["params"]["x"], row["state"]) for row in rows] == [(x, "complete") for x in (0.7, 0.4, 0.2)]
    assert call("sweep", sweep_file, "--retry-crashed") == 0  # nothing is left to do
    assert "re-queued" not in capsys.readouterr().err


def test_a_low_terminal_shows_the_best_trials_and_those_that_run(tmp_path: Path) -> None:
    sweep, space = make(tmp_path), {"x": FloatDistribution(0, 1)}
    evaluations = [{"step": 9, "alarms": 0, "signals": {"rankme": [k, 1]}} for k in range(60)]
    trials = [
        create_trial(value=k, params={"x": 0.5}, distributions=space, user_attrs={"look": evaluation})
        for k, evaluation in enumerate(evaluations)
    ]
    trials += [create_trial(state=TrialState.RUNNING, params={"x": 0.5}, distributions=space) for _ in range(4)]
    for number, t in enumerate(trials):
        t.number = number
    console = Console(file=io.StringIO(), width=100, height=20, force_terminal=True)
    with live_table(sweep, console) as show_trials:
        assert show_trials is not None
        show_trials(trials)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert re.findall(r"│ trial (\d+) │", shown)[:13] == [*map(str, range(59, 50, -1)), "60", "61", "62", "63"]
    assert "and 51 more trials" in shown


def test_importance_of_parameters() -> None:
    """The metric depends on x alone. The range of x was extended after half of the trials."""
    space = {"x": FloatDistribution(0, 1), "y": FloatDistribution(0, 1)}
    sweep = make(Path("s"), parameters={**space, "x": FloatDistribution(0, 2)})

    def complete(k: int, **attrs: Any) -> FrozenTrial:
        params = {"x": (k % 20) / 10, "y": (7 * k % 20) / 20}
        distributions = space if params["x"] <= 1 else dict(sweep.parameters)
        return create_trial(value=10 * params["x"], params=params, distributions=distributions, user_attrs=attrs)

    trials = [complete(k) for k in range(40)]
    (line,) = results.importance(trials, sweep)
    assert re.fullmatch(r"importance for the rankme of the best tenth \(PED-ANOVA\): x (\d+)%, y (\d+)%", line)
    assert int(line.split("x ")[1].split("%")[0]) > 80
    assert results.importance(trials[:9], sweep) == []
    assert results.importance([complete(k, repeats=0) for k in range(40)], sweep) == []
    assert results.importance(trials, make(Path("s"), parameters={"x": sweep.parameters["x"]})) == []
    equal = [create_trial(value=1.0, params=t.params, distributions=t.distributions) for t in trials]
    assert results.importance(equal, sweep) == []
    outside = make(Path("s"), parameters={**space, "x": IntDistribution(5, 9)})
    assert results.importance(trials, outside) == []


def test_trials_of_a_running_study(tmp_path: Path) -> None:
    running = create_trial(state=TrialState.RUNNING, params={"x": 0.5}, distributions={"x": FloatDistribution(0, 1)})
    sweep = make(tmp_path)
    rows = results.rows([running], sweep, running=True)
    assert [(row.state, row.values) for row in rows] == [("running", ())]
    found = results.to_json(rows, sweep, {})
    assert (found["best"], found["conclusion"]) == ([], ["no run can be chosen"])
    assert results.to_json([], sweep, {})["trials"] == []
