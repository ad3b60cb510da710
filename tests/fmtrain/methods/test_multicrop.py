from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter
from torchvision.transforms import functional as TF

from fmtrain.methods.multicrop import MultiCrop, gaussian_blur
from fmtrain.patches.stains import STAINS

IDENTITY_OPTIONS: dict[str, Any] = {
    "global_crops_scale": (1.0, 1.0), "ratio": (1.0, 1.0), "horizontal_flip": 0.0, "vertical_flip": 0.0,
    "rotate90": 0.0, "jitter": 0.0, "grayscale": 0.0, "stain_jitter": 0.0, "blur": (0.0, 0.0, 0.0),
    "local_crops_number": 0,
}  # fmt: skip
IDENTITY = MultiCrop(global_crops_size=32, **IDENTITY_OPTIONS)


def noise(batch: int, size: int, *, low: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(low, 256, (batch, 3, size, size), generator=generator, dtype=torch.uint8)


def ramp(batch: int, size: int) -> torch.Tensor:
    """Patches whose red is x and green is y, in 0…1: the colors of a crop give its position."""
    axis = (torch.arange(size) + 0.5) / size
    return torch.stack([axis.expand(size, size), axis[:, None].expand(size, size), torch.full((size, size), 0.5)])[
        None
    ].repeat(batch, 1, 1, 1)


def test_with_everything_off_a_view_is_the_patch() -> None:
    images = noise(4, 32)
    views = IDENTITY(images, step=3)
    # log and exp of the stain jitter change the last digits
    torch.testing.assert_close(views.global_crops[0], images / 255, atol=2e-6, rtol=0)
    torch.testing.assert_close(views.global_crops[1], images / 255, atol=2e-6, rtol=0)
    assert views.local_crops.shape == (0, 4, 3, 96, 96)


@pytest.mark.parametrize("size", [16, 24, 48])
def test_resizing_is_bilinear(size: int) -> None:
    images = noise(2, 32)
    expected = F.interpolate(images / 255, size=(size, size), mode="bilinear", align_corners=False)
    views = replace(IDENTITY, global_crops_size=size)(images, step=0)
    torch.testing.assert_close(views.global_crops[0], expected, atol=1e-5, rtol=0)


def test_a_crop_shows_its_box() -> None:
    crops = replace(
        IDENTITY,
        global_crops_scale=(0.3, 0.6),
        local_crops_scale=(0.05, 0.3),
        ratio=(0.5, 2.0),
        local_crops_number=3,
        local_crops_size=16,
    )
    batch, boxes = crops(ramp(8, 64), step=0), crops.draw(8, step=0).box
    for size, views, box in ((32, batch.global_crops, boxes[:2]), (16, batch.local_crops, boxes[2:])):
        first, last = views[..., 0, 0][..., :2], views[..., -1, -1][..., :2]
        half_pixel = box[..., 2:] / size / 2
        inside = ((box[..., :2] - box[..., 2:] / 2 > 1 / 64) & (box[..., :2] + box[..., 2:] / 2 < 63 / 64)).all(-1)
        assert inside.any()  # at the patch's border the ramp is cut off
        lower, upper = box[..., :2] - box[..., 2:] / 2 + half_pixel, box[..., :2] + box[..., 2:] / 2 - half_pixel
        torch.testing.assert_close(first[inside], lower[inside], atol=1e-5, rtol=0)
        torch.testing.assert_close(last[inside], upper[inside], atol=1e-5, rtol=0)


def test_boxes_follow_scale_and_ratio_and_stay_inside() -> None:
    box = (
        MultiCrop(global_crops_scale=(0.3, 0.6), local_crops_scale=(0.05, 0.3), ratio=(0.75, 4 / 3))
        .draw(500, step=0)
        .box
    )
    center, extent = box[..., :2], box[..., 2:]
    assert (center - extent / 2 > -1e-6).all()
    assert (center + extent / 2 < 1 + 1e-6).all()
    area, ratio = extent.prod(-1), extent[..., 0] / extent[..., 1]
    assert 0.3 - 1e-6 <= area[:2].min() < 0.31 < 0.59 < area[:2].max() <= 0.6 + 1e-6
    assert 0.05 - 1e-6 <= area[2:].min() < 0.06 < 0.29 < area[2:].max() <= 0.3 + 1e-6
    assert 0.75 - 1e-5 <= ratio.min() < 0.77 < 1.3 < ratio.max() <= 4 / 3 + 1e-5
    assert abs(ratio.log().mean()) < 0.01  # symmetric in the logarithm: standard error 0.0024


def test_extended_context_shifts_crops_through_real_tissue_at_the_same_scale() -> None:
    """A patch of 96 px is two fields of 48 px wide; the colors of a pixel give its position in the patch."""
    options: dict[str, Any] = {"global_crops_size": 24, "global_crops_scale": (0.25, 1.0), "ratio": (0.5, 2.0)}
    crops = replace(IDENTITY, **options, context=2.0)
    x, y = crops(ramp(400, 96), step=0).global_crops[:, :, :2].mul(96).unbind(2)
    box = crops.draw(400, step=0).box
    # no border is stretched: the distance of neighbors is constant in a crop
    for position, extent, steps in ((x, box[..., 2], x.diff(dim=-1)), (y, box[..., 3], y.diff(dim=-2))):
        inside = (position.amin((-1, -2)) > 0.51) & (position.amax((-1, -2)) < 95.49)
        distances = steps.flatten(2)[inside]
        expected = (extent * 96 / 24)[inside]
        torch.testing.assert_close(distances, expected[:, None].expand_as(distances), atol=1e-3, rtol=0)
    # the size of crops of a patch of 48 px, except those that such a patch would have cut off
    area, ratio = box[..., 2:].prod(-1) * 4, box[..., 2] / box[..., 3]
    assert 0.25 - 1e-6 <= area.min() < 0.3
    assert 0.95 < area.max() <= 1 + 1e-6
    assert ratio.max() > 1.9
    without = replace(crops, context=1.0).draw(400, step=0).box[..., 2:]
    torch.testing.assert_close((box[..., 2:] * 2).clamp(max=1), without)
    # and they cover the patch: without context they would move by less than half a field
    center = box[..., 0] * 96
    assert center.min() < 24
    assert center.max() > 72
    assert (center[0] - center[1]).abs().max() > 48


def test_all_eight_symmetries_are_equally_frequent_and_exact() -> None:
    image = noise(1, 32)
    crops = replace(IDENTITY, horizontal_flip=0.5, vertical_flip=0.5, rotate90=1.0)
    views = crops(image.expand(1600, -1, -1, -1), step=1).global_crops[0]
    counts = []
    for flip, turns in itertools.product((False, True), range(4)):
        expected = torch.rot90(image.flip(-1) if flip else image, turns, (-2, -1)) / 255
        counts.append(int((views - expected).abs().flatten(1).amax(1).lt(1e-4).sum()))
    assert sum(counts) == 1600
    assert min(counts) > 140  # 200 expected, standard deviation 13
    assert max(counts) < 260


def test_flip_probabilities_are_kept() -> None:
    image = noise(1, 8)
    never = replace(IDENTITY, global_crops_size=8, horizontal_flip=1.0)(image, step=0).global_crops[0]
    torch.testing.assert_close(never, image.flip(-1) / 255, atol=1e-5, rtol=0)
    vertical = replace(IDENTITY, global_crops_size=8, vertical_flip=1.0)(image, step=0).global_crops[0]
    torch.testing.assert_close(vertical, image.flip(-2) / 255, atol=1e-5, rtol=0)


def test_same_seed_and_step_same_views_and_no_global_randomness() -> None:
    crops = MultiCrop(global_crops_size=16, local_crops_size=8, local_crops_number=2)
    images = noise(4, 24)
    before = torch.get_rng_state()
    first = crops(images, step=5)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    second = crops(images, step=5)
    assert torch.equal(first.global_crops, second.global_crops)
    assert torch.equal(first.local_crops, second.local_crops)
    assert not torch.equal(first.global_crops, crops(images, step=6).global_crops)
    assert not torch.equal(first.global_crops, replace(crops, seed=1)(images, step=5).global_crops)


def test_every_sample_and_view_has_separate_parameters() -> None:
    drawn = MultiCrop(local_crops_number=4).draw(16, step=0)
    assert len(torch.unique(drawn.box[2:, :, 0])) == 4 * 16
    assert len(torch.unique(drawn.brightness[drawn.brightness != 1])) > 60  # 8 of 10 are jittered


def test_ranks_share_the_views_of_one_batch() -> None:
    crops = MultiCrop(global_crops_size=16, local_crops_size=8, local_crops_number=2)
    images = noise(6, 24)
    whole = crops(images, step=2)
    for rank in range(2):
        part = crops(images[rank::2], step=2, rank=rank, world_size=2)
        # batched and single kernels may differ in the last place
        torch.testing.assert_close(part.global_crops, whole.global_crops[:, rank::2], atol=1e-6, rtol=0)
        torch.testing.assert_close(part.local_crops, whole.local_crops[:, rank::2], atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation"])
def test_color_jitter_is_torchvisions(name: str) -> None:
    off = {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0}
    crops = replace(IDENTITY, jitter=1.0, **(off | {name: 0.5}))
    images = noise(6, 32, low=2)
    factors = getattr(crops.draw(6, step=0), name)[0]
    assert factors.std() > 0.1
    adjust = getattr(TF, f"adjust_{name}")
    expected = torch.stack([adjust(image / 255, float(f)) for image, f in zip(images, factors, strict=True)])
    # the weights of gray are 0.2989, 0.587, 0.114 in torchvision, with a sum below 1, and 0.299, 0.587, 0.114 here
    torch.testing.assert_close(crops(images, step=0).global_crops[0], expected.clamp(1 / 255, 1), atol=3e-4, rtol=0)


def test_hue_keeps_luma_and_half_a_turn_inverts_chroma() -> None:
    images = torch.rand((4, 3, 8, 8), generator=torch.Generator().manual_seed(0)) * 0.2 + 0.4
    crops = replace(IDENTITY, global_crops_size=8, jitter=1.0, brightness=0.0, contrast=0.0, saturation=0.0, hue=0.5)
    luma = torch.tensor([0.299, 0.587, 0.114])
    turned = crops(images, step=0).global_crops[0]
    torch.testing.assert_close(
        torch.einsum("bchw,c->bhw", turned, luma), torch.einsum("bchw,c->bhw", images, luma), atol=1e-5, rtol=0
    )
    assert (turned - images).abs().max() > 0.02


def test_grayscale_has_no_color() -> None:
    view = replace(IDENTITY, grayscale=1.0)(noise(3, 32), step=0).global_crops[0]
    torch.testing.assert_close(view[:, 0], view[:, 1], atol=1e-5, rtol=0)
    torch.testing.assert_close(view[:, 0], view[:, 2], atol=1e-5, rtol=0)


def test_stain_jitter_against_beer_and_lambert() -> None:
    crops = replace(IDENTITY, stain_jitter=1.0, stain=0.2)
    images = noise(3, 32)
    drawn = crops.draw(3, step=0)
    stains = STAINS.double().numpy()
    for i in range(3):
        density = -np.log(images[i].double().numpy() / 255).reshape(3, -1).T  # (pixels, 3)
        amounts = density @ np.linalg.inv(stains)
        amounts = amounts * drawn.stain_scale[0, i].double().numpy() + drawn.stain_shift[0, i].double().numpy()
        expected = np.exp(-amounts @ stains).clip(max=1).T.reshape(3, 32, 32)
        view = crops(images, step=0).global_crops[0, i].numpy()
        np.testing.assert_allclose(view, expected, atol=1e-5)
    assert np.abs(view - images[2].numpy() / 255).max() > 0.02


@pytest.mark.parametrize("sigma", [0.3, 1.0, 2.0])
@pytest.mark.parametrize(("height", "width"), [(40, 33), (64, 5), (34, 96)])  # also sides within the radius
def test_blur_is_scipys_gaussian_up_to_the_edges(sigma: float, height: int, width: int) -> None:
    images = torch.rand((2, 3, height, width), generator=torch.Generator().manual_seed(0))
    blurred = gaussian_blur(images, sigma=torch.tensor([sigma, 2 * sigma]), radius=12)
    for image, result, width in zip(images.numpy(), blurred, (sigma, 2 * sigma), strict=True):
        expected = gaussian_filter(image, width, radius=math.ceil(3 * width), axes=(1, 2), mode="nearest")
        torch.testing.assert_close(result, torch.from_numpy(expected), atol=1e-6, rtol=0)


@pytest.mark.parametrize("widest", [2.0, 4.0])
def test_views_are_blurred_by_separate_sigmas(widest: float) -> None:
    crops = replace(IDENTITY, blur=(1.0, 1.0, 0.0), blur_sigma=(0.1, widest))
    images = noise(40, 32)
    sigma = crops.draw(40, step=0).sigma
    assert sigma.max() > 0.9 * widest
    views = crops(images, step=0).global_crops
    expected = gaussian_blur((images / 255).repeat(2, 1, 1, 1), sigma=sigma.flatten(), radius=16)
    torch.testing.assert_close(views.flatten(0, 1), expected, atol=1e-6, rtol=0)


def test_stain_jitter_changes_only_the_selected_views() -> None:
    images = noise(40, 16)
    crops = replace(IDENTITY, global_crops_size=16, stain_jitter=0.5, stain=0.3)
    changed = (crops(images, step=0).global_crops - images / 255).abs().amax((-1, -2, -3)) > 1e-5
    assert torch.equal(changed, (crops.draw(40, step=0).stain_scale != 1).any(-1))
    assert 20 < changed.sum() < 60


def test_blur_changes_only_the_selected_views() -> None:
    images = noise(4, 32)
    views = replace(IDENTITY, blur=(1.0, 0.0, 0.0), blur_sigma=(1.0, 2.0))(images, step=0)
    torch.testing.assert_close(views.global_crops[1], images / 255, atol=2e-6, rtol=0)
    assert (views.global_crops[0].std(dim=(2, 3)) < 0.5 * (images / 255).std(dim=(2, 3))).all()


def test_solarize_inverts_the_bright_half_of_the_second_view_only() -> None:
    images = noise(4, 32)
    pixels = images / 255
    views = replace(IDENTITY, solarize=1.0)(images, step=0)
    torch.testing.assert_close(views.global_crops[0], pixels, atol=2e-6, rtol=0)
    torch.testing.assert_close(views.global_crops[1], torch.where(pixels >= 0.5, 1 - pixels, pixels), atol=2e-6, rtol=0)


def test_views_are_not_rounded_by_autocast() -> None:
    crops, images = MultiCrop(global_crops_size=16, local_crops_size=8, local_crops_number=1), noise(2, 24)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        views = crops(images, step=0)
    for mixed, full in zip(views, crops(images, step=0), strict=True):
        assert mixed.dtype == torch.float32
        assert torch.equal(mixed, full)


def test_float_patches_are_taken_as_0_to_1() -> None:
    images = noise(2, 24)
    crops = MultiCrop(global_crops_size=16, local_crops_size=8, local_crops_number=1)
    assert torch.equal(crops(images, step=0).global_crops, crops(images / 255, step=0).global_crops)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**9), st.floats(0, 1), st.floats(0, 0.5), st.floats(0, 2))
