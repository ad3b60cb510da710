"""Augmented views of each image from a fixed seed: named view sets, and the views of LiDAR and alignment."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from repmetrics.data.source import Unreadable

AUGMENTATION = "crop 0.4–1 of the area, flips, brightness and contrast ± 0.4, saturation ± 0.2, hue ± 0.1"
LUMA = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in gray, ITU-R 601."""


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


@dataclass(frozen=True)
class ViewSet:
    """A fixed distribution of views: what the features of an image may ignore.

    The views of an image are a pure function of the seed, the index of the image and the number of the view. They are
    independent of the batch, of the device up to rounding, of global random state, and of the augmentation of any run.

    Each view is a crop, resized bilinearly to the size of the image, and flipped. Brightness, contrast, saturation and
    the channels are then jittered together with probability ``jitter``: x·f, (x − mean gray)·f + mean gray,
    (x − gray)·f + gray, x_c·f_c, in this order, with one clamp to 0 … 1 at the end. Gray has the weights of ITU-R 601.

    Attributes:
        name: Name in records.
        area: Range of the area of the crop, as a share of the image.
        log_aspect: Half-width of the range of ln(width/height).
        flip: Probability of a horizontal flip.
        symmetries: Whether a view is also turned by a random quarter-turn and flipped vertically.
        jitter: Probability of the color jitter.
        brightness: Half-width of the range of the brightness factor around 1.
        contrast: Half-width of the range of the contrast factor around 1.
        saturation: Half-width of the range of the saturation factor around 1.
        channels: Half-width of the range of a factor of each channel around 1.
        gray: Probability of a view without color.
        recolor: Function: views (B, 3, H, W) in 0 … 1 and uniform numbers (B, 8) → recolored views in 0 … 1.
        summary: Meaning of ``recolor`` in a few words.

    Example:
        >>> images = torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        >>> first, second = (VIEW_SETS["natural"].draw(images, view=view) for view in (0, 1))
        >>> first.shape, bool((first == second).all())
        (torch.Size([8, 3, 32, 32]), False)
        >>> bool((VIEW_SETS["natural"].draw(images[3:5], indices=[3, 4]) == first[3:5]).all())
        True
    """

    name: str
    area: tuple[float, float] = (0.2, 1.0)
    log_aspect: float = 0.29
    flip: float = 0.5
    symmetries: bool = False
    jitter: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    channels: float = 0.0
    gray: float = 0.0
    recolor: Callable[[Tensor, Tensor], Tensor] | None = None
    summary: str = ""

    @property
    def colored(self) -> bool:
        """Whether views differ from their images in color, so that images must be RGB in 0 … 1."""
        return self.jitter > 0 or self.gray > 0 or self.recolor is not None

    def __str__(self) -> str:
        """The distribution in one line, for records.

        Example:
            >>> str(VIEW_SETS["geometry"])
            'geometry: crop 0.2–1 of the area, ln aspect ± 0.29, flip 0.5'
        """
        parts = [f"crop {self.area[0]:g}–{self.area[1]:g} of the area", f"ln aspect ± {self.log_aspect:g}"]
        parts += [f"flip {self.flip:g}"] * (self.flip > 0) + ["all symmetries of the square"] * self.symmetries
        if self.jitter:
            names = ("brightness", "contrast", "saturation", "channels")
            parts.append(f"jitter {self.jitter:g}: " + ", ".join(f"{n} ± {getattr(self, n):.2g}" for n in names))
        parts += [f"gray {self.gray:g}"] * (self.gray > 0) + [self.summary] * bool(self.summary)
        return f"{self.name}: {', '.join(parts)}"

    def draw(
        self,
        images: Tensor,
        *,
        indices: Sequence[int] | NDArray[np.int64] | Tensor | None = None,
        view: int = 0,
        seed: int = 0,
    ) -> Tensor:
        """Draw one view of each image, on the device of the images.

        Args:
            images: (B, C, H, W), uint8 or floating. Color needs RGB, as uint8 or floats in 0 … 1.
            indices: Index of each image in its data set; default 0 … B − 1.
            view: Number of the view.
            seed: Seed of all views.

        Returns:
            Views of the shape and dtype of ``images``.

        Raises:
            ValueError: The shape, the range of values, or the number of indices is wrong.
        """
        self._check(images)
        index = np.arange(len(images)) if indices is None else np.asarray(indices, dtype=np.int64)
        if index.shape != (len(images),):
            raise ValueError(f"indices must be ({len(images)},), one per image, got {index.shape}")
        uniform = torch.from_numpy(counter_uniforms(seed, index, view, n=24)).float()
        compute = images.dtype if images.is_floating_point() and images.element_size() > 2 else torch.float32
        pixels = images.to(compute) / 255 if images.dtype == torch.uint8 else images.to(compute)
        views = F.grid_sample(
            pixels, self._grid(uniform, images).to(pixels), padding_mode="border", align_corners=False
        )
        views = self._color(views, uniform[:, 8:].to(views)) if self.colored else views
        if images.dtype == torch.uint8:
            return (views * 255).round().to(torch.uint8)
        return views.to(images.dtype)

    def _check(self, images: Tensor) -> None:
        if images.ndim != 4 or (self.colored and images.shape[1] != 3):
            channels = "3" if self.colored else "C"
            raise ValueError(f"{self.name} views take images (B, {channels}, H, W), got {tuple(images.shape)}")
        if images.dtype == torch.uint8 or not self.colored or not len(images):
            return
        if not images.is_floating_point() or images.min() < 0 or images.max() > 1:
            low, high = images.min().item(), images.max().item()
            raise ValueError(
                f"{self.name} views change color and take uint8 images or floats in 0 … 1, got {low:.3g} … {high:.3g}: "
                "give images before normalization, or use geometry views"
            )

    def _grid(self, uniform: Tensor, images: Tensor) -> Tensor:
        """Position (B, H, W, 2) of each pixel of the views in the images, in grid_sample's −1 … 1."""
        height, width = images.shape[-2:]
        area, aspect, x, y, flip_x, flip_y, turn = uniform[:, :7].unbind(1)
        area = self.area[0] + (self.area[1] - self.area[0]) * area
        root = ((2 * aspect - 1) * self.log_aspect / 2).exp()
        size = torch.stack([area.sqrt() * root, area.sqrt() / root], 1).clamp(max=1)
        center = (2 * torch.stack([x, y], 1) - 1) * (1 - size)  # −1 … 1 minus half of the crop
        signs = torch.stack([flip_x < self.flip, (flip_y < 0.5) & torch.tensor(self.symmetries)], 1)
        scale = size * (1 - 2 * signs.float())
        along = [(2 * torch.arange(side) + 1) / side - 1 for side in (width, height)]
        right, down = torch.meshgrid(*along, indexing="xy")
        swap = ((turn < 0.5) & torch.tensor(self.symmetries and height == width))[:, None, None]
        right, down = torch.where(swap, down, right), torch.where(swap, right, down)
        return torch.stack([right, down], -1) * scale[:, None, None] + center[:, None, None]

    def _color(self, views: Tensor, uniform: Tensor) -> Tensor:
        """Jitter color, remove it, or change it by ``recolor``; uniform numbers (B, 16)."""
        if self.recolor is not None:
            views = self.recolor(views, uniform[:, 8:])
        widths = [self.brightness, self.contrast, self.saturation, *[self.channels] * 3]
        active = (uniform[:, :1] < self.jitter).to(uniform)
        factors = 1 + active * (2 * uniform[:, 1:7] - 1) * uniform.new_tensor(widths)
        brightness, contrast, saturation = factors[:, :3, None, None, None].unbind(1)
        saturation = saturation * (uniform[:, 7] >= self.gray).to(uniform)[:, None, None, None]
        weights = views.new_tensor(LUMA)[:, None, None]
        views = views * brightness
        mean = (views * weights).sum(1, keepdim=True).mean((2, 3), keepdim=True)
        views = (views - mean) * contrast + mean
        gray = (views * weights).sum(1, keepdim=True)
        channels = torch.where(saturation == 0, 1.0, factors[:, 3:, None, None])  # a gray view has no tint
        return (((views - gray) * saturation + gray) * channels).clamp(0, 1)


