"""The architecture of a network from the names and shapes of its weights, or from timm's name for it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from difflib import get_close_matches
from functools import partial
from typing import Any, NamedTuple

import timm
import torch
from timm.layers.mlp import SwiGLUPacked
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

StateDict = dict[str, Tensor]

# A key that occurs exactly once in every encoder of that layout.
SIGNATURES = {
    "vit": "patch_embed.proj.weight",
    "hf": "embeddings.patch_embeddings.projection.weight",
    "resnet": "layer1.0.conv1.weight",
}
# Arguments of ``timm.create_model`` that name other weights: a checkpoint may state its arguments.
READS_FILES = {"pretrained", "checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"}
HEADS = re.compile(
    r"(module\.)?(head|fc|classifier|head_dist|heads|dino_head|ibot_head|pooler|projector|projection_head|predictor"
    r"|prototypes|decoder\w*|mask_token|embeddings\.mask_token|pre_logits)(\.|$)"
)
# Shapes do not determine the number of heads. Published ViTs have 64 channels per head, except these widths.
HEADS_BY_WIDTH = {1152: 16, 1280: 16, 1408: 16, 1664: 16}
VIT_SIZES = {(192, 12): "tiny", (384, 12): "small", (768, 12): "base", (1024, 24): "large", (1280, 32): "huge",
             (1536, 40): "giant"}  # fmt: skip
RESNETS: dict[tuple[type[nn.Module], tuple[int, ...]], int] = {
    (BasicBlock, (2, 2, 2, 2)): 18,
    (BasicBlock, (3, 4, 6, 3)): 34,
    (Bottleneck, (3, 4, 6, 3)): 50,
    (Bottleneck, (3, 4, 23, 3)): 101,
    (Bottleneck, (3, 8, 36, 3)): 152,
}


class Architecture(NamedTuple):
    """A network without classifier, before it is built.

    Attributes:
        name: Name of the architecture.
        construct: Function that builds the network, untrained.
        skeleton: Network on the meta device, which has shapes but no values.
        image_size: Side of the images in pixels.
        notes: What a user should know about the architecture.
        kwargs: Arguments of ``timm.create_model`` beside `name`; None if inferred from shapes.
    """

    name: str
    construct: Callable[[], nn.Module]
    skeleton: Any
    image_size: int
    notes: tuple[str, ...] = ()
    kwargs: Mapping[str, Any] | None = None


def timm_architecture(arch: str, *, kwargs: Mapping[str, Any]) -> Architecture:
    """Architecture by its name in timm."""
    if not timm.is_model(arch):
        close = ", ".join(get_close_matches(arch, timm.list_models(), n=3))
        raise ValueError(f"timm has no architecture {arch!r}" + (f": did you mean {close}?" if close else ""))
    if refused := sorted(READS_FILES & kwargs.keys()):
        raise ValueError(
            f"arch_kwargs must describe the network, got {', '.join(refused)}: timm would read other weights"
        )
    construct = partial(_create, arch, kwargs)
    skeleton = _without_values(construct)
    patch_embed = getattr(skeleton, "patch_embed", None)
    size = getattr(patch_embed, "img_size", None) or skeleton.default_cfg["input_size"][1:]
    return Architecture(arch, construct, skeleton, int(size[0]), kwargs=dict(kwargs))


def _create(arch: str, kwargs: Mapping[str, Any]) -> nn.Module:
    try:
        model: nn.Module = timm.create_model(arch, pretrained=False, num_classes=0, **kwargs)
    except (TypeError, AssertionError) as error:
        raise ValueError(f"{arch} cannot be built with {dict(kwargs)}: {error}") from error
    return model


def _without_values(construct: Callable[[], nn.Module]) -> Any:
    with suppress(RuntimeError, ValueError), torch.device("meta"):
        return construct()
    return construct()  # reads values of tensors while it builds, or raises the same error


def infer(state: StateDict, *, overrides: Mapping[str, Any]) -> Architecture:
    """Architecture whose parameters have these names (timm's) and shapes.

    Args:
        state: Weights.
        overrides: Arguments of timm's VisionTransformer or ResNet that shapes do not determine ("num_heads").
    """
    if SIGNATURES["vit"] in state:
        return _infer_vit(state, overrides)
    if SIGNATURES["resnet"] in state:
        return _infer_resnet(state, overrides)
    raise ValueError(
        f"no ViT or ResNet among the {len(state)} weights (first: {', '.join(list(state)[:3])}): "
        "name the timm architecture with --arch"
    )


def _infer_vit(state: StateDict, overrides: Mapping[str, Any]) -> Architecture:
    width, in_chans, _, patch = state["patch_embed.proj.weight"].shape
    blocks = {int(m.group(1)) for key in state if (m := re.match(r"blocks\.(\d+)\.", key))}
    if not blocks or "blocks.0.mlp.fc1.weight" not in state or "pos_embed" not in state:
        raise ValueError("a patch embedding, but not the weights of a plain ViT: name the architecture with --arch")
    depth = max(blocks) + 1
    size = VIT_SIZES.get((width, depth), f"{width}x{depth}")
    if "norm_pre.weight" in state:
        known = ", ".join(timm.list_models(f"vit_{size}_patch{patch}_clip_*")) or "vit_base_patch16_clip_224, ..."
        raise ValueError(
            "a ViT with a norm before its blocks, like CLIP's: the weights do not determine its activation, GELU or "
            f"QuickGELU, nor the epsilon of its norms; name the architecture with --arch ({known})"
        )
    hidden, gated = state["blocks.0.mlp.fc1.weight"].shape[0], state["blocks.0.mlp.fc2.weight"].shape[1]
    registers = state["reg_token"].shape[1] if "reg_token" in state else 0
    has_class = "cls_token" in state
    grid, embedded_prefix = pos_embed_grid(state)
    heads = overrides.get("num_heads") or HEADS_BY_WIDTH.get(width) or _heads(width)
    kwargs: dict[str, Any] = {
        "img_size": grid * patch,
        "patch_size": patch,
        "in_chans": in_chans,
        "embed_dim": width,
        "depth": depth,
        "num_heads": heads,
        "mlp_ratio": hidden / width,
        "qkv_bias": "blocks.0.attn.qkv.bias" in state,
        "qk_norm": "blocks.0.attn.q_norm.weight" in state,
        "init_values": 1.0 if "blocks.0.ls1.gamma" in state else None,
        "class_token": has_class,
        "reg_tokens": registers,
        "no_embed_class": embedded_prefix == 0,
        "final_norm": "norm.weight" in state or "fc_norm.weight" in state,
        "fc_norm": "fc_norm.weight" in state,
        "global_pool": "token" if has_class and "fc_norm.weight" not in state else "avg",
    }
    if hidden == 2 * gated:
        kwargs |= {"mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU}
    name = f"vit_{size}_patch{patch}{f'_reg{registers}' if registers else ''}"
    kwargs |= {"num_classes": 0, "dynamic_img_size": True}
    construct = partial(_construct, VisionTransformer, kwargs, overrides)
    architecture = Architecture(name, construct, _without_values(construct), grid * patch)
    if architecture.image_size <= 256:
        return architecture
    # DINOv2 learns positions at 518 px, and is evaluated at 224 px.
    tokens = 224 // patch
    note = f"images of {tokens * patch} px, positions resampled {grid}×{grid} → {tokens}×{tokens}: see --image-size"
    return architecture._replace(image_size=tokens * patch, notes=(note,))


def _construct(kind: type[nn.Module], inferred: Mapping[str, Any], overrides: Mapping[str, Any]) -> nn.Module:
    try:
        return kind(**{**inferred, **overrides})
    except (TypeError, AssertionError) as error:
        raise ValueError(f"a {kind.__name__} cannot be built with {dict(overrides)}: {error}") from error


def pos_embed_grid(state: StateDict) -> tuple[int, int]:
    """Side of a ViT's grid of positions, and the number of prefix tokens that have a position."""
    tokens = state["pos_embed"].shape[1]
    has_class = int("cls_token" in state)
    registers = state["reg_token"].shape[1] if "reg_token" in state else 0
    for prefix in (has_class, 0, has_class + registers):
        side = math.isqrt(max(tokens - prefix, 0))
        if side and side * side == tokens - prefix:
            return side, prefix
    raise ValueError(f"{tokens} positions do not form a square grid of patches: name the timm architecture with --arch")


def _heads(width: int) -> int:
    if width % 64 == 0:
        return width // 64
    candidates = [heads for heads in range(1, width // 8 + 1) if width % heads == 0]
    raise ValueError(
        f"a ViT of width {width} may have {', '.join(map(str, candidates))} heads; the weights do not determine it: "
        """pass --arch, or --arch-kwargs '{"num_heads": ...}'"""
    )


def _infer_resnet(state: StateDict, overrides: Mapping[str, Any]) -> Architecture:
    block = Bottleneck if "layer1.0.conv3.weight" in state else BasicBlock
    layers = tuple(
        1 + max((int(m.group(1)) for key in state if (m := re.match(rf"layer{stage}\.(\d+)\.", key))), default=-1)
        for stage in (1, 2, 3, 4)
    )
    if 0 in layers or "conv1.weight" not in state:
        raise ValueError(f"a ResNet with {layers} blocks per stage is unknown: pass --arch")
    kwargs: dict[str, Any] = {"in_chans": state["conv1.weight"].shape[1]}
    if block is Bottleneck:
        planes, per_group = state["layer1.0.conv2.weight"].shape[:2]
        kwargs |= {"cardinality": planes // per_group, "base_width": per_group}
    depth = RESNETS.get((block, layers), "x".join(map(str, layers)))
    kwargs |= {"block": block, "layers": layers, "num_classes": 0}
    construct = partial(_construct, ResNet, kwargs, overrides)
    return Architecture(f"resnet{depth}", construct, _without_values(construct), image_size=224)


def to_timm(state: Mapping[str, Tensor]) -> StateDict:
    """Convert the names and packing of DINOv2's and Hugging Face's ViTs to timm's; other names stay unchanged.

    - ``blocks.<chunk>.<i>.`` (DINOv2, chunked for FSDP) → ``blocks.<i>.``
    - registers: timm adds the class token's position to the token and keeps positions for patches only
    - SwiGLU: ``w12`` / ``weights_in`` → ``fc1``, ``w3`` / ``weights_out`` → ``fc2``
    - Hugging Face: query, key and value fused; ``layer_scaleN.lambda1`` → ``lsN.gamma``
    """
    named = _from_hf(state) if SIGNATURES["hf"] in state else dict(state)
    if "blocks.0.0.norm1.weight" in named:
        named = {re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", key): value for key, value in named.items()}
    named = {key.replace(".mlp.w12.", ".mlp.fc1.").replace(".mlp.w3.", ".mlp.fc2."): v for key, v in named.items()}
    if "register_tokens" in named:
        named["reg_token"] = named.pop("register_tokens")
        named["cls_token"] = named["cls_token"] + named["pos_embed"][:, :1]
        named["pos_embed"] = named["pos_embed"][:, 1:]
    return named


_HF_NAMES = (
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.", ""),
    (r"^(?:encoder\.)?layers?\.(\d+)\.", r"blocks.\1."),
    (r"\.(?:layernorm_before|norm1)\.", ".norm1."),
    (r"\.(?:layernorm_after|norm2)\.", ".norm2."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.attention\.o_proj\.", ".attn.proj."),
    (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"(blocks\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
    (r"\.mlp\.weights_in\.", ".mlp.fc1."),
    (r"\.mlp\.weights_out\.", ".mlp.fc2."),
    (r"^layernorm\.", "norm."),
)


def _from_hf(state: Mapping[str, Tensor]) -> StateDict:
    """Transformers' ViT, Dinov2 and Dinov2WithRegisters."""
    named: StateDict = {}
    for key, value in state.items():
        for pattern, replacement in _HF_NAMES:
            key = re.sub(pattern, replacement, key)
        named[key] = value
    fused: StateDict = {}
    for key, value in named.items():
        qkv = re.match(r"(blocks\.\d+)\.attention\.(?:attention\.)?(query|key|value|[qkv]_proj)\.(weight|bias)$", key)
        if not qkv:
            fused[key] = value
        elif qkv.group(2)[0] == "q":
            stem = key[: qkv.start(2)]
            names = ("query", "key", "value") if "query" in key else ("q_proj", "k_proj", "v_proj")
            parts = [named[f"{stem}{name}.{qkv.group(3)}"] for name in names]
            fused[f"{qkv.group(1)}.attn.qkv.{qkv.group(3)}"] = torch.cat(parts)
    return fused
