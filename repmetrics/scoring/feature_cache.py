"""Features kept on disk, keyed by the content of everything they were made from."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from repmetrics.data.features import Features
from repmetrics.data.source import Unreadable


def default_folder() -> Path:
    """``$XDG_CACHE_HOME/repmetrics``, or ``~/.cache/repmetrics``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "repmetrics"


def load_or_compute(
    folder: Path | None, key: str, make: Callable[[], tuple[Features, tuple[Unreadable, ...]]]
) -> tuple[Features, tuple[Unreadable, ...], bool]:
    """What `make` made when it was last called for this key, or makes now.

    A damaged entry is made again. Entries are written whole, under a temporary name first.

    Args:
        folder: of the entries; None keeps nothing.
        key: from `digest`, over all that the features depend on.
        make: features, and what had to be left out.

    Returns:
        Features, what was left out, and whether they came from the cache.
    """
    if folder is None:
        return *make(), False
    folder.mkdir(parents=True, exist_ok=True)  # where it cannot be made, that is better said now
    path = folder / f"{key}.safetensors"
    if path.is_file():
        try:
            return *_read(path), True
        except (SafetensorError, KeyError, ValueError, TypeError):
            path.unlink()
    features, unreadable = make()
    _write(path, features, unreadable)
    return features, unreadable, False


def _read(path: Path) -> tuple[Features, tuple[Unreadable, ...]]:
    with safe_open(path, framework="pt") as file:
        about = json.loads(file.metadata()["about"])
        values = file.get_tensor("values")
        labels = file.get_tensor("labels") if "labels" in file.keys() else None  # noqa: SIM118  # no mapping
    groups = None if about["groups"] is None else tuple(about["groups"])
    return Features(values, groups, labels), tuple(Unreadable(*item) for item in about["unreadable"])


def _write(path: Path, features: Features, unreadable: tuple[Unreadable, ...]) -> None:
    tensors = {"values": features.values.contiguous()}
    if features.labels is not None:
        tensors["labels"] = features.labels.contiguous()
    about = json.dumps({"groups": features.groups, "unreadable": unreadable})
    draft = path.with_name(f"{path.name}.{os.getpid()}.part")
    save_file(tensors, draft, metadata={"about": about})
    draft.replace(path)


def versions() -> list[str]:
    """The libraries whose numbers may differ in the last bit from release to release."""
    import timm

    return [f"torch {torch.__version__}", f"timm {timm.__version__}"]
