"""A stage begins where a checkpoint of an earlier one ended."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from small_dino import CROPS, SCHEDULES, fit, tiny
from small_runs import LIGHTNING_NOISE

from fmtrain.methods.dinov2 import DINOv2

pytestmark = [pytest.mark.filterwarnings(line) for line in LIGHTNING_NOISE]
ARCH = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}


class AtStart(Callback):
    """Copies weights and averages before the first step."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 0:
            self.weights = {name: value.clone() for name, value in pl_module.state_dict().items()}
            names = {id(p): name for name, p in pl_module.student.named_parameters()}
            state = trainer.optimizers[0].state
            self.averages = {names[id(p)]: value["exp_avg_sq"].clone() for p, value in state.items()}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stage") / "run.ckpt"
    fit(tiny(), steps=8).save_checkpoint(path)
    return path


def begin(checkpoint: Path, **changes: Any) -> AtStart:
    stage: dict[str, Any] = dict.fromkeys(("init", "init_heads", "init_optimizer"), checkpoint)
    start = AtStart()
    fit(tiny(**(stage | changes), seed=5), steps=1, callbacks=(start,))
    return start


def test_a_stage_begins_with_all_of_the_checkpoint(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = torch.load(checkpoint, weights_only=True)
    start = begin(checkpoint)
    for name, value in content["state_dict"].items():
        torch.testing.assert_close(start.weights[name], value, atol=0, rtol=0, msg=name)
    saved = content["optimizer_states"][0]
    for group in saved["param_groups"]:
        for name, number in zip(group["names"], group["params"], strict=True):
            if number in saved["state"]:
                torch.testing.assert_close(start.averages[name], saved["state"][number]["exp_avg_sq"], atol=0, rtol=0)
    assert len(start.averages) == sum(len(group["params"]) for group in saved["param_groups"])
    text = capsys.readouterr().err
    assert "heads: 8 of 8 weights loaded from run.ckpt" in text
    assert "optimizer: averages of 37 of 37 parameters loaded" in text


def test_other_crops_keep_what_fits(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    begin(checkpoint, arch_kwargs=ARCH | {"img_size": 32}, augment=replace(CROPS, global_crops_size=32))
    text = capsys.readouterr().err
    assert "resized: pos_embed, 4 × 4 to 8 × 8 positions" in text
    assert "optimizer: averages of 36 of 37 parameters loaded" in text
    assert "optimizer: without averages: backbone.pos_embed" in text


def test_schedules_go_on_at_the_stages_position() -> None:
    later = replace(SCHEDULES, start_step=8)
    for step in range(4):
        assert later.at(step, steps=4, batch_size=16) == SCHEDULES.at(8 + step, steps=12, batch_size=16)
    assert replace(SCHEDULES, start_step=2).is_frozen(0, steps=10)
    assert not replace(SCHEDULES, start_step=2).is_frozen(1, steps=10)
    assert replace(SCHEDULES, lr_warmup_steps=0.5, start_step=8).resolved(12).lr_warmup_steps == 10


def test_published_heads_are_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options: dict[str, Any] = {
        "arch_kwargs": ARCH, "augment": CROPS, "schedules": SCHEDULES, "n_prototypes": 64, "hidden_dim": 48,
        "bottleneck_dim": 16, "ibot_prototypes": 32,
    }  # fmt: skip
    torch.manual_seed(1)
    teacher = {name: torch.rand_like(value) for name, value in DINOv2(**options).teacher.state_dict().items()}
    renames = (("parametrizations.weight.original0", "weight_g"), ("parametrizations.weight.original1", "weight_v"))
    published = {}
    for name, value in teacher.items():
        for ours, theirs in renames:
            name = name.replace(ours, theirs)
        name = f"dino_{name}" if name.startswith("head.") else name
        published["backbone.mask_token" if name == "mask_token" else name] = value
    torch.save({"teacher": published}, tmp_path / "teacher_checkpoint.pth")
    model = DINOv2(**options, init_heads=tmp_path / "teacher_checkpoint.pth")
    model.initialize()
    for branch in (model.student, model.teacher):
        for name, value in branch.state_dict().items():
            if not name.startswith("backbone."):
                torch.testing.assert_close(value, teacher[name], atol=0, rtol=0, msg=name)
    text = capsys.readouterr().err
    assert "has those of the teacher only, which serve both" in text
    assert "heads: 17 of 17 weights loaded from teacher_checkpoint.pth" in text
    assert "centers: start at zero" in text
    with pytest.raises(ValueError, match=r"other shapes .*set n_prototypes, hidden_dim"):
        DINOv2(**options | {"hidden_dim": 24}, init_heads=tmp_path / "teacher_checkpoint.pth").initialize()
    torch.save({"state_dict": {"weight": torch.zeros(1)}}, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match=r"other.ckpt holds no heads of DINO or DINOv2"):
        DINOv2(**options, init_heads=tmp_path / "other.ckpt").initialize()


def test_an_optimizer_that_is_absent_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    content = torch.load(checkpoint, weights_only=True)
    del content["optimizer_states"]
    torch.save(content, tmp_path / "light.ckpt")
    with pytest.raises(ValueError, match=r"light.ckpt holds no optimizer state with names"):
        begin(tmp_path / "light.ckpt")
