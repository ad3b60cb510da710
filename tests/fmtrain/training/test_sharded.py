"""A model sharded over ranks by FSDP2 trains, resumes, is measured and scored as one that is whole."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from fit_runs import SMALL, rows
from lightning.pytorch.strategies import DDPStrategy
from processes import run_fmtrain, run_ranks
from small_runs import LIGHTNING_NOISE
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from fmtrain.training.resume import latest_checkpoint
from fmtrain.training.sharded import ShardedStrategy, check_strategy
from repmetrics.cli import main as repmetrics

pytestmark = [
    *(pytest.mark.filterwarnings(line) for line in LIGHTNING_NOISE),
    pytest.mark.filterwarnings("ignore:.*args parameter is intended to run.*"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:lightning"),
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
]
V2 = ["--model", "fmtrain.methods.DINOv2", "--model.ibot_prototypes", "64", "--model.centering", "sinkhorn_knopp"]
V2 += ["--model.layer_scale", "0.5", "--monitor.metrics", '["rankme_centered"]', "--trainer.max_steps", "4"]


def weights(run: Path, folder: Path) -> dict[str, torch.Tensor]:
    """Weights and optimizer of the last checkpoint, by name."""
    whole = folder / f"{run.name}.pt"
    dcp_to_torch_save(run / "checkpoints" / "last.ckpt", whole)
    return dict(flat(torch.load(whole, weights_only=True), ""))


def flat(value: Any, name: str) -> list[tuple[str, torch.Tensor]]:
    if isinstance(value, dict):
        return [pair for key, item in value.items() for pair in flat(item, f"{name}/{key}")]
    return [(name, value)] if isinstance(value, torch.Tensor) else []


def measured(run: Path) -> list[tuple[int, float]]:
    return [(row["step"], row["measurements"]["rankme_centered"]["value"]) for row in rows(run)]


@pytest.mark.slow
def test_a_sharded_run_equals_a_whole_one(
    manifest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    config = tmp_path / "small.yaml"
    config.write_text(SMALL)
    common = ["fit", "--config", str(config), "--data.manifest", str(manifest), "--data.num_workers", "0", *V2]

    def run(name: str, *options: object, world: int = 2) -> Path:
        logs = tmp_path / f"logs of {name}"
        logs.mkdir()
        words = [*common, "--trainer.devices", world, *options, "--out", tmp_path / name]
        run_ranks(run_fmtrain, *words, folder=logs, world=world)
        return tmp_path / name

    sharded, whole = run("sharded", "--trainer.strategy", "fsdp2"), run("whole", "--trainer.strategy", "ddp")
    assert [step for step, _ in measured(sharded)] == [0, 3, 4]
    assert measured(sharded)[0] == measured(whole)[0]  # bit by bit
    assert measured(sharded) == [(step, pytest.approx(value, rel=1e-4)) for step, value in measured(whole)]
    assert measured(sharded)[0][1] > 3
    files = {path.name for path in (sharded / "checkpoints" / "last.ckpt").iterdir()}
    assert files == {".metadata", "__0_0.distcp", "__1_0.distcp", "meta.pt"}

    with pytest.raises(SystemExit, match="0"):
        repmetrics(
            ["score", str(sharded / "checkpoints" / "last.ckpt"), "--data", str(manifest), "--json", "--no-cache"]
        )
    (score,) = json.loads(capsys.readouterr().out)["scores"]
    values = {m["name"]: m["value"] for m in score["measurements"].values()}
    assert (4, pytest.approx(values["rankme_centered"], rel=1e-9)) == measured(sharded)[-1]

    for name, world, batch in (("again", 2, 8), ("alone", 1, 16)):
        shutil.copytree(sharded, tmp_path / name)
        for file in ("last.ckpt", "step-00000004.ckpt"):
            shutil.rmtree(tmp_path / name / "checkpoints" / file)
        run(name, "--trainer.strategy", "fsdp2", "--data.batch_size", batch, "--resume", world=world)
    final = weights(sharded, tmp_path)
    again, alone = weights(tmp_path / "again", tmp_path), weights(tmp_path / "alone", tmp_path)
    assert final.keys() == again.keys() == alone.keys()
    assert len(final) > 200
    assert all(torch.equal(final[name], value) for name, value in again.items())
    for name in (name for name in final if name.startswith("/state_dict/")):
        torch.testing.assert_close(alone[name], final[name], atol=5e-3, rtol=0)

    last = sharded / "checkpoints" / "last.ckpt"
    with pytest.raises(ValueError, match=r"is sharded: continue with trainer\.strategy fsdp2, or begin a run with"):
        check_strategy(last, DDPStrategy())
    with pytest.raises(ValueError, match=r"is not sharded: continue with trainer\.strategy ddp, or begin a run with"):
        check_strategy(whole / "checkpoints" / "last.ckpt", ShardedStrategy())
    for folder in ("last.ckpt", "step-00000004.ckpt"):
        with (sharded / "checkpoints" / folder / "__1_0.distcp").open("r+b") as part:
            part.truncate(100)
    skipped: list[str] = []
    path, step = latest_checkpoint(sharded / "checkpoints", on_skipped=lambda path, reason: skipped.append(reason))
    assert (path.name, step) == ("step-00000002.ckpt", 2)
    assert skipped == 2 * [skipped[0]]
    assert skipped[0].startswith("__1_0.distcp is incomplete: it has 100 bytes")
