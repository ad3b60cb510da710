"""Checkpoint files: written atomically and once per state, never with values that are not finite."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor

from fmtrain.methods.sharding import local
from repmetrics.atomic_write import atomic_path, temporary_path
from repmetrics.encoders.distributed import tensor_shapes

LAST = "last.ckpt"
DATA = "SlidePatches"  # key of the data module's state in a file
DATA_MODULE = "SlideDataModule"  # Lightning's key for it: the name of the class
TIMER = "Timer"  # Lightning's key for the seconds used of trainer.max_time
OWN_RECORD = "ModelCheckpoint"  # start of the key of a callback's state that describes the files themselves


class NonFiniteWeightsError(FloatingPointError):
    """A weight or a value of the optimizer is NaN or infinite, such as after steps that are too large."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint to a temporary file, flushes it to the disk, then renames it.

    A crash leaves the previous file untouched. A state with two names, such as ``step-…`` and ``last``, is written
    once: the second is a hard link. The key of the data module's state in the file is `DATA`, not the
    name of the class: files stay readable when the class is renamed.
    """

    def __init__(self) -> None:
        super().__init__()
        self._written: Path | None = None
        self._state: dict[str, Any] = {}

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write one checkpoint.

        Raises:
            NonFiniteWeightsError: A weight or a value of the optimizer is NaN or infinite; nothing is written.
        """
        path, state = Path(path), comparable_state(checkpoint)
        written = self._written
        if written is not None and written.is_file() and is_same_state(state, self._state) and link(written, path):
            return
        name = find_nonfinite(checkpoint)
        if name is not None:
            step = checkpoint["global_step"]
            raise NonFiniteWeightsError(f"the weights are not finite at step {step} ({name}); nothing was written")
        try:
            with atomic_path(path, sync=True) as temporary, temporary.open("wb") as file:
                torch.save(from_lightning(checkpoint), file)
        except (OSError, RuntimeError) as error:
            cause = error if isinstance(error, OSError) else error.__context__  # torch's own message has no cause
            if isinstance(cause, OSError) and cause.errno is not None:
                raise OSError(cause.errno, os.strerror(cause.errno), str(path)) from error
            raise
        self._written, self._state = path, deepcopy(state)  # callbacks change theirs in place

    def load_checkpoint(self, path: str | Path, *args: Any, **options: Any) -> dict[str, Any]:
        """Read one checkpoint, without the time that earlier jobs used: ``trainer.max_time`` limits each job."""
        return to_lightning(read_checkpoint(Path(path)))


def from_lightning(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint as it is stored: the key of the data module's state is `DATA`."""
    return _rename_key(checkpoint, DATA_MODULE, DATA)


def to_lightning(content: dict[str, Any]) -> dict[str, Any]:
    """A stored checkpoint as Lightning reads it, without the time that earlier jobs used."""
    content = _rename_key(content, DATA, DATA_MODULE)
    callbacks = content.get("callbacks", {})
    content["callbacks"] = {key: value for key, value in callbacks.items() if key != TIMER}
    return content


def comparable_state(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """What tells the state of one step from that of another: all but weights, optimizer and paths of files."""
    state = {key: value for key, value in checkpoint.items() if key not in ("state_dict", "optimizer_states")}
    callbacks = checkpoint.get("callbacks", {})
    state["callbacks"] = {key: value for key, value in callbacks.items() if not key.startswith(OWN_RECORD)}
    return state


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Content of a checkpoint; tensors are mapped into memory and read from the disk when they are used.

    Of a folder with a part per rank, tensors have their shape alone.
    """
    if path.is_dir():
        return _read_folder(path)
    content: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu", mmap=True)
    return content


def _read_folder(folder: Path) -> dict[str, Any]:
    """Content of a folder of torch.distributed.checkpoint whose files are complete, with weights on the meta device."""
    content: dict[str, Any] = torch.load(folder / "meta.pt", weights_only=True, map_location="cpu")
    parts = {tuple(name.partition(".")): shape for name, shape in tensor_shapes(folder).items()}
    weights = {
        name: torch.empty(shape, device="meta") for (key, _, name), shape in parts.items() if key == "state_dict"
    }
    return {**content, "state_dict": weights, "optimizer_states": []}


def find_nonfinite(content: Mapping[str, Any]) -> str | None:
    """Name of a weight or an optimizer value with NaN or infinity; None if all are finite.

    Minus infinity alone is allowed: attention masks hold it.

    Example:
        >>> find_nonfinite({"state_dict": {"weight": torch.tensor([1.0, torch.nan])}})
        'state_dict.weight'
    """
    parts = {key: content[key] for key in ("state_dict", "optimizer_states") if key in content}
    tensors = {name: local([value])[0] for name, value in _tensors(parts, "") if _has_values(value)}
    flags = [~(value.isnan() | value.isposinf()).any() for value in tensors.values()]
    if not flags or all(bool(torch.stack(group).all()) for group in _by_device(flags)):
        return None
    return next(name for name, finite in zip(tensors, flags, strict=True) if not finite)


def _has_values(value: Tensor) -> bool:
    return value.is_floating_point() and value.numel() > 0 and not value.is_meta


def link(source: Path, path: Path) -> bool:
    """Make `path` a hard link to `source`, atomically; False where the file system has no hard links."""
    if path.exists() and path.samefile(source):
        return True
    temporary = temporary_path(path)
    try:
        os.link(source, temporary)
    except OSError:
        return False
    temporary.replace(path)
    return True


def _by_device(flags: Sequence[Tensor]) -> list[list[Tensor]]:
    """Flags in groups of one device, so that each group needs one transfer."""
    groups: dict[torch.device, list[Tensor]] = {}
    for flag in flags:
        groups.setdefault(flag.device, []).append(flag)
    return list(groups.values())


def _tensors(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    """Every tensor in nested dicts and lists, with its place."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping | list | tuple):
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, item in items:
            yield from _tensors(item, f"{name}.{key}" if name else str(key))


def is_same_state(a: Any, b: Any) -> bool:
    """Whether two states are the same; values that cannot be compared are not."""
    try:
        return bool(a == b)
    except RuntimeError:  # a tensor with several values
        return False


def _rename_key(content: dict[str, Any], old: str, new: str) -> dict[str, Any]:
    return {new if key == old else key: value for key, value in content.items()}
