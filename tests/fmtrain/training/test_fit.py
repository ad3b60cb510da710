"""`fmtrain fit` from the command line, on synthetic slides."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

import pytest
import torch
import yaml
from fit_runs import SMALL, call, rows
from small_runs import LIGHTNING_NOISE

pytestmark = [
    *(pytest.mark.filterwarnings(line) for line in LIGHTNING_NOISE),
    pytest.mark.filterwarnings("ignore:.*args parameter is intended to run.*"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:lightning"),  # from jsonargparse
]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    return path


def test_all_files_of_a_run_are_in_its_folder(manifest: Path, config: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert call("fit", "--config", config, "--out", out, "--data.manifest", manifest) == 0
    assert torch.load(out / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 6
    assert [row["step"] for row in rows(out)] == [0, 3, 6]
    assert {"rankme", "rankme_centered", "odcorr", "linear_probe"} <= set(rows(out)[-1]["measurements"])
    assert (out / "config.yaml").is_file()
    assert list(out.glob("events.out.tfevents.*"))
    settings = yaml.safe_load((out / "hparams.yaml").read_text(encoding="utf-8"))  # as in TensorBoard's HParams
    assert settings["trainer.max_steps"] == 6
    assert settings["model.arch"] == torch.load(out / "checkpoints" / "last.ckpt")["hyper_parameters"]["arch"]


def test_a_run_without_progress_bar_prints_no_progress_line(
    manifest: Path, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("fit", "--config", config, "--data.manifest", manifest, "--trainer.max_steps", 1)
    assert call(*arguments, "--out", tmp_path / "shown") == 0
    assert "step 1/1" in capsys.readouterr().err
    assert call(*arguments, "--out", tmp_path / "silent", "--trainer.enable_progress_bar", "false") == 0
    assert "step 1/1" not in capsys.readouterr().err
    recorded = yaml.safe_load((tmp_path / "silent" / "config.yaml").read_text(encoding="utf-8"))
    assert recorded["trainer"]["enable_progress_bar"] is False


def test_a_used_folder_is_refused_and_overwritten_on_demand(
    manifest: Path, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    arguments = ("fit", "--config", config, "--out", out, "--data.manifest", manifest, "--trainer.max_steps", 1)
    assert call(*arguments) == 0
    assert call(*arguments) == 1
    assert f"{out} is not empty: --resume continues the run in it, --overwrite deletes it" in capsys.readouterr().err
    assert call(*arguments, "--overwrite") == 0
    assert [row["step"] for row in rows(out)] == [0, 1]
    (out / "config.yaml").unlink()
    assert call(*arguments, "--overwrite") == 1
    assert "contains no config.yaml" in capsys.readouterr().err
    assert (out / "measurements.jsonl").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "no-such"], "no configuration no-such: neither a file nor one of"),
        (["--resume"], "nothing to resume"),
        (["--resume", "--overwrite"], "choose one"),
        (["--data.manifest", "nowhere.json"], "nowhere.json"),
        (["--model.init_args.n_prototype", "3"], "has no 'n_prototype': did you mean n_prototypes"),
        (["--trainer.max_step", "3"], "has no 'trainer.max_step': did you mean max_steps"),
        (["--data.sise_px", "3"], "has no 'data.sise_px': did you mean size_px"),
        (["--model.init_args.augment.global_sizes", "3"], "did you mean global_crops_size"),
        (["--model.init_args.n_prototypes", "many"], "Expected a <class 'int'>. Got value: many"),
        (["--model", "fmtrain.methods.dino.DINA"], "DINA"),
        (["--data.patches_in_total", "7"], "a batch of 8 patches is more than the 7 distinct patches of"),
        (["--data.patches_per_slide", "1"], "a batch of 8 patches is more than the 5 distinct patches of 5 training"),
        (
            ["--model.init_args.arch", "vit_smal_patch16_224"],
            "vit_smal_patch16_224: did you mean vit_small",
        ),
        (["--model.init_args.arch", "resnet18"], "resnet18 cannot be created as a ViT"),
        (["--model.init_args.schedules.lr", "-1"], "lr must be 0 or more, got -1"),
        (
            ["--model.init_args.schedules.momentum_teacher", "1.5"],
            "momentum_teacher must be 0 or more and at most 1, got 1.5",
        ),
        (["--trainer.max_steps", "-1"], "the length of the run is unknown: set trainer.max_steps"),
        (["--trainer.max_steps", "-1", "--trainer.max_epochs", "2"], "trainer.max_epochs defines no length"),
        (["--trainer.precision", "bf16-true"], "set bf16-mixed"),
        (["--trainer.precision", "16-true"], "set 16-mixed"),
        (["--model.init_args.drop_path_rate", "1.5"], "drop_path_rate must be 0 or more and below 1, got 1.5"),
        (["--model.init_args.n_prototypes", "0"], "n_prototypes must be 1 or more, got 0"),
        (["--model.init_args.std", "[1, 0, 1]"], "std must be above 0, got 0"),
        (["--data.num_workers", "-1"], "num_workers must be 0 or more, got -1"),
        (["--trainer.accumulate_grad_batches", "0"], "accumulate_grad_batches must be 1 or more, got 0"),
        (["--progress.every_seconds", "-1"], "every_seconds must be above 0, got -1"),
        (["--trainer.gradient_clip_val", "1"], "set model.clip_grad instead of trainer.gradient_clip_val"),
        (
            ["--model.init_args.arch_kwargs.patch_size", "7"],
            "the held-out patches: 32 px cannot be cut into tokens of 7",
        ),
        (
            ["--model.init_args.augment.local_crops_size", "12"],
            "local_crops_size: 12 px cannot be cut into tokens of 8 px: set it to 8",
        ),
        (["--trainer.devices", "0"], "the trainer cannot run as configured: `Trainer(devices='0')`"),
        (["--data.batch_size", "0"], "batch_size must be 1 or more, got 0"),
    ],
)
def test_bad_input_is_one_sentence(
    manifest: Path, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    common = ["--data.manifest", str(manifest)]
    assert call("fit", "--config", config, "--out", tmp_path / "run", *common, *arguments) == 1
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert len(error.strip().splitlines()) <= 2
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", sorted(path.stem for path in Path(str(files("fmtrain") / "configs")).glob("*.yaml")))
def test_every_shipped_configuration_is_valid(name: str, manifest: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["fit", "--config", name, "--data.manifest", manifest]
    assert call(*arguments, "--print_config") == 0, capsys.readouterr().err
    assert "class_path: fmtrain.methods.DINO" in capsys.readouterr().out
    assert call(*arguments) == 2
    assert "--out" in capsys.readouterr().err


def test_weights_that_are_not_finite_are_never_written(
    manifest: Path, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    broken = ["--model.schedules.lr", "1e38", "--model.clip_grad", "null", "--monitor.every_n_steps", "100"]
    assert call("fit", "--config", config, "--out", out, "--data.manifest", manifest, *broken) == 1
    error = capsys.readouterr().err
    assert "the weights are not finite at step 2" in error
    assert "no checkpoint was written before" in error
    assert "Traceback" not in error
    assert not list(out.rglob("*.ckpt"))
