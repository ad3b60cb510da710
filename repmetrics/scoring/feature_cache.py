"""Cache of features on disk, keyed by the content of everything that they depend on."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import timm
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from repmetrics.atomic_write import atomic_path
from repmetrics.data.features import Features
from repmetrics.data.source import Unreadable


def default_folder() -> Path:
    """``$XDG_CACHE_HOME/repmetrics``, or ``~/.cache/repmetrics``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "repmetrics"


def load_or_compute(
    folder: Path, key: str, compute: Callable[[], tuple[Features, tuple[Unreadable, ...]]]
) -> tuple[Features, tuple[Unreadable, ...], bool]:
    """Read the features of a key from the cache, or compute and store them. A damaged entry is computed again."""
    _check_writable(folder)  # now, not after the features are computed
    path = folder / f"{key}.safetensors"
    if path.is_file():
        try:
            return *_read(path), True
        except (SafetensorError, KeyError, ValueError, TypeError):
            path.unlink()
    features, unreadable = compute()
    _write(path, features, unreadable)
    return features, unreadable, False


def _check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError("it is not writable")
    except OSError as error:
        reason = error.strerror or str(error)
        raise ValueError(
            f"the cache {folder} cannot be used ({reason}): pass --no-cache, or set XDG_CACHE_HOME"
        ) from error


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of the content of tensors."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _read(path: Path) -> tuple[Features, tuple[Unreadable, ...]]:
    with safe_open(path, framework="pt") as file:
        ids = json.loads(file.metadata()["about"])
        values = file.get_tensor("values")
        labels = file.get_tensor("labels") if "labels" in file.keys() else None  # noqa: SIM118  # not a mapping
    tensors = {"values": values} | ({} if labels is None else {"labels": labels})
    if ids["sha256"] != _digest(tensors):
        raise ValueError(f"{path.name} is damaged")
    groups = None if ids["groups"] is None else tuple(ids["groups"])
    return Features(values, groups, labels), tuple(Unreadable(*item) for item in ids["unreadable"])


def _write(path: Path, features: Features, unreadable: tuple[Unreadable, ...]) -> None:
    tensors = {"values": features.values.contiguous()}
    if features.labels is not None:
        tensors["labels"] = features.labels.contiguous()
    ids = json.dumps({"groups": features.groups, "unreadable": unreadable, "sha256": _digest(tensors)})
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata={"about": ids})


def versions() -> list[str]:
    """Versions of the libraries whose results may differ in the last bit between releases."""
    return [f"torch {torch.__version__}", f"timm {timm.__version__}"]
