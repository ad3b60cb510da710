"""Initial weights from small files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from fit_runs import SMALL, call
from huggingface_hub import constants
from safetensors.torch import save_file
from small_dino import fit, patches, tiny
from small_runs import LIGHTNING_NOISE
from timm.layers import resample_abs_pos_embed

from fmtrain.methods.pretrained import adapt_weights, initialize_, read_weights, timm_weights
from repmetrics.encoders.checkpoint import load_encoder

pytestmark = [
    *(pytest.mark.filterwarnings(line) for line in LIGHTNING_NOISE),
    pytest.mark.filterwarnings("ignore:.*args parameter is intended to run.*"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:lightning"),
]
TINY: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
HALF = {"mean": (0.5,) * 3, "std": (0.5,) * 3}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def vit(seed: int = 0, **changes: Any) -> Any:
    torch.manual_seed(seed)
    options = {"num_classes": 0, "dynamic_img_size": True} | TINY | changes
    return timm.create_model("vit_tiny_patch16_224", **options).eval()


def saved(path: Path, model: Any, prefix: str = "") -> Path:
    torch.save({f"{prefix}{name}": value for name, value in model.state_dict().items()}, path)
    return path


def test_every_weight_is_loaded_and_the_features_are_equal(tmp_path: Path) -> None:
    source, backbone = vit(1, num_classes=10), vit(2)
    messages = initialize_(backbone, saved(tmp_path / "x.pth", source, "teacher.backbone."), arch="vit", **HALF)
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(backbone(images), source.forward_head(source.forward_features(images), pre_logits=True))
    numbers = sum(p.numel() for p in backbone.parameters())
    assert messages == [
        f"x.pth (teacher.backbone): 30 of the backbone's 30 weights loaded, {numbers:,} of {numbers:,} numbers"
    ]


def test_positions_are_resampled_as_timm_does_it(tmp_path: Path) -> None:
    source, backbone = vit(1, img_size=64), vit(2)
    messages = initialize_(backbone, saved(tmp_path / "x.pth", source), arch="vit", **HALF)
    assert "resized: pos_embed, 8 × 8 to 4 × 4 positions" in messages
    torch.testing.assert_close(backbone.pos_embed, resample_abs_pos_embed(source.pos_embed, [4, 4]))
    assert torch.equal(backbone.cls_token, source.cls_token)


def test_the_class_tokens_position_moves_without_changing_the_sum(tmp_path: Path) -> None:
    images = torch.rand(2, 3, 32, 32)
    for in_file, in_model, message in ((False, True, "moved:"), (True, False, "set to 0:")):
        source, backbone = vit(1, no_embed_class=in_file), vit(2, no_embed_class=in_model)
        messages = initialize_(backbone, saved(tmp_path / "x.pth", source), arch="vit", **HALF)
        assert any(line.startswith(message) for line in messages)
        with torch.no_grad():
            torch.testing.assert_close(backbone(images), source(images), atol=1e-6, rtol=0)


def test_layer_scale_that_the_weights_lack_changes_nothing(tmp_path: Path) -> None:
    source, backbone = vit(1), vit(2, init_values=1e-5)
    messages = initialize_(backbone, saved(tmp_path / "x.pth", source), arch="vit", **HALF)
    assert messages[-1] == "set to 1: 4 layer scales, which the weights were trained without"
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(backbone(images), source(images))


@pytest.mark.parametrize("embedded", [True, False])
def test_registers_are_random_and_named(embedded: bool, tmp_path: Path) -> None:
    source, backbone = vit(1), vit(2, reg_tokens=4, no_embed_class=embedded)
    registers = backbone.reg_token.clone()
    messages = initialize_(backbone, saved(tmp_path / "x.pth", source), arch="vit", **HALF)
    assert messages[0].startswith("x.pth (top level): 30 of the backbone's 31 weights loaded")
    assert messages[-1] == "random: reg_token"
    assert torch.equal(backbone.reg_token, registers)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depth": 3}, "a ViT of width 32, 3 blocks, patches of 8 px"),
        ({"depth": 1}, "a ViT of width 32, 1 block, patches of 8 px"),
        ({"embed_dim": 48}, "a ViT of width 48, 2 blocks, patches of 8 px"),
        ({"patch_size": 4}, "a ViT of width 32, 2 blocks, patches of 4 px"),
        ({"init_values": 1.0}, "a ViT of width 32, 2 blocks, patches of 8 px, layer scale"),
        ({"reg_tokens": 2}, "a ViT of width 32, 2 blocks, patches of 8 px, 2 registers"),
        ({"qkv_bias": False}, "blocks.0.attn.qkv.bias"),
    ],
)
def test_another_architecture_is_refused_and_both_described(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    backbone = vit(2)
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    with pytest.raises(ValueError, match="name a checkpoint of the same architecture") as error:
        initialize_(backbone, saved(tmp_path / "x.pth", vit(1, **changes)), arch="vit_tiny", **HALF)
    assert message in str(error.value)
    assert "vit_tiny as configured is a ViT of width 32, 2 blocks, patches of 8 px" in str(error.value)
    assert all(torch.equal(before[name], value) for name, value in backbone.state_dict().items())


def test_files_without_a_vit_are_refused(tmp_path: Path) -> None:
    resnet = timm.create_model("resnet18", num_classes=0)
    with pytest.raises(ValueError, match="it holds no ViT"):
        initialize_(vit(), saved(tmp_path / "x.pth", resnet), arch="vit", **HALF)
    with pytest.raises(ValueError, match="expected random, timm, or the path of a checkpoint"):
        read_weights(tmp_path / "imagenet")
    (tmp_path / "y.pth").write_text("nothing")
    with pytest.raises(ValueError, match=r"y\.pth"):
        read_weights(tmp_path / "y.pth")


def test_a_checkpoint_of_fmtrain_gives_its_teacher_and_normalization(tmp_path: Path) -> None:
    first = tiny(mean=(0.4, 0.5, 0.6))
    fit(first, steps=3).save_checkpoint(tmp_path / "run.ckpt")
    second = tiny(seed=1, init=tmp_path / "run.ckpt")
    second.initialize()
    images = patches(4, seed=2)[:, :, :16, :16] / 255
    with torch.no_grad():
        assert torch.equal(second.teacher.backbone(images), load_encoder(tmp_path / "run.ckpt").model(images))
        assert torch.equal(second.student.eval().backbone(images), second.teacher.backbone(images))
    messages = initialize_(second.student.backbone, tmp_path / "run.ckpt", arch="vit", **HALF)
    assert messages[-1] == "note: its images were normalized with mean [0.4, 0.5, 0.6], this run's with [0.5, 0.5, 0.5]"
    other = vit(2, img_size=16, patch_size=4, num_heads=4)
    with pytest.raises(ValueError, match="2 attention heads per block, vit as configured 4"):
        initialize_(other, tmp_path / "run.ckpt", arch="vit", **HALF)


def test_a_trainer_without_the_command_loads_them_and_a_resumed_run_does_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = saved(tmp_path / "x.pth", vit(1, img_size=16, patch_size=4))
    model = tiny(init=path)
    trainer = fit(model, steps=2)
    assert capsys.readouterr().err.startswith("init: x.pth (top level): 30 of the backbone's 30 weights loaded")
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    path.unlink()
    resumed = tiny(seed=5, init=path)
    trainer = type(trainer)(
        max_steps=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(resumed, torch.utils.data.DataLoader(patches(16), batch_size=16), ckpt_path=tmp_path / "run.ckpt")
    assert capsys.readouterr().err == ""
    for (name, a), b in zip(model.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_timms_weights_come_from_its_hub_and_are_resized(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub is Hugging Face's cache folder, filled by the test; there is no network."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        ValueError, match=r"could not download timm's weights for vit_tiny_patch16_224: .*set model.init to"
    ):
        timm_weights("vit_tiny_patch16_224")
    torch.manual_seed(1)
    source = timm.create_model("vit_tiny_patch16_224", num_classes=1000)
    repository = tmp_path / "models--timm--vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    (repository / "snapshots" / "0").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0")
    save_file(source.state_dict(), repository / "snapshots" / "0" / "model.safetensors")

    backbone = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=96)
    messages = initialize_(backbone, "timm", arch="vit_tiny_patch16_224", mean=(0.4,) * 3, std=(0.5,) * 3)
    assert messages[0].startswith("timm's vit_tiny_patch16_224.augreg_in21k_ft_in1k: 150 of the backbone's 150 weights")
    assert messages[1:] == [
        "resized: pos_embed, 14 × 14 to 6 × 6 positions",
        "note: its images were normalized with mean [0.5, 0.5, 0.5], this run's with [0.4, 0.4, 0.4]",
    ]
    assert torch.equal(backbone.blocks[11].mlp.fc2.weight, source.blocks[11].mlp.fc2.weight)
    shallow = timm.create_model("vit_tiny_patch16_224", num_classes=0, depth=6)
    with pytest.raises(ValueError, match=r"a ViT of width 192, 12 blocks.*a ViT of width 192, 6 blocks"):
        initialize_(shallow, "timm", arch="vit_tiny_patch16_224", **HALF)


def test_an_empty_file_is_refused() -> None:
    with pytest.raises(ValueError, match="no ViT"):
        adapt_weights({}, {"norm.weight": torch.zeros(3)}, arch="vit", source="x.pth")


def test_the_command_prints_what_was_loaded_and_refuses_before_it_deletes(
    manifest: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config, out = tmp_path / "small.yaml", tmp_path / "run"
    config.write_text(SMALL)
    path = saved(tmp_path / "x.pth", vit(1, img_size=64))
    arguments = ["fit", "--config", config, "--out", out, "--data.manifest", manifest, "--trainer.max_steps", 1]
    assert call(*arguments, "--model.init_args.init", path) == 0
    error = capsys.readouterr().err
    assert "init: x.pth (top level): 30 of the backbone's 30 weights loaded" in error
    assert "init: resized: pos_embed, 8 × 8 to 4 × 4 positions" in error
    assert f"init: {path}" in (out / "config.yaml").read_text()

    path.unlink()
    more = ["--trainer.max_steps", 2, "--model.init_args.init", path]
    assert call(*arguments, *more, "--resume") == 0
    assert "init:" not in capsys.readouterr().err
    assert call(*arguments, *more, "--overwrite") == 1
    assert "expected random, timm, or the path of a checkpoint" in capsys.readouterr().err
    assert (out / "checkpoints" / "last.ckpt").is_file()
