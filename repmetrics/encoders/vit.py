"""Vision transformers from the names and shapes of their weights: ViT, DINOv3's ViT, Swin."""

from __future__ import annotations

import math
import re
from functools import partial
from typing import Any

import timm
import torch
from timm.layers.mlp import SwiGLUPacked
from timm.models.eva import Eva
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from repmetrics.encoders.architecture import (
    Architecture,
    Choices,
    StateDict,
    activation,
    construct,
    norm,
    without_values,
)
from repmetrics.encoders.components import ConvStem

# Shapes do not determine the number of heads. Published ViTs have 64 channels per head, except these widths.
HEADS_BY_WIDTH = {1152: 16, 1280: 16, 1408: 16, 1664: 16, 4096: 32}
VIT_SIZES = {(192, 12): "tiny", (384, 12): "small", (768, 12): "base", (1024, 24): "large", (1280, 32): "huge",
             (1536, 40): "giant", (4096, 40): "7b"}  # fmt: skip
QUICK_GELU = (
    "a ViT with a norm before its blocks, like CLIP's: the weights do not determine its activation, QuickGELU (OpenAI, "
    """PLIP) or GELU (LAION): pass --arch-kwargs '{"act_layer": "quick_gelu"}' or '{"act_layer": "gelu"}', put its """
    "configuration into the folder, or name the architecture with --arch"
)
EPSILON = "norm epsilon {:.3g}"
POOLS = {"token": "features from the class {}", "avg": "features averaged over the tokens ({})"}


def infer_vit(state: StateDict, choices: Choices, *, native: bool) -> Architecture:
    """ViT with these weights in timm's names.

    Args:
        state: Weights.
        choices: What the weights do not determine.
        native: Use the size of the positions, even a large one.
    """
    stem = _conv_stem(state)
    if "blocks.0.mlp.fc1.weight" not in state or "pos_embed" not in state:
        raise ValueError("a patch embedding, but not the weights of a plain ViT: name the architecture with --arch")
    width, depth = state["blocks.0.norm1.weight"].shape[0], _depth(state)
    grid, embedded_prefix = pos_embed_grid(state)
    patch = stem.patch if stem else state["patch_embed.proj.weight"].shape[-1]
    name, registers = _name(state, width, depth, patch), _registers(state)
    has_class, mean_norm = "cls_token" in state, "fc_norm.weight" in state
    pool = "map" if "attn_pool.latent" in state else "token" if has_class and not mean_norm else "avg"
    kwargs: dict[str, Any] = {
        "img_size": grid * patch, "patch_size": patch, "in_chans": 3, "embed_dim": width, "depth": depth,
        "num_heads": _take_heads(state, choices, width), "norm_layer": norm(choices.take("norm_eps", 1e-6, EPSILON)),
        "qkv_bias": "blocks.0.attn.qkv.bias" in state, "qk_norm": "blocks.0.attn.q_norm.weight" in state,
        "init_values": 1.0 if "blocks.0.ls1.gamma" in state else None, "pre_norm": "norm_pre.weight" in state,
        "class_token": has_class, "reg_tokens": registers, "no_embed_class": embedded_prefix == 0,
        "final_norm": "norm.weight" in state or mean_norm, "fc_norm": mean_norm,
        "global_pool": pool if pool == "map" or mean_norm else choices.take("global_pool", pool, POOLS[pool]),
        "num_classes": 0, "dynamic_img_size": True, **_mlp(state, choices, width, depth, patch),
    }  # fmt: skip
    if stem:
        kwargs["embed_layer"] = partial(ConvStem, widths=stem.widths)
    build = partial(construct, VisionTransformer, kwargs, choices.given)
    architecture = Architecture(name, build, without_values(build), grid * patch, choices.notes())
    if architecture.image_size <= 256 or native or stem:
        return architecture
    # DINOv2 learns positions at 518 px, and is evaluated at 224 px.
    tokens = 224 // patch
    note = f"images of {tokens * patch} px, positions resampled {grid}×{grid} → {tokens}×{tokens}: see --image-size"
    return architecture._replace(image_size=tokens * patch, notes=(*architecture.notes, note))


class _Stem:
    """Convolutional stem: channels of its layers, and side of the patches."""

    def __init__(self, widths: tuple[int, ...]) -> None:
        self.widths, self.patch = widths, 2 ** len(widths)


def _conv_stem(state: StateDict) -> _Stem | None:
    convolution = re.compile(r"patch_embed\.proj\.\d+\.weight$")
    keys = [key for key, value in state.items() if convolution.match(key) and value.ndim == 4]
    keys.sort(key=lambda key: int(key.split(".")[2]))
    return _Stem(tuple(state[key].shape[0] for key in keys[:-1])) if keys else None


