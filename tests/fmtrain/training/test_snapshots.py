"""Snapshots of the teacher at evaluations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from fit_runs import SMALL, call
from small_runs import LIGHTNING_NOISE

from fmtrain.training.snapshots import TeacherSnapshots, steps_to_keep
from repmetrics.encoders.checkpoint import load_encoder
from repmetrics.measurement.result import Measurement
from repmetrics.monitoring.record import Record

pytestmark = [
    *(pytest.mark.filterwarnings(line) for line in LIGHTNING_NOISE),
    pytest.mark.filterwarnings("ignore:.*args parameter is intended to run.*"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:lightning"),
]


def history(*values: float) -> list[Record]:
    common: dict[str, Any] = {"standard_error": None, "reason": "", "direction": "higher", "n": 10, "d": 2}
    common |= {"groups": None, "convention": "", "dtype": "float32"}
    return [Record(k, 0, 0.0, {"rankme": Measurement("rankme", value, **common)}) for k, value in enumerate(values)]


def test_the_rules_of_what_is_kept() -> None:
    records = history(9.0, 1.0, 3.0, 2.0, 5.0, 4.0, 2.5, 2.6, 2.0, 1.0)
    assert steps_to_keep(records, "none") == set()
    assert steps_to_keep(records, "all") == set(range(1, 10))
    assert steps_to_keep(records, "all", every_n_evaluations=3) == {3, 6, 9}
    assert steps_to_keep(records, 2) == {8, 9}
    assert steps_to_keep(records, 2, every_n_evaluations=4) == {4, 8}
    assert steps_to_keep(records, "local_maxima") == {2, 4, 7, 9}  # three maxima and the newest
    with pytest.raises(ValueError, match="keep_teacher must be 1 or more, got 0"):
        TeacherSnapshots(keep_teacher=0)


def test_a_run_keeps_its_teachers_also_when_resumed(
    manifest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, out = tmp_path / "small.yaml", tmp_path / "run"
    config.write_text(SMALL.replace("every_n_steps: 3", "every_n_steps: 2, metrics: [rankme]"))
    common: list[Any] = [
        "fit",
        "--config",
        config,
        "--data.manifest",
        manifest,
        "--out",
        out,
        "--model.drop_path_rate",
        0,
    ]
    assert call(*common, "--trainer.max_steps", 4, "--snapshots.keep_teacher", "all") == 0
    folder = out / "teachers"
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000002.ckpt", "step-00000004.ckpt"]
    stated = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("snapshots"))
    megabytes = (folder / "step-00000002.ckpt").stat().st_size / 1e6
    assert float(stated.split(": ")[1].split(" MB")[0]) == pytest.approx(megabytes, rel=0.15)
    assert "at most 2 at a time" in stated

    images = torch.rand((4, 3, 32, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = load_encoder(out / "checkpoints" / "last.ckpt")(images)
        light = load_encoder(folder / "step-00000004.ckpt")
        assert torch.equal(light(images), whole)
    assert light.step == 4
    assert call("fit", *common[1:], "--resume", "--trainer.max_steps", 6, "--snapshots.keep_teacher", 2) == 0
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000004.ckpt", "step-00000006.ckpt"]