VIEW_SETS: Mapping[str, ViewSet] = {
    each.name: each
    for each in (
        ViewSet("geometry"),
        ViewSet("natural", jitter=0.8, brightness=0.4, contrast=0.4, saturation=0.4, channels=0.15, gray=0.2),
        ViewSet(
            "weak", area=(0.6, 1.0), jitter=0.8, brightness=0.4 / 3, contrast=0.4 / 3, saturation=0.4 / 3, channels=0.05
        ),
        ViewSet("turned", symmetries=True),
    )
}
"""Fixed view sets by name. ``geometry`` changes no color, and suits images in which color tells classes apart.
``turned`` also turns it, for objects without an upright direction. ``natural`` is the usual augmentation of natural
images. ``weak`` is a milder one. :func:`find_view_set` also finds those that other packages register."""

ENTRY_POINT_GROUP = "repmetrics.views"


def find_view_set(name: str) -> ViewSet:
    """View set by name, from :data:`VIEW_SETS` or from an entry point ``name = "module:OBJECT"`` of another package.

    Raises:
        ValueError: The name is unknown; the message lists the known ones.

    Example:
        >>> find_view_set("weak").area
        (0.6, 1.0)
    """
    if name in VIEW_SETS:
        return VIEW_SETS[name]
    registered = {point.name: point for point in entry_points(group=ENTRY_POINT_GROUP)}
    if name not in registered:
        raise ValueError(f"unknown view set {name!r}: choose among {', '.join([*VIEW_SETS, *sorted(registered)])}")
    loaded: ViewSet = registered[name].load()
    return loaded


def counter_uniforms(seed: int, index: NDArray[np.int64], view: int, *, n: int) -> NDArray[np.float64]:
    """Uniform numbers (B, n) in [0, 1), each a pure function of seed, index, view and its number: SplitMix64.

    Example:
        >>> whole = counter_uniforms(0, np.arange(4), 1, n=3)
        >>> bool((counter_uniforms(0, np.array([2]), 1, n=3) == whole[2]).all())
        True
    """
    gamma = np.uint64(0x9E3779B97F4A7C15)

    def mix(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))

    state = np.array([seed & (2**64 - 1)], dtype=np.uint64)
    for counter in (np.array([view], dtype=np.int64), index[:, None], np.arange(n, dtype=np.int64)):
        state = mix(state + gamma * (counter.astype(np.uint64) + np.uint64(1)))
    return (state >> np.uint64(11)).astype(np.float64) * 2.0**-53


def quarter_turns(images: Tensor) -> Tensor:
    """Images (B, C, S, S) turned by 0, 90, 180 and 270 degrees: (4, B, C, S, S).

    Raises:
        ValueError: The images are not square.

    Example:
        >>> quarter_turns(torch.tensor([[[[1, 2], [3, 4]]]]))[1, 0, 0].tolist()
        [[2, 4], [1, 3]]
    """
    if images.ndim != 4 or images.shape[-1] != images.shape[-2]:
        raise ValueError(f"quarter-turns take square images (B, C, S, S), got {tuple(images.shape)}")
    return torch.stack([images.rot90(turn, (-2, -1)) for turn in range(4)])
