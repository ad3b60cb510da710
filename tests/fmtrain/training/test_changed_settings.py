"""What a resumed run says about its settings, and which it refuses to change. One run of two steps serves all tests."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import yaml
from fit_runs import SMALL, call, rows
from small_runs import LIGHTNING_NOISE

from fmtrain.training.resume import compare_settings

pytestmark = [
    *(pytest.mark.filterwarnings(line) for line in LIGHTNING_NOISE),
    pytest.mark.filterwarnings("ignore:.*args parameter is intended to run.*"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:lightning"),
]


@pytest.fixture(scope="module")
def finished(manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Arguments of a run that ended at step 2."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "small.yaml").write_text(SMALL)
    arguments = ["fit", "--config", str(folder / "small.yaml"), "--data.manifest", str(manifest)]
    assert call(*arguments, "--out", folder / "run", "--trainer.max_steps", 2) == 0
    return [*arguments, "--out", str(folder / "run")]


@pytest.fixture
def run(finished: list[str], tmp_path: Path) -> list[str]:
    """Arguments of a copy of that run, which ends at step 3."""
    shutil.copytree(finished[-1], tmp_path / "run")
    return [*finished[:-1], str(tmp_path / "run"), "--trainer.max_steps", "3", "--resume"]


@pytest.mark.parametrize(
    ("options", "change"),
    [
        (["--model.schedules.lr", "0.5"], "model.init_args.schedules.lr: 0.0005 → 0.5"),
        (["--model.mean", "[0.1, 0.1, 0.1]"], "model.init_args.mean: [0.5, 0.5, 0.5] → [0.1, 0.1, 0.1]"),
        (["--model.augment.seed", "9"], "model.init_args.augment.seed: 0 → 9"),
        (["--data.seed", "7"], "data.seed: 0 → 7"),
        (["--data.size_px", "48"], "data.size_px: 40 → 48"),
        (["--data.mpp", "[1.0]"], "data.mpp: None → [1.0]"),
        (["--data.batch_size", "4"], "patches_per_step: 8 → 4"),
        (["--trainer.accumulate_grad_batches", "2"], "trainer.accumulate_grad_batches: 1 → 2"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_settings_of_data_and_schedules_change_only_on_demand(
    run: list[str], options: list[str], change: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = Path(run[run.index("--out") + 1])
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert call(*run, *options) == 1
    error = capsys.readouterr().err
    assert "resume: trainer.max_steps: 2 → 3" in error
    assert f"the run started with other settings: {change}; " in error
    key = change.partition(":")[0]
    assert f"--allow-change {key}" in error
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_an_allowed_change_is_listed_and_the_earlier_configuration_kept(
    run: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    out = Path(run[run.index("--out") + 1])
    first = (out / "config.yaml").read_text()
    options = ["--model.schedules.lr", "0.1", "--data.batch_size", "4", "--monitor.every_n_steps", "2"]
    assert call(*run, *options, "--allow-change", "schedules.lr", "--allow-change", "patches_per_step") == 0
    error = capsys.readouterr().err
    for line in ("schedules.lr: 0.0005 → 0.1", "data.batch_size: 8 → 4", "monitor.every_n_steps: 3 → 2"):
        assert line in error
    assert (out / "config-until-step-00000002.yaml").read_text() == first
    assert yaml.safe_load((out / "config.yaml").read_text())["model"]["init_args"]["schedules"]["lr"] == 0.1
    assert torch.load(out / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 3


def test_a_finished_run_has_nothing_left_to_do(finished: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    out = Path(finished[-1])
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    for mode in (["--resume"], ["--resume", "auto"]):
        assert call(*finished, "--trainer.max_steps", 2, *mode) == 0
        assert "nothing left to do" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_auto_begins_a_run_and_begins_it_again_without_a_checkpoint(run: list[str], tmp_path: Path) -> None:
    out = Path(run[run.index("--out") + 1])
    for path in out.rglob("*.ckpt"):
        path.unlink()
    (out / "job.log").write_text("opened by the scheduler")
    assert call(*run, "auto") == 0
    assert [row["step"] for row in rows(out)] == [0, 3]
    assert (out / "job.log").is_file()
    (out / "checkpoints" / "last.ckpt").write_bytes(b"half")
    for path in (out / "checkpoints").glob("step*"):
        path.unlink()
    assert call(*run, "auto") == 1  # damaged checkpoints are not overwritten


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--model.centering", "sinkhorn_knopp"], "the encoder is the same, but not model.centering and n_prototypes"),
        (
            ["--model.n_prototypes", "128"],
            "but not model.centering and n_prototypes, nor model.n_prototypes, hidden_dim",
        ),
    ],
)
def test_another_model_is_described_by_what_differs(
    run: list[str], options: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(*run, *options) == 1
    error = capsys.readouterr().err
    assert named in error
    assert error.count("a ViT of width") == 0


def test_more_ranks_with_smaller_batches_are_the_same_run() -> None:
    old, new = {"data": {"batch_size": 8}}, {"data": {"batch_size": 4}}
    assert [change.binding for change in compare_settings(old, new, per_step=(8, 8)).changes] == [False]
    assert [change.binding for change in compare_settings(old, new).changes] == [True]
    changed = compare_settings(old, old, per_step=(8, 16)).changes  # twice the ranks
    assert [(change.key, change.binding) for change in changed] == [("patches_per_step", True)]