def _mlp(state: StateDict, choices: Choices, width: int, depth: int, patch: int) -> dict[str, Any]:
    """Arguments of the MLPs: a SwiGLU is known by its shapes, the activation of others is not."""
    hidden, out = state["blocks.0.mlp.fc1.weight"].shape[0], state["blocks.0.mlp.fc2.weight"].shape[1]
    ratio = {"mlp_ratio": (hidden + 0.5) / width}
    if hidden == 2 * out:
        return {**ratio, "mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU}
    undetermined = ""
    if "norm_pre.weight" in state:
        size = VIT_SIZES.get((width, depth), "*")
        known = ", ".join(timm.list_models(f"vit_{size}_patch{patch}_clip_*")) or "vit_base_patch16_clip_224, ..."
        undetermined = f"{QUICK_GELU} ({known})"
    act = choices.take("act_layer", "gelu", "activation {}", undetermined=undetermined)
    return {**ratio, "act_layer": activation(act)}


def _take_heads(state: StateDict, choices: Choices, width: int) -> int:
    text = "{} attention heads" + ("" if choices.has("num_heads") or width in HEADS_BY_WIDTH else " (64 channels each)")
    if width in (192, 384) and not choices.has("num_heads") and "cls_token" in state and is_sine(state):
        raise ValueError(
            f"a ViT of width {width} with fixed positions: published ones have {width // 64} heads (MAE, DINO) or 12 "
            f"(MoCo v3, solo-learn's MAE), and the weights do not determine it: {HEADS_OPTION}"
        )
    default = 0 if choices.has("num_heads") else HEADS_BY_WIDTH.get(width) or default_heads(width)
    return int(choices.take("num_heads", default, text))


HEADS_OPTION = """pass --arch-kwargs '{"num_heads": ...}', or --arch"""


def default_heads(width: int) -> int:
    """Heads of 64 channels, if the width has them.

    Raises:
        ValueError: It has not; the message lists the numbers of heads that divide it.
    """
    if width % 64 == 0:
        return width // 64
    candidates = [heads for heads in range(1, width // 8 + 1) if width % heads == 0]
    raise ValueError(
        f"a ViT of width {width} may have {', '.join(map(str, candidates))} heads; the weights do not determine it: "
        + HEADS_OPTION
    )


def is_sine(state: StateDict) -> bool:
    """Whether positions are the fixed sines and cosines of MAE and MoCo v3: each row has the squared norm D/2."""
    grid, _ = pos_embed_grid(state)
    rows = state["pos_embed"].float().reshape(-1, state["pos_embed"].shape[-1])[-grid * grid :]
    return bool(torch.allclose(rows.square().sum(1), torch.tensor(rows.shape[1] / 2), rtol=1e-3))


def pos_embed_grid(state: StateDict) -> tuple[int, int]:
    """Side of a ViT's grid of positions, and the number of prefix tokens that have a position."""
    tokens = state["pos_embed"].shape[1]
    has_class, registers = int("cls_token" in state), _registers(state)
    for prefix in (has_class, 0, has_class + registers):
        side = math.isqrt(max(tokens - prefix, 0))
        if side and side * side == tokens - prefix:
            return side, prefix
    raise ValueError(f"{tokens} positions do not form a square grid of patches: name the timm architecture with --arch")


def _depth(state: StateDict) -> int:
    return 1 + max(int(m.group(1)) for key in state if (m := re.match(r"blocks\.(\d+)\.", key)))


def _registers(state: StateDict) -> int:
    names = [name for name in ("reg_token", "storage_tokens") if name in state]
    return state[names[0]].shape[1] if names else 0


def _name(state: StateDict, width: int, depth: int, patch: int) -> str:
    registers = _registers(state)
    size = VIT_SIZES.get((width, depth), f"{width}x{depth}")
    return f"vit_{size}_patch{patch}{f'_reg{registers}' if registers else ''}"


def is_dinov3(state: StateDict) -> bool:
    """Whether weights, in the names of DINOv3's repository or of timm, are those of a DINOv3 ViT."""
    scales = "blocks.0.ls1.gamma" in state or "blocks.0.gamma_1" in state
    return "pos_embed" not in state and scales and "blocks.0.attn.qkv.weight" in state


def infer_dinov3(state: StateDict, choices: Choices) -> Architecture:
    """DINOv3's ViT, with rotary positions, in the names of its repository or of timm."""
    width, depth, patch = state["norm.weight"].shape[0], _depth(state), state["patch_embed.proj.weight"].shape[-1]
    gate = next((state[key] for key in ("blocks.0.mlp.w1.weight", "blocks.0.mlp.fc1_g.weight") if key in state), None)
    hidden = state["blocks.0.mlp.fc1.weight"].shape[0] if gate is None else gate.shape[0]
    periods = state.get("rope_embed.periods")
    if periods is not None and not choices.has("num_heads"):
        heads = width // (4 * len(periods))  # a head rotates pairs in two directions
    else:
        heads = _take_heads(state, choices, width)
    bias = state.get("blocks.0.attn.qkv.bias")
    kwargs: dict[str, Any] = {
        "patch_size": patch, "embed_dim": width, "depth": depth, "num_heads": heads,
        "mlp_ratio": (hidden + 0.5) / width, "swiglu_mlp": gate is not None, "swiglu_align_to": int(gate is not None),
        "init_values": 1e-5,
        "qkv_bias": bias is not None or "blocks.0.attn.q_bias" in state, "num_reg_tokens": _registers(state),
        "use_rot_pos_emb": True, "use_abs_pos_emb": False, "rope_type": "dinov3", "rope_rotate_half": True,
        "rope_temperature": choices.take("rope_temperature", _temperature(state, width // heads), "rotary base {:.5g}"),
        "norm_layer": norm(choices.take("norm_eps", 1e-5, EPSILON)), "use_fc_norm": False,
        "global_pool": choices.take("global_pool", "token", POOLS["token"]), "num_classes": 0, "dynamic_img_size": True,
    }  # fmt: skip
    if choices.has("act_layer") and gate is None:
        _require_gelu(choices, "DINOv3's ViT")
    build = partial(construct, Eva, kwargs, choices.given)
    name = _name(state, width, depth, patch).partition("_reg")[0]
    return Architecture(f"{name}_dinov3", build, without_values(build), 14 * patch, choices.notes())


def _require_gelu(choices: Choices, network: str) -> None:
    act = choices.take("act_layer", "gelu", "activation {}")
    if act != "gelu":
        raise ValueError(f"{network} with the activation {act}: timm builds it with gelu only")


def _temperature(state: StateDict, channels: int) -> float:
    """Base of the rotary periods, base^(2i/d) for d channels in each direction; 100 if the file lacks them."""
    periods = state.get("rope_embed.periods")
    if periods is None or len(periods) < 2:
        return 100.0
    return round(float(periods[1].float() / periods[0].float()) ** (channels / 4), 2)


def check_dinov3_bias(state: StateDict) -> None:
    """Timm drops the bias of the keys, which DINOv3 masks. Without the mask in the file, it must be zero."""
    for key, bias in state.items():
        if key.endswith("attn.qkv.bias") and f"{key}_mask" not in state and bias.chunk(3)[1].abs().max() > 0:
            raise ValueError(f"{key} has a bias of the keys, which DINOv3 masks: this variant cannot be built")


def is_swin(state: StateDict) -> bool:
    """Whether weights, in the names of Swin's repository or of timm, are those of a Swin transformer."""
    return "layers.0.blocks.0.attn.relative_position_bias_table" in state


def infer_swin(state: StateDict, choices: Choices) -> Architecture:
    """Swin transformer, also with the convolutional stem of CTransPath."""
    stem, tables = _conv_stem(state), {}
    for key, value in state.items():
        if match := re.match(r"layers\.(\d+)\.blocks\.(\d+)\.attn\.relative_position_bias_table$", key):
            tables[int(match[1]), int(match[2])] = value.shape
    stages = 1 + max(stage for stage, _ in tables)
    depths = tuple(sum(stage == i for stage, _ in tables) for i in range(stages))
    window = (math.isqrt(tables[0, 0][0]) + 1) // 2
    width, hidden = state["layers.0.blocks.0.norm1.weight"].shape[0], state["layers.0.blocks.0.mlp.fc1.weight"].shape[0]
    patch = stem.patch if stem else state["patch_embed.proj.weight"].shape[-1]
    mask = next((value for key, value in state.items() if key == "layers.0.blocks.1.attn_mask"), None)
    native = math.isqrt(len(mask)) * window * patch if mask is not None else 8 * patch * window
    size = choices.take("img_size", native, "images of {} px")
    kwargs: dict[str, Any] = {
        "img_size": size, "patch_size": patch, "embed_dim": width, "depths": depths, "window_size": window,
        "num_heads": tuple(tables[stage, 0][1] for stage in range(stages)), "mlp_ratio": (hidden + 0.01) / width,
        "qkv_bias": "layers.0.blocks.0.attn.qkv.bias" in state, "num_classes": 0,
        "norm_layer": norm(choices.take("norm_eps", 1e-5, EPSILON)),
    }  # fmt: skip
    if choices.has("act_layer"):
        _require_gelu(choices, "a Swin transformer")
    if stem:
        kwargs["embed_layer"] = partial(ConvStem, widths=stem.widths)
    build = partial(construct, SwinTransformer, kwargs, choices.given)
    return Architecture(f"swin_{width}_window{window}", build, without_values(build), size, choices.notes())
