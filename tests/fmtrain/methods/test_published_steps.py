"""Twelve whole steps of both methods against a restatement of the published code, with every part of it switched on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from published_steps import Method, Weights
from small_dino import CROPS, SCHEDULES, fit, patches
from small_runs import LIGHTNING_NOISE
from torch import Tensor

from fmtrain.methods.dino import DINO
from fmtrain.methods.dinov2 import DINOv2
from fmtrain.methods.masking import batch_masks
from fmtrain.rng import derive_seed

pytestmark = [pytest.mark.filterwarnings(line) for line in LIGHTNING_NOISE]
STEPS, BATCH, DEPTH = 12, 16, 2
RUN = replace(SCHEDULES, lr=5e-3, weight_decay=0.4, weight_decay_end=0.8)
ARCH = {"img_size": 16, "patch_size": 2, "embed_dim": 32, "depth": DEPTH, "num_heads": 2}
REGISTERS = {"reg_tokens": 2, "no_embed_class": True}
COMMON: dict[str, Any] = {
    "arch": "vit_tiny_patch16_224", "augment": CROPS, "schedules": RUN, "n_prototypes": 64, "hidden_dim": 48,
    "bottleneck_dim": 16,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def separate_positions(branch: torch.nn.Module, *, registers: bool) -> Weights:
    """Weights of a branch in which the positions of class token and patches are separate, as published."""
    w = {name: p.detach().double().clone().requires_grad_(p.requires_grad) for name, p in branch.named_parameters()}
    positions = w.pop("backbone.pos_embed").detach()[0]
    token = w["backbone.cls_token"].detach()[0]
    if registers:  # any two parts of the sum take the same steps
        w["backbone.cls_token"], w["class position"] = 0.25 * token, 0.75 * token
    else:
        w["backbone.cls_token"], w["class position"] = token, positions[:1]
    w["positions"] = positions[-64:]
    trained = next(branch.parameters()).requires_grad
    return {
        name: p.detach().requires_grad_(p.requires_grad or (trained and "original0" not in name))
        for name, p in w.items()
    }


def merge_positions(w: Weights, *, registers: bool) -> Weights:
    """Weights in the names and shapes of timm."""
    result = {name: value.detach() for name, value in w.items() if name not in ("class position", "positions")}
    result["backbone.cls_token"] = result["backbone.cls_token"][None]
    positions = w["positions"].detach()[None]
    if registers:
        result["backbone.cls_token"] = result["backbone.cls_token"] + w["class position"].detach()
        result["backbone.pos_embed"] = positions
    else:
        result["backbone.pos_embed"] = torch.cat([w["class position"].detach()[None], positions], 1)
    return result


def run_oracle(method: Method, student: Weights, teacher: Weights, *, teacher_temp: list[float]) -> None:
    data = patches(STEPS * BATCH)
    for step in range(STEPS):
        values = RUN.at(step, steps=STEPS, batch_size=BATCH)
        views = CROPS(data[step * BATCH : (step + 1) * BATCH], step=step)
        crops = [((view.flatten(0, 1) - 0.5) / 0.5).double() for view in views]
        mask = torch.from_numpy(
            batch_masks(range(32), total=32, grid=(8, 8), probability=0.5, ratio=(0.1, 0.5), seed=0, step=step)
        )
        torch.manual_seed(derive_seed(0, step, 0) >> 1)
        loss = method.loss(crops, mask, student, teacher, teacher_temp[step])
        new = method.update(student, loss, lr=values.lr, decay=values.weight_decay, frozen=step < 3)
        for name, value in new.items():
            student[name] = value
            teacher[name] = values.momentum * teacher[name].detach() + (1 - values.momentum) * value.detach()


@pytest.mark.parametrize(
    ("v2", "swiglu", "registers"),
    [(False, False, False), (True, False, False), (True, True, True)],
    ids=["DINO", "DINOv2", "DINOv2 with SwiGLU and registers"],
)
def test_twelve_steps_are_those_of_the_published_code(v2: bool, swiglu: bool, registers: bool) -> None:
    torch.manual_seed(0)
    arch_kwargs = ARCH | (REGISTERS if registers else {})
    options = COMMON | {"arch_kwargs": arch_kwargs, "ffn_layer": "swiglu" if swiglu else "mlp", "clip_grad": 0.2}
    if v2:
        more: dict[str, Any] = {
            "layer_scale": 0.1,
            "layerwise_decay": 0.7,
            "drop_path_rate": 0.3,
            "ibot_prototypes": 48,
        }
        model: DINO = DINOv2(**options, **more)
    else:
        model = DINO(**options, drop_path_rate=0.2)
    with torch.no_grad():  # norms and layer scale start alike: different values show which is used where
        for name, parameter in model.student.named_parameters():
            if "norm" in name or "gamma" in name or "mask_token" in name:
                parameter.add_(0.05 * torch.randn_like(parameter))
        model.teacher.load_state_dict(model.student.state_dict())
    method = Method(
        v2=v2, depth=DEPTH, heads=2, patch=2, native=8, drop_path=0.3 if v2 else 0.2, swiglu=swiglu,
        registers=registers, layer_decay=0.7, clip=0.2, batch=BATCH, local_crops=2,
    )  # fmt: skip
    student = separate_positions(model.student, registers=registers)
    teacher = separate_positions(model.teacher, registers=registers)
    start = {name: value.clone() for name, value in merge_positions(student, registers=registers).items()}
    fit(model, steps=STEPS, precision="64-true")

    # DINO's temperature is constant over an epoch of 1250 steps; DINOv2's rises step by step
    temperatures = [0.03, 0.03 + 0.01 / 3, 0.03 + 0.02 / 3, *[0.04] * 9] if v2 else [0.03] * 4 + [0.04] * 8
    run_oracle(method, student, teacher, teacher_temp=temperatures)
    for branch, weights in ((model.student, student), (model.teacher, teacher)):
        expected = merge_positions(weights, registers=registers)
        for name, parameter in branch.named_parameters():
            compare(name, parameter.detach(), expected[name])
    moved = {
        name
        for name, value in start.items()
        if not torch.equal(value, merge_positions(student, registers=registers)[name])
    }
    assert {"backbone.cls_token", "head.last_layer.parametrizations.weight.original1"} <= moved


def compare(name: str, actual: Tensor, expected: Tensor) -> None:
    # crops are float32, and Adam's first steps amplify rounding and epsilons
    torch.testing.assert_close(actual, expected, atol=1e-7, rtol=0, msg=lambda text: f"{name}: {text}")
