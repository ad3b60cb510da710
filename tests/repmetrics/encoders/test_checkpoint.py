"""Small modules saved in every format load to encoders with the same features, or fail with one clear sentence."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.layers.mlp import SwiGLUPacked
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from repmetrics.encoders.checkpoint import find_prefix, identify, load_encoder
from repmetrics.encoders.encoder import Encoder, build
from repmetrics.encoders.files import read_checkpoint_file
from repmetrics.encoders.safe_load import Content, flatten, read_checkpoint

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 1}
HALF = [0.5, 0.5, 0.5]


def vit(seed: int = 0, **kwargs: Any) -> nn.Module:
    torch.manual_seed(seed)
    model = VisionTransformer(**{**TINY, "num_classes": 0, **kwargs})
    with torch.no_grad():  # zeros and ones would hide a parameter that is not loaded
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def images(size: int = 32, seed: int = 1) -> Tensor:
    return torch.rand(3, 3, size, size, generator=torch.Generator().manual_seed(seed))


def under(prefix: str, model: nn.Module) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in model.state_dict().items()}


@torch.no_grad()
def expected(model: nn.Module, encoder: Encoder, x: Tensor) -> Tensor:
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (encoder.mean, encoder.std))
    return model((x - mean) / std)


def assert_same(path: Path, model: nn.Module, **options: Any) -> Encoder:
    """Bit-identical: the same operations on the same numbers, with no position resampled."""
    encoder = load_encoder(path, **options)
    assert torch.equal(encoder(images()), expected(model, encoder, images()))
    assert not encoder.training
    assert not any(p.requires_grad for p in encoder.parameters())
    return encoder


def fmtrain_file(path: Path, *, teacher: nn.Module, student: nn.Module, kwargs: dict[str, Any] = TINY) -> Path:
    state = {
        **under("student.backbone.", student),
        "student.head.mlp.0.weight": torch.zeros(4, 64),
        **under("teacher.backbone.", teacher),
        "teacher.head.mlp.0.weight": torch.zeros(4, 64),
    }
    hparams = {"arch": "vit_small_patch16_224", "arch_kwargs": kwargs, "mean": HALF, "std": HALF, "lr": 1e-3}
    torch.save({"epoch": 1, "global_step": 40, "hyper_parameters": hparams, "state_dict": state}, path)
    return path


def test_fmtrain_checkpoint_gives_the_teacher_as_it_was_built(tmp_path: Path) -> None:
    teacher, student = vit(0), vit(1)
    path = fmtrain_file(tmp_path / "last.ckpt", teacher=teacher, student=student)
    encoder = assert_same(path, teacher)
    assert (encoder.arch, encoder.image_size, encoder.step) == ("vit_small_patch16_224", 32, 40)
    assert list(encoder.mean) == HALF
    assert encoder.source == "last.ckpt:teacher.backbone"
    assert_same(path, student, branch="student")
    assert_same(path, student, prefix="student.backbone")


def test_uint8_and_float_images_give_the_same_features(tmp_path: Path) -> None:
    encoder = load_encoder(fmtrain_file(tmp_path / "a.ckpt", teacher=vit(), student=vit(1)))
    pixels = (images() * 255).to(torch.uint8)
    assert torch.equal(encoder(pixels), encoder(pixels.float().div(255)))


def test_wrong_image_size_says_which_is_right(tmp_path: Path) -> None:
    encoder = load_encoder(fmtrain_file(tmp_path / "a.ckpt", teacher=vit(), student=vit(1)))
    with pytest.raises(ValueError, match=r"takes images of \(32, 32\), got \(40, 40\): pass --image-size"):
        encoder(images(40))


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"reg_tokens": 4, "no_embed_class": True},
        {"reg_tokens": 2},
        {"reg_tokens": 2, "class_token": False, "global_pool": "avg"},
        {"reg_tokens": 2, "class_token": False, "global_pool": "avg", "no_embed_class": True},
        {"init_values": 1e-5},
        {"global_pool": "avg", "fc_norm": True},
        {"class_token": False, "global_pool": "avg"},
        {"qkv_bias": False},
        {"qk_norm": True},
        {"mlp_ratio": 3.0},
        {"mlp_ratio": 5.0, "mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU},
        {"embed_dim": 128, "num_heads": 2, "depth": 3, "patch_size": 16},
    ],
    ids=lambda kwargs: "-".join(kwargs) or "plain",
)
def test_timm_vit_is_inferred_from_its_shapes(tmp_path: Path, kwargs: dict[str, Any]) -> None:
    model = vit(**kwargs)
    torch.save(model.state_dict(), tmp_path / "model.pth")
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    for name in ("model.pth", "model.safetensors"):
        encoder = assert_same(tmp_path / name, model)
        assert any("inferred" in note for note in encoder.notes)


def test_any_length_of_a_header_is_read(tmp_path: Path) -> None:
    """The first byte of a .safetensors file is its header's length modulo 256, which may look like a pickle's sign."""
    firsts = set()
    for length in range(0, 256, 8):
        save_file(vit().state_dict(), tmp_path / "model.safetensors", metadata={"note": "x" * length})
        firsts.add((tmp_path / "model.safetensors").read_bytes()[0])
        assert read_checkpoint(tmp_path / "model.safetensors")
    assert 0x80 in firsts


@pytest.mark.parametrize(
    ("arch", "kwargs"),
    [
        ("resnet18", {}), ("resnet26", {}), ("wide_resnet50_2", {}), ("resnext50_32x4d", {}),
        ("resnet10t", {"stem_type": "", "stem_width": 32}),  # average pooling in its shortcuts
    ],
)  # fmt: skip
def test_resnet_is_inferred_from_its_shapes(tmp_path: Path, arch: str, kwargs: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = timm.create_model(arch, num_classes=7, **kwargs).eval()
    torch.save(model.state_dict(), tmp_path / "model.pth")
    encoder = load_encoder(tmp_path / "model.pth")
    model.reset_classifier(0)
    assert torch.equal(encoder(images()), expected(model, encoder, images()))


def test_torchvision_resnet(tmp_path: Path) -> None:
    from torchvision.models import resnet18

    torch.manual_seed(0)
    model = resnet18().eval()
    torch.save(model.state_dict(), tmp_path / "resnet18.pth")
    encoder = load_encoder(tmp_path / "resnet18.pth")
    model.fc = nn.Identity()
    # timm and torchvision pool with different kernels: equal to rounding
    torch.testing.assert_close(encoder(images()), expected(model, encoder, images()), rtol=1e-5, atol=1e-5)


def test_named_architecture_that_no_shape_tells(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = timm.create_model("efficientnet_lite0", num_classes=0).eval()
    torch.save({"model": under("module.", model)}, tmp_path / "model.pth")
    with pytest.raises(ValueError, match="--arch"):
        load_encoder(tmp_path / "model.pth")
    encoder = load_encoder(tmp_path / "model.pth", arch="efficientnet_lite0")
    assert torch.equal(encoder(images(64)), expected(model, encoder, images(64)))
    assert encoder.image_size == 224


def test_named_vit_takes_its_image_size_from_the_positions(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=64).eval()
    torch.save(model.state_dict(), tmp_path / "model.pth")
    encoder = load_encoder(tmp_path / "model.pth", arch="vit_tiny_patch16_224")
    assert encoder.image_size == 64
    assert torch.equal(encoder(images(64)), expected(model, encoder, images(64)))


def dino_file(path: Path, model: nn.Module) -> None:
    """facebookresearch/dino's full checkpoint, which holds an argparse.Namespace."""
    torch.save(
        {
            "student": {**under("module.backbone.", vit(1)), "module.head.last_layer.weight_g": torch.ones(5, 1)},
            "teacher": {**under("backbone.", model), "head.last_layer.weight_g": torch.ones(5, 1)},
            "optimizer": {"state": {0: {"step": 3, "exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 0.1}]},
            "epoch": 3,
            "args": argparse.Namespace(arch="vit_small", lr=5e-4),
            "dino_loss": {"center": torch.zeros(1, 5)},
        },
        path,
    )


def lightning_file(path: Path, model: nn.Module) -> None:
    """Another LightningModule: `self.net` compiled, an EMA copy, hyperparameters as AttributeDict."""
    from lightning.fabric.utilities.data import AttributeDict

    state = {**under("net._orig_mod.", vit(1)), **under("ema_net.", model), "criterion.center": torch.zeros(3)}
    torch.save({"state_dict": state, "hyper_parameters": AttributeDict(lr=1.0, arch="mine"), "global_step": 9}, path)


def numpy_file(path: Path, model: nn.Module) -> None:
    """NumPy scalars and arrays next to the weights, in the old serialization."""
    content = {"model": model.state_dict(), "best": np.float64(0.5), "curve": np.arange(3), "dir": Path("runs")}
    torch.save(content, path, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize("write", [dino_file, lightning_file, numpy_file])
def test_other_trainers_files(tmp_path: Path, write: Callable[[Path, nn.Module], None]) -> None:
    model = vit()
    write(tmp_path / "checkpoint.pth", model)
    assert_same(tmp_path / "checkpoint.pth", model)


def dinov2_file(path: Path, model: nn.Module, *, position: Tensor | None = None) -> None:
    """facebookresearch/dinov2's teacher checkpoint: chunked blocks, w12 and w3, class token apart from its position."""
    state = dict(model.state_dict())
    if position is not None:
        state["register_tokens"] = state.pop("reg_token")
        state["pos_embed"] = torch.cat([position, state["pos_embed"]], dim=1)
    named = {"mask_token": torch.zeros(1, 64)}
    for key, value in state.items():
        key = re.sub(r"^blocks\.(\d+)\.", r"blocks.0.\1.", key)
        if "mlp.fc1.weight" in key and value.shape[0] != 256:
            key = key.replace("fc1", "w12")
        named[key] = value
    gated = any("w12" in key for key in named)
    named = {key.replace("fc1", "w12").replace("fc2", "w3") if gated else key: value for key, value in named.items()}
    heads = {"dino_head.last_layer.weight": torch.zeros(2, 2), "ibot_head.mlp.0.weight": torch.zeros(2, 2)}
    torch.save({"teacher": {**{f"backbone.{key}": value for key, value in named.items()}, **heads}}, path)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"init_values": 1.0},
        {"init_values": 1.0, "mlp_ratio": 5.0, "mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU},
    ],
    ids=["mlp", "swiglu"],
)
def test_dinov2_chunked(tmp_path: Path, kwargs: dict[str, Any]) -> None:
    model = vit(**kwargs)
    dinov2_file(tmp_path / "teacher_checkpoint.pth", model)
    assert_same(tmp_path / "teacher_checkpoint.pth", model)


def test_dinov2_registers_get_the_class_tokens_position(tmp_path: Path) -> None:
    model = vit(reg_tokens=4, no_embed_class=True, init_values=1.0)
    position = torch.randn(1, 1, 64)
    dinov2_file(tmp_path / "reg4.pth", model, position=position)
    model.cls_token.data += position  # timm's form of the same network
    encoder = assert_same(tmp_path / "reg4.pth", model)
    assert encoder.arch == "vit_64x2_patch8_reg4"


def test_large_position_grids_are_scored_at_224(tmp_path: Path) -> None:
    model = vit(img_size=14 * 30, patch_size=14)
    torch.save(model.state_dict(), tmp_path / "model.pth")
    encoder = load_encoder(tmp_path / "model.pth")
    assert encoder.image_size == 224
    assert any("30×30 → 16×16" in note for note in encoder.notes)
    assert torch.equal(encoder(images(420)), expected(model, encoder, images(420)))
    assert encoder(images(224)).shape == (3, 64)


HF = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 1, "image_size": 32, "patch_size": 8}


@pytest.mark.parametrize("with_config", [True, False])
@pytest.mark.parametrize("kind", ["Dinov2", "Dinov2-swiglu", "Dinov2WithRegisters", "ViT"])
def test_hugging_face(tmp_path: Path, kind: str, with_config: bool) -> None:
    transformers = pytest.importorskip("transformers", reason="Hugging Face's own modules are the reference")
    family, _, swiglu = kind.partition("-")
    more = {"use_swiglu_ffn": True} if swiglu else {}
    config = getattr(transformers, f"{family}Config")(
        **HF, **more, **({} if family == "Dinov2" else {"intermediate_size": 256})
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}Model")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": HALF, "image_std": HALF}))
    if not with_config:
        (tmp_path / "config.json").unlink()
    encoder = load_encoder(tmp_path / "model.safetensors")
    with torch.no_grad():
        reference = model(pixel_values=(images() - 0.5) / 0.5).last_hidden_state[:, 0]
    # attention is computed by other kernels, and without its config a ViT's 1e-12 in the norm is not known
    torch.testing.assert_close(encoder(images()), reference, rtol=1e-5, atol=1e-5)


