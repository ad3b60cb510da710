"""A new stage of training from a checkpoint of an earlier one: heads, centers and the optimizer's averages."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from repmetrics.encoders.safe_load import read_checkpoint

NAMES = "names"  # key of an optimizer group: names of its parameters
PARTS = ("head.", "ibot_head.", "mask_token")
CENTERS = ("criterion.", "ibot.")
# Names in facebookresearch's files → names here.
PUBLISHED = (
    (re.compile(r"^module\."), ""),
    (re.compile(r"^dino_head\."), "head."),
    (re.compile(r"^backbone\.mask_token$"), "mask_token"),
    (re.compile(r"\.last_layer\.weight_g$"), ".last_layer.parametrizations.weight.original0"),
    (re.compile(r"\.last_layer\.weight_v$"), ".last_layer.parametrizations.weight.original1"),
)


def read_heads(path: Path) -> dict[str, dict[str, Tensor]]:
    """Weights of "student" and "teacher" in a file of fmtrain, DINO or DINOv2, in names relative to the branch.

    Raises:
        OSError: The file cannot be read.
        ValueError: The file has no branch with a head.
    """
    if not path.is_file():
        raise ValueError(f"model.init_heads is {str(path)!r}: expected the path of a checkpoint")
    content = read_checkpoint(path)
    state = content.get("state_dict") if isinstance(content, Mapping) else None
    branches: dict[str, dict[str, Tensor]] = {}
    for branch in ("student", "teacher"):
        if isinstance(state, Mapping):
            part = {k.removeprefix(f"{branch}."): v for k, v in state.items() if k.startswith(f"{branch}.")}
        else:
            part = dict(content.get(branch) or {}) if isinstance(content, Mapping) else {}
        named = {_own_name(name): value for name, value in part.items() if isinstance(value, Tensor)}
        if any(name.startswith("head.") for name in named):
            branches[branch] = named
    if not branches:
        raise ValueError(f"{path.name} holds no heads of DINO or DINOv2: leave model.init_heads out")
    return branches


def _own_name(name: str) -> str:
    for pattern, replacement in PUBLISHED:
        name = pattern.sub(replacement, name)
    return name


def load_heads_(
    student: nn.Module, teacher: nn.Module, branches: Mapping[str, Mapping[str, Tensor]], *, source: str
) -> list[str]:
    """Load heads and mask token of student and teacher; a file with one branch serves both.

    Args:
        student: Branch, changed in place.
        teacher: Branch, changed in place.
        branches: From :func:`read_heads`.
        source: Name of the file in messages.

    Returns:
        Messages on what was and was not loaded.

    Raises:
        ValueError: A weight of the file has another shape, or the file has no heads.
    """
    messages = []
    if len(branches) == 1:
        messages.append(f"heads: {source} has those of the {next(iter(branches))} only, which serve both")
    for name, module in (("student", student), ("teacher", teacher)):
        weights = branches.get(name) or next(iter(branches.values()))
        weights = {key: value for key, value in weights.items() if key.startswith(PARTS)}
        current = {key: value for key, value in module.state_dict().items() if key.startswith(PARTS)}
        wrong = [key for key in current if key in weights and weights[key].shape != current[key].shape]
        if wrong:
            key = wrong[0]
            raise ValueError(
                f"the heads in {source} have other shapes ({key}: {tuple(weights[key].shape)} instead of "
                f"{tuple(current[key].shape)}): set n_prototypes, hidden_dim, bottleneck_dim "
                "and ibot_prototypes as in its run"
            )
        module.load_state_dict({key: weights[key] for key in current if key in weights}, strict=False)
        if name == "student":
            random, unused = ([k for k in a if k not in b] for a, b in ((current, weights), (weights, current)))
            messages.append(f"heads: {len(current) - len(random)} of {len(current)} weights loaded from {source}")
            messages += [f"heads: random: {', '.join(random)}"] if random else []
            messages += [f"heads: not used: {', '.join(unused)}"] if unused else []
    return messages


def load_centers_(module: nn.Module, path: Path) -> list[str]:
    """Load the moving centers of the losses from a checkpoint of fmtrain, where both have them."""
    state = read_checkpoint(path).get("state_dict") or {}
    current = {key: value for key, value in module.state_dict().items() if key.startswith(CENTERS)}
    loaded = {key: state[key] for key in current if key in state and state[key].shape == current[key].shape}
    module.load_state_dict(loaded, strict=False)
    if len(loaded) == len(current):
        return []
    return [f"centers: start at zero: {', '.join(key for key in current if key not in loaded)}"]


def read_averages(path: Path) -> dict[str, dict[str, Tensor]]:
    """AdamW's averages in a checkpoint of fmtrain, by the name of the parameter.

    Raises:
        OSError: The file cannot be read.
        ValueError: The file holds no optimizer, or one that does not name its parameters.
    """
    if not path.is_file():
        raise ValueError(f"model.init_optimizer is {str(path)!r}: expected the path of a checkpoint")
    content = read_checkpoint(path)
    states = content.get("optimizer_states") if isinstance(content, Mapping) else None
    if not states or not all(NAMES in group for group in states[0]["param_groups"]):
        raise ValueError(f"{path.name} holds no optimizer state with names: leave model.init_optimizer out")
    state = states[0]["state"]
    return {name: state[number] for name, number in _numbered(states[0]["param_groups"]) if number in state}


def load_averages_(optimizer: Optimizer, averages: Mapping[str, Mapping[str, Tensor]]) -> list[str]:
    """Load averages of :func:`read_averages` parameter by parameter; those of another shape start without.

    Args:
        optimizer: Optimizer whose groups hold the names of their parameters; changed in place.
        averages: Averages by the name of the parameter.

    Returns:
        Messages on what was and was not loaded.
    """
    current = optimizer.state_dict()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state, dropped = {}, []
    for name, number in _numbered(current["param_groups"]):
        if name in averages and averages[name]["exp_avg"].shape == parameters[number].shape:
            state[number] = dict(averages[name])
        else:
            dropped.append(name)
    optimizer.load_state_dict({"state": state, "param_groups": current["param_groups"]})
    messages = [f"optimizer: averages of {len(state)} of {len(parameters)} parameters loaded"]
    return messages + ([f"optimizer: without averages: {', '.join(dropped)}"] if dropped else [])


def _numbered(groups: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, int]]:
    """Name and number of each parameter of an optimizer."""
    for group in groups:
        yield from zip(group[NAMES], group["params"], strict=True)
