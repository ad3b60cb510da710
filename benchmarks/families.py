"""Published layouts of encoders: largest difference between a source model and what `load_encoder` makes of its file.

Each family is built at a tiny size with random weights, by the package that defines it (timm, transformers,
torchvision) or in a small restatement of the names that its repository uses. It is read in four ways: the weights
alone, the file with its configuration next to it, the folder, and a name on the hub (a local cache; nothing is
downloaded).

    python benchmarks/families.py > benchmarks/results/families.md
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import constants
from safetensors.torch import save_file
from timm.models.convnext import ConvNeXt
from timm.models.eva import Eva
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from repmetrics.encoders.checkpoint import load_encoder

WAYS = ("weights alone", "with configuration", "folder", "hub id")
VIT: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 1, "num_classes": 0}
HF: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128,
                      "image_size": 32, "patch_size": 8}  # fmt: skip
REPOSITORY = "owner/name"


@dataclass
class Source:
    """A source model as a file.

    Attributes:
        reference: Function from normalized images to the features of the source model.
        weights: Weights in the names of the source.
        config: Configuration files by name; empty if the source publishes none.
        options: Arguments of `load_encoder` that the weights alone need.
        size: Side of the images.
        wrap: Content of the file from the weights.
    """

    reference: Callable[[Tensor], Tensor]
    weights: Mapping[str, Tensor]
    config: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    size: int = 32
    wrap: Callable[[dict[str, Tensor]], Any] = dict


def randomized(model: nn.Module) -> nn.Module:
    """The model in eval mode, with all parameters and statistics changed, so that one that is not loaded is noticed."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.add_(0.05 * torch.randn_like(buffer))
    return model.eval()


def renamed(state: Mapping[str, Tensor], *rules: tuple[str, str]) -> dict[str, Tensor]:
    """Weights whose names are changed by regular expressions."""
    named = {}
    for key, value in state.items():
        for pattern, replacement in rules:
            key = re.sub(pattern, replacement, key)
        named[key] = value
    return named