def test_a_masked_autoencoders_decoder_is_left_aside(tmp_path: Path) -> None:
    model = vit()
    decoder = {"mask_token": torch.zeros(1, 1, 32), "decoder_embed.weight": torch.zeros(32, 64)}
    decoder |= {"decoder_blocks.0.norm1.weight": torch.ones(32), "decoder_pos_embed": torch.zeros(1, 17, 32)}
    torch.save({"model": {**model.state_dict(), **decoder}}, tmp_path / "mae.pth")
    assert_same(tmp_path / "mae.pth", model)


def test_root_is_found_among_nested_and_wrapped_modules() -> None:
    sign = "patch_embed.proj.weight"
    assert find_prefix([sign, "norm.weight"]) == ""
    assert find_prefix([f"model.encoder.{sign}"]) == "model.encoder."
    assert find_prefix([f"state_dict.{sign}", f"state_dict_ema.{sign}"]) == "state_dict_ema."
    assert find_prefix([f"state_dict.{sign}", f"state_dict_ema.{sign}"], branch="student") == "state_dict."
    notes: list[str] = []
    assert find_prefix([f"student.{sign}"], notes=notes) == "student."
    assert notes == ["no teacher in the file: this is the student"]


def test_several_equal_candidates_are_listed() -> None:
    with pytest.raises(ValueError, match="several encoders: 'left', 'right'; choose one with --prefix"):
        find_prefix(["left.patch_embed.proj.weight", "right.patch_embed.proj.weight"])


