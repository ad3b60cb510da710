"""DINO's multi-crop views of a batch of patches, cut on the device with separate parameters for every sample.

lightly's `DINOTransform` works image by image in PIL; torchvision v2 shares its random parameters over a batch. Here
one `grid_sample` per crop size does crop, resize, flips and quarter-turns. The color jitter is one 3×3 matrix per
view. Blurs are depthwise convolutions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fmtrain.domains import check_domain, check_range
from fmtrain.patches.stains import DARKEST, stain_map
from fmtrain.rng import derive_seed

CPU_PIXELS = 4 * 256**2  # pixels of the patches whose views fit into the cache of a core
# Rows: weights of red, green and blue for luma (ITU-R 601, as in PIL and torchvision) and two chroma axes.
YIQ = torch.tensor([[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])
RGB = torch.linalg.inv(YIQ)


class Crops(NamedTuple):
    """Crops of one batch: float32 in 0…1, views first."""

    global_crops: Tensor  # (2, B, 3, G, G)
    local_crops: Tensor  # (L, B, 3, S, S)


class Parameters(NamedTuple):
    """Random parameters of every view of every sample; leading shape (views, samples)."""

    box: Tensor  # (…, 4): center x, center y, width, height as shares of the patch
    turn: Tensor  # (…, 2, 2): signed permutation, one of the eight symmetries of the square
    brightness: Tensor  # (…): factor
    contrast: Tensor  # (…): factor around the view's mean gray
    saturation: Tensor  # (…): factor around each pixel's gray
    hue: Tensor  # (…): rotation in turns
    stain_scale: Tensor  # (…, 3): factor of hematoxylin, eosin, DAB density
    stain_shift: Tensor  # (…, 3): added density
    sigma: Tensor  # (…): standard deviation of the blur in pixels of the crop; 0 = no blur
    solarized: Tensor  # (…): bool

    def select(self, *index: slice | Tensor) -> Parameters:
        """Parameters of some views and samples."""
        return Parameters(*(p[index] for p in self))


@dataclass(frozen=True)
class MultiCrop:
    """DINO's multi-crop augmentation (arXiv 2104.14294, appendix) for pathology.

    The views are a pure function of the patches, the seed and the step. No global random state is read or changed.
    Differences from the paper's PIL pipeline:

    - vertical flips and quarter-turns (tissue has no upright direction);
    - hematoxylin-eosin-DAB jitter, and no solarization by default;
    - brightness, contrast, saturation and hue always in this order, with one clamp at the end; hue turns in YIQ;
    - bilinear resizing without antialiasing (crops shrink by less than 2 at the published scales).

    Args:
        global_crops_size: Side of the 2 global crops in pixels.
        global_crops_scale: Range of the area of global crops, as a share of the patch.
        local_crops_size: Side of the local crops in pixels.
        local_crops_scale: Range of the area of local crops, as a share of the patch.
        local_crops_number: Number of local crops per patch.
        ratio: Range of width / height of a crop before resizing; drawn log-uniformly.
        context: Side of the patch in fields. Crop areas are shares of a field, whose side is 1 / `context` of the
            patch's, and crops lie anywhere in the patch. Above 1 this is extended-context translation (arXiv
            2408.00738): two crops differ in their position in real tissue more than in their magnification.
        horizontal_flip: Probability of a horizontal flip.
        vertical_flip: Probability of a vertical flip.
        rotate90: Probability of a turn by 0, 90, 180 or 270 degrees, all equally likely.
        jitter: Probability of brightness, contrast, saturation and hue jitter.
        brightness: Half-width of the brightness factor's range around 1.
        contrast: Half-width of the contrast factor's range around 1.
        saturation: Half-width of the saturation factor's range around 1.
        hue: Half-width of the hue rotation's range around 0, in turns.
        grayscale: Probability of a view without color.
        stain_jitter: Probability of stain jitter.
        stain: Half-width of two ranges per stain: of a factor on its density, around 1, and of an added density,
            around 0.
        blur: Probabilities of blur for the first global, the second global and the local crops.
        blur_sigma: Range of the blur's standard deviation in pixels of the crop.
        solarize: Probability of solarizing the second global crop (0.2 in the paper; unnatural for stained tissue).
        seed: Seed of the augmentation's random stream.

    Example:
        >>> crops = MultiCrop(global_crops_size=32, local_crops_size=16, local_crops_number=4)
        >>> views = crops(torch.zeros(8, 3, 48, 48, dtype=torch.uint8), step=0)
        >>> views.global_crops.shape, views.local_crops.shape
        (torch.Size([2, 8, 3, 32, 32]), torch.Size([4, 8, 3, 16, 16]))
    """

    global_crops_size: int = 224
    global_crops_scale: tuple[float, float] = (0.4, 1.0)
    local_crops_size: int = 96
    local_crops_scale: tuple[float, float] = (0.05, 0.4)
    local_crops_number: int = 8
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    context: float = 1.0
    horizontal_flip: float = 0.5
    vertical_flip: float = 0.5
    rotate90: float = 1.0
    jitter: float = 0.8
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1
    grayscale: float = 0.2
    stain_jitter: float = 0.5
    stain: float = 0.05
    blur: tuple[float, float, float] = (1.0, 0.1, 0.5)
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    solarize: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("global_crops_size", "local_crops_size", "context"):
            check_domain(name, getattr(self, name), minimum=1)
        check_domain("local_crops_number", self.local_crops_number, minimum=0)
        for name in ("global_crops_scale", "local_crops_scale"):
            check_range(name, getattr(self, name), above=0, maximum=1)
        for name in ("ratio", "blur_sigma"):
            check_range(name, getattr(self, name), above=0)
        probabilities = ("horizontal_flip", "vertical_flip", "rotate90", "jitter", "grayscale", "stain_jitter")
        for name in (*probabilities, "blur", "solarize", "brightness", "contrast", "saturation"):
            check_domain(name, getattr(self, name), minimum=0, maximum=1)
        check_domain("stain", self.stain, minimum=0)
        check_domain("hue", self.hue, minimum=0, maximum=0.5)
        check_domain("seed", self.seed, minimum=0)
        if len(self.blur) != 3:
            raise ValueError(f"blur needs 3 probabilities (global, global, local), got {len(self.blur)}")

    def __call__(self, images: Tensor, *, step: int, rank: int = 0, world_size: int = 1) -> Crops:
        """Cut and color the views of one batch.

        Args:
            images: Patches (B, 3, S, S), uint8 or float in 0…1; not normalized.
            step: Number of the batch; it selects the random stream together with ``seed``.
            rank: Rank of this process. Ranks draw for disjoint samples of one common batch: sample `i` of it has the
                same views for any number of ranks.
            world_size: Number of processes that share the batch.

        Raises:
            ValueError: The images are not a batch of square RGB patches.
        """
        drawn = self._drawn(images, step=step, rank=rank, world_size=world_size)
        views = Crops(*(
            torch.empty((count, len(images), 3, size, size), device=images.device, dtype=torch.float32)
            for count, size in ((2, self.global_crops_size), (self.local_crops_number, self.local_crops_size))
        ))  # fmt: skip
        _fill(images, [(views.global_crops, drawn.select(slice(2))), (views.local_crops, drawn.select(slice(2, None)))])
        return views

    def global_crops(self, images: Tensor, *, size: int, step: int, rank: int = 0, world_size: int = 1) -> Tensor:
        """The global crops of a call with the same arguments, at another size in pixels: (2, B, 3, size, size).

        The blur keeps its width in the tissue.
        """
        drawn = self._drawn(images, step=step, rank=rank, world_size=world_size).select(slice(2))
        crops = torch.empty((2, len(images), 3, size, size), device=images.device, dtype=torch.float32)
        _fill(images, [(crops, drawn._replace(sigma=drawn.sigma * size / self.global_crops_size))])
        return crops

    def _drawn(self, images: Tensor, *, step: int, rank: int, world_size: int) -> Parameters:
        """Parameters of the views of this rank's patches."""
        if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] != images.shape[3]:
            raise ValueError(f"images must be square RGB patches (B, 3, S, S), got {tuple(images.shape)}")
        return Parameters(*(p[:, rank::world_size] for p in self.draw(len(images) * world_size, step=step)))

    def draw(self, samples: int, *, step: int) -> Parameters:
        """Draw the parameters of all views of a batch on the CPU, so that they are the same for every device."""
        views = 2 + self.local_crops_number
        generator = torch.Generator().manual_seed(derive_seed(self.seed, step) & (2**63 - 1))
        uniform = torch.rand((samples, views, 24), generator=generator, dtype=torch.float32)
        uniform = uniform.transpose(0, 1)  # (V, B, 24)
        (area, ratio, x, y, hflip, vflip, turns, turned, jitter, brightness, contrast, saturation, hue, gray,
         stained, blur, sigma, solarize) = uniform[..., :18].unbind(-1)  # fmt: skip

        is_global = torch.arange(views)[:, None] < 2
        low = torch.where(is_global, self.global_crops_scale[0], self.local_crops_scale[0])
        high = torch.where(is_global, self.global_crops_scale[1], self.local_crops_scale[1])
        area = low + (high - low) * area
        ratio = torch.exp(_between(ratio, math.log(self.ratio[0]), math.log(self.ratio[1])))
        box = crop_boxes(area, ratio, x, y, context=self.context)

        jittered = (jitter < self.jitter).float()
        stained = (stained < self.stain_jitter).float()[..., None]
        blur_p = torch.tensor([*self.blur[:2], *[self.blur[2]] * self.local_crops_number])[:, None]
        second = (torch.arange(views) == 1)[:, None]
        drawn = Parameters(
            box=box,
            turn=_symmetry(
                flip_x=hflip < self.horizontal_flip,
                flip_y=vflip < self.vertical_flip,
                turns=(4 * turns).long() * (turned < self.rotate90),
            ),
            brightness=1 + jittered * _between(brightness, -self.brightness, self.brightness),
            contrast=1 + jittered * _between(contrast, -self.contrast, self.contrast),
            saturation=(1 + jittered * _between(saturation, -self.saturation, self.saturation))
            * (gray >= self.grayscale),
            hue=jittered * _between(hue, -self.hue, self.hue),
            stain_scale=1 + stained * _between(uniform[..., 18:21], -self.stain, self.stain),
            stain_shift=stained * _between(uniform[..., 21:24], -self.stain, self.stain),
            sigma=(blur < blur_p) * _between(sigma, *self.blur_sigma),
            solarized=second & (solarize < self.solarize),
        )
        # float32 for any default dtype of torch
        return Parameters(*(p.float() if p.is_floating_point() else p for p in drawn))


