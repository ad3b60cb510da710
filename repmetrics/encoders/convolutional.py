"""Convolutional networks from the names and shapes of their weights: ResNet, ConvNeXt."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from typing import Any

from timm.layers.blur_pool import BlurPool2d
from timm.models.convnext import ConvNeXt
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import nn

from repmetrics.encoders.architecture import (
    Architecture,
    Choices,
    StateDict,
    activation,
    construct,
    norm,
    without_values,
)

RESNETS: dict[tuple[type[nn.Module], tuple[int, ...]], int] = {
    (BasicBlock, (2, 2, 2, 2)): 18,
    (BasicBlock, (3, 4, 6, 3)): 34,
    (Bottleneck, (3, 4, 6, 3)): 50,
    (Bottleneck, (3, 4, 23, 3)): 101,
    (Bottleneck, (3, 8, 36, 3)): 152,
}
SMALL_STEM = (
    "a ResNet whose first convolution is 3 × 3: networks for small images differ in its stride and in the pooling that "
    """follows: pass --arch-kwargs '{"stem_stride": 1, "stem_pool": false}' (SimCLR on CIFAR), or other values"""
)
DILATED = (
    "a ResNet in a segmentation model: its last stages have strides or dilations, which no weight determines: pass "
    """--arch-kwargs '{"output_stride": 8}' (torchvision, mmsegmentation), 16 (DeepLab v3+) or 32 (no dilation)"""
)
SEGMENTATION = re.compile(r"(^|\.)(aux_classifier|decode_head|auxiliary_head|classifier\.\d+|segmentation_head)\.")


def infer_resnet(state: StateDict, choices: Choices, *, siblings: Mapping[str, int]) -> Architecture:
    """ResNet with these weights in torchvision's names.

    Args:
        state: Weights.
        choices: What the weights do not determine.
        siblings: Dimensions of the weights next to those of the encoder, by name.
    """
    block = Bottleneck if "layer1.0.conv3.weight" in state else BasicBlock
    layers = tuple(
        1 + max((int(m.group(1)) for key in state if (m := re.match(rf"layer{stage}\.(\d+)\.", key))), default=-1)
        for stage in (1, 2, 3, 4)
    )
    if 0 in layers or "conv1.weight" not in state:
        raise ValueError(f"a ResNet with {layers} blocks per stage is unknown: pass --arch")
    kwargs: dict[str, Any] = {"block": block, "layers": layers, "num_classes": 0}
    if block is Bottleneck:
        planes, per_group = state["layer1.0.conv2.weight"].shape[:2]
        kwargs |= {"cardinality": planes // per_group, "base_width": per_group}
    small = state["conv1.weight"].shape[-1] == 3
    segments = any(SEGMENTATION.search(key) and ndim == 4 for key, ndim in siblings.items())
    stem = {
        "width": state["conv1.weight"].shape[0],
        "kernel": state["conv1.weight"].shape[-1],
        "stride": choices.take("stem_stride", 2, "first stride {}", undetermined=SMALL_STEM if small else ""),
        "pool": choices.take("stem_pool", True, "max pooling after it ({})", undetermined=SMALL_STEM if small else ""),
    }
    kwargs["output_stride"] = choices.take(
        "output_stride", 32, "output stride {}, without dilation", undetermined=DILATED if segments else ""
    )
    # Average pooling is the first layer of these shortcuts: their convolution is the second.
    if any(re.match(r"layer\d\.0\.downsample\.1\.weight", key) and w.ndim == 4 for key, w in state.items()):
        kwargs["avg_down"] = True
    if choices.take("aa_layer", "none", "anti-aliasing {}") != "none":
        kwargs["aa_layer"] = BlurPool2d
    depth = RESNETS.get((block, layers), "x".join(map(str, layers)))
    build = partial(construct, partial(_resnet, stem=stem), kwargs, choices.given)
    return Architecture(f"resnet{depth}", build, without_values(build), 224, choices.notes())


def _resnet(*, stem: Mapping[str, Any], **kwargs: Any) -> nn.Module:
    """ResNet of timm, with another first convolution or without the pooling after it."""
    model = ResNet(**kwargs)
    if stem["kernel"] != 7 or stem["stride"] != 2:
        kernel, device = stem["kernel"], model.conv1.weight.device
        conv = nn.Conv2d(3, stem["width"], kernel, stem["stride"], padding=kernel // 2, bias=False, device=device)
        model.conv1 = conv  # type: ignore[assignment]
    if not stem["pool"]:
        model.maxpool = nn.Identity()  # type: ignore[assignment]
    return model


def is_convnext(state: StateDict) -> bool:
    """Whether weights, in the names of ConvNeXt's repository or of timm, are those of a ConvNeXt."""
    return "stages.0.0.dwconv.weight" in state or "stages.0.blocks.0.conv_dw.weight" in state


def infer_convnext(state: StateDict, choices: Choices) -> Architecture:
    """ConvNeXt, ConvNeXt V2 and DINOv3's ConvNeXt, in the names of their repositories or of timm."""
    depthwise: dict[int, list[Any]] = {}
    for key, value in state.items():
        if match := re.match(r"stages\.(\d+)\.(?:blocks\.)?\d+\.(?:dwconv|conv_dw)\.weight$", key):
            depthwise.setdefault(int(match[1]), []).append(value.shape)
    stem = state.get("downsample_layers.0.0.weight", state.get("stem.0.weight"))
    overlapping = any(re.match(r"stem\.[1-9]\.weight$", key) and value.ndim == 4 for key, value in state.items())
    if stem is None or overlapping or sorted(depthwise) != [0, 1, 2, 3]:
        raise ValueError("a ConvNeXt with another stem or number of stages: name the architecture with --arch")
    pointwise = re.compile(r"stages\.0\.(blocks\.)?0\..*(pwconv1|fc1)\.weight")
    first = next(value for key, value in state.items() if pointwise.match(key))
    kwargs: dict[str, Any] = {
        "depths": tuple(len(depthwise[i]) for i in range(4)), "dims": tuple(depthwise[i][0][0] for i in range(4)),
        "kernel_sizes": tuple(depthwise[i][0][-1] for i in range(4)), "patch_size": stem.shape[-1],
        "ls_init_value": 1e-6 if any(key.endswith("gamma") and "grn" not in key for key in state) else None,
        "use_grn": any(".grn." in key for key in state), "conv_mlp": first.ndim == 4, "num_classes": 0,
        "head_norm_first": "norm_pre.weight" in state,
        "act_layer": activation(choices.take("act_layer", "gelu", "activation {}")),
    }  # fmt: skip
    eps = choices.take("norm_eps", 1e-6, "epsilon {:.3g} of the last norm")
    name = f"convnext_{'-'.join(map(str, kwargs['depths']))}x{kwargs['dims'][0]}"
    build = partial(construct, partial(_convnext, eps=eps), kwargs, choices.given)
    return Architecture(name, build, without_values(build), 224, choices.notes())


def _convnext(*, eps: Any, **kwargs: Any) -> nn.Module:
    """ConvNeXt of timm, whose last norm has its own epsilon."""
    model = ConvNeXt(**kwargs)
    last = model.norm_pre if kwargs["head_norm_first"] else model.head.norm
    last.eps = norm(eps)(1).eps  # type: ignore[union-attr]
    return model
