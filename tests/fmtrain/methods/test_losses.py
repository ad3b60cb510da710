"""Losses compared with loops from the papers, and with lightly's."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from lightly.loss import DINOLoss

from fmtrain.methods.losses import SinkhornLoss, in_float32, sinkhorn


def logits(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("teacher_temp", "views"), list(itertools.product((0.04, 0.07), (2, 5))))
def test_lightlys_dino_loss_is_the_papers_loop(teacher_temp: float, views: int) -> None:
    teacher, student, center = logits(2, 6, 32), logits(views, 6, 32, seed=1), logits(32, seed=2) * 0.1
    loss = DINOLoss(32, student_temp=0.1, center_momentum=0.9)
    loss.center.copy_(center)
    terms = []
    for t, s in itertools.product(range(2), range(views)):
        if t != s:
            q = ((teacher[t] - center) / teacher_temp).double().softmax(-1)
            terms.append(float(-(q * (student[s].double() / 0.1).log_softmax(-1)).sum(-1).mean()))
    value = in_float32(loss, list(teacher), list(student), device=teacher.device, teacher_temp=teacher_temp)
    assert float(value) == pytest.approx(np.mean(terms), rel=1e-5)
    torch.testing.assert_close(loss.center.flatten(), 0.9 * center + 0.1 * teacher.mean((0, 1)))


def test_sinkhorn_is_its_loop_and_balances_the_prototypes() -> None:
    z = logits(24, 8) * 3
    q = np.exp(z.double().numpy() / 0.5).T
    for _ in range(3):
        q /= q.sum(1, keepdims=True) * 8
        q /= q.sum(0, keepdims=True) * 24
    targets = sinkhorn(z, temperature=0.5)
    np.testing.assert_allclose(targets.numpy(), q.T * 24, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(targets.sum(1), torch.ones(24))
    converged = sinkhorn(z, temperature=0.5, iterations=100)
    torch.testing.assert_close(converged.sum(0), torch.full((8,), 3.0), atol=1e-3, rtol=0)


def test_sinkhorn_does_not_overflow_and_ignores_an_offset() -> None:
    z = logits(12, 6)
    torch.testing.assert_close(sinkhorn(z + 50, temperature=0.04), sinkhorn(z, temperature=0.04), atol=1e-3, rtol=0)
    assert sinkhorn(z * 1000, temperature=1.0).isfinite().all()


def test_sinkhorn_loss_is_its_loop() -> None:
    teacher, student = logits(2, 6, 16), logits(4, 6, 16, seed=1)
    targets = sinkhorn(teacher.flatten(0, 1), temperature=0.2).unflatten(0, (2, 6))
    terms = [
        float(-(targets[t] * (student[s] / 0.1).log_softmax(-1)).sum(-1).mean())
        for t, s in itertools.product(range(2), range(4))
        if t != s
    ]
    value = SinkhornLoss(student_temp=0.1)(list(teacher), list(student), teacher_temp=0.2)
    assert float(value) == pytest.approx(np.mean(terms), rel=1e-5)


def test_losses_leave_autocast() -> None:
    teacher, student = logits(2, 8, 64), logits(4, 8, 64, seed=1).requires_grad_()
    expected = SinkhornLoss()(list(teacher), list(student), teacher_temp=0.04)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = in_float32(SinkhornLoss(), list(teacher), list(student), device=teacher.device, teacher_temp=0.04)
        halves = in_float32(
            SinkhornLoss(), list(teacher.bfloat16()), list(student.bfloat16()), device=teacher.device, teacher_temp=0.04
        )
    assert inside.dtype == halves.dtype == torch.float32
    assert torch.equal(inside, expected)
    assert torch.allclose(halves, expected, rtol=1e-2)  # rounded before