def crop_boxes(area: Tensor, ratio: Tensor, x: Tensor, y: Tensor, *, context: float = 1.0) -> Tensor:
    """Boxes of crops in a patch: (…, 4), center x, center y, width, height as shares of the patch.

    Args:
        area: Area of the crop as a share of the field, whose side is 1 / `context` of the patch's.
        ratio: Width / height of the crop; a crop larger than the patch is cut to its side.
        x: Horizontal position in 0…1, from the patch's left border to its right border.
        y: Vertical position in 0…1, from top to bottom.
        context: Side of the patch in fields.

    Example:
        >>> half, full = torch.tensor(0.5), torch.tensor(1.0)
        >>> crop_boxes(full, full, half, half), crop_boxes(full, full, full, half, context=2.0)
        (tensor([0.5000, 0.5000, 1.0000, 1.0000]), tensor([0.7500, 0.5000, 0.5000, 0.5000]))
    """
    width = ((area * ratio).sqrt() / context).clamp(max=1)
    height = ((area / ratio).sqrt() / context).clamp(max=1)
    return torch.stack([width / 2 + (1 - width) * x, height / 2 + (1 - height) * y, width, height], -1)


def _fill(images: Tensor, kinds: Sequence[tuple[Tensor, Parameters]]) -> None:
    """Fill each output (V, B, 3, size, size) with the views of its parameters, in parts that fit into the cache."""
    chunk = max(1, CPU_PIXELS // images.shape[-1] ** 2 if images.device.type == "cpu" else len(images))
    with torch.autocast(images.device.type, enabled=False):  # pixels have more levels than bfloat16
        for start in range(0, len(images), chunk):
            part = slice(start, start + chunk)
            pixels = images[part].float()
            if images.dtype == torch.uint8:
                pixels /= 255
            for crops, parameters in kinds:
                apply_(crops[:, part], pixels, parameters.select(slice(None), part))


def apply_(crops: Tensor, pixels: Tensor, parameters: Parameters) -> None:
    """Fill `crops` with the views that `parameters` describe; rare operations run on their views only.

    Args:
        crops: Output (V, B, 3, size, size), float32. A copy of all views would cost as much as their color jitter.
        pixels: Patches (B, 3, S, S), float32 in 0…1.
        parameters: Parameters of (V, B) views, on the CPU: selecting views must not wait for the device.
    """
    views, batch, _, size, _ = crops.shape
    device = pixels.device
    if views == 0:
        return
    on_device = Parameters(*(p.to(device, non_blocking=True) for p in parameters))
    grid = _sampling_grid(on_device, size=size)  # (B, V·size, size, 2): one call samples all views of a patch
    sampled = F.grid_sample(pixels, grid, padding_mode="border", align_corners=False).view(batch, 3, views, size**2)

    matrix, offset = _color_map(sampled.mean(3).permute(2, 0, 1), on_device)
    flat = crops.flatten(3)
    for view, crop in enumerate(flat):
        torch.baddbmm(offset[view], matrix[view], sampled[:, :, view], out=crop)
    crops.clamp_(DARKEST, 1)

    stained = _indices((parameters.stain_scale != 1).any(-1) | (parameters.stain_shift != 0).any(-1), device)
    if len(stained[0]):
        changed = on_device.select(*stained)
        matrix, offset = stain_map(changed.stain_scale, changed.stain_shift)
        flat[stained] = torch.baddbmm(offset, matrix, flat[stained].log_()).exp_().clamp_(max=1)
    solarized = _indices(parameters.solarized, device)
    if len(solarized[0]):
        bright = crops[solarized]
        crops[solarized] = torch.where(bright >= 0.5, 1 - bright, bright)
    blurred = _indices(parameters.sigma > 0, device)
    if len(blurred[0]):
        radius = math.ceil(3 * parameters.sigma.max())
        crops[blurred] = gaussian_blur(crops[blurred], sigma=on_device.sigma[blurred], radius=radius).clamp_(max=1)


def _indices(selected: Tensor, device: torch.device) -> tuple[Tensor, ...]:
    """Indices of views and samples where `selected` (V, B) is true."""
    return tuple(index.to(device, non_blocking=True) for index in selected.nonzero(as_tuple=True))


def gaussian_blur(images: Tensor, *, sigma: Tensor, radius: int) -> Tensor:
    """Blur every image with a separate standard deviation; edges are replicated.

    Two depthwise convolutions, one per direction, with one group per channel of each image. On a CPU the channels-last
    layout is several times as fast as contiguous planes, and nearly twice as fast as products with band matrices.

    Args:
        images: Images (N, C, H, W).
        sigma: Standard deviations (N,) in pixels, positive.
        radius: Radius of the kernels in pixels, at least 3 times the largest standard deviation. Every kernel is cut at
            3 times its standard deviation, which holds 99.7 % of a Gaussian.
    """
    taps = torch.arange(-radius, radius + 1, device=images.device)
    log_kernel = -(taps**2) / (2 * sigma[:, None] ** 2)
    outside = taps.abs() > (3 * sigma[:, None]).ceil()  # cut per image: no image depends on the others
    kernel = torch.softmax(log_kernel.masked_fill(outside, -torch.inf), dim=1)  # (N, K), sums to 1
    kernel = kernel.repeat_interleave(images.shape[1], dim=0)[:, None, :, None]
    layout = torch.channels_last if images.device.type == "cpu" else torch.contiguous_format
    padded = F.pad(images.flatten(0, 1)[None], (radius,) * 4, mode="replicate").contiguous(memory_format=layout)
    vertical = F.conv2d(padded, kernel, groups=len(kernel))
    return F.conv2d(vertical, kernel.mT, groups=len(kernel)).view_as(images)


def _between(uniform: Tensor, low: float, high: float) -> Tensor:
    return low + (high - low) * uniform


def _symmetry(*, flip_x: Tensor, flip_y: Tensor, turns: Tensor) -> Tensor:
    """Signed permutation matrices (…, 2, 2) that map output to input coordinates."""
    sine = torch.tensor([0.0, 1.0, 0.0, -1.0])[turns]
    cosine = torch.tensor([1.0, 0.0, -1.0, 0.0])[turns]
    sign_x, sign_y = 1 - 2 * flip_x.float(), 1 - 2 * flip_y.float()
    return torch.stack([cosine * sign_x, -sine * sign_y, sine * sign_x, cosine * sign_y], -1).unflatten(-1, (2, 2))


def _sampling_grid(parameters: Parameters, *, size: int) -> Tensor:
    """Position of each output pixel in the patch, in grid_sample's −1…1: (B, V·size, size, 2)."""
    center, extent = parameters.box.transpose(0, 1).split(2, dim=-1)  # (B, V, 2)
    linear = (extent[..., None] * parameters.turn.transpose(0, 1)).mT.contiguous()  # (B, V, 2, 2): columns
    pixels = torch.arange(size, device=center.device, dtype=center.dtype)
    axis = (pixels * 2 + 1) / size - 1  # centers of the output pixels
    right, down = torch.view_as_complex(linear)[..., None].unbind(2)  # x + iy: one sum for both coordinates
    along_x, along_y = right * axis, down * axis + torch.view_as_complex(2 * center - 1)[..., None]
    return torch.view_as_real(along_x[:, :, None] + along_y[..., None]).flatten(1, 2)


def _color_map(mean: Tensor, p: Parameters) -> tuple[Tensor, Tensor]:
    """Brightness, contrast, saturation and hue as one affine map: matrices (…, 3, 3) and offsets (…, 1, 1).

    In YIQ, saturation scales the chroma plane and hue rotates it. Gray stays gray, so the offset of the contrast is the
    same for red, green and blue.

    Args:
        mean: Mean red, green and blue of each view, (…, 3).
        p: Parameters of the views, (…).
    """
    gray = (mean @ YIQ[0].to(mean)) * p.brightness  # mean of the brightened view
    angle = 2 * math.pi * p.hue
    x, y, zero = p.saturation * angle.cos(), p.saturation * angle.sin(), torch.zeros_like(angle)
    chroma = torch.stack([zero + 1, zero, zero, zero, x, -y, zero, y, x], -1).unflatten(-1, (3, 3))
    factor, shift = p.brightness * p.contrast, (1 - p.contrast) * gray
    return factor[..., None, None] * (RGB.to(mean) @ chroma @ YIQ.to(mean)), shift[..., None, None]
