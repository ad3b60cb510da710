"""Settings for computing features, their cache, and the device to compute them on."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import torch


class EmbedSettings(NamedTuple):
    """Settings for computing features from images.

    Attributes:
        image_size: Side of the images; None: the encoder's, unless the source fixes the size.
        batch_size: Images per batch. The default is the monitor's: both compute the same features to the last bit.
        num_workers: Processes that decode images.
        device: Device of the encoder.
        views: Augmented views of each image, for metrics that need them.
        cache: Folder of cached features; None caches nothing.
        view_set: Name of the view set of view retrieval; default: that of the source.
    """

    image_size: int | None = None
    batch_size: int = 64
    num_workers: int = 0
    device: str = "cpu"
    views: int = 10
    cache: Path | None = None
    view_set: str | None = None


def cache_folder() -> Path:
    """``$XDG_CACHE_HOME/repmetrics``, or ``~/.cache/repmetrics``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "repmetrics"


def choose_device(name: str | None = None) -> str:
    """The device of this name; without a name, the accelerator of this machine if there is one, else the CPU.

    Raises:
        ValueError: There is no such device; the message lists the devices.
    """
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    default = "cpu" if accelerator is None else str(accelerator)
    if name is None:
        return default
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        devices = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        devices = list(dict.fromkeys([*devices, default]))
        raise ValueError(f"no device {name!r} on this machine: choose among {', '.join(devices)}") from error
    return name
