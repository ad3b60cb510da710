"""Cache of features on disk, keyed by the content of everything that they depend on.

Long computations are stored in parts, so that an interrupted one continues where its last part ends.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import timm
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from repmetrics.atomic_write import atomic_path
from repmetrics.data.batches import ReadReport
from repmetrics.data.features import FeatureDict, Features, concatenate
from repmetrics.data.source import Unreadable
from repmetrics.scoring.embedded import Embedded


def load_or_compute(folder: Path, key: str, compute: Callable[[int], Iterable[Embedded]], *, total: int) -> Embedded:
    """Read the features of a key from the cache, or compute and store them. A damaged entry is computed again.

    Args:
        folder: Folder of the cache.
        key: Digest of everything that the features depend on.
        compute: Function from the first image to the parts of the features from there on.
        total: Number of images. Every part but the last is stored as soon as it is computed.
    """
    _check_writable(folder)  # now, not after the features are computed
    path, parts_folder = folder / f"{key}.safetensors", folder / f"{key}.parts"
    if (stored := _read(path)) is not None:
        return stored._replace(from_cache=True, key=key)
    parts = _read_parts(parts_folder)
    done = sum(len(part.report.readable) for part in parts)
    for part in compute(done):
        parts.append(part)
        done += len(part.report.readable)
        if done < total:
            _write(parts_folder / f"{len(parts) - 1:05d}.safetensors", part)
    if done < total:  # no image after the stored parts can be read, and no part reports them
        parts = list(compute(0))
    embedded = join(parts)
    _write(path, embedded)
    shutil.rmtree(parts_folder, ignore_errors=True)
    return embedded._replace(key=key)


def join(parts: Sequence[Embedded]) -> Embedded:
    """Parts in their order as one."""
    report = ReadReport()
    for part in parts:
        report.add(part.report)
    features = [FeatureDict({"": part.features.values}, *part.features[1:]) for part in parts]
    return Embedded(concatenate(features).select(""), report)


def _read_parts(folder: Path) -> list[Embedded]:
    """Parts of an interrupted computation, up to the first that is absent or damaged."""
    parts: list[Embedded] = []
    while (part := _read(folder / f"{len(parts):05d}.safetensors")) is not None:
        parts.append(part)
    return parts


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


def _read(path: Path) -> Embedded | None:
    """Entry of the cache; None if it is absent. A damaged one is removed."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads(file.metadata()["about"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a mapping
        if about["sha256"] != _digest(tensors):
            raise ValueError(f"{path.name} is damaged")
        groups = None if about["groups"] is None else tuple(about["groups"])
        unreadable = [Unreadable(*item) for item in about["unreadable"]]
        report = ReadReport(tensors["readable"].tolist(), unreadable, about["several_frames"])
        return Embedded(Features(tensors["values"], groups, tensors.get("labels")), report)
    except (SafetensorError, KeyError, ValueError, TypeError):
        path.unlink()
        return None


def _write(path: Path, embedded: Embedded) -> None:
    features, report = embedded.features, embedded.report
    tensors = {"values": features.values.contiguous(), "readable": torch.tensor(report.readable)}
    if features.labels is not None:
        tensors["labels"] = features.labels.contiguous()
    about = {
        "groups": features.groups,
        "unreadable": report.unreadable,
        "several_frames": report.several_frames,
        "sha256": _digest(tensors),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata={"about": json.dumps(about)})


def versions() -> list[str]:
    """Versions of the libraries whose results may differ in the last bit between releases."""
    return [f"torch {torch.__version__}", f"timm {timm.__version__}"]