def change(state: dict[str, Tensor], **edits: Any) -> dict[str, Tensor]:
    state = dict(state)
    for key in edits.get("drop", ()):
        del state[key]
    return {**state, **edits.get("add", {})}


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        ({"drop": ["norm.bias"]}, r"1 missing: norm\.bias\. Name"),
        ({"add": {"blocks.0.extra": torch.ones(1)}}, r"1 left over: blocks\.0\.extra\. Name"),
        ({"add": {"norm.bias": torch.ones(3)}}, r"1 of another shape: norm\.bias \(3,\) in the file, \(64,\) in the"),
        ({"drop": [f"blocks.1.{k}.weight" for k in ("norm1", "norm2", "attn.qkv", "attn.proj", "mlp.fc2")]},
         r"5 missing: .* and 1 more\. Name"),
    ],
)  # fmt: skip
def test_weights_that_do_not_fit_are_listed(tmp_path: Path, edits: dict[str, Any], message: str) -> None:
    torch.save(change(vit().state_dict(), **edits), tmp_path / "model.pth")
    with pytest.raises(ValueError, match=message):
        load_encoder(tmp_path / "model.pth")


def test_a_named_architecture_that_is_another_does_not_fit(tmp_path: Path) -> None:
    torch.save(vit().state_dict(), tmp_path / "model.pth")
    with pytest.raises(ValueError, match=r"vit_tiny_patch16_224 does not fit model.pth .*missing.*another shape"):
        load_encoder(tmp_path / "model.pth", arch="vit_tiny_patch16_224")
    with pytest.raises(ValueError, match="timm has no architecture 'vit_tiny_patch16': did you mean vit_tiny_patch16"):
        load_encoder(tmp_path / "model.pth", arch="vit_tiny_patch16")


