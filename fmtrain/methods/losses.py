"""The losses of DINO and DINOv2: lightly's where it matches the references, called in full precision."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


def in_float32(loss: nn.Module, *inputs: Any, device: torch.device, **options: Any) -> Tensor:
    """Call a loss outside autocast, with what is in half precision brought to float32.

    lightly's losses do not leave autocast themselves: in bfloat16 KoLeo reads 2.64 where it is 2.73.

    Args:
        loss: The module.
        inputs: Tensors, or lists of them.
        device: Where they lie.
        options: Passed on as they are.
    """

    def up(value: Any) -> Any:
        if isinstance(value, list):
            return [up(item) for item in value]
        halves = isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16)
        return value.float() if halves else value

    with torch.autocast(device.type, enabled=False):
        result: Tensor = loss(*map(up, inputs), **options)
    return result


@torch.no_grad()
def sinkhorn(logits: Tensor, *, temperature: float, iterations: int = 3) -> Tensor:
    """Targets that use all prototypes alike: exp(logits/temperature), scaled in turn to equal columns and unit rows.

    Sinkhorn-Knopp as in SwAV (arXiv 2006.09882) and DINOv2. Under torch.distributed the columns are those of all ranks.

    Args:
        logits: (N, K) of the teacher, on this rank.
        temperature: They are divided by it.
        iterations: Rounds; the rows sum to 1 exactly, the columns nearly to N/K.
    """
    log_q = logits / temperature  # in logarithms: at low temperatures whole columns would underflow
    for _ in range(iterations):
        lowest = log_q.new_full((1, log_q.shape[1]), -torch.inf)  # of a rank that has no rows
        largest = _reduced(torch.cat([log_q, lowest]).amax(0), dist.ReduceOp.MAX)
        log_q = log_q - largest - _reduced((log_q - largest).exp().sum(0), dist.ReduceOp.SUM).log()
        log_q = log_q - log_q.logsumexp(1, keepdim=True)
    return log_q.exp()


def _reduced(value: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(value, operation)
    return value


class SinkhornLoss(nn.Module):
    """DINO's loss with Sinkhorn targets in place of centred ones; called as lightly's ``DINOLoss`` is.

    Mean over samples and over all pairs of a teacher's view t and a student's view s ≠ t of −Σ_k q_t·log p_s, with q
    from :func:`sinkhorn` over all of the teacher's views and p = softmax(student / student_temp).

    Args:
        student_temp: Of the student's softmax.
        iterations: Of Sinkhorn-Knopp.
    """

    def __init__(self, *, student_temp: float = 0.1, iterations: int = 3) -> None:
        super().__init__()
        self.student_temp = student_temp
        self.iterations = iterations

    def forward(self, teacher_out: Sequence[Tensor], student_out: Sequence[Tensor], *, teacher_temp: float) -> Tensor:
        """The loss of logits (B, K), one tensor a view; the first student views are those of the teacher."""
        views, batch = len(teacher_out), len(teacher_out[0])
        targets = sinkhorn(torch.cat(list(teacher_out)), temperature=teacher_temp, iterations=self.iterations)
        log_p = F.log_softmax(torch.stack(list(student_out)) / self.student_temp, dim=-1)
        pairs = -torch.einsum("tbk,sbk->ts", targets.unflatten(0, (views, batch)), log_p)
        return pairs.fill_diagonal_(0).sum() / (batch * (pairs.numel() - views))


class TokenCenter(nn.Module):
    """In place of the moving centre in lightly's ``IBOTPatchLoss``: of all ranks' tokens alike.

    Ranks mask different numbers of tokens, and one may mask none. lightly takes the mean of the ranks' means, which is
    then NaN.

    Args:
        n_prototypes: Width of the logits.
        momentum: Of the moving average.
    """

    def __init__(self, n_prototypes: int, *, momentum: float = 0.9) -> None:
        super().__init__()
        self.momentum = momentum
        self.center: Tensor
        self.register_buffer("center", torch.zeros(1, n_prototypes))

    @property
    def value(self) -> Tensor:
        """The centre, (1, K)."""
        return self.center

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """Move towards the mean of `x` (M, K) over all ranks; without any, stay."""
        total = _reduced(torch.cat([x.sum(0), x.new_tensor([len(x)])]), dist.ReduceOp.SUM)
        count = total[-1]
        moved = self.momentum * self.center + (1 - self.momentum) * total[:-1] / count.clamp(min=1)
        self.center = torch.where(count > 0, moved, self.center)


class SinkhornPatchLoss(nn.Module):
    """iBOT's loss with Sinkhorn targets; called as lightly's ``IBOTPatchLoss`` is, which only has a centre.

    Σ over masked tokens of −Σ_k q_k·log p_k / (masked tokens of its image), divided by the number of images.

    Args:
        student_temp: Of the student's softmax.
        iterations: Of Sinkhorn-Knopp.
    """

    def __init__(self, *, student_temp: float = 0.1, iterations: int = 3) -> None:
        super().__init__()
        self.student_temp = student_temp
        self.iterations = iterations

    def forward(self, teacher_out: Tensor, student_out: Tensor, mask: Tensor, *, teacher_temp: float) -> Tensor:
        """The loss of the masked tokens' logits (M, K); `mask` is (B, H, W) with M True."""
        targets = sinkhorn(teacher_out, temperature=teacher_temp, iterations=self.iterations)
        each = -(targets * F.log_softmax(student_out / self.student_temp, dim=-1)).sum(-1)
        share = 1 / mask.sum((1, 2), keepdim=True).clamp(min=1)
        return (each * share.expand_as(mask)[mask]).sum() / len(mask)


class KDELoss(nn.Module):
    r"""Kernel density on the hypersphere, in place of KoLeo: (1/κN)·Σ_i log(mean_{j≠i} exp(κ·cos(x_i, x_j))).

    With a von Mises-Fisher kernel (Wang & Isola 2020), as Virchow2 uses it. Lower is more spread out; 1 is a single
    point. OpenMidnight's code has the opposite sign, which rewards collapse.

    Args:
        concentration: κ.
    """

    def __init__(self, *, concentration: float = 5.0) -> None:
        super().__init__()
        self.concentration = concentration

    def forward(self, x: Tensor) -> Tensor:
        """The loss of representations (N, D), N ≥ 2."""
        unit = F.normalize(x, dim=-1, eps=1e-8)
        cosine = (unit @ unit.T).fill_diagonal_(-torch.inf)
        density = torch.logsumexp(self.concentration * cosine, dim=1) - math.log(len(x) - 1)
        return density.mean() / self.concentration
