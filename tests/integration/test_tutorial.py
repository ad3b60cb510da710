"""The tutorial's notebook: every cell runs, in fewer steps than printed."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from matplotlib import pyplot
from paths import ROOT
from small_runs import LIGHTNING_NOISE

import repmetrics.cli

NOTEBOOK = ROOT / "docs" / "tutorial.ipynb"


def cells() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in found if cell["cell_type"] == "code"]


@pytest.mark.filterwarnings(*LIGHTNING_NOISE, "ignore:.*GPU available.*", "ignore:.*log_every_n_steps.*")
def test_every_cell_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TUTORIAL_STEPS", "5")
    pyplot.switch_backend("agg")
    names: dict[str, Any] = {}
    for cell in cells():
        source = "".join(cell["source"])
        if source.startswith("!"):
            with pytest.raises(SystemExit) as ended:
                repmetrics.cli.main(shlex.split(source)[1:])
            assert ended.value.code in (0, None), source
        else:
            exec(compile(source, str(NOTEBOOK), "exec"), names)
    pyplot.close("all")
    assert "report.html" in capsys.readouterr().out
    assert [record.step for record in names["broken"].history] == list(range(6))
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "no-negatives" in page
    assert page.count("Neighbors: each row begins with a held-out image") == 2
    assert "Tokens of submodule 2" in page  # the last convolution


def test_the_outputs_are_stored_and_small() -> None:
    outputs = [output for cell in cells() for output in cell["outputs"]]
    assert all(cell["execution_count"] for cell in cells())
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 4
    assert not any(output["output_type"] == "error" for output in outputs)
    assert NOTEBOOK.stat().st_size < 600_000
