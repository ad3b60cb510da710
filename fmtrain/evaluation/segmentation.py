"""A segmentation head on frozen patch tokens, and its Dice score."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, one_hot, softmax

from repmetrics.encoders.encoder import Encoder
from repmetrics.encoders.preprocessing import normalize

STEPS, BATCH, LR, POWER = 2000, 64, 2e-3, 0.9
SMOOTH = 1e-5
"""Added to numerator and denominator of the Dice loss, so that it is finite for an absent class."""


class Decoder(nn.Sequential):
    """Two stages of 2 × upsampling and a 3 × 3 convolution: tokens (B, D, h, w) → logits (B, K, 4h, 4w).

    The design follows the multi-scale head of DINOv2's authors, which kaiko-eva has as ConvDecoderMS.
    """

    def __init__(self, width: int, classes: int) -> None:
        super().__init__(
            nn.Upsample(scale_factor=2),
            nn.Conv2d(width, 64, 3, padding=1),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(64, classes, 3, padding=1),
        )


@torch.no_grad()
def tokens(encoder: Encoder, images: Tensor, *, on_batch: Callable[[int], None] = lambda _: None) -> Tensor:
    """Patch tokens of a ViT after the last norm: images (N, 3, S, S) uint8 → (N, D, h, w) float16.

    Images are resized to the encoder's size, antialiased. All tokens are kept in memory, hence half precision.
    """
    model: Any = encoder.model
    if not hasattr(model, "num_prefix_tokens") or not hasattr(model, "patch_embed"):
        raise ValueError(f"{encoder.arch} has no patch tokens: segmentation needs a vision transformer")
    side, device = encoder.image_size, next(model.parameters()).device
    grid = tuple(side // p for p in model.patch_embed.patch_size)
    batches = []
    for batch in images.split(BATCH):
        pixels = batch.to(device).float() / 255
        resized = interpolate(pixels, size=(side, side), mode="bilinear", antialias=True, align_corners=False)
        features = model.forward_features(normalize(resized.clamp(0, 1), mean=encoder.mean, std=encoder.std))
        patches = features[:, model.num_prefix_tokens :].unflatten(1, grid).permute(0, 3, 1, 2)
        batches.append(patches.half().cpu())
        on_batch(len(batch))
    return torch.cat(batches)


def dice_loss(logits: Tensor, target: Tensor) -> Tensor:
    r"""1 − mean of (2·Σ p·y + ε)/(Σ p + Σ y + ε) over images and classes, p the softmax, sums over pixels."""
    p, y = softmax(logits, 1), one_hot(target, logits.shape[1]).permute(0, 3, 1, 2)
    overlap, total = (p * y).sum((2, 3)), (p + y).sum((2, 3))
    return 1 - ((2 * overlap + SMOOTH) / (total + SMOOTH)).mean()


def dice_score(predicted: Tensor, target: Tensor, *, classes: int) -> float:
    """Mean Dice, 2·|A ∩ B|/(|A| + |B|), over the classes of each image but background, then over images.

    A class absent from an image's target is left out of that image's mean. An image without any class is left out of
    the mean over images. This is MONAI's convention, which eva uses. torchmetrics counts an absent class as 0 where it
    is predicted, and divides in float32.

    Example:
        >>> target = torch.tensor([[[1, 1], [0, 2]]])
        >>> dice_score(torch.tensor([[[1, 0], [0, 2]]]), target, classes=4)   # (2/3 + 1)/2
        0.8333...
    """
    per_image = []
    for p, t in zip(predicted, target, strict=True):
        present = [k for k in range(1, classes) if bool((t == k).any())]
        scores = [2 * float(((p == k) & (t == k)).sum()) / float((p == k).sum() + (t == k).sum()) for k in present]
        if scores:
            per_image.append(sum(scores) / len(scores))
    return sum(per_image) / len(per_image) if per_image else math.nan


def train_decoder(
    features: Tensor, masks: Tensor, *, classes: int, seed: int, steps: int = STEPS, device: str = "cpu"
) -> Decoder:
    """Train a decoder with the Dice loss and AdamW; the learning rate decays to 0 polynomially with power 0.9."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        decoder = Decoder(features.shape[1], classes).to(device)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=LR)
    schedule = torch.optim.lr_scheduler.PolynomialLR(optimizer, total_iters=steps, power=POWER)
    order = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        if not len(order):
            order = torch.randperm(len(features), generator=generator)
        rows, order = order[:BATCH], order[BATCH:]
        logits = decoder(features[rows].to(device, torch.float32))
        loss = dice_loss(_upsample_to(logits, masks), masks[rows].to(device, torch.int64))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return decoder.eval()


@torch.no_grad()
def predict(decoder: Decoder, features: Tensor, masks: Tensor, *, device: str = "cpu") -> Tensor:
    """Most likely class of each pixel (N, H, W), in the size of `masks`."""
    batches = (batch.to(device, torch.float32) for batch in features.split(BATCH))
    return torch.cat([_upsample_to(decoder(batch), masks).argmax(1).cpu() for batch in batches])


def _upsample_to(logits: Tensor, masks: Tensor) -> Tensor:
    return interpolate(logits, size=masks.shape[-2:], mode="bilinear", align_corners=False)