def test_heads_that_shapes_do_not_tell_are_asked_for(tmp_path: Path) -> None:
    model = vit(embed_dim=48, num_heads=3)
    torch.save(model.state_dict(), tmp_path / "model.pth")
    with pytest.raises(ValueError, match="width 48 may have 1, 2, 3, 4, 6 heads"):
        load_encoder(tmp_path / "model.pth")
    assert_same(tmp_path / "model.pth", model, arch_kwargs={"num_heads": 3})


def test_a_vit_like_clips_is_to_be_named(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = timm.create_model("vit_base_patch16_clip_quickgelu_224", depth=1, num_classes=0).eval()
    torch.save(model.state_dict(), tmp_path / "one.pth")
    with pytest.raises(ValueError, match=r"do not determine its activation, .*with --arch \(.+\)"):
        load_encoder(tmp_path / "one.pth")
    encoder = load_encoder(tmp_path / "one.pth", arch="vit_base_patch16_clip_quickgelu_224", arch_kwargs={"depth": 1})
    assert torch.equal(encoder(images(224)), expected(model, encoder, images(224)))


@pytest.mark.parametrize(
    ("arch_kwargs", "message"),
    [({"num_heads": 5}, "divisible by num_heads"), ({"foo": 1}, "unexpected keyword argument 'foo'")],
)
def test_corrections_that_cannot_be_built_are_named(tmp_path: Path, arch_kwargs: dict[str, Any], message: str) -> None:
    torch.save(vit().state_dict(), tmp_path / "model.pth")
    with pytest.raises(ValueError, match=f"a VisionTransformer cannot be built with .*: .*{message}"):
        load_encoder(tmp_path / "model.pth", arch_kwargs=arch_kwargs)


def test_half_precision_weights_are_scored_in_float32(tmp_path: Path) -> None:
    model = vit().half()
    torch.save(model.state_dict(), tmp_path / "model.pth")
    encoder = assert_same(tmp_path / "model.pth", model.float())
    assert encoder(images()).dtype == torch.float32
    assert any("float16" in note for note in encoder.notes)


class Bomb:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
def test_a_pickle_that_would_run_code_is_refused_and_named(tmp_path: Path, new: bool) -> None:
    content = {"model": vit().state_dict(), "payload": Bomb(tmp_path / "ran")}
    torch.save(content, tmp_path / "bomb.pt", _use_new_zipfile_serialization=new)
    with pytest.raises(ValueError, match=r"bomb\.pt refused: .*\.mkdir.* not on the list of harmless types"):
        load_encoder(tmp_path / "bomb.pt")
    assert not (tmp_path / "ran").exists()
    with (tmp_path / "plain.pkl").open("wb") as file:
        pickle.dump(Bomb(tmp_path / "ran"), file)
    with pytest.raises(ValueError, match=r"plain\.pkl refused: it is a plain pickle that would call \w+\.mkdir"):
        load_encoder(tmp_path / "plain.pkl")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.pt", b"", "an empty file"),
        ("page.pt", b"<html><body>404", "a web page"),
        ("lfs.pt", b"version https://git-lfs.github.com/spec/v1", "a Git LFS pointer"),
        ("text.ckpt", b"hello, this is no checkpoint", "bytes b'hello, t'"),
    ],
)
def test_what_is_no_checkpoint_is_described(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name} is not a checkpoint: .*found {message}"):
        read_checkpoint(tmp_path / name)


