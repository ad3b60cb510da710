"""CoNSeP (Graham et al. 2019, arXiv 1812.06499) in its published layout: tiles of colon with a type per pixel."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

CLASSES = ("background", "other", "inflammatory", "epithelial", "spindle-shaped")
PATCH_PX = 250
TILES = {"train": 27, "val": 14}
FOLDERS = {"train": "Train", "val": "Test"}

# Publisher's types 0 … 7 as eva's classes. Types 3 and 4 are healthy and malignant epithelium; 5, 6, 7 are fibroblast,
# muscle, endothelium.
CLASS_OF_TYPE = np.array([0, 1, 2, 3, 3, 4, 4, 4], np.uint8)


class Segmented(NamedTuple):
    """Patches and the class of each pixel.

    Attributes:
        images: Patches (N, 3, S, S) uint8.
        masks: Indices into `CLASSES` (N, S, S) uint8.
        tiles: Name of each patch's tile (N,).
    """

    images: Tensor
    masks: Tensor
    tiles: tuple[str, ...]


def consep(root: Path) -> dict[str, Segmented]:
    """Splits from ``Train`` and ``Test``, each with ``Images/*.png`` and ``Labels/*.mat``; Test validates, as in eva.

    Each tile of 1000 × 1000 at 40× is cut into 16 patches of 250.
    """
    splits = {}
    for split, folder in FOLDERS.items():
        files = sorted((root / folder / "Images").glob("*.png"))
        if not files:
            raise ValueError(f"{root} is not CoNSeP: expected {folder}/Images/*.png and {folder}/Labels/*.mat in it")
        if len(files) != TILES[split]:
            raise ValueError(f"CoNSeP has {TILES[split]} tiles in {folder}, found {len(files)}: copy all of them")
        pairs = [patches(*read_tile(file, root / folder / "Labels" / f"{file.stem}.mat")) for file in files]
        images, masks = (np.concatenate(parts) for parts in zip(*pairs, strict=True))
        names = tuple(file.stem for file, (cut, _) in zip(files, pairs, strict=True) for _ in cut)
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
        splits[split] = Segmented(pixels, torch.from_numpy(masks), names)
    return splits


def read_tile(image: Path, labels: Path) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """Pixels (H, W, 3) of a tile and eva's class of each pixel (H, W)."""
    from scipy.io import loadmat

    try:
        with Image.open(image) as opened:
            pixels = np.array(opened.convert("RGB"))
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise ValueError(f"{image}: not a readable image ({error})") from error
    if not labels.is_file():
        raise ValueError(f"{labels} is missing: every tile needs its labels")
    try:
        types = loadmat(labels, variable_names=["type_map"])["type_map"]
    except KeyError as error:
        raise ValueError(f"{labels} has no type_map") from error
    except Exception as error:  # SciPy raises many types for broken files
        raise ValueError(f"{labels}: not a MATLAB file that can be read ({error})") from error
    if types.shape != pixels.shape[:2]:
        raise ValueError(f"{labels} is {types.shape}, its tile {pixels.shape[:2]}")
    if min(types.shape) < PATCH_PX:
        raise ValueError(f"{image} is {types.shape[1]} × {types.shape[0]}: smaller than a patch of {PATCH_PX}")
    if not (types.min() >= 0 and types.max() < len(CLASS_OF_TYPE)):  # false for NaN too
        raise ValueError(f"{labels} holds types {types.min():g} to {types.max():g}: CoNSeP has 0 to 7")
    return pixels, CLASS_OF_TYPE[types.astype(np.int64)]


def patches(
    pixels: npt.NDArray[np.uint8], classes: npt.NDArray[np.uint8]
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """Patches of one tile in a grid, row by row; incomplete patches at the right and lower edge are left out.

    Example:
        >>> images, masks = patches(np.zeros((500, 760, 3), np.uint8), np.zeros((500, 760), np.uint8))
        >>> images.shape, masks.shape
        ((6, 250, 250, 3), (6, 250, 250))
    """
    rows, columns, s = pixels.shape[0] // PATCH_PX, pixels.shape[1] // PATCH_PX, PATCH_PX
    corners = [(row * s, column * s) for row in range(rows) for column in range(columns)]
    images = np.stack([pixels[y : y + s, x : x + s] for y, x in corners])
    return images, np.stack([classes[y : y + s, x : x + s] for y, x in corners])
