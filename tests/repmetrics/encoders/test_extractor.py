"""Outputs of encoders in use as one vector per image, and the remedies that errors offer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import ViTMAEConfig, ViTMAEForPreTraining
from transformers.modeling_outputs import BaseModelOutputWithPooling

from repmetrics.encoders.extractor import FeatureExtractor

IMAGES = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
VECTORS = IMAGES.flatten(1)[:, :5]
TOKENS = IMAGES.flatten(2)  # (6, 3, 64)


class Returns(nn.Module):
    """Module that returns something made from its images."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output

    def forward(self, images: Tensor) -> Any:
        return self.output(images.flatten(1)[:, :5], images.flatten(2))


def root(output: Any) -> nn.Module:
    module = nn.Module()
    module.teacher = nn.ModuleList([nn.Identity(), Returns(output)])
    return module


def remedy(error: BaseException) -> Any:
    """What a user copies from the message."""
    return eval(str(error).split("encoder=")[1])


OUTPUTS = [
    (lambda v, t: (v, t), VECTORS),
    (lambda v, t: [t.long(), t.sum(), v, v + 1], VECTORS),
    (lambda v, t: {"loss": v.sum(), "logits": v + 1, "feats": v, "z": v + 2}, VECTORS),
    (lambda v, t: {"loss": v.sum(), "logits": v + 1, "z": v}, VECTORS),
    (lambda v, t: BaseModelOutputWithPooling(last_hidden_state=t, pooler_output=v), TOKENS.mean(1)),
    (lambda v, t: {"x_norm_patchtokens": t, "x_norm_clstoken": v, "masks": None}, VECTORS),
]


@pytest.mark.parametrize(("output", "expected"), OUTPUTS)
@pytest.mark.parametrize("path", [None, "teacher.1", "module"])
def test_the_remedy_for_several_tensors_works_as_printed(output: Any, expected: Tensor, path: str | None) -> None:
    module = Returns(output) if path is None else root(output)
    encoder = module.get_submodule("teacher.1") if path == "module" else path
    with pytest.raises(TypeError, match=r"the encoder must return|encoder 'teacher.1' must return") as caught:
        FeatureExtractor(module, encoder)(IMAGES)
    features = FeatureExtractor(module, remedy(caught.value))(IMAGES)
    assert torch.equal(features[""], expected)


def test_the_remedy_leaves_tokens_to_pool() -> None:
    module = Returns(lambda v, t: {"loss": v.sum(), "last_hidden_state": t, "mask": v})
    with pytest.raises(TypeError) as caught:
        FeatureExtractor(module, pool="cls")(IMAGES)
    assert torch.equal(FeatureExtractor(module, remedy(caught.value), pool="cls")(IMAGES)[""], TOKENS[:, 0])


def test_the_remedy_for_a_function_and_for_an_encoder_elsewhere() -> None:
    pair = Returns(lambda v, t: (v, t))
    with pytest.raises(TypeError, match=r"encoder=lambda module, images: your_encoder\(images\)\[0\]"):
        FeatureExtractor(nn.Identity(), pair)(IMAGES)
    with pytest.raises(TypeError, match=r"encoder=lambda module, images: your_function\(module, images\)\[0\]"):
        FeatureExtractor(nn.Identity(), lambda module, images: (images, images))(IMAGES)


def test_a_masked_autoencoder_of_hugging_face() -> None:
    config = ViTMAEConfig(
        image_size=8, patch_size=4, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
        decoder_hidden_size=8, decoder_num_hidden_layers=1, decoder_num_attention_heads=2, decoder_intermediate_size=8,
    )  # fmt: skip
    module = ViTMAEForPreTraining(config).eval()
    with pytest.raises(TypeError, match=r"module\.vit\(images\)\['last_hidden_state'\]\.mean\(1\)") as caught:
        FeatureExtractor(module, "vit")(IMAGES)
    assert FeatureExtractor(module, remedy(caught.value))(IMAGES)[""].shape == (6, 8)


@pytest.mark.parametrize("output", [lambda v, t: (t, None), lambda v, t: {"loss": v.sum(), "tokens": t}])
def test_the_only_tensor_stands_for_the_output(output: Any) -> None:
    assert torch.equal(FeatureExtractor(Returns(output), pool="mean")(IMAGES)[""], TOKENS.mean(1))


def test_a_layer_that_returns_several_tensors_is_named() -> None:
    module = nn.Sequential(Returns(lambda v, t: (v, t)), Returns(lambda v, t: v))
    module.forward = lambda images: (module[0](images), module[1](images))[1]  # type: ignore[method-assign]
    with pytest.raises(TypeError, match=r"layer '0' must return one tensor, .*: name a layer that returns one"):
        FeatureExtractor(module, layers=["0"])(IMAGES)


def test_maps_of_one_position_are_vectors() -> None:
    """The usual backbone of lightly: a ResNet without its last layer."""
    module = nn.Sequential(nn.Conv2d(3, 5, 3), nn.AdaptiveAvgPool2d(1))
    features = FeatureExtractor(module)(IMAGES)[""]
    assert torch.equal(features, module(IMAGES)[:, :, 0, 0])
