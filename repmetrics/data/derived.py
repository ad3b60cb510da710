"""Images derived from held-out ones, and their features: pairs of views of a fixed set, and quarter-turns.

Two views of every second image cost as much as one pass over all images.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from repmetrics.data.features import Encode, FeatureDict, Features
from repmetrics.data.source import Unreadable
from repmetrics.data.views import ViewSet, quarter_turns

# Names in a batch's features in addition to layers; a submodule's path has no spaces.
PAIRED = "images with pairs of views"
PAIRS = "pairs of views of "
TURNS = "quarter-turns of "

PAIR_STRIDE = 2
"""Distance of the images with pairs of views within a batch."""


class DerivedImages(Dataset[Any]):
    """``count`` images derived from every ``stride``-th image: item i is derive(image, i % count).

    Args:
        images: Dataset of dicts with "image", a tensor (3, H, W).
        derive: Function: image, number → derived image.
        count: Number of images derived from each.
        stride: Distance of the images.
    """

    def __init__(
        self, images: Dataset[Any], derive: Callable[[Tensor, int], Tensor], *, count: int, stride: int = 1
    ) -> None:
        self.images = images
        self.derive = derive
        self.count = count
        self.stride = stride

    def __len__(self) -> int:
        return -(-len(self.images) // self.stride) * self.count  # type: ignore[arg-type]  # map-style: has a length

    def __getitem__(self, index: int) -> Any:
        item = self.images[index // self.count * self.stride]
        if isinstance(item, Unreadable):
            return item
        return {**item, "image": self.derive(item["image"], index % self.count)}


def image_keys(images: Tensor) -> NDArray[np.int64]:
    """Key (B,) of each image from its content: the same in any order, batch, and process.

    Example:
        >>> images = torch.arange(24).reshape(2, 3, 2, 2)
        >>> bool((image_keys(images.flip(0)) == image_keys(images)[::-1]).all())
        True
    """
    content = images.detach().cpu().contiguous().flatten(1).view(torch.uint8).numpy()
    return np.array([zlib.crc32(row) for row in content], dtype=np.int64)


def draw_view(image: Tensor, number: int, *, view_set: ViewSet) -> Tensor:
    """View of one image (3, H, W), drawn by its content."""
    return view_set.draw(image[None], indices=image_keys(image[None]), view=number)[0]


def turn(image: Tensor, number: int) -> Tensor:
    """One image (3, S, S) turned by a number of quarter-turns."""
    return quarter_turns(image[None])[number, 0]


def add_view_pairs(encode: Encode, encode_view: Encode, *, view_set: ViewSet) -> Encode:
    """Images → features of ``encode``, and those (n, 2, D) of two views of every second image of the batch.

    The mask (B,) of these images is under :data:`PAIRED`. Inputs other than images (B, C, H, W) have no views.
    """

    def encode_with_pairs(images: Tensor) -> dict[str, Tensor]:
        features = encode(images)
        mask = torch.zeros(len(images), dtype=torch.bool)
        if images.ndim != 4:
            return features | {PAIRED: mask}
        mask[::PAIR_STRIDE] = True
        part = images[::PAIR_STRIDE]
        keys = image_keys(part)
        views = torch.cat([view_set.draw(part, indices=keys, view=view) for view in (0, 1)])
        pairs = {PAIRS + k: torch.stack(v.chunk(2), dim=1) for k, v in encode_view(views).items()}
        return features | {PAIRED: mask} | pairs

    return encode_with_pairs


def add_turns(encode: Encode, encode_view: Encode) -> Encode:
    """Images → features of ``encode``, and those (B, 4, D) of each image turned by 0, 90, 180 and 270 degrees."""

    def encode_with_turns(images: Tensor) -> dict[str, Tensor]:
        turned = [encode_view(each) for each in quarter_turns(images)]
        return encode(images) | {TURNS + k: torch.stack([t[k] for t in turned], dim=1) for k in turned[0]}

    return encode_with_turns


def view_pairs(features: FeatureDict, layer: str) -> Features | None:
    """Features (n, 2, D) of the pairs of views, with the groups of their images; None if there are none."""
    if PAIRS + layer not in features.values:
        return None
    kept = features.values[PAIRED].nonzero().flatten().tolist()
    groups = None if features.groups is None else tuple(features.groups[row] for row in kept)
    return Features(features.values[PAIRS + layer], groups)
