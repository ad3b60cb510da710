"""Augmented views of each image from a fixed seed, for LiDAR and alignment."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from repmetrics.data.source import Unreadable

AUGMENTATION = "crop 0.4–1 of the area, flips, brightness and contrast ± 0.4, saturation ± 0.2, hue ± 0.1"


class MultiViewDataset(Dataset[Any]):
    """`count` augmented views of each image in sequence: item i is view i % count of image i // count.

    Each view is a pure function of (seed, i), so that the views are the same for every checkpoint.
    """

    def __init__(self, images: Dataset[Any], *, count: int, size: int | None, seed: int = 0) -> None:
        if count < 2:
            raise ValueError(f"views must be at least 2 per image, got {count}")
        self.images = images
        self.count = count
        self.size = size
        self.seed = seed

    def __len__(self) -> int:
        return self.count * len(self.images)  # type: ignore[arg-type]  # map-style datasets have a length

    def __getitem__(self, index: int) -> Any:
        item = self.images[index // self.count]
        if isinstance(item, Unreadable):
            return item
        image = augment(item["image"], size=self.size, seed=self.seed + index)
        return {**item, "image": image}


def augment(image: Tensor, *, size: int | None, seed: int) -> Tensor:
    """One view of an image (3, H, W), uint8 or floating in 0 … 1: see `AUGMENTATION`. Random state does not change."""
    from torchvision.transforms import v2

    height, width = image.shape[-2:]
    steps = v2.Compose(
        [
            v2.RandomResizedCrop([size or height, size or width], scale=(0.4, 1.0), antialias=True),
            v2.RandomHorizontalFlip(),
            v2.RandomVerticalFlip(),
            v2.ColorJitter(0.4, 0.4, 0.2, 0.1),
        ]
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed CUDA's generators too
        view: Tensor = steps(image)
    return view


def random_view(images: Tensor) -> Tensor:
    """One view of each image of a batch (B, 3, H, W), uint8 or floating in 0 … 1, drawn from torch's generator.

    Example:
        >>> random_view(torch.rand(2, 3, 8, 8)).shape
        torch.Size([2, 3, 8, 8])
    """
    hint = "give augmentation=, a function of a batch of images"
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"the default augmentation takes images (B, 3, H, W), got {tuple(images.shape)}: {hint}")
    if images.dtype != torch.uint8 and (images.min() < 0 or images.max() > 1):
        low, high = images.min().item(), images.max().item()
        raise ValueError(
            f"the default augmentation takes uint8 images or floats in 0 … 1, got {low:.3g} … {high:.3g}: {hint}"
        )
    seeds = torch.randint(2**62, (len(images),)).tolist()
    return torch.stack([augment(image, size=None, seed=seed) for image, seed in zip(images, seeds, strict=True)])
