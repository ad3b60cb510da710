"""Images of the three domains in memory, with their labels, groups and splits.

| domain | images | label | split |
|---|---|---|---|
| cifar10 | 40,000 natural images | class, 10 | 30,000 to train on, 10,000 test images |
| cells | 8,000 single blood cells | type, 8 | every image by a hash of its file's name, 5 : 3 |
| nuclei | 15,546 nuclei of H&E-stained colon, with surroundings | type, 4 | by block of tiles, 2 : 1 |

Training on a domain and fitting of its probes use the training images, everything measured uses the test images.
"""

from __future__ import annotations

import io
import tarfile
import zlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from repmetrics.data.read_csv import read_csv
from repmetrics.functional.ids import factorize
from repmetrics.probes.linear import folds_of

SIZE_PX = 32
NUCLEUS_PX = 64  # side of a nucleus's patch at 20×, about 35 µm
HELD_OUT = 1000

Pixels = NDArray[np.uint8]


class Domain(NamedTuple):
    """Images (N, 3, 32, 32) uint8 with labels and groups (N,), and the rows of each split.

    Attributes:
        held_out: Test rows, with no use of their labels, on which label-free signals are measured.
        orientation_free: Whether a rotated or mirrored image is as likely as the image itself.
    """

    images: Tensor
    labels: Tensor
    groups: Tensor
    train: Tensor
    test: Tensor
    held_out: Tensor
    orientation_free: bool

    def to(self, device: torch.device | str) -> Domain:
        """All tensors on a device."""
        return Domain(*(part.to(device) if isinstance(part, Tensor) else part for part in self))


def load(name: str, *, data: Path, cache: Path) -> Domain:
    """A domain, from the cache if an earlier call wrote it.

    Args:
        name: Name in :data:`DOMAINS`.
        data: Folder with the raw data.
        cache: Folder for the decoded images.
    """
    file = cache / f"{name}.pt"
    if not file.exists():
        cache.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(".partial")
        torch.save(tuple(DOMAINS[name](data)), partial)
        partial.rename(file)
    return Domain(*torch.load(file, weights_only=True))


def cifar10(data: Path) -> Domain:
    """Natural images. Orientation is a cue: most objects are upright."""
    images, names = _read_tar(data / "cifar10" / "cifar10.tar.xz")
    labels = factorize([name.split("/")[2] for name in names], key=str)[0]
    is_test = torch.tensor([name.split("/")[1] == "test" for name in names])
    return _domain(images, labels, torch.arange(len(labels)), is_test, orientation_free=False)


def cells(data: Path) -> Domain:
    """Blood cells, stained by Giemsa's method."""
    images, names = _read_tar(data / "pbc" / "pbc.tar.xz")
    labels = factorize([name.split("/")[1] for name in names], key=str)[0]
    is_test = torch.tensor([zlib.crc32(name.encode()) % 8 < 3 for name in names])
    return _domain(images, labels, torch.arange(len(labels)), is_test, orientation_free=True)


def nuclei(data: Path) -> Domain:
    """Nuclei of colorectal tissue. Patches of one tile overlap, so that whole blocks of tiles are in one split."""
    folder = data / "crchisto_nuclei"
    rows = read_csv(folder / "labels.csv")[1]
    half = NUCLEUS_PX // 2
    tiles = {}
    for file in dict.fromkeys(row["file"] for row in rows):
        pixels = np.asarray(Image.open(folder / file).convert("RGB"))
        tiles[file] = np.pad(pixels, ((half, half), (half, half), (0, 0)), mode="reflect")

    def patch(row: dict[str, str]) -> Pixels:
        x, y = int(float(row["x"])), int(float(row["y"]))
        return _resize(Image.fromarray(tiles[row["file"]][y : y + NUCLEUS_PX, x : x + NUCLEUS_PX]))

    labels = factorize([row["label"] for row in rows], key=str)[0]
    blocks = [row["block"] for row in rows]
    is_test = torch.from_numpy(folds_of(labels.numpy(), groups=blocks, folds=3) == 0)
    groups = factorize([row["image"] for row in rows], key=str)[0]
    return _domain(_stack(map(patch, rows)), labels, groups, is_test, orientation_free=True)


DOMAINS: dict[str, Callable[[Path], Domain]] = {"cifar10": cifar10, "cells": cells, "nuclei": nuclei}


def _domain(images: Tensor, labels: Tensor, groups: Tensor, is_test: Tensor, *, orientation_free: bool) -> Domain:
    test = is_test.nonzero()[:, 0]
    order = torch.randperm(len(test), generator=torch.Generator().manual_seed(0))
    held_out = test[order[:HELD_OUT]].sort().values
    return Domain(images, labels, groups, (~is_test).nonzero()[:, 0], test, held_out, orientation_free)


def _read_tar(file: Path) -> tuple[Tensor, list[str]]:
    """All JPEG images of an archive by name."""
    with tarfile.open(file) as archive:
        members = [m for m in archive if m.name.endswith(".jpg")]
        contents = {m.name: archive.extractfile(m).read() for m in members}  # type: ignore[union-attr]  # files only
    names = sorted(contents)
    with ThreadPoolExecutor() as pool:
        pixels = pool.map(lambda name: _resize(Image.open(io.BytesIO(contents[name]))), names)
        return _stack(pixels), names


def _resize(image: Image.Image) -> Pixels:
    image = image.convert("RGB")
    if image.size != (SIZE_PX, SIZE_PX):
        image = image.resize((SIZE_PX, SIZE_PX), Image.Resampling.BICUBIC)
    return np.asarray(image)


def _stack(pixels: Iterable[Pixels]) -> Tensor:
    return torch.from_numpy(np.stack(list(pixels))).permute(0, 3, 1, 2).contiguous()
