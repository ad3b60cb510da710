"""What weights do not determine is stated, or listed as assumed, or refused with the option that decides."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from repmetrics.encoders.checkpoint import load_encoder
from repmetrics.encoders.encoder import Encoder

TINY: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 192, "depth": 2, "num_classes": 0}


def vit(**kwargs: Any) -> nn.Module:
    torch.manual_seed(0)
    model = VisionTransformer(**{**TINY, "num_heads": 3, **kwargs})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def under(prefix: str, model: nn.Module) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in model.state_dict().items()}


@torch.no_grad()
def difference(encoder: Encoder, model: nn.Module, size: int = 32) -> float:
    x = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (encoder.mean, encoder.std))
    return (encoder(x) - model((x - mean) / std)).abs().max().item()


def noted(encoder: Encoder, text: str) -> bool:
    return any(text in note for note in encoder.notes)


def test_assumptions_are_listed(tmp_path: Path) -> None:
    torch.save(vit().state_dict(), tmp_path / "a.pth")
    encoder = load_encoder(tmp_path / "a.pth")
    (assumed,) = [note for note in encoder.notes if note.startswith("assumed")]
    for text in ("3 attention heads (64 channels each)", "activation gelu", "norm epsilon 1e-06", "class token"):
        assert text in assumed
    assert noted(encoder, "mean and std are not in the file: ImageNet's are assumed")


def test_moco_v3_has_twelve_heads(tmp_path: Path) -> None:
    model = vit(num_heads=12)
    content = {"arch": "vit_tiny", "state_dict": under("module.momentum_encoder.", model)}
    torch.save(content, tmp_path / "moco.pth.tar")
    encoder = load_encoder(tmp_path / "moco.pth.tar")
    assert difference(encoder, model) < 1e-5
    assert noted(encoder, "as MoCo v3's layout states: 12 attention heads")


def sines(model: nn.Module) -> nn.Module:
    """The fixed positions of MAE and MoCo v3: sines and cosines of both coordinates."""
    angles = torch.rand(16, 96) * 6
    positions = torch.cat([torch.zeros(1, 192), torch.cat([angles.sin(), angles.cos()], dim=1)])
    model.pos_embed.data = positions[None]  # type: ignore[union-attr,operator]
    return model


def test_fixed_positions_leave_the_heads_open(tmp_path: Path) -> None:
    model = sines(vit(num_heads=12))
    torch.save(model.state_dict(), tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"have 3 heads \(MAE, DINO\) or 12 \(MoCo v3.*--arch-kwargs"):
        load_encoder(tmp_path / "a.pth")
    assert difference(load_encoder(tmp_path / "a.pth", arch_kwargs={"num_heads": 12}), model) < 1e-5
    hparams = {"method": "mae", "backbone": {"name": "vit_tiny"}}
    torch.save({"state_dict": under("backbone.", model), "hyper_parameters": hparams}, tmp_path / "solo.ckpt")
    assert difference(load_encoder(tmp_path / "solo.ckpt"), model) < 1e-5


def test_heads_among_hyper_parameters_are_used(tmp_path: Path) -> None:
    model = vit(num_heads=6)
    hparams = {"model": {"num_heads": 6, "decoder": {"num_heads": 16}}}
    torch.save({"state_dict": under("net.", model), "hyper_parameters": hparams}, tmp_path / "a.ckpt")
    encoder = load_encoder(tmp_path / "a.ckpt")
    assert difference(encoder, model) < 1e-5
    assert noted(encoder, "as its hyper-parameters states: 6 attention heads")


@pytest.mark.parametrize("act", ["gelu", "quick_gelu", "gelu_new", "relu"])
def test_the_activation_and_epsilon_of_a_configuration_are_used(tmp_path: Path, act: str) -> None:
    transformers = pytest.importorskip("transformers", reason="the reference")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    config = transformers.ViTConfig(**sizes, image_size=32, patch_size=8, hidden_act=act, layer_norm_eps=1e-3)
    model = transformers.ViTModel(config, add_pooling_layer=False).eval()
    model.save_pretrained(tmp_path)
    encoder = load_encoder(tmp_path)
    assert difference(encoder, lambda x: model(pixel_values=x).last_hidden_state[:, 0]) < 1e-5  # type: ignore[arg-type]
    assert noted(encoder, "4 attention heads, norm epsilon 0.001, activation ")


def test_a_configuration_of_another_network_is_not_used(tmp_path: Path) -> None:
    model = vit()
    torch.save(model.state_dict(), tmp_path / "a.pth")
    bert = {"model_type": "bert", "num_attention_heads": 12, "layer_norm_eps": 0.1, "image_mean": 0.5, "image_std": 0.5}
    for config in (bert, {"architecture": "resnet18", "pretrained_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}):
        (tmp_path / "config.json").write_text(json.dumps(config))
        encoder = load_encoder(tmp_path / "a.pth")
        assert difference(encoder, model) < 1e-5
        assert noted(encoder, "config.json describes another network")
        assert encoder.mean[0] == 0.485


def test_the_architectures_name_does_not_change_mean_and_std(tmp_path: Path) -> None:
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, depth=1, img_size=32)
    torch.save({"teacher": under("backbone.", model)}, tmp_path / "a.pth")
    kwargs = {"depth": 1, "img_size": 32}
    bare = load_encoder(tmp_path / "a.pth")
    named = load_encoder(tmp_path / "a.pth", arch="vit_tiny_patch16_224", arch_kwargs=kwargs)
    assert (bare.mean, bare.std) == (named.mean, named.std)
    assert noted(named, "timm's own weights of vit_tiny_patch16_224 have [0.5, 0.5, 0.5]")
    tagged = "vit_tiny_patch16_224.augreg_in21k"
    assert load_encoder(tmp_path / "a.pth", arch=tagged, arch_kwargs=kwargs).mean == (0.5, 0.5, 0.5)
    given = load_encoder(tmp_path / "a.pth", mean=[0.4] * 3, std=[0.3] * 3)
    assert (given.mean, given.std) == ((0.4,) * 3, (0.3,) * 3)


@pytest.mark.parametrize(
    ("mean", "std", "expected"),
    [
        (0.5, 0.5, (0.5, 0.5)),
        ("imagenet", "imagenet", (0.485, 0.229)),
        ([127.5] * 3, [51.0] * 3, (0.5, 0.2)),
        ({"train": 1}, 0.5, (0.485, 0.229)),
        ([0.5] * 4, [0.5] * 4, (0.485, 0.229)),
    ],
)
def test_mean_and_std_of_other_trainers(tmp_path: Path, mean: Any, std: Any, expected: tuple[float, float]) -> None:
    hparams = {"mean": mean, "std": std, "arch_kwargs": None, "image_size": [32, 32]}
    torch.save({"state_dict": under("net.", vit()), "hyper_parameters": hparams}, tmp_path / "a.ckpt")
    encoder = load_encoder(tmp_path / "a.ckpt")
    assert (encoder.mean[0], encoder.std[0]) == pytest.approx(expected)
    assert noted(encoder, "mean")


@pytest.mark.parametrize(("mean", "message"), [([123.7] * 3, "0 to 255"), ([-1.0] * 3, "at least 0"), ([0.5], "three")])
def test_wrong_means_are_refused(tmp_path: Path, mean: list[float], message: str) -> None:
    torch.save(vit().state_dict(), tmp_path / "a.pth")
    with pytest.raises(ValueError, match=message):
        load_encoder(tmp_path / "a.pth", mean=mean, std=mean)


@pytest.mark.parametrize("kind", ["int8", "uint8", "float8_e4m3fn", "complex64"])
def test_quantized_weights_are_refused(tmp_path: Path, kind: str) -> None:
    state = vit().state_dict()
    key = "blocks.1.attn.qkv.weight"
    state[key] = state[key].mul(9).to(getattr(torch, kind))
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=f"{key} is {kind}, not a plain floating-point weight"):
        load_encoder(tmp_path / "a.pth")


@pytest.mark.parametrize("channels", [1, 4, 6])
def test_other_numbers_of_channels_are_refused(tmp_path: Path, channels: int) -> None:
    torch.save(vit(in_chans=channels).state_dict(), tmp_path / "vit.pth")
    torch.save(timm.create_model("resnet18", in_chans=channels).state_dict(), tmp_path / "resnet.pth")
    for name, arch in (("vit.pth", None), ("resnet.pth", None), ("resnet.pth", "resnet18")):
        with pytest.raises(ValueError, match=f"an encoder of {channels} channels .*three"):
            load_encoder(tmp_path / name, arch=arch)


def test_resnets_that_differ_only_in_function(tmp_path: Path) -> None:
    from torchvision.models.segmentation import fcn_resnet50

    model = fcn_resnet50(weights=None, weights_backbone=None, aux_loss=True).eval()
    torch.save(model.state_dict(), tmp_path / "fcn.pth")
    with pytest.raises(ValueError, match=r"segmentation.*'\{\"output_stride\": 8\}'"):
        load_encoder(tmp_path / "fcn.pth")
    encoder = load_encoder(tmp_path / "fcn.pth", arch_kwargs={"output_stride": 8})
    assert noted(encoder, "left aside: classifier, aux_classifier")
    assert difference(encoder, lambda x: model.backbone(x)["out"].mean((2, 3)), 64) < 1e-4  # type: ignore[arg-type]
    blurred = timm.create_model("resnetblur18" if timm.is_model("resnetblur18") else "resnetblur50", num_classes=0)
    torch.save(blurred.state_dict(), tmp_path / "blur.pth")
    assert noted(load_encoder(tmp_path / "blur.pth"), "anti-aliasing none")
    options = {"arch_kwargs": {"aa_layer": "blur"}}
    assert difference(load_encoder(tmp_path / "blur.pth", **options), blurred.eval(), 64) < 1e-4  # type: ignore[arg-type]


def test_a_resnet_for_small_images(tmp_path: Path) -> None:
    model = timm.create_model("resnet18", num_classes=0).eval()
    model.conv1, model.maxpool = nn.Conv2d(3, 64, 3, stride=1, padding=1, bias=False), nn.Identity()
    torch.save(model.state_dict(), tmp_path / "cifar.pth")
    with pytest.raises(ValueError, match=r"3 × 3.*'\{\"stem_stride\": 1, \"stem_pool\": false\}'"):
        load_encoder(tmp_path / "cifar.pth")
    encoder = load_encoder(tmp_path / "cifar.pth", arch_kwargs={"stem_stride": 1, "stem_pool": False})
    assert difference(encoder, model) < 1e-5


def test_one_network_beside_others_lists_them(tmp_path: Path) -> None:
    content = {**under("visual.trunk.", vit()), "visual.attn_pool_contrast.query": torch.zeros(1, 8)}
    torch.save({**content, "text.token_embedding.weight": torch.zeros(9, 8)}, tmp_path / "pair.bin")
    encoder = load_encoder(tmp_path / "pair.bin")
    assert noted(encoder, "left aside: visual.attn_pool_contrast, which lacks weights")
    assert noted(encoder, "left aside: visual.attn_pool_contrast, text")


def test_class_token_and_mean_of_the_patches(tmp_path: Path) -> None:
    model = vit(reg_tokens=2)
    torch.save(model.state_dict(), tmp_path / "a.pth")

    def virchow(x: Tensor) -> Tensor:
        tokens = model.forward_features(x)  # type: ignore[operator]
        return torch.cat([tokens[:, 0], tokens[:, 3:].mean(1)], dim=1)

    encoder = load_encoder(tmp_path / "a.pth", pool="cls+mean")
    assert difference(encoder, virchow) < 1e-5  # type: ignore[arg-type]
    torch.save(timm.create_model("resnet18").state_dict(), tmp_path / "r.pth")
    with pytest.raises(ValueError, match="resnet18 has no tokens to pool"):
        load_encoder(tmp_path / "r.pth", pool="cls+mean")


def test_other_networks_in_the_names_of_clip_and_resnet_are_refused_in_words(tmp_path: Path) -> None:
    resnet = timm.create_model("resnet18", num_classes=0).state_dict()
    clip = {**resnet, "attnpool.positional_embedding": torch.zeros(5, 512)}
    save_file({f"visual.{key}": value for key, value in clip.items()}, tmp_path / "clip.safetensors")
    with pytest.raises(ValueError, match=r"CLIP's ResNet, .*resnet50_clip.* with --arch"):
        load_encoder(tmp_path / "clip.safetensors")
    coca = {"ln_pre.weight": torch.ones(64), "attn_pool.query": torch.zeros(4, 48)}
    save_file({f"visual.{key}": value for key, value in coca.items()}, tmp_path / "coca.safetensors")
    with pytest.raises(ValueError, match="OpenCLIP's CoCa, whose pooling by attention is not read"):
        load_encoder(tmp_path / "coca.safetensors")
