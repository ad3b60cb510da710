"""Weights of one encoder among all tensors of a file: found, converted, checked against a network."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from timm.layers.mlp import SwiGLUPacked
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from repmetrics.encoders.architecture import Architecture, StateDict, timm_architecture
from repmetrics.encoders.files import CheckpointFile
from repmetrics.encoders.layouts import prefixes
from repmetrics.encoders.safe_load import join_first
from repmetrics.encoders.vit import pos_embed_grid

HEADS = re.compile(
    r"(module\.)?(head(?!\.norm)|fc|classifier|head_dist|heads|dino_head|ibot_head|pooler|projector|projection_head"
    r"|predictor|prototypes|decoder\w*|mask_token|masked_embed|embeddings\.mask_token|pre_logits|lm_head|projectors"
    r"|local_cls_norm)(\.|$)"
)
# Entries of a checkpoint that hold no network.
_STATE_OF_TRAINING = re.compile(r"(optim|lr_sched|scheduler|loops|callbacks|scaler|loss|criterion|rng|epoch|state$)")
# Weights of the layers that see the images.
FIRST_LAYERS = (
    "patch_embed.proj.weight", "patch_embed.proj.0.weight", "patch_embed.projection.weight", "conv1.weight",
    "stem.0.weight", "stem.conv1.weight", "conv_stem.weight", "conv_proj.weight", "downsample_layers.0.0.weight",
    "embeddings.patch_embeddings.projection.weight", "embeddings.patch_embeddings.weight",
    "embeddings.patch_embedding.weight", "embeddings.patch_embeddings.proj.weight", "features.0.0.weight",
)  # fmt: skip
_PARTS_OF_WEIGHTS = ("weight", "bias", "cls_token", "pos_embed", "reg_token", "register_tokens", "storage_tokens")


def check_images(raw: Mapping[str, Tensor], *, video: bool = False) -> None:
    """The encoder must take images of three channels, or with ``video`` several frames of them."""
    for key in FIRST_LAYERS:
        first = raw.get(key)
        if first is None or (key == "patch_embed.proj.weight" and any("patch_embed.backbone" in name for name in raw)):
            continue
        if first.ndim == 5 and not video:
            raise ValueError(
                f"an encoder of video: {key} covers {first.shape[2]} frames; images are not scored with it, and a "
                "network of images is needed"
            )
        if first.ndim not in (4, 5) or first.shape[1] != 3:
            raise ValueError(
                f"an encoder of {first.shape[1] if first.ndim > 1 else 'no'} channels ({key} {tuple(first.shape)}): "
                "images are read as RGB, with three"
            )


def raw_weights(file: CheckpointFile, root: str, *, expected: Mapping[str, Any] | None = None) -> StateDict:
    """Weights under the prefix `root` as they are in the file, without other encoders nested there.

    Args:
        file: Content of the file.
        root: Prefix with its dot, or "".
        expected: Names of the network if it is known: an encoder nested in it is a part of it.

    Raises:
        ValueError: A weight is quantized, or replaced by an object that is not read.
    """
    inner = {key[len(root) :]: value for key, value in file.tensors.items() if key.startswith(root)}
    # for example an EMA copy inside the module
    nested = {place for place in prefixes(inner) if place and not any(key.startswith(place) for key in expected or ())}
    kept = {key: value for key, value in inner.items() if not any(key.startswith(place) for place in nested)}
    for path, kind in file.opaque.items():
        if path.startswith(root) and path.rpartition(".")[2] in _PARTS_OF_WEIGHTS:
            raise ValueError(f"{file.name}: {path} is a {kind}, which is not read: save plain tensors")
    for key, value in kept.items():
        if value.is_quantized or value.is_complex() or value.layout != torch.strided or "float8" in str(value.dtype):
            raise ValueError(_quantized(file.name, key, value))
    return kept


def _quantized(name: str, key: str, value: Tensor) -> str:
    kind = str(value.dtype).removeprefix("torch.")
    return f"{name}: {key} is {kind}, not a plain floating-point weight: quantized networks are not read"


def find_merged(file: CheckpointFile) -> StateDict:
    """All tensors of the file, with LoRA's low-rank updates merged into their base weights.

    Raises:
        ValueError: The base is not in the file, or the scale of the updates is not known.
    """
    updates = [key for key in file.tensors if re.search(r"\.lora_(A|embedding_A)(\.\w+)?(\.weight)?$", key)]
    if not updates:
        return file.tensors
    stems = {key: re.sub(r"\.lora_A(\.\w+)?(\.weight)?$", "", key) for key in updates}
    if missing := [key for key, stem in stems.items() if f"{stem}.base_layer.weight" not in file.tensors]:
        raise ValueError(
            f"{file.name} holds LoRA's updates, such as {missing[0]}, without the weights that they change: merge them "
            "into their base (peft: merge_and_unload()) and save that"
        )
    config = file.config.get("adapter_config.json", {})
    if not isinstance(config.get("lora_alpha"), int | float) or config.get("use_dora"):
        raise ValueError(
            f"{file.name} holds LoRA's updates, whose scale is not in the file: put peft's adapter_config.json into "
            "its folder, or merge them (merge_and_unload()) and save that"
        )
    merged = {key: value for key, value in file.tensors.items() if ".lora_" not in key}
    for key, stem in stems.items():
        down, up = file.tensors[key].float(), file.tensors[key.replace(".lora_A", ".lora_B")].float()
        rank = down.shape[0] ** 0.5 if config.get("use_rslora") else down.shape[0]
        base = merged[f"{stem}.base_layer.weight"].float()
        merged[f"{stem}.base_layer.weight"] = base + (config["lora_alpha"] / rank) * (up @ down)
    return {re.sub(r"\.base_layer\.", ".", key).removeprefix("base_model.model."): v for key, v in merged.items()}


def left_aside(file: CheckpointFile, root: str, used: Mapping[str, Any]) -> list[str]:
    """Networks and heads in the file that are not loaded, by the first parts of their names.

    Under the encoder's own prefix, everything but heads and other encoders is loaded, in whatever names.
    """
    parent = root.rstrip(".").rpartition(".")[0]
    parent = f"{parent}." if parent else ""
    loaded = {name.split(".")[0] for name in used}
    inner = [key[len(root) :] for key in file.tensors if key.startswith(root)]
    nested = tuple(place for place in prefixes(inner) if place and place.split(".")[0] not in loaded)
    groups: dict[str, None] = {}
    for key in file.tensors:
        place = root if key.startswith(root) else parent if key.startswith(parent) else ""
        rest = key[len(place) :]
        group = place + rest.split(".")[0]
        if place == root and rest.split(".")[0] in loaded:
            continue
        if place == root and not (nested and rest.startswith(nested)):
            head = HEADS.match(rest)
            if head is None:
                continue
            group = place + head[0].rstrip(".")
        if not _STATE_OF_TRAINING.match(group) and not root.startswith(f"{group}."):
            groups[group] = None
    return list(groups)


def select_weights(architecture: Architecture, state: StateDict, *, place: str) -> StateDict:
    """Weights to load in float32, or an error that lists what does not fit. Only heads are dropped.

    Raises:
        ValueError: A weight is missing, left over, of another shape, or not a floating-point number.
    """
    expected = architecture.skeleton.state_dict()
    state = {key: value for key, value in state.items() if key in expected or not HEADS.match(key)}
    faults = {
        "missing": [key for key in expected if key not in state],
        "left over": [key for key in state if key not in expected],
        "of another shape": [
            f"{key} {tuple(state[key].shape)} in the file, {tuple(expected[key].shape)} in the model"
            for key in expected
            if key in state and state[key].shape != expected[key].shape
        ],
    }
    if any(faults.values()):
        listed = "; ".join(f"{len(keys)} {fault}: {join_first(keys)}" for fault, keys in faults.items() if keys)
        raise ValueError(
            f"{architecture.name} does not fit {place}: {listed}. Name the network of timm by --arch, and what differs "
            "from it by --arch-kwargs; of any other network, save its embeddings and give that file"
        )
    for key, value in state.items():
        if expected[key].is_floating_point() and not value.is_floating_point():
            raise ValueError(_quantized(place, key, value))
    return {key: value.float() if value.is_floating_point() else value for key, value in state.items()}


def fit_to_weights(named: Architecture, state: StateDict, *, source: str) -> Architecture:
    """A named ViT with the parts that its name leaves open, as the weights have them: positions, SwiGLU, layer scale.

    Args:
        named: Architecture by its name in timm.
        state: Weights in timm's names.
        source: Place that states the name, for notes.
    """
    skeleton, kwargs = named.skeleton, dict(named.kwargs or {})
    expected: StateDict = skeleton.state_dict()
    changes: dict[str, Any] = {}
    notes: list[str] = []
    if isinstance(skeleton, VisionTransformer) and "blocks.0.mlp.fc1.weight" in state:
        width, hidden = skeleton.embed_dim, state["blocks.0.mlp.fc1.weight"].shape[0]
        gated = hidden == 2 * state["blocks.0.mlp.fc2.weight"].shape[1]
        name = "blocks.0.mlp.fc2.weight"
        if gated and name in expected and expected[name].shape != state[name].shape:
            changes |= {"mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU, "mlp_ratio": (hidden + 0.5) / width}
            notes.append("SwiGLU")
        if "blocks.0.ls1.gamma" in state and "blocks.0.ls1.gamma" not in expected:
            changes["init_values"] = 1e-5
            notes.append("layer scale")
    notes = [f"as the weights have it, and {source} does not state it: {', '.join(notes)}"] if notes else []
    positions = getattr(skeleton, "pos_embed", None)
    resized = "pos_embed" in state and positions is not None and state["pos_embed"].shape != positions.shape
    if resized and "img_size" not in kwargs and "patch_embed.proj.weight" in state:
        size = pos_embed_grid(state)[0] * state["patch_embed.proj.weight"].shape[-1]
        changes["img_size"] = size
        notes.append(f"positions are for {size} px, not {named.name}'s own size")
    if not changes:
        return named
    return timm_architecture(named.name, kwargs={**kwargs, **changes})._replace(notes=tuple(notes))
