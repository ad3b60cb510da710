"""Initial weights of a backbone: random, timm's, or those of any checkpoint; with a list of what was loaded."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import timm
import torch
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor, nn

from repmetrics.encoders.checkpoint import identify
from repmetrics.encoders.configuration import read_config
from repmetrics.encoders.files import read_checkpoint_file
from repmetrics.encoders.hub import is_hub_id
from repmetrics.encoders.vit import pos_embed_grid

Init = Literal["random", "timm"] | Path
LAYER_SCALE = re.compile(r"blocks\.\d+\.ls[12]\.gamma$")


class Weights(NamedTuple):
    """Weights of a backbone in timm's names, their source, and what is known of their network.

    Attributes:
        state: Weights.
        source: Name of the file and of the place in it.
        mean, std: Normalization of the images.
        details: Properties that shapes do not determine, as in `vit_details`.
    """

    state: dict[str, Tensor]
    source: str
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    details: Mapping[str, Any] = {}


class AdaptedWeights(NamedTuple):
    """State dict for a backbone, and one message per kind of change."""

    state: dict[str, Tensor]
    messages: list[str]


def initialize_(
    backbone: nn.Module,
    init: Init,
    *,
    arch: str,
    mean: Sequence[float],
    std: Sequence[float],
    branch: Literal["teacher", "student"] = "teacher",
) -> list[str]:
    """Load the weights of `init` into a ViT, and return messages on what was and was not loaded.

    Args:
        backbone: ViT of timm, changed in place.
        init: "random" changes nothing. "timm" loads timm's published weights of `arch`. A path loads a checkpoint.
        arch: Name of the ViT in timm, with a tag where several weights are published (``vit_small_patch16_224.dino``).
        mean: Mean of the run's image normalization, compared with that of the weights.
        std: Standard deviation of the run's image normalization, compared with that of the weights.
        branch: Branch of a checkpoint that has both.
    """
    if init == "random":
        return []
    current = vit_details(backbone)
    weights = timm_weights(arch) if init == "timm" else read_weights(Path(init), like=current, branch=branch)
    heads = weights.details.get("num_heads", current["num_heads"])
    if heads != current["num_heads"]:  # no weight's shape depends on it
        raise ValueError(
            f"{weights.source} has {heads} attention heads per block, {arch} as configured {current['num_heads']}"
        )
    state, messages = adapt_weights(weights.state, backbone.state_dict(), arch=arch, source=weights.source)
    backbone.load_state_dict(state)
    for name, expected, actual in (("mean", tuple(mean), weights.mean), ("std", tuple(std), weights.std)):
        if actual not in (None, expected):
            messages.append(
                f"note: its images were normalized with {name} {list(actual)}, this run's with {list(expected)}"
            )
    for name, text in (("act_layer", "activation"), ("norm_eps", "epsilon of the norms")):
        if (actual := weights.details.get(name, current[name])) != current[name]:
            messages.append(f"note: its network has the {text} {actual}, this run's has {current[name]}")
    return messages


def vit_details(network: Any) -> dict[str, Any]:
    """Properties of a ViT of timm that the shapes of its weights do not determine; empty for another network."""
    block = next(iter(getattr(network, "blocks", ())), None)
    if block is None or not hasattr(getattr(block, "attn", None), "num_heads"):
        return {}
    act = getattr(block.mlp, "act", None)
    name = {"GELU": "gelu", "GELUTanh": "gelu_tanh", "QuickGELU": "quick_gelu", "SiLU": "silu", "ReLU": "relu"}
    return {
        "num_heads": block.attn.num_heads,
        "act_layer": name.get(type(act).__name__, type(act).__name__),
        "norm_eps": block.norm1.eps,
    }


def timm_weights(arch: str) -> Weights:
    """Weights that timm publishes for an architecture, in their published image size."""
    try:
        model = timm.create_model(arch, pretrained=True, num_classes=0)
    except (OSError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"could not download timm's weights for {arch}: {reason}; without access to the hub, "
            "fetch the file elsewhere and set model.init to its path"
        ) from error
    cfg: Any = model.pretrained_cfg
    tag = f"{cfg['architecture']}.{cfg['tag']}" if cfg.get("tag") else arch
    return Weights(dict(model.state_dict()), f"timm's {tag}", tuple(cfg["mean"]), tuple(cfg["std"]))


def read_weights(
    path: Path, *, like: Mapping[str, Any] | None = None, branch: Literal["teacher", "student"] = "teacher"
) -> Weights:
    """Weights of the encoder in any checkpoint that `repmetrics score` reads: the teacher's before the student's.

    Args:
        path: Checkpoint, or name of a model on the hub. JSON in its folder is read too.
        like: Properties of the run's network, for those that neither the file nor its JSON states.
        branch: Branch of a checkpoint that has both.
    """
    if not path.exists() and not is_hub_id(str(path)):
        raise ValueError(f"model.init is {str(path)!r}: expected random, timm, or the path of a checkpoint")
    file = read_checkpoint_file(path, digests=False)
    identified = identify(file, branch=branch, fallback=like)
    notes = [note for note in identified.notes if note.startswith("no teacher")]
    place = "; ".join([identified.prefix.rstrip(".") or "top level", *notes])
    channels = read_config(file).channels
    mean, std = (channels.mean, channels.std) if channels else (None, None)
    details = vit_details(identified.architecture.skeleton)
    return Weights(identified.state, f"{path.name} ({place})", mean, std, details)


def adapt_weights(
    weights: Mapping[str, Tensor], expected: Mapping[str, Tensor], *, arch: str, source: str
) -> AdaptedWeights:
    """Adapt weights to a network of the same architecture and possibly another image size.

    Every weight must be used; otherwise the file is of another architecture. Positions are resampled as in timm. If
    only one side has a position for the class token, it is added to that token, or set to zero: the sum is unchanged.
    The network may have registers and layer scale that the weights lack. Registers stay random. Layer scale is set to
    1, as if it were absent.

    Args:
        weights: Weights to load.
        expected: State dict of the network.
        arch: Name of the network in messages.
        source: Name of the weights in messages.

    Example:
        >>> network = {"norm.weight": torch.zeros(3), "reg_token": torch.zeros(1, 4, 3)}
        >>> for line in adapt_weights({"norm.weight": torch.ones(3)}, network, arch="vit", source="x.pth").messages:
        ...     print(line)
        x.pth: 1 of the backbone's 2 weights loaded, 3 of 15 numbers
        random: reg_token
    """
    state, changes = dict(weights), list[str]()
    if "pos_embed" in expected and "pos_embed" in weights and "patch_embed.proj.weight" in expected:
        changes = fit_positions_(state, expected)
    missing = [name for name in expected if name not in state]
    scales = [name for name in missing if LAYER_SCALE.match(name)]
    random = [name for name in missing if name not in scales]
    wrong = [name for name in state if name not in expected or state[name].shape != expected[name].shape]
    if wrong or any(name != "reg_token" for name in random):
        listed = ", ".join([*wrong, *random][:3])
        raise ValueError(
            f"{source} is of another architecture: it holds {describe_vit(weights)}, and {arch} as configured is "
            f"{describe_vit(expected)} (different: {listed}); name a checkpoint of the same architecture, or change "
            "model.arch"
        )
    loaded, numbers = len(expected) - len(missing), sum(state[name].numel() for name in expected if name in state)
    total = sum(value.numel() for value in expected.values())
    messages = [
        f"{source}: {loaded} of the backbone's {len(expected)} weights loaded, {numbers:,} of {total:,} numbers",
        *changes,
    ]
    if random:
        messages.append(f"random: {', '.join(random)}")
    if scales:
        messages.append(f"set to 1: {len(scales)} layer scales, which the weights were trained without")
    state |= {name: expected[name] for name in random}
    state |= {name: torch.ones_like(expected[name]) for name in scales}
    return AdaptedWeights(state, messages)


def fit_positions_(state: dict[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    """Fit the positions of `state` to the grid and prefix tokens of `expected`; return messages on the changes."""
    (side, prefix), (new_side, new_prefix) = pos_embed_grid(dict(state)), pos_embed_grid(dict(expected))
    messages = []
    positions = state["pos_embed"]
    if (prefix, new_prefix) == (1, 0):
        state["cls_token"] = state["cls_token"] + positions[:, :1]
        positions, prefix = positions[:, 1:], 0
        messages.append("moved: the class token's position into the class token")
    elif prefix < new_prefix:
        zeros = positions.new_zeros(1, new_prefix - prefix, positions.shape[-1])
        positions = torch.cat([positions[:, :prefix], zeros, positions[:, prefix:]], dim=1)
        messages.append("set to 0: positions of the class token or registers, which the weights do not have")
        prefix = new_prefix
    if side != new_side:
        positions = resample_abs_pos_embed(positions, [new_side, new_side], [side, side], num_prefix_tokens=prefix)
        messages.append(f"resized: pos_embed, {side} × {side} to {new_side} × {new_side} positions")
    state["pos_embed"] = positions
    return messages


def describe_vit(state: Mapping[str, Tensor]) -> str:
    """Description of a network, inferred from its weights.

    Example:
        >>> patches, norm = torch.zeros(384, 3, 16, 16), torch.zeros(384)
        >>> describe_vit({"patch_embed.proj.weight": patches, "blocks.0.norm1.weight": norm})
        'a ViT of width 384, 1 block, patches of 16 px'
        >>> describe_vit({"conv1.weight": torch.zeros(1)})
        'no ViT (1 weight, such as conv1.weight)'
    """
    patches = state.get("patch_embed.proj.weight")
    if patches is None or patches.ndim != 4:
        count = "1 weight" if len(state) == 1 else f"{len(state)} weights"
        return f"no ViT ({count}, such as {next(iter(state), 'none')})"
    depth = len({match[1] for name in state if (match := re.match(r"blocks\.(\d+)\.", name))})
    blocks = "1 block" if depth == 1 else f"{depth} blocks"
    registers = f", {state['reg_token'].shape[1]} registers" if "reg_token" in state else ""
    scaled = ", layer scale" if any(LAYER_SCALE.match(name) for name in state) else ""
    return f"a ViT of width {patches.shape[0]}, {blocks}, patches of {patches.shape[-1]} px{registers}{scaled}"


def differing_names(file: Mapping[str, Tensor], model: Mapping[str, Tensor]) -> list[str]:
    """Names that only one of two state dicts has, or that have different shapes in them.

    Example:
        >>> differing_names({"a": torch.zeros(3), "c": torch.zeros(1)}, {"a": torch.zeros(2), "b": torch.zeros(1)})
        ['a', 'b', 'c']
    """
    shapes = {name for name in model if name in file and file[name].shape != model[name].shape}
    return sorted(shapes | (file.keys() ^ model.keys()))


def state_dict_diff(file: Mapping[str, Tensor], model: Mapping[str, Tensor]) -> str | None:
    """Differences of a checkpoint's weights from a model's in names and shapes; None without a difference.

    Example:
        >>> state_dict_diff({"a": torch.zeros(3), "c": torch.zeros(1)}, {"a": torch.zeros(2), "b": torch.zeros(1)})
        '1 of another shape, such as a: (3,) instead of (2,); 1 missing, such as b; 1 unknown, such as c'
    """
    shapes = [name for name in model if name in file and file[name].shape != model[name].shape]
    missing = [name for name in model if name not in file]
    unknown = [name for name in file if name not in model]
    parts = []
    if shapes:
        actual, expected = tuple(file[shapes[0]].shape), tuple(model[shapes[0]].shape)
        parts.append(f"{len(shapes)} of another shape, such as {shapes[0]}: {actual} instead of {expected}")
    if missing:
        parts.append(f"{len(missing)} missing, such as {missing[0]}")
    if unknown:
        parts.append(f"{len(unknown)} unknown, such as {unknown[0]}")
    return "; ".join(parts) or None
