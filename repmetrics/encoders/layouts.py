"""The names of weights in other libraries, converted to those that timm, or its checkpoint filters, read."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor

StateDict = dict[str, Tensor]
Rules = Sequence[tuple[str, str]]


class Layout(NamedTuple):
    """Names of weights that a library uses.

    Attributes:
        name: The library and its model, for messages.
        signature: Name that occurs once in each encoder of this layout.
        convert: Function from these names to those that timm or its filters read.
        model_types: Types of transformers' configurations that belong to the layout.
    """

    name: str
    signature: str
    convert: Callable[[StateDict], StateDict] = dict
    model_types: tuple[str, ...] = ()


def _rename(state: Mapping[str, Tensor], rules: Rules) -> StateDict:
    named: StateDict = {}
    for key, value in state.items():
        for pattern, replacement in rules:
            key = re.sub(pattern, replacement, key)
        named[key] = value
    return named


def _fuse(state: Mapping[str, Tensor], *, names: Sequence[str], into: str, pattern: str) -> StateDict:
    """Concatenate the weights and biases of several linear layers with the names `names` into one.

    Args:
        state: Weights.
        names: Last part of the names of the layers, in order.
        into: Name of the fused layer.
        pattern: Pattern of the prefix of the names, with one group.
    """
    fused: StateDict = {}
    for key, value in state.items():
        match = re.match(rf"({pattern})({'|'.join(names)})\.(weight|bias)$", key)
        if not match:
            fused[key] = value
            continue
        stem, kind = match.group(1), match.group(match.lastindex or 0)
        parts = {name: state.get(f"{stem}{name}.{kind}") for name in names}
        if absent := [name for name, part in parts.items() if part is None]:
            raise ValueError(f"{stem}{absent[0]}.{kind} is not in the file, but {key} is: the two belong together")
        fused[f"{stem}{into}.{kind}"] = torch.cat([part for part in parts.values() if part is not None])
    return fused


def _dinov2(state: StateDict) -> StateDict:
    """DINO, DINOv2, iBOT and timm: blocks in chunks, registers, SwiGLU.

    - ``blocks.<chunk>.<i>.`` (DINOv2, chunked for FSDP) → ``blocks.<i>.``
    - registers: timm adds the class token's position to the token and keeps positions for patches only
    - SwiGLU: ``w12`` / ``weights_in`` → ``fc1``, ``w3`` / ``weights_out`` → ``fc2``
    - V-JEPA: a first layer over several frames is summed over them, as for equal frames
    """
    named = dict(state)
    if (first := named.get("patch_embed.proj.weight")) is not None and first.ndim == 5:
        named["patch_embed.proj.weight"] = first.sum(2)
    if any(re.match(r"blocks\.\d+\.\d+\.norm1\.weight$", key) for key in named):
        named = {re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", key): value for key, value in named.items()}
    named = {key.replace(".mlp.w12.", ".mlp.fc1.").replace(".mlp.w3.", ".mlp.fc2."): v for key, v in named.items()}
    if "register_tokens" in named:
        named["reg_token"] = named.pop("register_tokens")
        named["cls_token"] = named["cls_token"] + named["pos_embed"][:, :1]
        named["pos_embed"] = named["pos_embed"][:, 1:]
    return named


_HF_RULES: Rules = (
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.norm\.", "patch_embed.norm."),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.distillation_token$", "dist_token"),
    (r"^embeddings\.", ""),
    (r"^(?:encoder\.)?layers?\.(\d+)\.(?!blocks|downsample)", r"blocks.\1."),
    (r"^encoder\.layers\.", "layers."),
    (r"\.(?:layernorm_before|norm1)\.", ".norm1."),
    (r"\.(?:layernorm_after|norm2)\.", ".norm2."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.attention\.o_proj\.", ".attn.proj."),
    (r"\.attention\.(?:self|attention)\.", ".attention."),
    (r"\.attention\.relative_position_bias\.", ".attention."),
    (r"\.attention\.(relative_position_\w+)$", r".attn.\1"),
    (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"(blocks\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
    (r"\.mlp\.weights_in\.", ".mlp.fc1."),
    (r"\.mlp\.weights_out\.", ".mlp.fc2."),
    (r"^layernorm\.", "norm."),
)


_HF_VJEPA_RULES: Rules = (
    (r"^embeddings\.patch_embeddings\.", "patch_embed."),
    (r"^layer\.(\d+)\.", r"blocks.\1."),
    (r"\.attention\.proj\.", ".attn.proj."),
    (r"\.attention\.", ".attn."),
    (r"^layernorm\.", "norm."),
)


def _hf_vjepa(state: StateDict) -> StateDict:
    """Transformers' V-JEPA 2."""
    named = _rename(state, _HF_VJEPA_RULES)
    return _dinov2(_fuse(named, names=("query", "key", "value"), into="qkv", pattern=r"blocks\.\d+\.attn\."))


