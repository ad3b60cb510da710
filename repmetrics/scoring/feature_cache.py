"""Cache of features on disk, keyed by the content of everything that they depend on."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

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
    folder.mkdir(parents=True, exist_ok=True)  # fails now, not after the features are computed
    path = folder / f"{key}.safetensors"
    if path.is_file():
        try:
            return *_read(path), True
        except (SafetensorError, KeyError, ValueError, TypeError):
            path.unlink()
    features, unreadable = compute()
    _write(path, features, unreadable)
    return features, unreadable, False


def _read(path: Path) -> tuple[Features, tuple[Unreadable, ...]]:
    with safe_open(path, framework="pt") as file:
        ids = json.loads(file.metadata()["about"])
        values = file.get_tensor("values")
        labels = file.get_tensor("labels") if "labels" in file.keys() else None  # noqa: SIM118  # not a mapping
    groups = None if ids["groups"] is None else tuple(ids["groups"])
    return Features(values, groups, labels), tuple(Unreadable(*item) for item in ids["unreadable"])


def _write(path: Path, features: Features, unreadable: tuple[Unreadable, ...]) -> None:
    tensors = {"values": features.values.contiguous()}
    if features.labels is not None:
        tensors["labels"] = features.labels.contiguous()
    ids = json.dumps({"groups": features.groups, "unreadable": unreadable})
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata={"about": ids})


def versions() -> list[str]:
    """Versions of the libraries whose results may differ in the last bit between releases."""
    return [f"torch {torch.__version__}", f"timm {timm.__version__}"]
