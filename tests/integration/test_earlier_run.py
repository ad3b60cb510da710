"""A run written before modules, settings and classes were renamed is still read and resumed.

`run` has 12 steps and one quarantined slide. `config.yaml` is its configuration with the new names. `expected.json` has
what the earlier code computed: the scores of the checkpoint, and the rest of the run to step 20 with its scores.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from fit_runs import call, rows
from small_runs import LIGHTNING_NOISE

from repmetrics.cli import main

pytestmark = [
    *(pytest.mark.filterwarnings(line) for line in LIGHTNING_NOISE),
    pytest.mark.filterwarnings("ignore:.*args parameter is intended to run.*"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:lightning"),
    pytest.mark.filterwarnings("ignore:complete collapse at step"),  # a tiny network
]
EARLIER = Path(__file__).parent.parent / "data" / "earlier_run"
LAST = Path("run/checkpoints/last.ckpt")


@pytest.fixture
def expected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Results of the earlier code; the files of the run are copied to the current folder."""
    shutil.copytree(EARLIER, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    content: dict[str, Any] = json.loads(Path("expected.json").read_text())
    return content


def values(measurements: dict[str, Any]) -> dict[str, float]:
    return {name: measurement["value"] for name, measurement in measurements.items()}


def of_earlier_keys(row: Any, reference: Any) -> Any:
    """The row with the keys that the earlier code wrote; later ones are additions."""
    if not isinstance(reference, dict):
        return row
    return {key: of_earlier_keys(row[key], part) for key, part in reference.items()}


def score(capsys: pytest.CaptureFixture[str]) -> dict[str, float]:
    with pytest.raises(SystemExit) as exit_info:
        main(["score", str(LAST), "--data", "manifest.json", "--json", "--no-cache"])
    assert not exit_info.value.code
    (result,) = json.loads(capsys.readouterr().out)["scores"]
    return values(result["measurements"])


def test_its_checkpoint_has_the_same_scores(expected: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert score(capsys) == pytest.approx(expected["score"], rel=1e-6)


def test_it_is_resumed_to_the_same_measurements(expected: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    earlier, recorded = torch.load(LAST, weights_only=True), rows(Path("run"))
    Path("run/maxima").mkdir()
    shutil.copy(LAST, "run/maxima/step=12.ckpt")  # kept by the earlier code until step 16, which is better
    assert call("fit", "--config", "config.yaml", "--data.manifest", "manifest.json", "--out", "run", "--resume") == 0
    history = rows(Path("run"))
    assert [of_earlier_keys(row, reference) for row, reference in zip(history[:4], recorded, strict=True)] == recorded
    assert [row["step"] for row in history] == [0, 4, 8, 12, 16, 20]
    for row, reference in zip(history[4:], expected["resumed"], strict=True):
        assert row["loss"] == pytest.approx(reference["loss"], rel=1e-3)  # processors round differently
        measured = values(row["measurements"])  # by default, more than the earlier code measured
        assert {name: measured[name] for name in reference["measurements"]} == pytest.approx(
            reference["measurements"], rel=1e-3
        )
    capsys.readouterr()
    assert score(capsys) == pytest.approx(expected["score_resumed"], rel=1e-3)

    content = torch.load(LAST, weights_only=True)
    assert content.keys() == earlier.keys() | {"hparams_name"}
    assert content["state_dict"].keys() == earlier["state_dict"].keys()
    assert content["callbacks"].keys() == earlier["callbacks"].keys()
    assert content["SlidePatches"] == earlier["SlidePatches"] | {"patches per step": 4}
    assert content["SlidePatches"]["quarantined"] == {"TCGA-C3-1002-01Z-00-DX1.tiff": 32}
    assert [path.name for path in Path("run/maxima").iterdir()] == ["step=20.ckpt"]
