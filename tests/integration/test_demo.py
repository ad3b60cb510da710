"""The demo, scaled down; each command runs in its own process, a fork that imports nothing again."""

from __future__ import annotations

import json
import re
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from subprocess import CompletedProcess
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from processes import Program

from fmtrain import demo
from fmtrain.cli import main
from repmetrics.cli import main as repmetrics

ROW = {
    "rankme": {"value": 4.0, "standard_error": 0.1, "reason": None, "n": 8, "d": 4, "groups": 2, "details": {}},
    "odcorr": {"value": 0.5, "standard_error": None, "reason": "no group ids", "details": {"null_floor": 0.1}},
    "linear_probe": {"value": 0.5, "standard_error": 0.05, "reason": None, "details": {"chance": 0.25}},
}


def run_fork(command: Sequence[Any], *, stdout: int | None, text: bool, check: bool) -> CompletedProcess[str]:
    """In place of `subprocess.run`, which `test_a_failing_command_stops_the_demo` calls."""
    entry = {"fmtrain": main, "repmetrics": repmetrics}[Path(command[0]).name]
    with TemporaryDirectory() as folder:
        program = Program(entry, command[1:], folder=Path(folder))
        code = program.wait(timeout=500)
        sys.stderr.write(program.stderr.read_text())
        return CompletedProcess(command, code, stdout=program.stdout.read_text())


@pytest.mark.slow
def test_the_demo_runs_to_its_end(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fmtrain.demo.subprocess.run", run_fork)
    out = tmp_path / "demo"
    arguments = ["demo", "--out", str(out), "--slides", "10", "--slide-px", "1024", "--held-out", "80", "--steps", "2"]
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--monitor.every_n_steps", "1", "--data.batch_size", "4"])
    shown = capfd.readouterr()
    assert ended.value.code in (0, None), shown.err
    for command in ("fmtrain manifest", "fmtrain fit --config demo", "repmetrics score"):
        assert f"$ {command}" in shown.err
    assert f"--json > {out / 'score.json'}" in " ".join(shown.err.split())
    assert json.loads((out / "score.json").read_text(encoding="utf-8"))["scores"][0]["step"] == 2
    assert re.findall(r"^│ +(\d+) │ .*±", shown.out, re.MULTILINE) == ["0", "1", "2"]
    assert "The values of the last row are those that `repmetrics score` prints" in " ".join(shown.err.split())
    assert f"repmetrics board {out / 'run'}" in " ".join(shown.err.split())
    assert "<svg" in (out / "report.html").read_text(encoding="utf-8")
    with pytest.raises(SystemExit) as refused:
        main(arguments)
    assert refused.value.code == 1
    assert "--overwrite deletes an earlier demo" in capfd.readouterr().err


def test_the_last_line_names_a_program_that_the_terminal_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    scripts = sysconfig.get_path("scripts")
    monkeypatch.setenv("PATH", scripts)
    assert demo.typed_name("repmetrics") == "repmetrics"
    monkeypatch.setenv("PATH", "/bin")
    assert Path(demo.typed_name("repmetrics")).resolve() == Path(scripts, "repmetrics").resolve()


def test_a_score_that_differs_is_reported() -> None:
    assert demo.differences(ROW, ROW) == []
    changed: dict[str, Any] = {**ROW, "odcorr": {"value": 0.5 * (1 + 3e-9)}}
    assert len(demo.differences(ROW, changed)) == 1
    changed["odcorr"] = {"value": 0.5 * (1 + 3e-10)}
    assert demo.differences(ROW, changed) == []
    assert len(demo.differences(ROW, {"rankme": ROW["rankme"]})) == 2
    nothing: dict[str, Any] = {**ROW, "rankme": {"value": None}}
    assert len(demo.differences(nothing, nothing)) == 1


def test_the_agreement_is_one_of_values_and_not_of_errors() -> None:
    sentences = demo.agreement("last.ckpt")
    assert "values of the last row are those that `repmetrics score` prints for last.ckpt, to 1e-09." in sentences
    assert (
        "errors may differ: the score has exact jackknife errors, and the monitor has errors to first order."
        in sentences
    )


def test_a_missing_error_is_explained() -> None:
    assert demo.cell(ROW["odcorr"]) == "0.5 *"
    assert "* odcorr: no group ids" in demo.footnotes([{"step": 0, "measurements": ROW}])


def test_the_probe_is_shown_with_chance_and_color() -> None:
    probe = {**ROW["linear_probe"], "details": {"chance": 0.25, "null_floor": 0.4}}
    notes = demo.footnotes([{"step": 0, "measurements": {**ROW, "linear_probe": probe}}])
    assert "the probe's chance is 0.250, color statistics alone give 0.400" in notes
    assert "the probe's chance is 0.250" in demo.footnotes([{"step": 0, "measurements": ROW}])


def test_a_failing_command_stops_the_demo(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ChildProcessError, match=r"`repmetrics score` failed with exit code 1: the reason is above"):
        demo.run_program(["repmetrics", "score", str(tmp_path / "none.pt")], demo.Console(stderr=True))
    assert "none.pt" in capfd.readouterr().err
