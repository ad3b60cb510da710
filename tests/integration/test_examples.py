"""The examples of the docs, run unchanged."""

from __future__ import annotations

import csv
import json
import os
import re
import runpy
import subprocess
from pathlib import Path
from typing import Any

import pytest
from paths import HELPERS, ROOT
from processes import Program, run_script
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fmtrain.cli import main as fmtrain
from repmetrics.cli import main as repmetrics

EXAMPLES = ROOT / "docs" / "examples"
PEERS = ROOT / "build" / "peers" / "bin" / "python"


def run(name: str, root: Path, **options: Any) -> Any:
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"](root, **options)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the libraries of the examples warn
def test_simclr(tmp_path: Path) -> None:
    monitor = run("simclr", tmp_path)
    assert [record.step for record in monitor.history] == [0, 4, 8, 12]
    (kept,) = tmp_path.rglob("epoch=*.ckpt")
    assert monitor.history[-1].loss < 5
    best = max(monitor.history[1:], key=lambda record: record.measurements["rankme"].value)
    assert f"step={best.step}.ckpt" in kept.name


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_lightly_dino(tmp_path: Path) -> None:
    monitor = run("lightly_dino", tmp_path)
    assert [record.step for record in monitor.history] == [0, 2, 4, 6]
    assert monitor.history[-1].measurements["rankme"].d == 192
    values = {record.measurements["rankme"].value for record in monitor.history}
    assert len(values) == 4  # the EMA moves the teacher


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_own_loop(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monitor = run("own_loop", tmp_path)
    assert "complete collapse: 1 − ‖E u‖²" in capsys.readouterr().out  # its loss allows it
    lines = [json.loads(line) for line in (tmp_path / "measurements.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [record.step for record in monitor.history] == [0, 4, 8]
    assert "blocks.0/rankme" in lines[-1]["measurements"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_accelerate_loop(tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="accelerate is not installed: pip install accelerate")
    monitor = run("accelerate_loop", tmp_path)
    events = EventAccumulator(str(tmp_path / "ssl"))
    events.Reload()
    logged = {point.step: point.value for point in events.Scalars("repmetrics/rankme")}
    expected = {record.step: record.measurements["rankme"].value for record in monitor.history}
    assert list(expected) == [0, 4, 8]
    assert logged == pytest.approx(expected, rel=1e-6)  # event files hold float32


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_fabric_loop(tmp_path: Path) -> None:
    monitor = run("fabric_loop", tmp_path)
    (table,) = tmp_path.rglob("metrics.csv")
    with table.open() as file:
        logged = {int(row["step"]): float(row["repmetrics/rankme"]) for row in csv.DictReader(file)}
    expected = {record.step: record.measurements["rankme"].value for record in monitor.history}
    assert list(expected) == [0, 4, 8]
    assert logged == expected
    assert "blocks.0/rankme" in monitor.history[-1].measurements


@pytest.fixture
def peers() -> Path:
    """Interpreter of an environment with stable-pretraining."""
    command = [PEERS, "-c", "import stable_pretraining"]
    if not PEERS.is_file() or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("stable-pretraining is not in build/peers: python benchmarks/peers/install.py")
    return PEERS


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 2])
def test_stable_pretraining(peers: Path, tmp_path: Path, devices: int) -> None:
    """The case that fails with its own callbacks: two ranks, EarlyStopping and ModelCheckpoint on the rank metric."""
    done = subprocess.run(
        [peers, EXAMPLES / "stable_pretraining_simclr.py", tmp_path, str(devices)],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = dict(re.findall(r"rank (\d): RankMe (\d+\.\d{6})", done.stdout))  # the ranks' lines may run together
    assert sorted(ranks) == [str(rank) for rank in range(devices)]
    assert len(set(ranks.values())) == 1
    assert len(list((tmp_path / "kept").glob("*.ckpt"))) == 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_sweep_of_any_script(tmp_path: Path) -> None:
    script = f"{{python}} {EXAMPLES / 'sweep_script.py'} --out {{out}} --lr {{lr}} --seed {{seed}}"
    entries = {"study": "s", "command": script, "trials": 2, "run_steps": 16, "domain": "custom"}
    entries |= {"parameters": {"lr": {"low": 0.01, "high": 1.0, "log": True}}}
    (tmp_path / "sweep.yaml").write_text(json.dumps(entries))
    with pytest.raises(SystemExit, match="0"):
        fmtrain(["sweep", str(tmp_path / "sweep.yaml"), "--csv"])
    for folder in sorted((tmp_path / "s" / "trials").iterdir()):
        lines = [json.loads(line) for line in (folder / "run" / "measurements.jsonl").open()]
        assert [line["step"] for line in lines] == [0, 8, 16]
        assert list((folder / "run").glob("*.ckpt"))


@pytest.mark.slow
def test_a_hydra_multirun_is_ranked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--multirun", "lr=0.01,0.3", f"hydra.sweep.dir={tmp_path / 'multirun'}"]
    program = Program(run_script, EXAMPLES / "hydra_sweep.py", *words, folder=tmp_path)
    assert program.wait() == 0, program.stderr.read_text()
    with pytest.raises(SystemExit, match="0"):
        repmetrics(["select", str(tmp_path / "multirun"), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert sorted(run["settings"]["lr"] for run in found["runs"]) == [0.01, 0.3]
    assert found["by"] == "view_retrieval_whitened"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_ray_tune(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray.tune", reason="pip install 'ray[tune]'")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    results = run("ray_tune", tmp_path, samples=2)
    assert results.get_best_result().metrics["rankme"] > 1


@pytest.mark.slow
def test_stable_pretraining_trains_the_same_weights(peers: Path, tmp_path: Path) -> None:
    command = [peers, HELPERS / "stable_pretraining_run.py"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