def test_a_checkpoint_without_weights_says_what_it_holds(tmp_path: Path) -> None:
    torch.save({"epoch": 3, "best": 0.5}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="holds no weights: found a mapping with epoch, best"):
        load_encoder(tmp_path / "a.pt")
    torch.save(torch.zeros(3, 4), tmp_path / "features.pt")
    with pytest.raises(ValueError, match=r"features\.pt holds no weights: found a Tensor"):
        load_encoder(tmp_path / "features.pt")


@pytest.mark.parametrize("argument", ["checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"])
@pytest.mark.parametrize("place", ["hyper-parameters", "config.json"])
def test_a_checkpoint_cannot_name_other_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, argument: str, place: str
) -> None:
    monkeypatch.setattr("timm.create_model", lambda *_, **__: pytest.fail("built"))
    arch, kwargs = "vit_tiny_patch16_224", {argument: str(tmp_path / "other.pth")}
    content: dict[str, Any] = {"state_dict": {"norm.weight": torch.ones(192)}}
    if place == "config.json":
        (tmp_path / place).write_text(json.dumps({"architecture": arch, "model_args": kwargs}))
    else:
        content["hyper_parameters"] = {"arch": arch, "arch_kwargs": kwargs}
    torch.save(content, tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match=f"arch_kwargs must describe the network, got {argument}"):
        load_encoder(tmp_path / "x.ckpt")


