"""Images of a source as batches of one image size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

from repmetrics.data.held_out import HeldOutData
from repmetrics.data.source import Source, Unreadable

MAX_ASPECT = 32  # in short sides: resizing a strip of one pixel whole would exhaust the memory


class ResizeCrop(Dataset[Any]):
    """A data set's images, shorter side resized to `size` (bilinear, antialiased) and center-cropped to a square.

    An image that is already `size` square is returned unchanged.
    """

    def __init__(self, images: Dataset[Any], size: int) -> None:
        self.images = images
        self.size = size

    def __len__(self) -> int:
        return len(self.images)  # type: ignore[arg-type]  # map-style datasets have a length

    def __getitem__(self, index: int) -> Any:
        item = self.images[index]
        if isinstance(item, Unreadable):
            return item
        return {**item, "image": resize_and_crop(item["image"], size=self.size)}


def resize_and_crop(image: Tensor, *, size: int) -> Tensor:
    """Resize the shorter side of a uint8 image (3, H, W) to `size`, then crop the center: (3, size, size).

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


@dataclass
class ReadReport:
    """What became of the items that were read so far.

    Attributes:
        readable: Whether each item could be read, in their order.
        unreadable: Items that could not be read.
        several_frames: Number of readable items whose files have several frames, of which the first is read.
    """

    readable: list[bool] = field(default_factory=list)
    unreadable: list[Unreadable] = field(default_factory=list)
    several_frames: int = 0

    def add(self, other: ReadReport) -> None:
        """Append the items of another report."""
        self.readable += other.readable
        self.unreadable += other.unreadable
        self.several_frames += other.several_frames

    def take(self) -> ReadReport:
        """The items so far; the report is empty afterwards."""
        taken = ReadReport(self.readable, self.unreadable, self.several_frames)
        self.readable, self.unreadable, self.several_frames = [], [], 0
        return taken


def collate(items: Sequence[Any]) -> dict[str, Any]:
    """Items as one batch without the unreadable ones, which are in the report under "report".

    It is part of the batch because a worker process has no other way to report.
    """
    readable = [item for item in items if not isinstance(item, Unreadable)]
    report = ReadReport(
        [not isinstance(item, Unreadable) for item in items],
        [item for item in items if isinstance(item, Unreadable)],
        sum(item.get("several_frames", False) for item in readable),
    )
    batch: dict[str, Any] = {"report": report}
    if readable:
        shapes = {tuple(item["image"].shape) for item in readable}
        if len(shapes) > 1:
            raise ValueError(f"images of different sizes in one batch, {sorted(shapes)}: pass --image-size")
        batch["image"] = torch.stack([item["image"] for item in readable])
        if "group" in readable[0]:
            batch["group"] = [item["group"] for item in readable]
        if "label" in readable[0]:
            batch["label"] = torch.tensor([item["label"] for item in readable])
    return batch


def load_batches(
    source: Source,
    *,
    image_size: int | None,
    batch_size: int = 64,
    num_workers: int = 0,
    start: int = 0,
    stop: int | None = None,
    report: ReadReport | None = None,
) -> Iterator[dict[str, Any]]:
    """Images of `source` in order, as batches: dicts with "image" (B, 3, S, S) uint8, "group", "label".

    Args:
        source: A source with images.
        image_size: Side to resize every image to; None keeps the source's sizes.
        batch_size: Images per batch; the monitor's default, so that both compute the same features to the last bit.
        num_workers: Number of processes that decode images.
        start: First item to read.
        stop: Item after the last one to read; default: the end.
        report: Report to which each batch is added before it is yielded.
    """
    if source.images is None:
        raise ValueError(f"{source.path.name} holds features already: there are no images to load")
    images = source.images if image_size is None else ResizeCrop(source.images, image_size)
    if start or stop is not None:
        count = len(images)  # type: ignore[arg-type]  # map-style: has a length
        images = Subset(images, range(start, count if stop is None else min(stop, count)))
    data = HeldOutData(images, batch_size=batch_size, num_workers=num_workers, collate_fn=collate)
    for batch in data.shard(0, 1):
        read = batch.pop("report")
        if report is not None:
            report.add(read)
        if "image" in batch:
            yield batch
