"""What can be scored: a folder of images, a file of embeddings, or what another package registers.

A package adds a kind of source with an entry point in the group ``repmetrics.sources``: a function that takes
a path and returns a `Source`, or None where the path is not its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from repmetrics.features import Features

ENTRY_POINT_GROUP = "repmetrics.sources"
LONGEST = 32  # short sides: a strip of one pixel, resized whole, would fill the memory


@dataclass(frozen=True)
class Source:
    """Features, or images for an encoder to make them from. Exactly one of `features` and `images` is given.

    Attributes:
        path: what the user named.
        kind: two or three words for the reader: "image folder", "slides manifest".
        features: given directly, no encoder needed.
        images: a map-style dataset of dicts: "image" a uint8 tensor (3, H, W), and where known "group" a
            string (slide or patient) and "label" an int. An item that cannot be read is an `Unreadable`.
        classes: the names of the labels, by index; empty where there are no labels.
        resize: True: images of any size, to be brought to the encoder's. False: the source fixed the size.
        notes: what the reader should know: assumptions made, columns not used.
        fingerprint: a digest of everything the images depend on. Features are kept for a second run only of a
            source that has one.
    """

    path: Path
    kind: str
    features: Features | None = None
    images: Dataset[Any] | None = None
    classes: tuple[str, ...] = ()
    resize: bool = False
    notes: tuple[str, ...] = ()
    fingerprint: Callable[[], str] | None = None

    def __post_init__(self) -> None:
        if (self.features is None) == (self.images is None):
            raise ValueError("a Source holds either features or images: give exactly one")


class Unreadable(NamedTuple):
    """In place of an item that could not be read: it is skipped, counted and named."""

    name: str
    reason: str


def open_source(path: Path, *, labels: str | None = None, groups: str | None = None) -> Source:
    """Find out what `path` is and open it.

    Args:
        path: a folder of images, a CSV of files, an embeddings file, or what a plugin knows.
        labels: column (or key) with the labels; "none" to use none. Default: found by name.
        groups: column (or key) with the slide or patient; "folder" for the sub-folder; "none" to use none.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: nobody knows what this is; the message says what was found and what is supported.
    """
    from repmetrics.embeddings import SUFFIXES as EMBEDDINGS
    from repmetrics.embeddings import read_embeddings, read_slides
    from repmetrics.images import image_csv, image_folder, list_images

    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    suffix = path.suffix.lower()
    if path.is_file() and suffix in EMBEDDINGS:
        return read_embeddings(path, labels=labels, groups=groups)
    if path.is_file() and suffix == ".csv":
        return image_csv(path, labels=labels, groups=groups)
    source, faults = _from_plugins(path)
    if source is not None:
        for option, value in (("--labels", labels), ("--groups", groups)):
            if value not in (None, "none"):
                raise ValueError(f"{option} {value}: a {source.kind} says itself what its labels and groups are")
        return source
    if path.is_dir() and any(f.suffix.lower() in EMBEDDINGS for f in path.iterdir()) and not list_images(path):
        return read_slides(path, labels=labels)
    if path.is_dir():
        return image_folder(path, labels=labels, groups=groups)
    raise ValueError(
        f"{path.name} is no source of images or features: expected an image folder, a .csv of files, "
        f"embeddings ({' '.join(EMBEDDINGS)}) or a manifest.json" + "".join(f"; {fault}" for fault in faults)
    )


def _from_plugins(path: Path) -> tuple[Source | None, list[str]]:
    """Ask each registered package. One that cannot be imported is named only if nobody else knows the path."""
    faults = []
    for point in entry_points(group=ENTRY_POINT_GROUP):
        try:
            opener: Callable[[Path], Source | None] = point.load()
        except (ImportError, AttributeError) as error:
            faults.append(f"the source {point.name!r} could not be loaded ({error})")
            continue
        source = opener(path)
        if source is not None:
            return source, faults
    return None, faults


class Fitted(Dataset[Any]):
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
        return item if isinstance(item, Unreadable) else {**item, "image": fit(item["image"], size=self.size)}


def fit(image: Tensor, *, size: int) -> Tensor:
    """One uint8 image (3, H, W) → (3, size, size): shorter side to `size`, then the centre.

    Example:
        >>> fit(torch.zeros(3, 40, 30, dtype=torch.uint8), size=15).shape
        torch.Size([3, 15, 15])
    """
    from torchvision.transforms.v2 import functional as F

    if image.shape[-2:] == (size, size):
        return image
    short = min(image.shape[-2:])
    image = F.center_crop(image, [min(side, LONGEST * short) for side in image.shape[-2:]])
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
    images = source.images if image_size is None else Fitted(source.images, image_size)
    loader = DataLoader(images, batch_size=batch_size, num_workers=num_workers, collate_fn=collate)
    for batch in loader:
        for item in batch.pop("unreadable"):
            on_unreadable(item)
        if "image" in batch:
            yield batch
