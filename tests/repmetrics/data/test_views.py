"""Fixed view sets: pure functions of seed and index, with the ranges that their names state."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from repmetrics.data.views import VIEW_SETS, ViewSet, counter_uniforms, quarter_turns


def images(n: int = 12, side: int = 16, *, seed: int = 0) -> Tensor:
    return torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(seed))


def plain(**changes: object) -> ViewSet:
    """A view set that changes nothing but for ``changes``."""
    identity = ViewSet("plain", area=(1.0, 1.0), log_aspect=0.0, flip=0.0)
    return replace(identity, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", VIEW_SETS)
def test_views_are_functions_of_seed_index_and_view(name: str) -> None:
    x = images()
    before = torch.get_rng_state()
    whole = VIEW_SETS[name].draw(x)
    assert torch.equal(torch.get_rng_state(), before)
    part = VIEW_SETS[name].draw(x[5:9], indices=torch.arange(5, 9))
    torch.testing.assert_close(part, whole[5:9], rtol=0, atol=1e-6)
    for other in (VIEW_SETS[name].draw(x, view=1), VIEW_SETS[name].draw(x, seed=1)):
        assert (other - whole).abs().flatten(1).amax(1).min() > 1e-3  # each image has another view


def test_numbers_are_uniform_and_independent() -> None:
    u = counter_uniforms(7, np.arange(4000), 0, n=6)
    assert u.min() >= 0
    assert u.max() < 1
    assert np.abs(u.mean(0) - 0.5).max() < 4 * np.sqrt(1 / 12 / 4000)
    correlation = np.corrcoef(np.concatenate([u, counter_uniforms(7, np.arange(4000), 1, n=6)], 1).T)
    assert np.abs(correlation - np.eye(12)).max() < 4.5 / np.sqrt(4000)
    assert len(np.unique(u)) == u.size


def test_a_view_set_that_changes_nothing_returns_the_images() -> None:
    x = images()
    torch.testing.assert_close(plain().draw(x), x, rtol=0, atol=1e-5)
    pixels = (x * 255).round().to(torch.uint8)
    assert torch.equal(plain().draw(pixels), pixels)


def test_flips_and_symmetries() -> None:
    x = images(200, 6)
    flipped = plain(flip=0.5).draw(x)
    same = [torch.allclose(view, image, atol=1e-5) for view, image in zip(flipped, x, strict=True)]
    mirrored = [torch.allclose(view, image.flip(-1), atol=1e-5) for view, image in zip(flipped, x, strict=True)]
    assert all(a != b for a, b in zip(same, mirrored, strict=True))
    assert 70 < sum(mirrored) < 130  # 4 standard deviations of 200 fair draws
    turned = plain(flip=0.5, symmetries=True).draw(x)
    eight = [turn(y) for y in (x, x.flip(-1)) for turn in (lambda z, k=k: z.rot90(k, (-2, -1)) for k in range(4))]
    hits = torch.stack([(turned - each).abs().flatten(1).amax(1) < 1e-5 for each in eight])
    assert torch.equal(hits.sum(0), torch.ones(200, dtype=torch.int64))
    assert hits.sum(1).min() > 6  # 25 expected of each


def test_crops_have_the_area_and_aspect_of_their_range() -> None:
    """Views of a ramp: the difference of the outer pixels is the side of the crop."""
    side, n = 33, 500
    ramp = torch.linspace(0, 1, side).expand(1, side, side)
    x = torch.stack([ramp, ramp.mT, ramp * 0]).squeeze(1).expand(n, 3, side, side)
    views = replace(VIEW_SETS["geometry"], flip=0.0).draw(x)
    width = (views[:, 0, 16, -2] - views[:, 0, 16, 1]).abs() * (side - 1) / (side - 3)
    height = (views[:, 1, -2, 16] - views[:, 1, 1, 16]).abs() * (side - 1) / (side - 3)
    area, aspect = width * height, (width / height).log()
    assert 0.19 < area.min() < 0.25
    assert 0.85 < area.max() < 1.02  # sides beyond the image are cut to it
    assert 0.25 < aspect.abs().max() < 0.3
    assert abs(aspect.mean()) < 0.03


def test_color_is_jittered_as_stated() -> None:
    x = images(400)
    weights = torch.tensor([0.299, 0.587, 0.114])[:, None, None]
    gray = (x * weights).sum(1, keepdim=True)
    bright = plain(jitter=1.0, brightness=0.4).draw(x / 2)
    factor = bright.flatten(1).sum(1) / (x / 2).flatten(1).sum(1)
    assert 0.6 <= factor.min() < 0.62 < 1.38 < factor.max() <= 1.4
    colorless = plain(gray=1.0).draw(x)
    torch.testing.assert_close(colorless, gray.expand(-1, 3, -1, -1), rtol=0, atol=1e-5)
    mixed = plain(jitter=0.5, channels=0.15).draw(x / 2)
    unchanged = (mixed - x / 2).abs().flatten(1).amax(1) < 1e-5
    assert 160 < unchanged.sum() < 240
    tint = (mixed / (x / 2)).flatten(2).median(2).values[~unchanged]
    assert 0.85 <= tint.min() < 0.88 < 1.12 < tint.max() <= 1.15 + 1e-5
    contrast = plain(jitter=1.0, contrast=0.4).draw(0.4 + x / 5)
    # contrast keeps the mean gray
    means = ((contrast * weights).sum(1).mean((1, 2)), ((0.4 + x / 5) * weights).sum(1).mean((1, 2)))
    torch.testing.assert_close(*means, rtol=1e-4, atol=1e-5)


def test_the_named_sets_are_those_of_the_evidence() -> None:
    assert str(VIEW_SETS["natural"]) == (
        "natural: crop 0.2–1 of the area, ln aspect ± 0.29, flip 0.5, jitter 0.8: brightness ± 0.4, contrast ± 0.4, "
        "saturation ± 0.4, channels ± 0.15, gray 0.2"
    )
    assert str(VIEW_SETS["weak"]) == (
        "weak: crop 0.6–1 of the area, ln aspect ± 0.29, flip 0.5, jitter 0.8: brightness ± 0.13, contrast ± 0.13, "
        "saturation ± 0.13, channels ± 0.05"
    )
    assert not VIEW_SETS["geometry"].colored


def test_geometry_takes_any_images_and_color_says_what_it_takes() -> None:
    normalized = 3 * images() - 1
    assert VIEW_SETS["geometry"].draw(normalized).min() < 0
    assert VIEW_SETS["geometry"].draw(torch.rand(2, 5, 8, 6)).shape == (2, 5, 8, 6)
    with pytest.raises(ValueError, match=r"uint8 images or floats in 0 … 1, got -1 … 2: give images before"):
        VIEW_SETS["natural"].draw(normalized.round())
    with pytest.raises(ValueError, match=r"natural views take images \(B, 3, H, W\), got \(2, 5, 8, 6\)"):
        VIEW_SETS["natural"].draw(torch.rand(2, 5, 8, 6))
    with pytest.raises(ValueError, match=r"indices must be \(12,\), one per image, got \(2,\)"):
        VIEW_SETS["weak"].draw(images(), indices=[0, 1])


def test_quarter_turns() -> None:
    x = images(2, 5)
    turns = quarter_turns(x)
    assert turns.shape == (4, 2, 3, 5, 5)
    assert torch.equal(turns[2], x.flip(-1).flip(-2))
    assert torch.equal(turns[1].rot90(1, (-2, -1)), turns[2])
    with pytest.raises(ValueError, match=r"square images \(B, C, S, S\), got \(2, 3, 5, 4\)"):
        quarter_turns(x[..., :4])