def test_truncated_files_are_refused(tmp_path: Path) -> None:
    torch.save(vit().state_dict(), tmp_path / "a.pt")
    save_file(vit().state_dict(), tmp_path / "a.safetensors")
    for name in ("a.pt", "a.safetensors"):
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(ValueError, match=f"{name}.*truncated"):
            read_checkpoint(tmp_path / name)


@pytest.mark.parametrize("name", ["zip.pt", "legacy.pt", "a.safetensors"])
def test_a_file_is_opened_once(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is removed once it is open, so that opening it again fails, in Python or outside."""
    path = tmp_path / name
    if path.suffix == ".pt":
        torch.save(vit().state_dict(), path, _use_new_zipfile_serialization=name.startswith("zip"))
    else:
        save_file(vit().state_dict(), path)
    content, expected = path.read_bytes(), load_encoder(path)
    opened = Path.open

    def open_and_remove(self: Path, *args: Any, **kwargs: Any) -> Any:
        file = opened(self, *args, **kwargs)
        self.unlink()
        return file

    monkeypatch.setattr(Path, "open", open_and_remove)
    file = read_checkpoint_file(path)
    assert not path.exists()
    assert file.digests == (hashlib.sha256(content).hexdigest(),)
    assert torch.equal(build(identify(file))(images()), expected(images()))


def test_what_determines_an_encoder_is_in_its_inputs(tmp_path: Path) -> None:
    torch.save(vit().state_dict(), tmp_path / "a.pt")
    file = read_checkpoint_file(tmp_path / "a.pt")
    (tmp_path / "config.json").write_text(json.dumps({"image_mean": HALF, "image_std": HALF}))
    with_config = read_checkpoint_file(tmp_path / "a.pt")
    inputs = [identify(file).inputs, identify(with_config).inputs, identify(file, arch_kwargs={"num_heads": 2}).inputs]
    assert len(set(inputs)) == 3
    assert identify(read_checkpoint_file(tmp_path / "a.pt", digests=False)).inputs is None


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.pt"
    torch.save(vit().state_dict(), path)

    def read_while_written(file: Any, *, name: str) -> Any:
        os.utime(path, ns=(0, 0))
        return Content(vit().state_dict())

    monkeypatch.setattr("repmetrics.encoders.files.read_open_checkpoint", read_while_written)
    with pytest.raises(ValueError, match=r"a\.pt changed while it was read"):
        load_encoder(path)


def test_flatten_keeps_lists_and_scalars_out() -> None:
    tensors = flatten({"a": {"b": torch.ones(1), 3: {"c": torch.ones(2)}}, "d": [torch.ones(1)], "e": 1})
    assert list(tensors) == ["a.b", "a.3.c"]
