"""Read the files of one checkpoint: a file with the JSON in its folder, shards, a folder, or a model on the hub."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from repmetrics.encoders import distributed, hub
from repmetrics.encoders.placeholders import Placeholder, plain
from repmetrics.encoders.safe_load import flatten, join_first, read_open_checkpoint

SIDECARS = (*hub.SIDECARS, "adapter_config.json", "trainer_state.json")
# Weights by which a folder is one checkpoint, in order of preference.
FOLDER_WEIGHTS = (*hub.WEIGHTS, "adapter_model.safetensors", "adapter_model.bin", "mp_rank_00_model_states.pt")
STEPS = ("global_step", "global_steps", "iteration", "step")
_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<suffix>\.\w+)$")
_OTHER_STATE = re.compile(r"(optimizer|scheduler|scaler|rng_state\w*|training_args)\.(pt|pth|bin)$|zero_pp_rank_\d+")
# Names that wrappers of training put into the names of weights.
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.")


class CheckpointFile(NamedTuple):
    """Content of a checkpoint and of the JSON files in the same folder.

    Attributes:
        name: Name of the file or folder.
        tensors: Every tensor in the file by its dotted path, without the names of wrappers.
        hyper_parameters: Hyper-parameters that Lightning recorded in the file, as plain values.
        arguments: What other trainers recorded: their arguments and the name of the architecture, as plain values.
        config: Content of the JSON files by their names.
        step: Training step recorded in the file, if any.
        digests: SHA-256 of each file; empty if not requested.
        placeholders: Names of the types in the file that became placeholders.
        opaque: Types of the placeholders by their dotted paths.
    """

    name: str
    tensors: dict[str, Tensor]
    hyper_parameters: Mapping[str, Any]
    arguments: Mapping[str, Any]
    config: Mapping[str, Mapping[str, Any]]
    step: int | None
    digests: tuple[str, ...]
    placeholders: tuple[str, ...] = ()
    opaque: Mapping[str, str] = {}


def weights_in(folder: Path) -> Path | None:
    """Weights of a folder that is one checkpoint; None if it is a folder of checkpoints, or something else.

    Such folders are those of timm and Hugging Face, of torch.distributed.checkpoint and of DeepSpeed.
    """
    if (folder / distributed.METADATA).is_file():
        return folder
    inner = [folder]
    if (folder / "latest").is_file() and (folder / "latest").stat().st_size < 256:  # DeepSpeed's name of the newest
        inner.append(folder / (folder / "latest").read_text(encoding="utf-8", errors="replace").strip())
    inner.append(folder / "checkpoint")  # DeepSpeed under Lightning
    candidates = [place / name for place in inner for name in FOLDER_WEIGHTS]
    return next((path for path in candidates if path.is_file()), None)


def read_checkpoint_file(path: Path, *, digests: bool = True) -> CheckpointFile:
    """Read a checkpoint, and the JSON that the hubs of timm and Hugging Face put into the same folder.

    Each file is opened once, so that its digest belongs to its weights even if the file is replaced meanwhile.

    Args:
        path: File, shard or index of shards, folder, or name of a model on the hub (``hf-hub:owner/name``).
        digests: Compute the digests of the files, for cache keys.

    Raises:
        OSError: A file cannot be read.
        ValueError: It is not a checkpoint, is unsafe, contains no weights, or is written while it is read.
    """
    if hub.is_hub_id(str(path)):
        return _read(hub.download(str(path)), name=str(path), digests=digests)
    weights, name = path, path.name
    if path.is_dir():
        inside = weights_in(path)
        if inside is None:
            raise ValueError(f"{path} is not the folder of one checkpoint: name the file in it")
        weights, name = inside, path.resolve().name
    return _read(weights, name=name, digests=digests)


def _read(path: Path, *, name: str, digests: bool) -> CheckpointFile:
    hashes: list[str] = []
    content: dict[str, Any] = {}
    placeholders: dict[str, None] = {}
    if path.is_dir():
        read = distributed.read_distributed(path, digests=digests)
        content = {**read.values, **read.tensors}
        hashes.extend(read.digests)
    parts = [path / "meta.pt"] * (path / "meta.pt").is_file() if path.is_dir() else shards(path)
    for part in parts:
        value, types, digest = _read_one(part, digests=digests)
        hashes += [digest] if digests else []
        placeholders |= dict.fromkeys(types)
        if not isinstance(value, Mapping) and not (isinstance(value, Placeholder) and value.weights()):
            raise ValueError(f"{name} holds no weights: found {_summary(value)}")
        value = value if isinstance(value, Mapping) else value.weights()
        if repeated := [key for key in value if key in content and isinstance(value[key], Tensor)]:
            raise ValueError(f"{name}: {repeated[0]} is in several shards: copy the files again")
        content |= {str(key): node for key, node in value.items()}
    tensors = _unwrapped(flatten(content), name)
    if not tensors:
        raise ValueError(f"{name} holds no weights: found {_summary(content)}")
    _check_shells(tensors, name)
    config, more = _read_sidecars(path if path.is_dir() else path.parent, digests=digests)
    steps = [content.get(key) for key in STEPS] + [config.get("trainer_state.json", {}).get("global_step")]
    step = next((value for value in steps if isinstance(value, int)), None)
    return CheckpointFile(
        name=name,
        tensors=tensors,
        hyper_parameters=hyper_parameters(content),
        arguments=_arguments(content),
        config=config,
        step=step,
        digests=(*hashes, *more),
        placeholders=tuple(placeholders),
        opaque=opaque(content),
    )


def _read_one(path: Path, *, digests: bool) -> tuple[Any, tuple[str, ...], str]:
    """Content of one file, the types that became placeholders, and its digest."""
    with path.open("rb") as file:
        before = os.fstat(file.fileno())
        digest = hashlib.file_digest(file, "sha256").hexdigest() if digests else ""
        content, placeholders = read_open_checkpoint(file, name=path.name)
        after = os.fstat(file.fileno())
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise ValueError(f"{path.name} changed while it was read: wait until it is written")
    return content, placeholders, digest


def shards(path: Path) -> list[Path]:
    """Files that hold the weights of a checkpoint together: one, or all shards of which `path` is one or the index.

    Raises:
        ValueError: A shard is absent, or the index is damaged.
    """
    match = _SHARD.match(path.name)
    if path.name.endswith(".index.json"):
        try:
            names = sorted(set(json.loads(path.read_bytes())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is not an index of shards: {error}") from error
        if outside := [name for name in names if Path(str(name)).name != name]:
            raise ValueError(f"{path} refused: it names a file outside of its folder, {outside[0]}")
    elif match:
        count = int(match["count"])
        names = [f"{match['stem']}-{i:05d}-of-{count:05d}{match['suffix']}" for i in range(1, count + 1)]
    else:
        return [path]
    files = [path.with_name(name) for name in names]
    if missing := [file.name for file in files if not file.is_file()]:
        raise ValueError(
            f"{path.name} is one part of a checkpoint in {len(files)} files, of which {join_first(missing)} are not in "
            "the folder: copy all of them"
        )
    return files


def hyper_parameters(content: Any) -> dict[str, Any]:
    """Hyper-parameters that Lightning stored in a checkpoint, as plain values; empty if it has none."""
    values = plain(content.get("hyper_parameters")) if isinstance(content, Mapping) else None
    return values if isinstance(values, dict) else {}


def _arguments(content: Mapping[str, Any]) -> dict[str, Any]:
    return {key: plain(content[key]) for key in ("arch", "args", "config", "cfg", "opt") if key in content}


def opaque(content: Any) -> dict[str, str]:
    """Types of the placeholders in nested mappings by their dotted paths."""
    types: dict[str, str] = {}
    waiting: list[tuple[str, Any]] = [("", content)]
    seen: set[int] = set()
    while waiting:
        path, node = waiting.pop()
        kind = node if isinstance(node, type) else type(node)
        children = node.weights() if isinstance(node, Placeholder) else node
        if issubclass(kind, Placeholder) and not children:
            types[path] = kind.type_name
        elif isinstance(children, Mapping) and id(node) not in seen:
            seen.add(id(node))
            waiting.extend((f"{path}.{key}" if path else str(key), value) for key, value in children.items())
    return types


def _unwrapped(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """Tensors without the names of wrappers in theirs. A compiled and a plain reference to one module are one."""
    unwrapped: dict[str, Tensor] = {}
    for key, value in tensors.items():
        short = _WRAPPERS.sub("", key)
        if short in unwrapped and not unwrapped[short].equal(value):
            raise ValueError(f"{name} holds {short} twice, with and without a wrapper: save one state_dict() alone")
        unwrapped[short] = value
    return unwrapped


def _check_shells(tensors: Mapping[str, Tensor], name: str) -> None:
    """DeepSpeed's ZeRO stage 3 leaves empty weights; FSDP's local format leaves flat pieces."""
    empty = [key for key, value in tensors.items() if not value.numel() and key.endswith("weight")]
    if empty:
        raise ValueError(
            f"{name} holds {len(empty)} empty weights, such as {empty[0]}: DeepSpeed's ZeRO stage 3 keeps them in the "
            "files of each rank; assemble them with the zero_to_fp32.py in its folder, and name the result"
        )
    if flat := [key for key in tensors if key.endswith(("_flat_param", ".flat_param"))]:
        raise ValueError(
            f"{name} holds FSDP's flat piece of one rank, {flat[0]}: save the full or the sharded state_dict instead"
        )


def _read_sidecars(folder: Path, *, digests: bool) -> tuple[dict[str, dict[str, Any]], list[str]]:
    config: dict[str, dict[str, Any]] = {}
    hashes: list[str] = []
    for sidecar in (folder / name for name in SIDECARS):
        if sidecar.is_file():
            text = sidecar.read_bytes()
            hashes += [hashlib.sha256(text).hexdigest()] if digests else []
            try:
                values = json.loads(text)
            except ValueError as error:
                raise ValueError(f"{sidecar} is not JSON: {error}") from error
            config |= {sidecar.name: values} if isinstance(values, dict) else {}
    return config, hashes


def _summary(content: Any) -> str:
    if isinstance(content, Mapping):
        return f"a mapping with {join_first([str(key) for key in content])}" if content else "an empty mapping"
    return f"a {content.type_name if isinstance(content, Placeholder) else type(content).__name__}"


def is_other_state(file: Path) -> bool:
    """Whether a file next to checkpoints holds another state of training: an optimizer's, a scheduler's, a generator's.

    Example:
        >>> is_other_state(Path("checkpoint-500/optimizer.pt")), is_other_state(Path("last.ckpt"))
        (True, False)
    """
    return bool(_OTHER_STATE.match(file.name))