def of_timm(model: nn.Module, arch: str, args: Mapping[str, Any], *, size: int = 32) -> Source:
    """A model of timm with the configuration of its hub."""
    config = {"architecture": arch, "num_classes": 0, "model_args": {**args, "num_classes": 0},
              "pretrained_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}  # fmt: skip
    return Source(model, model.state_dict(), {"config.json": config}, size=size)


def timm_vit() -> Source:
    args = {key: value for key, value in VIT.items() if key != "num_classes"}
    model = randomized(timm.create_model("vit_small_patch16_224", num_classes=0, **args))
    return of_timm(model, "vit_small_patch16_224", args)


def timm_resnet() -> Source:
    return of_timm(randomized(timm.create_model("resnet18", num_classes=0)), "resnet18", {}, size=64)


def timm_convnext() -> Source:
    args = {"depths": [1, 1, 1, 1], "dims": [16, 32, 32, 64]}
    model = randomized(timm.create_model("convnext_tiny", num_classes=0, **args))
    return of_timm(model, "convnext_tiny", args, size=64)


SWIN: dict[str, Any] = {"img_size": 224, "embed_dim": 16, "depths": [2, 2], "num_heads": [1, 2], "window_size": 7}


def timm_swin() -> Source:
    model = randomized(timm.create_model("swin_tiny_patch4_window7_224", num_classes=0, **SWIN))
    return of_timm(model, "swin_tiny_patch4_window7_224", SWIN, size=224)


def timm_dinov3() -> Source:
    args = {"embed_dim": 64, "depth": 2, "num_heads": 1, "global_pool": "token", "img_size": 64}
    model = randomized(timm.create_model("vit_small_patch16_dinov3_qkvb", num_classes=0, **args))
    return of_timm(model, "vit_small_patch16_dinov3_qkvb", args, size=64)


def timm_siglip() -> Source:
    args = {"embed_dim": 64, "depth": 2, "num_heads": 1, "img_size": 32}
    model = randomized(timm.create_model("vit_base_patch16_siglip_224", num_classes=0, **args))
    return of_timm(model, "vit_base_patch16_siglip_224", args)


def dino() -> Source:
    model = randomized(VisionTransformer(**VIT))
    wrap = partial(_pair, "module.backbone.", "backbone.", head="head.mlp.0.weight")
    return Source(model, model.state_dict(), wrap=wrap)


def ibot() -> Source:
    model = randomized(VisionTransformer(**VIT))
    weights = {**model.state_dict(), "masked_embed": torch.zeros(1, 64)}
    wrap = partial(_pair, "backbone.", "module.backbone.", head="head.mlp.0.weight", chosen="student")
    return Source(model, weights, options={"branch": "student"}, wrap=wrap)


def _pair(first: str, second: str, state: Mapping[str, Tensor], *, head: str, chosen: str = "teacher") -> Any:
    other = "student" if chosen == "teacher" else "teacher"
    noise = {first + key: torch.randn_like(value) for key, value in state.items() if "masked" not in key}
    return {
        other: {**noise, first + head: torch.zeros(1)},
        chosen: {**{second + key: value for key, value in state.items()}, head: torch.zeros(1)},
    }


def dinov2() -> Source:
    model = randomized(VisionTransformer(**VIT, reg_tokens=4, no_embed_class=True, init_values=1.0))
    state = dict(model.state_dict())
    position = torch.randn(1, 1, 64)
    state["register_tokens"] = state.pop("reg_token")
    state["cls_token"] = state["cls_token"] - position
    state["pos_embed"] = torch.cat([position, state["pos_embed"]], dim=1)
    state["mask_token"] = torch.zeros(1, 64)
    weights = renamed(state, (r"^blocks\.(\d+)\.", r"blocks.0.\1."))
    return Source(model, weights, wrap=lambda s: {"teacher": {f"backbone.{key}": value for key, value in s.items()}})


def dinov3(*, gated: bool = False) -> Source:
    """The names of facebookresearch/dinov3."""
    model = Eva(
        img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=2, qkv_bias=True, init_values=1.0,
        use_rot_pos_emb=True, use_abs_pos_emb=False, rope_type="dinov3", rope_temperature=100, rope_rotate_half=True,
        num_reg_tokens=4, use_fc_norm=False, norm_layer=partial(nn.LayerNorm, eps=1e-5), global_pool="token",
        num_classes=0, dynamic_img_size=True, swiglu_mlp=gated, swiglu_align_to=8 if gated else 0, mlp_ratio=2,
    )  # fmt: skip
    state = dict(randomized(model).state_dict())
    for i in range(2):
        q, v = (state.pop(f"blocks.{i}.attn.{name}_bias") for name in "qv")
        state[f"blocks.{i}.attn.qkv.bias"] = torch.cat([q, torch.zeros(64), v])
        state[f"blocks.{i}.attn.qkv.bias_mask"] = torch.cat([torch.ones(64), torch.zeros(64), torch.ones(64)])
        state.pop(f"blocks.{i}.attn.k_bias", None)
    state = {key: value for key, value in state.items() if not key.startswith("rope")}
    state["rope_embed.periods"] = 100 ** (2 * torch.arange(8) / 16)
    state["mask_token"] = torch.zeros(1, 64)
    weights = renamed(
        state, (r"reg_token", "storage_tokens"), (r"gamma_([12])", r"ls\1.gamma"),
        (r"fc1_g", "w1"), (r"fc1_x", "w2"), *([(r"mlp\.fc2", "mlp.w3")] if gated else []),
    )  # fmt: skip
    return Source(model, weights, wrap=lambda s: {"teacher": {f"backbone.{key}": value for key, value in s.items()}})


def moco_v3() -> Source:
    model = randomized(VisionTransformer(**{**VIT, "embed_dim": 384, "num_heads": 12}))

    def wrap(state: dict[str, Tensor]) -> dict[str, Any]:
        named = {f"module.momentum_encoder.{key}": value for key, value in state.items()}
        return {"arch": "vit_small", "state_dict": named}

    return Source(model, model.state_dict(), wrap=wrap)


def mmpretrain() -> Source:
    model = randomized(VisionTransformer(**VIT))
    weights = renamed(
        model.state_dict(), (r"^norm\.", "ln1."), (r"patch_embed\.proj\.", "patch_embed.projection."),
        (r"^blocks\.", "layers."), (r"\.norm([12])\.", r".ln\1."),
        (r"mlp\.fc1\.", "ffn.layers.0.0."), (r"mlp\.fc2\.", "ffn.layers.1."),
    )  # fmt: skip
    return Source(model, weights, wrap=lambda s: {"state_dict": {f"backbone.{key}": v for key, v in s.items()}})


def open_clip(*, quick: bool) -> Source:
    """The names of OpenAI's CLIP and of OpenCLIP."""
    act = "quick_gelu" if quick else "gelu"
    norm = partial(nn.LayerNorm, eps=1e-5)
    model = randomized(VisionTransformer(**VIT, pre_norm=True, norm_layer=norm, act_layer=act))
    state = dict(model.state_dict())
    state["class_embedding"] = state.pop("cls_token")[0, 0]
    state["positional_embedding"] = state.pop("pos_embed")[0]
    weights = renamed(
        state, (r"^norm\.", "ln_post."), (r"^norm_pre\.", "ln_pre."), (r"patch_embed\.proj\.", "conv1."),
        (r"\.norm([12])\.", r".ln_\1."), (r"attn\.qkv\.", "attn.in_proj_"), (r"attn\.proj\.", "attn.out_proj."),
        (r"mlp\.fc1\.", "mlp.c_fc."), (r"mlp\.fc2\.", "mlp.c_proj."), (r"^blocks\.", "transformer.resblocks."),
    )  # fmt: skip
    weights = {f"visual.{key}": value for key, value in weights.items()} | {"visual.proj": torch.zeros(64, 32)}
    weights |= {"transformer.resblocks.0.ln_1.weight": torch.zeros(8), "logit_scale": torch.zeros(())}
    vision = {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8}
    config = {"model_cfg": {"embed_dim": 32, "vision_cfg": vision, **({"quick_gelu": True} if quick else {})},
              "preprocess_cfg": {"mean": [0.48, 0.46, 0.41], "std": [0.27, 0.26, 0.28]}}  # fmt: skip
    return Source(model, weights, {"open_clip_config.json": config}, {"arch_kwargs": {"act_layer": act}})


class _ConchPooler(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(1, 32))
        self.attn = nn.MultiheadAttention(32, 8, kdim=64, vdim=64)
        self.ln_q, self.ln_k = nn.LayerNorm(32), nn.LayerNorm(64)


def conch() -> Source:
    trunk, pooler, norm = randomized(VisionTransformer(**VIT)), randomized(_ConchPooler()), randomized(nn.LayerNorm(32))

    def reference(x: Tensor) -> Tensor:
        tokens = pooler.ln_k(trunk.forward_features(x)).permute(1, 0, 2)
        queries = pooler.ln_q(pooler.query).unsqueeze(1).repeat(1, tokens.shape[1], 1)
        return norm(pooler.attn(queries, tokens, tokens, need_weights=False)[0][0])

    parts = {"trunk": trunk, "attn_pool_contrast": pooler, "ln_contrast": norm}
    weights = {f"visual.{n}.{key}": value for n, part in parts.items() for key, value in part.state_dict().items()}
    return Source(reference, {**weights, "visual.proj_contrast": torch.eye(32), "text.a.weight": torch.zeros(2)})


def swin() -> Source:
    """The names of Microsoft's repository: a stage ends with its downsampling, and masks are stored."""
    model = randomized(SwinTransformer(**SWIN, num_classes=0))
    weights = renamed(model.state_dict(), (r"^layers\.1\.downsample", "layers.0.downsample"))
    return Source(model, weights, size=224, wrap=lambda s: {"model": s})


def ctranspath() -> Source:
    model = SwinTransformer(**SWIN, num_classes=0)
    layers: list[nn.Module] = []
    for channels, width in ((3, 2), (2, 4)):
        layers += [nn.Conv2d(channels, width, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    model.patch_embed.proj = nn.Sequential(*layers, nn.Conv2d(4, 16, 1))
    randomized(model)
    weights = renamed(model.state_dict(), (r"^layers\.1\.downsample", "layers.0.downsample"))
    return Source(model, weights, size=224, wrap=lambda s: {"model": s})


def convnext() -> Source:
    """The names of facebookresearch/ConvNeXt and of DINOv3's ConvNeXt."""
    model = randomized(ConvNeXt(depths=(1, 1, 1, 1), dims=(16, 32, 32, 64), num_classes=0))
    weights = renamed(
        model.state_dict(), (r"^stem\.", "downsample_layers.0."),
        (r"^stages\.(\d)\.downsample\.", r"downsample_layers.\1."), (r"\.blocks\.", "."), (r"conv_dw", "dwconv"),
        (r"mlp\.fc", "pwconv"),
        (r"^head\.norm\.", "norm."),
    )  # fmt: skip
    return Source(model, weights, size=64)


def transformers_model(family: str, **settings: Any) -> Source:
    """A vision model of transformers with its configuration."""
    import transformers

    config = getattr(transformers, f"{family}Config")(**settings)
    model = randomized(getattr(transformers, f"{family}Model")(config))
    pooled = hasattr(config, "hidden_sizes") or family in ("Swin", "CLIPVision", "SiglipVision")

    def reference(x: Tensor) -> Tensor:
        output = model(pixel_values=x)
        return output.pooler_output if pooled else output.last_hidden_state[:, 0]

    clip = {"arch_kwargs": {"act_layer": "quick_gelu", "num_heads": 2}} if family == "CLIPVision" else {}
    options = {"arch_kwargs": {"num_heads": 2}} if "num_attention_heads" in settings else {}
    size = settings.get("image_size", 64)
    return Source(reference, model.state_dict(), {"config.json": config.to_dict()}, clip or options, size)


def torchvision_vit() -> Source:
    from torchvision.models import VisionTransformer as TorchvisionViT

    model = TorchvisionViT(image_size=32, patch_size=8, num_layers=2, num_heads=1, hidden_dim=64, mlp_dim=128)
    model.heads = nn.Identity()
    return Source(randomized(model), {**model.state_dict(), "heads.head.weight": torch.zeros(5, 64)})


def torchvision_resnet() -> Source:
    from torchvision.models import resnet18

    model = randomized(resnet18(weights=None))
    state = dict(model.state_dict())
    model.fc = nn.Identity()
    return Source(model, state, size=64)


SIZES = {"hidden_sizes": [16, 32, 32, 64], "depths": [1, 1, 1, 1]}


def vjepa2() -> Source:
    """V-JEPA 2 of transformers, which repeats an image for the frames of one tubelet."""
    import transformers

    sizes = {"hidden_size": 80, "num_hidden_layers": 2, "num_attention_heads": 2, "crop_size": 64, "patch_size": 16}
    predictor = {"pred_hidden_size": 24, "pred_num_attention_heads": 2, "pred_num_hidden_layers": 1}
    model = randomized(transformers.VJEPA2Model(transformers.VJEPA2Config(**sizes, **predictor)))

    def reference(images: Tensor) -> Tensor:
        return model(images[:, None], skip_predictor=True).last_hidden_state.mean(1)

    config = {"config.json": model.config.to_dict()}
    return Source(reference, model.state_dict(), config, {"arch_kwargs": {"num_heads": 2, "img_size": 64}}, size=64)


def vjepa2_of_meta() -> Source:
    """V-JEPA 2 in the names of its repository."""
    source = vjepa2()
    named = renamed(source.weights, (r"encoder\.embeddings\.patch_embeddings\.", "patch_embed."), (r"encoder\.", ""),
                    (r"^layer\.", "blocks."), (r"\.attention\.", ".attn."), (r"^layernorm", "norm"))  # fmt: skip
    weights = {key: value for key, value in named.items() if not key.startswith("predictor")}
    for stem in {re.sub(r"query\.\w+$", "", key) for key in named if ".query." in key and not key.startswith("pred")}:
        for kind in ("weight", "bias"):
            parts = [weights.pop(f"{stem}{name}.{kind}") for name in ("query", "key", "value")]
            weights[f"{stem}qkv.{kind}"] = torch.cat(parts)

    def wrap(state: Mapping[str, Tensor]) -> Any:
        target = {f"module.backbone.{key}": value for key, value in state.items()}
        online = {key: torch.randn_like(value) for key, value in target.items()}
        return {
            "encoder": online,
            "target_encoder": target,
            "predictor": {"module.backbone.norm.weight": torch.ones(2)},
        }

    return Source(source.reference, weights, options=source.options, size=64, wrap=wrap)


def lightly_resnet() -> Source:
    """ResNet in a sequence, as in lightly's examples."""
    source = torchvision_resnet()
    children = [module for module in source.reference.children() if not isinstance(module, nn.Identity)]
    weights = {f"backbone.{key}": value for key, value in nn.Sequential(*children).state_dict().items()}
    return Source(source.reference, weights, size=64, wrap=lambda state: {"state_dict": state})


FAMILIES: dict[str, Callable[[], Source]] = {
    "timm ViT": timm_vit,
    "timm DINOv3": timm_dinov3,
    "timm SigLIP": timm_siglip,
    "timm ResNet": timm_resnet,
    "timm ConvNeXt": timm_convnext,
    "timm Swin": timm_swin,
    "DINO": dino,
    "iBOT, student": ibot,
    "DINOv2, registers, chunks": dinov2,
    "DINOv3": dinov3,
    "DINOv3, SwiGLU": partial(dinov3, gated=True),
    "MoCo v3 ViT-S": moco_v3,
    "mmpretrain ViT": mmpretrain,
    "torchvision ViT": torchvision_vit,
    "torchvision ResNet": torchvision_resnet,
    "lightly ResNet, in a sequence": lightly_resnet,
    "V-JEPA 2": vjepa2_of_meta,
    "transformers V-JEPA 2": vjepa2,
    "transformers ViT": partial(transformers_model, "ViT", **HF),
    "transformers DeiT": partial(transformers_model, "DeiT", **HF),
    "transformers Dinov2": partial(transformers_model, "Dinov2", **{k: v for k, v in HF.items() if "inter" not in k}),
    "transformers DINOv3 ViT": partial(transformers_model, "DINOv3ViT", **HF, num_register_tokens=4),
    "transformers DINOv3 ConvNeXt": partial(transformers_model, "DINOv3ConvNext", **SIZES),
    "transformers ConvNeXt": partial(transformers_model, "ConvNext", **SIZES),
    "transformers ConvNeXt V2": partial(transformers_model, "ConvNextV2", **SIZES),
    "transformers Swin": partial(
        transformers_model, "Swin", image_size=224, embed_dim=16, depths=[2, 2], num_heads=[1, 2], window_size=7
    ),
    "transformers CLIP, PLIP": partial(transformers_model, "CLIPVision", **HF),
    "transformers SigLIP": partial(transformers_model, "SiglipVision", **HF),
    "CLIP (QuickGELU)": partial(open_clip, quick=True),
    "OpenCLIP (GELU)": partial(open_clip, quick=False),
    "CONCH, its own pooling": conch,
    "Swin (Microsoft)": swin,
    "CTransPath": ctranspath,
    "ConvNeXt (Meta)": convnext,
}


def write(source: Source, folder: Path, *, config: bool) -> Path:
    """The weights in a file of the folder, with or without the configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    content = source.wrap({key: value.contiguous() for key, value in source.weights.items()})
    flat = all(isinstance(value, Tensor) for value in content.values())
    path = folder / ("model.safetensors" if flat else "pytorch_model.bin")
    if flat:
        save_file({key: value.clone() for key, value in content.items()}, path)
    else:
        torch.save(content, path)
    for name, values in source.config.items() if config else ():
        (folder / name).write_text(json.dumps(values))
    return path


def on_hub(source: Source, cache: Path) -> Path:
    """Name of a model whose files are in a cache of the hub."""
    repository = cache / f"models--{REPOSITORY.replace('/', '--')}"
    shutil.rmtree(repository, ignore_errors=True)
    write(source, repository / "snapshots" / "0", config=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0")
    return Path(f"hf-hub:{REPOSITORY}")


@torch.no_grad()
def difference(source: Source, path: Path, options: Mapping[str, Any]) -> float:
    """Largest absolute difference of the features from those of the source model."""
    encoder = load_encoder(path, **options)
    x = torch.rand(2, 3, source.size, source.size, generator=torch.Generator().manual_seed(1))
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (encoder.mean, encoder.std))
    features, expected = encoder(x), source.reference((x - mean) / std)
    if features.shape != expected.shape:
        raise ValueError(f"features {tuple(features.shape)}, the source's {tuple(expected.shape)}")
    return (features - expected).abs().max().item()


def differences(source: Source, folder: Path) -> dict[str, float | None]:
    """Difference by way; None if the source publishes no configuration."""
    branch = {key: value for key, value in source.options.items() if key == "branch"}
    paths = {
        "weights alone": (write(source, folder / "alone", config=False), source.options),
        "with configuration": (write(source, folder / "whole", config=True), branch),
        "folder": (folder / "whole", branch),
        "hub id": (on_hub(source, folder / "cache"), branch),
    }
    if not source.config:
        paths.pop("with configuration")
        paths = {way: (path, source.options) for way, (path, _) in paths.items()}
    before = constants.HF_HUB_CACHE, constants.HF_HUB_OFFLINE
    constants.HF_HUB_CACHE, constants.HF_HUB_OFFLINE = str(folder / "cache"), True
    try:
        found = {way: difference(source, path, options) for way, (path, options) in paths.items()}
    finally:
        constants.HF_HUB_CACHE, constants.HF_HUB_OFFLINE = before
    return {way: found.get(way) for way in WAYS}


def main() -> None:
    print(f"| family | {' | '.join(WAYS)} |")
    print("|---|" + "---|" * len(WAYS))
    for name, build in FAMILIES.items():
        source = build()
        with tempfile.TemporaryDirectory() as folder:
            row = differences(source, Path(folder))
        cells = ["–" if value is None else f"{value:.1g}" for value in row.values()]
        if source.options.get("arch_kwargs"):
            cells[0] += f", `--arch-kwargs '{json.dumps(source.options['arch_kwargs'])}'`"
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
