"""Stain densities, restaining and stain views."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from fmtrain.patches.stains import SCALE, SHIFT, STAIN, STAINS, restain, stain_densities
from repmetrics.data.views import find_view_set


def tissue(n: int = 6, side: int = 24, *, seed: int = 0) -> Tensor:
    """(n, 3, side, side) in 0 … 1: pixels with 0.2 … 1.2 units of hematoxylin and of eosin, no residual."""
    amounts = 0.2 + torch.rand(n, side, side, 2, generator=torch.Generator().manual_seed(seed))
    return torch.exp(-amounts @ STAINS[:2]).movedim(-1, 1)


def test_densities_are_beers_and_lamberts() -> None:
    images = tissue()
    density = -np.log(images.double().numpy())
    expected = np.moveaxis(np.moveaxis(density, 1, -1) @ np.linalg.inv(STAINS.double().numpy()), -1, 1)
    np.testing.assert_allclose(stain_densities(images).numpy(), expected, atol=1e-5)
    assert stain_densities(images)[:, 2].abs().max() < 1e-5
    pixels = (images * 255).round().to(torch.uint8)
    # half a gray level of 20 … 200
    torch.testing.assert_close(stain_densities(pixels), stain_densities(images), rtol=0, atol=0.08)


def test_restaining_scales_and_shifts_densities() -> None:
    images = tissue()
    scale, shift = torch.tensor([[1.1, 0.9, 1.0]]).expand(6, 3), torch.tensor([[0.1, 0.05, 0.0]]).expand(6, 3)
    before, after = stain_densities(images), stain_densities(restain(images, scale, shift))
    expected = before * scale[..., None, None] + shift[..., None, None]
    torch.testing.assert_close(after, expected, rtol=0, atol=1e-4)


def test_stain_views_change_density_within_their_range_and_no_residual() -> None:
    flat = torch.exp(-(torch.tensor([[1.0, 1.0]]) @ STAINS[:2]))[..., None, None].expand(500, 3, 8, 8)
    density = stain_densities(STAIN.draw(flat)).mean((2, 3))
    low, high = 1 - SCALE - SHIFT, 1 + SCALE + SHIFT
    for stain in (0, 1):
        assert low <= density[:, stain].min() < low + 0.05
        assert high - 0.05 < density[:, stain].max() <= high
    assert density[:, 2].abs().max() < 1e-4
    assert abs(np.corrcoef(density[:, :2].T.numpy())[0, 1]) < 0.2  # the stains change independently


def test_the_set_is_registered_by_name() -> None:
    assert find_view_set("stain") is STAIN
    assert str(STAIN).endswith(
        "flip 0.5, all symmetries of the square, density of hematoxylin and of eosin × 1 ± 0.2, + ± 0.05"
    )
    with pytest.raises(ValueError, match="view set 'heavy': choose among geometry, natural, weak, turned, stain"):
        find_view_set("heavy")
