"""Images of several sizes as batches of one size."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from repmetrics.data.source import Source, Unreadable

MAX_ASPECT = 32  # short sides: a strip of one pixel, resized whole, would fill the memory


class ResizeCrop(Dataset[Any]):
    """The images of `images`, shorter side resized to `size` (bilinear, antialiased), centre-cropped to a square.

    An image that is already `size` square comes through untouched.
    """

    def __init__(self, images: Dataset[Any], size: int) -> None:
        self.images = images
        self.size = size

    def __len__(self) -> int:
        return len(self.images)  # type: ignore[arg-type]  # map-style datasets have a length

    def __getitem__(self, index: int) -> Any:
        item = self.images[index]
        return (
            item if isinstance(item, Unreadable) else {**item, "image": resize_and_crop(item["image"], size=self.size)}
        )


def resize_and_crop(image: Tensor, *, size: int) -> Tensor:
    """One uint8 image (3, H, W) → (3, size, size): shorter side to `size`, then the centre.

    Example:
        >>> resize_and_crop(torch.zeros(3, 40, 30, dtype=torch.uint8), size=15).shape
        torch.Size([3, 15, 15])
    """
    from torchvision.transforms.v2 import functional as F

    if image.shape[-2:] == (size, size):
        return image
    short = min(image.shape[-2:])
    image = F.center_crop(image, [min(side, MAX_ASPECT * short) for side in image.shape[-2:]])
    resized: Tensor = F.resize(image, [size], antialias=True)
    cropped: Tensor = F.center_crop(resized, [size, size])
    return cropped


def collate(items: Sequence[Any]) -> dict[str, Any]:
    """Items → one batch, leaving out the unreadable ones but carrying their names along.

    The names travel in the batch because a worker process has no other way to tell.
    """
    good = [item for item in items if not isinstance(item, Unreadable)]
    batch: dict[str, Any] = {"unreadable": [item for item in items if isinstance(item, Unreadable)]}
    if good:
        shapes = {tuple(item["image"].shape) for item in good}
        if len(shapes) > 1:
            raise ValueError(f"images of different sizes in one batch, {sorted(shapes)}: pass --image-size")
        batch["image"] = torch.stack([item["image"] for item in good])
        if "group" in good[0]:
            batch["group"] = [item["group"] for item in good]
        if "label" in good[0]:
            batch["label"] = torch.tensor([item["label"] for item in good])
    return batch


def load_batches(
    source: Source,
    *,
    image_size: int | None,
    batch_size: int = 64,
    num_workers: int = 0,
    on_unreadable: Callable[[Unreadable], None],
) -> Iterator[dict[str, Any]]:
    """The images of `source` in order, batch by batch: dicts with "image" (B, 3, S, S) uint8, "group", "label".

    Args:
        source: one with images.
        image_size: bring every image to this size; None leaves them as the source gives them.
        batch_size: 64 as in the monitor, so that both make the same features to the last bit.
        num_workers: processes that decode images.
        on_unreadable: called with each item that had to be left out.
    """
    if source.images is None:
        raise ValueError(f"{source.path.name} holds features already: there are no images to load")
    images = source.images if image_size is None else ResizeCrop(source.images, image_size)
    loader = DataLoader(images, batch_size=batch_size, num_workers=num_workers, collate_fn=collate)
    for batch in loader:
        for item in batch.pop("unreadable"):
            on_unreadable(item)
        if "image" in batch:
            yield batch
