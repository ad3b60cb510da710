"""Signals of training against their formulas, and their means over accumulated batches."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import Logger
from small_dino import fit, tiny
from small_runs import LIGHTNING_NOISE

from fmtrain.methods.diagnostics import target_signals
from fmtrain.methods.losses import sinkhorn

pytestmark = [pytest.mark.filterwarnings(line) for line in LIGHTNING_NOISE]


class Rows(Logger):
    """Keeps what is logged."""

    name, version = "rows", 0

    def __init__(self) -> None:
        super().__init__()
        self.rows: dict[int, dict[str, float]] = {}

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.rows[step or 0] = dict(metrics)

    def log_hyperparams(self, *_: Any, **__: Any) -> None: ...


class Losses(Callback):
    """Keeps the loss of each batch, and the gradient's norm of each part before clipping."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.norms: dict[int, dict[str, float]] = {}

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(float(outputs["loss"]) * trainer.accumulate_grad_batches)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.norms[trainer.global_step + 1] = {
            name: float(torch.cat([p.grad.flatten() for p in part.parameters() if p.grad is not None]).norm())
            for name, part in pl_module.student.named_children()
        }


@pytest.mark.parametrize("centered", [True, False])
def test_the_signals_are_their_formulas(centered: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    teacher, student = torch.randn((2, 12, 8), generator=generator)
    center = torch.randn((1, 8), generator=generator) if centered else None
    values = target_signals(teacher, student, temperature=0.2, center=center)
    if center is None:
        q = sinkhorn(teacher, temperature=0.2).double().numpy()
    else:
        z = (teacher - center).double().numpy() / 0.2
        q = np.exp(z - z.max(1, keepdims=True))
        q /= q.sum(1, keepdims=True)
    mean = q.mean(0)
    assert float(values["target_entropy"]) == pytest.approx(-(q * np.log(q)).sum(1).mean(), rel=1e-4)
    assert float(values["prototypes_used"]) == pytest.approx(np.exp(-(mean * np.log(mean)).sum()) / 8, rel=1e-4)
    a, b = teacher.double().numpy(), student.double().numpy()
    cosines = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    assert float(values["teacher_student_cosine"]) == pytest.approx(cosines.mean(), rel=1e-4)


def test_collapse_is_visible_in_the_signals() -> None:
    one = torch.zeros(16, 8).index_fill(1, torch.tensor([3]), 9.0)
    collapsed = target_signals(one, one, temperature=0.04, center=torch.zeros(1, 8))
    assert float(collapsed["prototypes_used"]) == pytest.approx(1 / 8, abs=1e-3)
    assert float(collapsed["target_entropy"]) < 1e-3
    uniform = target_signals(torch.zeros(16, 8), one, temperature=0.04, center=torch.zeros(1, 8))
    assert float(uniform["prototypes_used"]) == pytest.approx(1.0)
    assert float(uniform["target_entropy"]) == pytest.approx(np.log(8))


def test_logged_values_are_means_over_accumulated_batches() -> None:
    rows, losses = Rows(), Losses()
    fit(tiny(), steps=4, callbacks=(losses,), logger=rows, log_every_n_steps=2, accumulate_grad_batches=2)
    assert sorted(rows.rows) == [2, 4]
    row = rows.rows[2]
    assert row["train/loss"] == pytest.approx(np.mean(losses.losses[2:4]), rel=1e-6)
    assert {"train/target_entropy", "train/prototypes_used", "train/teacher_student_cosine"} <= row.keys()
    assert 0 < row["train/target_entropy"] <= np.log(64) + 1e-6
    for part in ("backbone", "head"):
        assert row[f"train/grad_norm_{part}"] == pytest.approx(losses.norms[2][part], rel=1e-5)
    total = np.hypot(*losses.norms[2].values())
    assert row["train/grad_norm"] == pytest.approx(total, rel=1e-5)
    assert row["speed/images_per_second"] > 0
    assert 0 <= row["speed/data_wait"] <= 1