def _hf(state: StateDict) -> StateDict:
    """Transformers' ViT, DeiT, Dinov2, Dinov2WithRegisters and Swin."""
    if any("lambda_1" in key or ("relative_position_bias.relative" in key and "blocks" not in key) for key in state):
        raise ValueError(
            "transformers' BEiT, whose weights are not read: name a file of timm's beit_* or beitv2_* with --arch"
        )
    named = _rename(state, _HF_RULES)
    for names in (("query", "key", "value"), ("q_proj", "k_proj", "v_proj")):
        named = _fuse(named, names=names, into="qkv", pattern=r"(?:layers\.\d+\.)?blocks\.\d+\.attention\.")
    named = {key.replace(".attention.qkv.", ".attn.qkv."): value for key, value in named.items()}
    if "dist_token" in named:  # a second prefix token with a position, like a register of timm
        named["reg_token"] = named.pop("dist_token")
    return _dinov2(named)


_HF_DINOV3_RULES: Rules = (
    (r"^embeddings\.patch_embeddings\.", "patch_embed.proj."),
    (r"^embeddings\.register_tokens$", "storage_tokens"),
    (r"^embeddings\.", ""),
    (r"^(?:model\.|encoder\.)?layers?\.(\d+)\.", r"blocks.\1."),
    (r"\.attention\.o_proj\.", ".attn.proj."),
    (r"\.attention\.([qkv]_proj)\.", r".attn.\1."),
    (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
    (r"\.mlp\.down_proj\.", ".mlp.fc2."),
)


def _hf_dinov3(state: StateDict) -> StateDict:
    """Transformers' DINOv3 ViT, in the names of DINOv3's repository; the keys have no bias."""
    named = {key: value for key, value in _rename(state, _HF_DINOV3_RULES).items() if not key.startswith("rope_")}
    gated = any(".mlp.gate_proj." in key for key in named)
    parts = {"gate_proj": "w1", "up_proj": "w2", "fc2": "w3"} if gated else {"up_proj": "fc1"}
    for old, new in parts.items():
        named = {key.replace(f".mlp.{old}.", f".mlp.{new}."): value for key, value in named.items()}
    for key in [key for key in named if key.endswith(".attn.q_proj.bias")]:
        named.setdefault(key.replace(".q_proj.", ".k_proj."), torch.zeros_like(named[key]))
    return _fuse(named, names=("q_proj", "k_proj", "v_proj"), into="qkv", pattern=r"blocks\.\d+\.attn\.")


_HF_CLIP_RULES: Rules = (
    (r"^embeddings\.class_embedding$", "cls_token"),
    (r"^embeddings\.patch_embedding\.", "patch_embed.proj."),
    (r"^embeddings\.position_embedding\.weight$", "pos_embed"),
    (r"^pre_layrnorm\.", "norm_pre."),
    (r"^post_layernorm\.", "norm."),
    (r"^encoder\.layers\.(\d+)\.", r"blocks.\1."),
    (r"\.layer_norm([12])\.", r".norm\1."),
    (r"\.self_attn\.out_proj\.", ".attn.proj."),
    (r"\.self_attn\.", ".attn."),
    (r"^head\.probe$", "attn_pool.latent"),
    (r"^head\.layernorm\.", "attn_pool.norm."),
    (r"^head\.mlp\.", "attn_pool.mlp."),
    (r"^head\.attention\.out_proj\.", "attn_pool.proj."),
)


def _hf_clip(state: StateDict) -> StateDict:
    """Transformers' CLIP and SigLIP vision models."""
    named = {key: value for key, value in state.items() if key != "embeddings.position_ids"}
    named = _fuse(_rename(named, _HF_CLIP_RULES), names=("q_proj", "k_proj", "v_proj"), into="qkv",
                  pattern=r"blocks\.\d+\.attn\.")  # fmt: skip
    for kind in ("weight", "bias"):
        if (packed := named.pop(f"head.attention.in_proj_{kind}", None)) is not None:
            q, k, v = packed.chunk(3)
            named |= {f"attn_pool.q.{kind}": q, f"attn_pool.kv.{kind}": torch.cat([k, v])}
    for key, ndim in (("cls_token", 1), ("pos_embed", 2)):
        if key in named and named[key].ndim == ndim:
            named[key] = named[key].reshape(1, -1, named[key].shape[-1])
    return named


_TORCHVISION_RULES: Rules = (
    (r"^class_token$", "cls_token"),
    (r"^conv_proj\.", "patch_embed.proj."),
    (r"^encoder\.pos_embedding$", "pos_embed"),
    (r"^encoder\.ln\.", "norm."),
    (r"^encoder\.layers\.encoder_layer_(\d+)\.", r"blocks.\1."),
    (r"\.ln_([12])\.", r".norm\1."),
    (r"\.self_attention\.in_proj_", ".attn.qkv."),
    (r"\.self_attention\.out_proj\.", ".attn.proj."),
    (r"\.mlp\.(?:linear_1|0)\.", ".mlp.fc1."),
    (r"\.mlp\.(?:linear_2|3)\.", ".mlp.fc2."),
)
_MMPRETRAIN_RULES: Rules = (
    (r"^patch_embed\.projection\.", "patch_embed.proj."),
    (r"^pre_norm\.", "norm_pre."),
    (r"^ln1\.", "norm."),
    (r"^ln2\.", "fc_norm."),
    (r"^layers\.(\d+)\.", r"blocks.\1."),
    (r"\.ln([12])\.", r".norm\1."),
    (r"\.attn\.gamma1\.(?:weight|gamma)$", ".ls1.gamma"),
    (r"\.ffn\.gamma2\.(?:weight|gamma)$", ".ls2.gamma"),
    (r"\.ffn\.layers\.0\.0\.", ".mlp.fc1."),
    (r"\.ffn\.layers\.1\.", ".mlp.fc2."),
    (r"\.ffn\.w12\.", ".mlp.fc1."),
    (r"\.ffn\.w3\.", ".mlp.fc2."),
)
_HF_CONVNEXT_RULES: Rules = (
    (r"^embeddings\.patch_embeddings\.", "downsample_layers.0.0."),
    (r"^embeddings\.layernorm\.", "downsample_layers.0.1."),
    (r"^(?:encoder\.|model\.)?stages\.0\.downsample_layers\.", "downsample_layers.0."),
    (r"^(?:encoder\.|model\.)?stages\.(\d+)\.(?:downsampling_layer|downsample_layers)\.", r"downsample_layers.\1."),
    (r"^(?:encoder\.|model\.)?stages\.(\d+)\.layers\.(\d+)\.", r"stages.\1.\2."),
    (r"\.depthwise_conv\.", ".dwconv."),
    (r"\.pointwise_conv([12])\.", r".pwconv\1."),
    (r"^(stages\.\d+\.\d+)\.layer_?norm\.", r"\1.norm."),
    (r"\.layer_scale_parameter$", ".gamma"),
    (r"\.grn\.weight$", ".grn.gamma"),
    (r"\.grn\.bias$", ".grn.beta"),
    (r"^layer_?norm\.", "norm."),
)


def _of_rules(rules: Rules) -> Callable[[StateDict], StateDict]:
    return lambda state: _rename(state, rules)


def _hf_patches(state: StateDict) -> StateDict:
    """Transformers' DINOv3 ViT or ConvNeXt, whose patch embeddings have one name."""
    convolutional = any("stages." in key for key in state)
    return _rename(state, _HF_CONVNEXT_RULES) if convolutional else _hf_dinov3(state)


def _clip(state: StateDict) -> StateDict:
    """CLIP's and OpenCLIP's ViT by timm's filter, which asks a model only for the shapes that it would resize to."""
    if any(key.startswith("attn_pool.") for key in state):
        raise ValueError(
            "OpenCLIP's CoCa, whose pooling by attention is not read from these names: save the weights of its trunk"
        )
    positions, patches = state["positional_embedding"], state["conv1.weight"]
    side = math.isqrt(len(positions) - 1)
    patch_embed = SimpleNamespace(proj=SimpleNamespace(weight=patches), grid_size=(side, side))
    shapes: Any = SimpleNamespace(
        patch_embed=patch_embed, pos_embed=positions[None], no_embed_class=False, num_prefix_tokens=1
    )
    named: StateDict = checkpoint_filter_fn({f"visual.{key}": value for key, value in state.items()}, shapes)
    return named


# Children of a ResNet in an ``nn.Sequential``: convolution, norm, ReLU, pooling, four stages; or without the two.
_SEQUENTIAL = {"4.0.conv1.weight": 4, "2.0.conv1.weight": 2}


def _sequential(state: StateDict) -> StateDict:
    """A ResNet's children in an ``nn.Sequential``, as in lightly's examples, in torchvision's names."""
    first = next(stage for signature, stage in _SEQUENTIAL.items() if signature in state)
    names = {"0": "conv1", "1": "bn1"} | {str(first + k): f"layer{k + 1}" for k in range(4)}
    return {re.sub(r"^\d+", lambda match: names.get(match[0], match[0]), key): value for key, value in state.items()}


def _resnet(state: StateDict) -> StateDict:
    """ResNet's own names; CLIP's variant, with three convolutions and a pooling by attention, is another network."""
    if "attnpool.positional_embedding" in state:
        raise ValueError(
            "CLIP's ResNet, whose names are not read: name a file of timm's resnet50_clip, resnet101_clip … with --arch"
        )
    return state


LAYOUTS = (
    Layout("DINO's and timm's", "patch_embed.proj.weight", _dinov2),
    Layout("a convolutional stem's", "patch_embed.proj.0.weight", _dinov2),
    Layout("transformers'", "embeddings.patch_embeddings.projection.weight", _hf,
           ("vit", "deit", "dinov2", "dinov2_with_registers", "swin", "vit_mae", "vit_msn", "ijepa")),
    Layout("transformers'", "embeddings.patch_embeddings.weight", _hf_patches,
           ("dinov3_vit", "convnext", "convnextv2")),
    Layout("transformers'", "model.stages.0.downsample_layers.0.weight", _of_rules(_HF_CONVNEXT_RULES),
           ("dinov3_convnext",)),
    Layout("transformers'", "stages.0.downsample_layers.0.weight", _of_rules(_HF_CONVNEXT_RULES), ("dinov3_convnext",)),
    Layout("transformers'", "embeddings.patch_embedding.weight", _hf_clip,
           ("clip", "clip_vision_model", "siglip", "siglip_vision_model")),
    Layout("transformers'", "embeddings.patch_embeddings.proj.weight", _hf_vjepa, ("vjepa2",)),
    Layout("CLIP's", "ln_pre.weight", _clip),
    Layout("torchvision's", "conv_proj.weight", _of_rules(_TORCHVISION_RULES)),
    Layout("mmpretrain's", "patch_embed.projection.weight", _of_rules(_MMPRETRAIN_RULES)),
    Layout("ResNet's", "layer1.0.conv1.weight", _resnet),
    Layout("timm's ConvNeXt", "stages.0.blocks.0.conv_dw.weight"),
    Layout("ConvNeXt's", "downsample_layers.0.0.weight"),
)  # fmt: skip
SEQUENTIAL = tuple(Layout("a sequence of a ResNet's children", name, _sequential) for name in _SEQUENTIAL)
"""Layouts with names so short that they count only in files without another one."""
SIGNATURES = tuple(layout.signature for layout in LAYOUTS)


def prefixes(keys: Iterable[str], signatures: Sequence[str] = SIGNATURES) -> set[str]:
    """What precedes a signature in each name that ends with one; the longest signature counts.

    Example:
        >>> prefixes(["teacher.backbone.patch_embed.proj.weight", "head.weight"])
        {'teacher.backbone.'}
    """
    longest = sorted(signatures, key=len, reverse=True)
    ends = ((key, next((s for s in longest if f".{key}".endswith(f".{s}")), None)) for key in keys)
    return {key[: -len(end)] for key, end in ends if end is not None}


def layout_of(state: Mapping[str, Tensor]) -> Layout | None:
    """Layout of weights by their signature; None if there is none."""
    return next((layout for layout in (*LAYOUTS, *SEQUENTIAL) if layout.signature in state), None)


def library_details(layout: Layout, state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Properties that shapes do not determine and that a library fixes, from weights in timm's names."""
    scaled = "blocks.0.ls1.gamma" in state
    if layout.convert is _hf_patches and "stages.0.0.dwconv.weight" in state:
        return {"norm_eps": 1e-12}
    if "norm_pre.weight" in state:  # CLIP
        return {"norm_eps": 1e-5}
    if layout.convert is _hf:
        return {"norm_eps": 1e-12} if not scaled and "pos_embed" in state else {}
    if layout.convert is _hf_clip:  # SigLIP
        return {"norm_eps": 1e-6, "act_layer": "gelu_tanh"}
    depth = sum(key.endswith(".norm1.weight") for key in state)
    if layout.name == "mmpretrain's" and (state["norm.weight"].shape[0], depth) == (768, 8):
        return {"num_heads": 8}
    return {}
