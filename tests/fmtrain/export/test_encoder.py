"""The exported encoder, its configuration and its model card."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
import torch
from fit_runs import call
from safetensors.torch import load_file
from small_dino import fit, patches, tiny
from small_runs import LIGHTNING_NOISE

from fmtrain.version import code_version
from repmetrics.encoders.checkpoint import load_encoder

pytestmark = [pytest.mark.filterwarnings(line) for line in LIGHTNING_NOISE]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("to", "weights"), [("safetensors", "model.safetensors"), ("timm", "weights.pth")])
def test_the_exported_encoder_gives_the_same_features(to: str, weights: str, tmp_path: Path) -> None:
    model = tiny()
    checkpoint = tmp_path / "run" / "checkpoints" / "last.ckpt"
    fit(model, steps=2).save_checkpoint(checkpoint)
    (checkpoint.parent.parent / "config.yaml").write_text("trainer: {max_steps: 2}\n")
    out = tmp_path / "exported"
    assert call("export", checkpoint, "--out", out, "--to", to) == 0
    images = patches(4, seed=2)[:, :, :16, :16]
    with torch.no_grad():
        expected = model(images)
        assert torch.equal(load_encoder(out / weights)(images), expected)

        config = json.loads((out / "config.json").read_text())
        bare = timm.create_model(config["architecture"], num_classes=0, **config["model_args"]).eval()
        file = out / weights
        bare.load_state_dict(load_file(file) if to == "safetensors" else torch.load(file, weights_only=True))
        assert torch.equal(bare((images / 255 - 0.5) / 0.5), expected)
    card = (out / "README.md").read_text()
    assert "step 2" in card
    assert "trainer: {max_steps: 2}" in card
    assert f"Trained with: fmtrain {code_version()}." in card
    assert call("export", checkpoint, "--out", out, "--to", to) == 1


def test_an_encoder_with_swiglu_is_exported_with_the_call_that_builds_it(tmp_path: Path) -> None:
    model = tiny(ffn_layer="swiglu")
    fit(model, steps=2).save_checkpoint(tmp_path / "last.ckpt")
    out = tmp_path / "exported"
    assert call("export", tmp_path / "last.ckpt", "--out", out) == 0
    images = patches(4, seed=2)[:, :, :16, :16]
    card = (out / "README.md").read_text()
    source = card.split("Build with: `")[1].split("`")[0]
    built = eval(source, {"timm": timm, "torch": torch}).eval()
    built.load_state_dict(load_file(out / "model.safetensors"))
    with torch.no_grad():
        expected = model(images)
        assert torch.equal(load_encoder(out / "model.safetensors")(images), expected)
        assert torch.equal(built((images / 255 - 0.5) / 0.5), expected)


def test_what_is_no_checkpoint_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.ckpt").write_text("nothing")
    assert call("export", tmp_path / "x.ckpt", "--out", tmp_path / "out") == 1
    assert "x.ckpt" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_export_can_be_exported_again(tmp_path: Path) -> None:
    checkpoint = tmp_path / "last.ckpt"
    fit(tiny(), steps=1).save_checkpoint(checkpoint)
    assert call("export", checkpoint, "--out", tmp_path / "a") == 0
    assert call("export", tmp_path / "a" / "model.safetensors", "--out", tmp_path / "b", "--to", "timm") == 0
    first, second = (json.loads((tmp_path / name / "config.json").read_text()) for name in "ab")
    assert first == second
    assert "step None" not in (tmp_path / "b" / "README.md").read_text()


def test_checkpoints_of_others_are_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")  # no git
    for arch in ("vit_tiny_patch16_224", "resnet18"):
        model = timm.create_model(arch, num_classes=0)
        torch.save({"teacher": model.state_dict(), "args": Namespace(lr=0.1)}, tmp_path / f"{arch}.pth")
        assert call("export", tmp_path / f"{arch}.pth", "--arch", arch, "--out", tmp_path / arch) == 0
        assert load_file(tmp_path / arch / "model.safetensors").keys() == model.state_dict().keys()


def test_a_failed_export_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(timm.create_model("vit_tiny_patch16_224", num_classes=0).state_dict(), tmp_path / "x.pth")
    assert call("export", tmp_path / "x.pth", "--out", tmp_path / "out") == 1
    assert "x.pth does not state its architecture, which timm builds by name: pass --arch" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["x.pth"]
