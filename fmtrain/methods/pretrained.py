"""Where a run's weights begin: random, timm's, or any checkpoint's; and a list of what was taken and what was not."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import timm
import torch
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor, nn

from repmetrics.encoders.architecture import HEADS, pos_embed_grid
from repmetrics.encoders.checkpoint import backbone_state, find_prefix
from repmetrics.encoders.safe_load import flatten, read_checkpoint

Init = Literal["random", "timm"] | Path
LAYER_SCALE = re.compile(r"blocks\.\d+\.ls[12]\.gamma$")


class Weights(NamedTuple):
    """A backbone's weights in timm's names, where they are from, and how their images were normalised, if stated."""

    state: dict[str, Tensor]
    source: str
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    num_heads: int | None = None


class AdaptedWeights(NamedTuple):
    """Weights as a backbone takes them, and what became of each of them."""

    state: dict[str, Tensor]
    messages: list[str]


def initialize_(
    backbone: nn.Module, init: Init, *, arch: str, mean: Sequence[float], std: Sequence[float]
) -> list[str]:
    """Give a ViT the weights that `init` names, and say in lines what was and what was not loaded.

    Args:
        backbone: Of timm, `arch` with whatever arguments it was built with. Changed in place.
        init: "random": nothing is done. "timm": what timm publishes under `arch`. Otherwise a checkpoint's path.
        arch: As timm names it, with a tag where several weights are published (``vit_small_patch16_224.dino``).
        mean: How the run normalises images, to be compared with how the weights' were.
        std: The same.

    Raises:
        OSError: The file cannot be read.
        ValueError: The weights cannot be had, or are of another architecture.
    """
    if init == "random":
        return []
    given = timm_weights(arch) if init == "timm" else read_weights(Path(init))
    blocks: Any = backbone.blocks
    if given.num_heads not in (None, heads := blocks[0].attn.num_heads):  # the one thing that shapes do not tell
        raise ValueError(f"{given.source} has {given.num_heads} attention heads a block, {arch} as configured {heads}")
    state, messages = adapt_weights(backbone.state_dict(), given.state, arch=arch, source=given.source)
    backbone.load_state_dict(state)
    for name, own, theirs in (("mean", tuple(mean), given.mean), ("std", tuple(std), given.std)):
        if theirs is not None and own != theirs:
            messages.append(f"note: its images were normalised with {name} {list(theirs)}, this run's with {list(own)}")
    return messages


def timm_weights(arch: str) -> Weights:
    """What timm publishes for an architecture, as it is published: in its own size.

    Raises:
        ValueError: There is nothing, or it cannot be reached.
    """
    try:
        model = timm.create_model(arch, pretrained=True, num_classes=0)
    except (OSError, RuntimeError) as error:
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"timm's weights of {arch} cannot be had: {why}; where the hub cannot be reached, "
            "fetch the file elsewhere and set model.init to its path"
        ) from error
    cfg: Any = model.pretrained_cfg
    tag = f"{cfg['architecture']}.{cfg['tag']}" if cfg.get("tag") else arch
    return Weights(dict(model.state_dict()), f"timm's {tag}", tuple(cfg["mean"]), tuple(cfg["std"]))


def read_weights(path: Path) -> Weights:
    """The encoder's weights in any checkpoint that `repmetrics score` reads: the teacher before the student.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is no checkpoint, or none of a known layout.
    """
    if not path.exists():
        raise ValueError(f"model.init is {str(path)!r}: expected random, timm, or the path of a checkpoint")
    content = read_checkpoint(path)
    tensors = flatten(content)
    notes: list[str] = []
    root = find_prefix(list(tensors), notes=notes)
    state = {name: value for name, value in backbone_state(tensors, root=root).items() if not HEADS.match(name)}
    stated: Any = content.get("hyper_parameters") if isinstance(content, Mapping) else None
    stated = stated if isinstance(stated, Mapping) else {}
    mean, std = (tuple(stated[key]) if stated.get(key) else None for key in ("mean", "std"))
    kwargs = stated.get("arch_kwargs")
    heads = kwargs.get("num_heads") if isinstance(kwargs, Mapping) else None
    where = f"{path.name} ({'; '.join([root.rstrip('.') or 'top level', *notes])})"
    return Weights(state, where, mean, std, heads)


def adapt_weights(own: Mapping[str, Tensor], given: Mapping[str, Tensor], *, arch: str, source: str) -> AdaptedWeights:
    """Fit published weights to a network of the same architecture but, perhaps, another image size.

    All of `given` is used, or it is another architecture. Positions are resampled as timm does it; where one side keeps
    a position for the class token and the other does not, it is added to that token, or is zero: the sum is the same.
    Beyond `given` the network may have registers, which begin at random, and layer scale, which begins at 1, as if it
    were not there.

    Args:
        own: The network's state.
        given: The weights.
        arch: What the network is called in messages.
        source: What the weights are called.

    Raises:
        ValueError: Another architecture; both are described.

    Example:
        >>> own = {"norm.weight": torch.zeros(3), "reg_token": torch.zeros(1, 4, 3)}
        >>> given = {"norm.weight": torch.ones(3)}
        >>> for line in adapt_weights(own, given, arch="vit", source="x.pth").messages:
        ...     print(line)
        x.pth: 1 of the backbone's 2 weights loaded, 3 of 15 numbers
        random: reg_token
    """
    state, changed = dict(given), list[str]()
    if "pos_embed" in own and "pos_embed" in given and "patch_embed.proj.weight" in own:
        changed = fit_positions_(state, own)
    beyond = [name for name in own if name not in state]
    scales = [name for name in beyond if LAYER_SCALE.match(name)]
    random = [name for name in beyond if name not in scales]
    wrong = [name for name in state if name not in own or state[name].shape != own[name].shape]
    if wrong or any(name != "reg_token" for name in random):
        listed = ", ".join([*wrong, *random][:3])
        raise ValueError(
            f"{source} is of another architecture: it holds {describe_vit(given)}, and {arch} as configured is "
            f"{describe_vit(own)} (different: {listed}); name a checkpoint of the same architecture, or change model.arch"
        )
    loaded, numbers = len(own) - len(beyond), sum(state[name].numel() for name in own if name in state)
    total = sum(value.numel() for value in own.values())
    messages = [
        f"{source}: {loaded} of the backbone's {len(own)} weights loaded, {numbers:,} of {total:,} numbers",
        *changed,
    ]
    if random:
        messages.append(f"random: {', '.join(random)}")
    if scales:
        messages.append(f"set to 1: {len(scales)} layer scales, which the weights were trained without")
    state |= {name: own[name] for name in random} | {name: torch.ones_like(own[name]) for name in scales}
    return AdaptedWeights(state, messages)


def fit_positions_(state: dict[str, Tensor], own: Mapping[str, Tensor]) -> list[str]:
    """Bring `state`'s positions to the grid and the prefix tokens of `own`; say what was done."""
    (side, prefix), (own_side, own_prefix) = pos_embed_grid(dict(state)), pos_embed_grid(dict(own))
    messages = []
    positions = state["pos_embed"]
    if (prefix, own_prefix) == (1, 0):
        state["cls_token"] = state["cls_token"] + positions[:, :1]
        positions, prefix = positions[:, 1:], 0
        messages.append("moved: the class token's position into the class token")
    elif prefix < own_prefix:
        none = positions.new_zeros(1, own_prefix - prefix, positions.shape[-1])
        positions = torch.cat([positions[:, :prefix], none, positions[:, prefix:]], dim=1)
        messages.append("set to 0: positions of the class token or registers, which the weights do not have")
        prefix = own_prefix
    if side != own_side:
        positions = resample_abs_pos_embed(positions, [own_side, own_side], [side, side], num_prefix_tokens=prefix)
        messages.append(f"resized: pos_embed, {side} × {side} to {own_side} × {own_side} positions")
    state["pos_embed"] = positions
    return messages


