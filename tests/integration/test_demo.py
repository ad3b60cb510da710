"""The demo, scaled down; each command runs in its own process."""

from __future__ import annotations

import re
import sysconfig
from pathlib import Path
from typing import Any

import pytest

from fmtrain import demo
from fmtrain.cli import main

ROW = {
    "rankme": {"value": 4.0, "standard_error": 0.1, "reason": None, "n": 8, "d": 4, "groups": 2, "details": {}},
    "odcorr": {"value": 0.5, "standard_error": None, "reason": "no group ids", "details": {"null_floor": 0.1}},
    "linear_probe": {"value": 0.5, "standard_error": 0.05, "reason": None, "details": {"chance": 0.25}},
}


@pytest.mark.slow
def test_the_demo_runs_to_its_end(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "demo"
    arguments = ["demo", "--out", str(out), "--slides", "10", "--slide-px", "1024", "--held-out", "80", "--steps", "2"]
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--monitor.every_n_steps", "1", "--data.batch_size", "4"])
    shown = capfd.readouterr()
    assert ended.value.code in (0, None), shown.err
    for command in ("fmtrain manifest", "fmtrain fit --config demo", "repmetrics score"):
        assert f"$ {command}" in shown.err
    assert re.findall(r"^│ +(\d+) │ .*±", shown.out, re.MULTILINE) == ["0", "1", "2"]
    assert "The last row is what `repmetrics score` prints" in " ".join(shown.err.split())
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
