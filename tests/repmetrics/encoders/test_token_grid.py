"""Tokens as grids, and the submodule they are read from."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import Tensor, nn

from repmetrics.encoders.token_grid import TokenReader, as_grid


@pytest.mark.parametrize("prefix", [0, 1, 5, 17])
def test_tokens_in_front_of_the_grid_are_left_out(prefix: int) -> None:
    grid = torch.arange(2 * 196 * 3.0).reshape(2, 14, 14, 3)
    tokens = torch.cat([torch.full((2, prefix, 3), -1.0), grid.flatten(1, 2)], dim=1)
    for known in (None, prefix):
        read = as_grid(tokens, height=224, width=224, prefix=known)
        assert read is not None
        assert torch.equal(read, grid)


def test_the_grid_has_the_proportions_of_the_image() -> None:
    tokens = torch.zeros(1, 8 * 16 + 1, 4)
    assert as_grid(tokens, height=128, width=256).shape == (1, 8, 16, 4)  # type: ignore[union-attr]
    assert as_grid(tokens, height=256, width=128).shape == (1, 16, 8, 4)  # type: ignore[union-attr]
    assert as_grid(torch.zeros(1, 31, 4), height=224, width=224, prefix=0) is None
    assert as_grid(torch.zeros(2, 16, 32, 32), height=64, width=64).shape == (2, 32, 32, 16)  # type: ignore[union-attr]
    assert as_grid(torch.zeros(2, 7, 7, 16), height=224, width=224).shape == (2, 7, 7, 16)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("model", "options", "path", "shape"),
    [
        ("vit_tiny_patch16_224", {"img_size": 64, "depth": 2, "reg_tokens": 4}, "norm", (2, 4, 4, 192)),
        ("resnet18", {}, "layer4", (2, 2, 2, 512)),
        ("swin_tiny_patch4_window7_224", {"img_size": 64, "depths": (1, 1), "window_size": 2}, "norm", (2, 8, 8, 192)),
    ],
)
def test_the_last_tokens_are_those_of_the_model(
    model: str, options: dict[str, object], path: str, shape: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    encoder = timm.create_model(model, num_classes=0, **options).eval()
    images = torch.randn(2, 3, 64, 64)
    expected = encoder.forward_features(images)
    if model.startswith("vit"):
        expected = expected[:, 5:].reshape(shape)
    elif model.startswith("resnet"):
        expected = expected.permute(0, 2, 3, 1)
    reader = TokenReader(encoder)
    with reader:
        encoder(images)
    again = TokenReader(encoder, reader.path)
    with again:
        encoder(images)
    for each in (reader, again):
        grid = each.grid(images)
        assert grid is not None
        assert grid.shape == shape
        torch.testing.assert_close(grid, expected)
    assert (reader.path or "").startswith(path)
    assert not any(module._forward_hooks for module in encoder.modules())


class Rows(nn.Module):
    """An encoder without positions."""

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)


def test_an_encoder_without_tokens_has_no_grid() -> None:
    images = torch.randn(2, 3, 8, 8)
    for encoder in (Rows(), torch.compile(nn.Conv2d(3, 4, 2, 2), backend="eager")):
        reader = TokenReader(encoder)
        with reader:
            encoder(images)
        assert reader.grid(images) is None