def describe_vit(state: Mapping[str, Tensor]) -> str:
    """What a network is, by its weights, in words.

    Example:
        >>> patches, norm = torch.zeros(384, 3, 16, 16), torch.zeros(384)
        >>> describe_vit({"patch_embed.proj.weight": patches, "blocks.0.norm1.weight": norm})
        'a ViT of width 384, 1 block, patches of 16 px'
        >>> describe_vit({"conv1.weight": torch.zeros(1)})
        'no ViT (1 weight, such as conv1.weight)'
    """
    patches = state.get("patch_embed.proj.weight")
    if patches is None or patches.ndim != 4:
        few = "1 weight" if len(state) == 1 else f"{len(state)} weights"
        return f"no ViT ({few}, such as {next(iter(state), 'none')})"
    blocks = len({found[1] for name in state if (found := re.match(r"blocks\.(\d+)\.", name))})
    registers = f", {state['reg_token'].shape[1]} registers" if "reg_token" in state else ""
    scaled = ", layer scale" if any(LAYER_SCALE.match(name) for name in state) else ""
    count = "1 block" if blocks == 1 else f"{blocks} blocks"
    return f"a ViT of width {patches.shape[0]}, {count}, patches of {patches.shape[-1]} px{registers}{scaled}"


def state_dict_diff(own: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> str | None:
    """How a checkpoint's weights differ from a model's in names and shapes, in words; None if they do not.

    Example:
        >>> state_dict_diff({"a": torch.zeros(2), "b": torch.zeros(1)}, {"a": torch.zeros(3), "c": torch.zeros(1)})
        '1 of another shape, such as a: (3,) there, (2,) here; 1 missing there, such as b; 1 unknown here, such as c'
    """
    shapes = [name for name in own if name in found and found[name].shape != own[name].shape]
    missing = [name for name in own if name not in found]
    unknown = [name for name in found if name not in own]
    parts = []
    if shapes:
        theirs, ours = tuple(found[shapes[0]].shape), tuple(own[shapes[0]].shape)
        parts.append(f"{len(shapes)} of another shape, such as {shapes[0]}: {theirs} there, {ours} here")
    if missing:
        parts.append(f"{len(missing)} missing there, such as {missing[0]}")
    if unknown:
        parts.append(f"{len(unknown)} unknown here, such as {unknown[0]}")
    return "; ".join(parts) or None
