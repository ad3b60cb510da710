"""Gram anchoring against its loops, and the anchor over a run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from small_dino import CROPS, SCHEDULES, fit
from small_runs import LIGHTNING_NOISE

from fmtrain.methods.dinov2 import DINOv2
from fmtrain.methods.losses import GramLoss
from fmtrain.methods.multicrop import MultiCrop
from repmetrics.encoders.checkpoint import load_encoder

pytestmark = [pytest.mark.filterwarnings(line) for line in LIGHTNING_NOISE]


def tiny(**changes: Any) -> DINOv2:
    torch.manual_seed(0)
    arch_kwargs = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}
    options: dict[str, Any] = {
        "arch_kwargs": arch_kwargs, "augment": CROPS, "schedules": SCHEDULES, "n_prototypes": 32, "hidden_dim": 32,
        "bottleneck_dim": 16, "layer_scale": None, "gram_weight": 2.0,
    }  # fmt: skip
    return DINOv2(**(options | changes))


def test_the_loss_is_its_loop_and_moves_only_the_student() -> None:
    generator = torch.Generator().manual_seed(0)
    student, anchor = torch.randn((2, 3, 5, 4), generator=generator, dtype=torch.float64).requires_grad_().unbind(0)
    total = 0.0
    for image in range(3):
        for i in range(5):
            for j in range(5):
                cosines = [
                    np.dot(x[i], x[j]) / np.linalg.norm(x[i]) / np.linalg.norm(x[j])
                    for x in (student[image].detach().numpy(), anchor[image].detach().numpy())
                ]
                total += (cosines[0] - cosines[1]) ** 2 / 75
    loss = GramLoss()(student, anchor)
    assert float(loss.detach()) == pytest.approx(total, rel=1e-12)
    assert torch.autograd.grad(loss, anchor, allow_unused=True, retain_graph=True)[0] is None
    assert torch.autograd.grad(loss, student)[0].any()


class Anchors(Callback):
    """Whether the anchor is the teacher before each step, and the terms of the loss."""

    def __init__(self) -> None:
        self.follows: list[bool] = []
        self.terms: list[bool] = []

    def on_before_zero_grad(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        pairs = zip(pl_module.anchor.parameters(), pl_module.teacher.backbone.parameters(), strict=True)
        self.follows.append(all(torch.equal(a, b) for a, b in pairs))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.terms.append("train/gram_loss" in pl_module.logged)


def test_the_anchor_begins_and_follows_at_its_steps() -> None:
    seen = Anchors()
    fit(tiny(gram_start_step=2, gram_update_steps=3), steps=7, callbacks=(seen,))
    assert seen.terms == [False, False, True, True, True, True, True]
    # equal at the start (the first step has a learning rate of 0), then taken anew at steps 2 and 5
    assert seen.follows == [True, True, True, False, False, True, False]


def test_a_checkpoint_can_be_the_anchor_and_does_not_confuse_readers(tmp_path: Path) -> None:
    first = tiny(gram_weight=0.0)
    fit(first, steps=3).save_checkpoint(tmp_path / "first.ckpt")
    model = tiny(gram_teacher=tmp_path / "first.ckpt")
    fit(model, steps=2).save_checkpoint(tmp_path / "second.ckpt")
    for kept, old in zip(model.anchor.parameters(), first.teacher.backbone.parameters(), strict=True):
        assert torch.equal(kept, old)
    images = torch.rand((3, 3, 16, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(load_encoder(tmp_path / "second.ckpt")(images), model(images))
    assert not any("anchor" in name for group in model.configure_optimizers().param_groups for name in group["names"])


def test_the_anchor_can_see_larger_crops() -> None:
    model = tiny(gram_crops_size=32)
    fit(model, steps=1)
    batch = torch.rand((3, 3, 48, 48), generator=torch.Generator().manual_seed(0))
    crops = model._normalize(model.views(batch, 4).global_crops.flatten(0, 1))
    larger = replace(model.augment, global_crops_size=32, blur=(0.0, 0.0, 0.0))
    unblurred = replace(model.augment, blur=(0.0, 0.0, 0.0))
    stream = {"step": model.batches_before(4), "rank": 0, "world_size": 1}
    expected = larger(batch, **stream).global_crops
    assert torch.equal(unblurred.global_crops(batch, size=32, **stream), expected)
    model.augment = unblurred
    tokens = []
    with torch.no_grad():
        for image in model._normalize(expected.flatten(0, 1)):
            grid = model.anchor.tokens(image[None], None)[1]  # 8 × 8 tokens
            assert grid.shape == (1, 8, 8, 32)
            tokens.append(F.interpolate(grid.permute(0, 3, 1, 2), size=(4, 4), mode="bicubic").permute(0, 2, 3, 1))
    torch.testing.assert_close(model.anchor_tokens(batch, crops, 4), torch.cat(tokens))


def test_larger_crops_show_the_same_tissue_with_the_same_blur() -> None:
    augment = MultiCrop(global_crops_size=32, local_crops_number=0, blur=(1.0, 1.0, 0.0), blur_sigma=(1.0, 1.5))
    smooth = F.interpolate(torch.rand((4, 3, 6, 6), generator=torch.Generator().manual_seed(0)), 64, mode="bicubic")
    images = smooth.clamp(0, 1)
    small, large = augment(images, step=3).global_crops, augment.global_crops(images, size=64, step=3)
    assert torch.equal(augment.global_crops(images, size=32, step=3), small)
    inner = (..., slice(4, -4), slice(4, -4))
    pooled = F.avg_pool2d(large.flatten(0, 1), 2).unflatten(0, (2, 4))
    assert float((pooled - small)[inner].abs().max()) < 0.01