def test_views_are_finite_and_in_range(step: int, strength: float, hue: float, stain: float) -> None:
    crops = MultiCrop(
        global_crops_size=16, local_crops_size=8, local_crops_number=2, jitter=1, brightness=strength,
        contrast=strength, saturation=strength, hue=hue, stain_jitter=1, stain=stain, solarize=0.5,
    )  # fmt: skip
    for views in crops(noise(3, 20, low=0), step=step):
        assert views.isfinite().all()
        assert views.min() >= 0
        assert views.max() <= 1


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"global_crops_scale": (0.0, 1.0)}, "global_crops_scale must be above 0 and at most 1, got 0"),
        ({"local_crops_scale": (0.5, 0.4)}, "local_crops_scale must be a lower and an upper end"),
        ({"context": 0.5}, r"context must be 1 or more, got 0\.5"),
        ({"local_crops_number": -1}, "local_crops_number must be 0 or more, got -1"),
        ({"blur": (0.5, 0.5)}, "blur needs 3 probabilities"),
        ({"jitter": math.nan}, "jitter must be 0 or more and at most 1, got nan"),
        ({"hue": 0.6}, "hue must be 0 or more and at most 0.5, got 0.6"),
        ({"blur_sigma": (0.0, 1.0)}, "blur_sigma must be above 0, got 0"),
        ({"global_crops_size": 0}, "global_crops_size must be 1 or more, got 0"),
    ],
)
def test_impossible_settings_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MultiCrop(**wrong)


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 1, 8, 8), (2, 3, 8, 9)])
def test_wrong_images_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="square RGB patches"):
        IDENTITY(torch.zeros(shape), step=0)
