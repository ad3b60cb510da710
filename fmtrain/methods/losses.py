"""Losses of DINO and DINOv2: lightly's, those that lightly lacks, and calls of any loss in float32. No Lightning."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightly.loss import DINOLoss, IBOTPatchLoss
from torch import Tensor, nn

Centering = Literal["centering", "sinkhorn_knopp"]


def dino_loss(
    centering: Centering, *, n_prototypes: int, student_temp: float = 0.1, center_momentum: float = 0.9
) -> nn.Module:
    """DINO's loss on class tokens: lightly's ``DINOLoss``, or :class:`SinkhornLoss`, called in the same way.

    Args:
        centering: "centering" subtracts a moving center from the teacher's logits; "sinkhorn_knopp" balances them.
        n_prototypes: Width of the logits.
        student_temp: Temperature of the student's softmax.
        center_momentum: Momentum of the moving center.
    """
    if centering == "sinkhorn_knopp":
        return SinkhornLoss(student_temp=student_temp)
    return DINOLoss(n_prototypes, student_temp=student_temp, center_momentum=center_momentum)


def ibot_loss(
    centering: Centering, *, n_prototypes: int, student_temp: float = 0.1, center_momentum: float = 0.9
) -> nn.Module:
    """Loss of iBOT on masked tokens: lightly's, with :class:`TokenCenter`, or :class:`SinkhornPatchLoss`.

    The arguments are those of :func:`dino_loss`.
    """
    if centering == "sinkhorn_knopp":
        return SinkhornPatchLoss(student_temp=student_temp)
    loss = IBOTPatchLoss(n_prototypes, student_temp=student_temp)
    loss.center = TokenCenter(n_prototypes, momentum=center_momentum)
    return loss


def in_float32(loss: nn.Module, *inputs: Any, device: torch.device, **options: Any) -> Tensor:
    """Call a loss outside autocast, with half-precision inputs converted to float32.

    lightly's losses do not disable autocast: in bfloat16, KoLeo is 2.64 instead of 2.73.

    Args:
        loss: Loss module.
        inputs: Tensors, or lists of tensors.
        device: Device of the inputs.
        options: Keyword arguments of the loss, passed unchanged.
    """

    def convert(value: Any) -> Any:
        if isinstance(value, list):
            return [convert(item) for item in value]
        is_half = isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16)
        return value.float() if is_half else value

    with torch.autocast(device.type, enabled=False):
        result: Tensor = loss(*map(convert, inputs), **options)
    return result


@torch.no_grad()
def sinkhorn(logits: Tensor, *, temperature: float, iterations: int = 3) -> Tensor:
    """Targets that use all prototypes equally: exp(logits/temperature), with columns and rows scaled alternately.

    Sinkhorn-Knopp as in SwAV (arXiv 2006.09882) and DINOv2. Under torch.distributed the columns span all ranks.

    Args:
        logits: Teacher logits of this rank, (N, K).
        temperature: Divisor of the logits.
        iterations: Number of scalings; the rows sum to 1 exactly, the columns approximately to N/K.
    """
    log_q = logits / temperature  # logarithms: at low temperatures whole columns would underflow
    for _ in range(iterations):
        lowest = log_q.new_full((1, log_q.shape[1]), -torch.inf)  # for a rank without rows
        largest = _all_reduce(torch.cat([log_q, lowest]).amax(0), dist.ReduceOp.MAX)
        log_q = log_q - largest - _all_reduce((log_q - largest).exp().sum(0), dist.ReduceOp.SUM).log()
        log_q = log_q - log_q.logsumexp(1, keepdim=True)
    return log_q.exp()


def _all_reduce(value: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(value, operation)
    return value


class SinkhornLoss(nn.Module):
    """DINO's loss with Sinkhorn targets instead of centered ones; called like lightly's ``DINOLoss``.

    Mean of −Σ_k q_t·log p_s over samples and over all pairs of a teacher view t and a student view s ≠ t. q is
    :func:`sinkhorn` over all teacher views, p = softmax(student / student_temp).

    Args:
        student_temp: Temperature of the student's softmax.
        iterations: Iterations of Sinkhorn-Knopp.
    """

    def __init__(self, *, student_temp: float = 0.1, iterations: int = 3) -> None:
        super().__init__()
        self.student_temp = student_temp
        self.iterations = iterations

    def forward(self, teacher_out: Sequence[Tensor], student_out: Sequence[Tensor], *, teacher_temp: float) -> Tensor:
        """Loss of logits (B, K), one tensor per view; the first student views are the teacher's."""
        views, batch = len(teacher_out), len(teacher_out[0])
        targets = sinkhorn(torch.cat(list(teacher_out)), temperature=teacher_temp, iterations=self.iterations)
        log_p = F.log_softmax(torch.stack(list(student_out)) / self.student_temp, dim=-1)
        pairs = -torch.einsum("tbk,sbk->ts", targets.unflatten(0, (views, batch)), log_p)
        return pairs.fill_diagonal_(0).sum() / (batch * (pairs.numel() - views))


class TokenCenter(nn.Module):
    """Moving center that replaces the one in lightly's ``IBOTPatchLoss``; it weights the tokens of all ranks equally.

    Ranks mask different numbers of tokens, and a rank may mask none. lightly takes the mean of the ranks' means, which
    is NaN in that case.

    Args:
        n_prototypes: Width of the logits.
        momentum: Momentum of the moving average.
    """

    def __init__(self, n_prototypes: int, *, momentum: float = 0.9) -> None:
        super().__init__()
        self.momentum = momentum
        self.center: Tensor
        self.register_buffer("center", torch.zeros(1, n_prototypes))

    @property
    def value(self) -> Tensor:
        """Center, (1, K)."""
        return self.center

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """Move towards the mean of `x` (M, K) over all ranks; do nothing if no rank has tokens."""
        total = _all_reduce(torch.cat([x.sum(0), x.new_tensor([len(x)])]), dist.ReduceOp.SUM)
        count = total[-1]
        moved = self.momentum * self.center + (1 - self.momentum) * total[:-1] / count.clamp(min=1)
        self.center = torch.where(count > 0, moved, self.center)


class SinkhornPatchLoss(nn.Module):
    """iBOT's loss with Sinkhorn targets; called like lightly's ``IBOTPatchLoss``, which only has a center.

    Σ over masked tokens of −Σ_k q_k·log p_k / (masked tokens of its image), divided by the number of images.

    Args:
        student_temp: Temperature of the student's softmax.
        iterations: Iterations of Sinkhorn-Knopp.
    """

    def __init__(self, *, student_temp: float = 0.1, iterations: int = 3) -> None:
        super().__init__()
        self.student_temp = student_temp
        self.iterations = iterations

    def forward(self, teacher_out: Tensor, student_out: Tensor, mask: Tensor, *, teacher_temp: float) -> Tensor:
        """Loss of the logits (M, K) of masked tokens; `mask` is (B, H, W), True at M positions."""
        targets = sinkhorn(teacher_out, temperature=teacher_temp, iterations=self.iterations)
        each = -(targets * F.log_softmax(student_out / self.student_temp, dim=-1)).sum(-1)
        share = 1 / mask.sum((1, 2), keepdim=True).clamp(min=1)
        return (each * share.expand_as(mask)[mask]).sum() / len(mask)


class KDELoss(nn.Module):
    r"""Kernel density on the hypersphere, an alternative to KoLeo: (1/κN)·Σ_i log(mean_{j≠i} exp(κ·cos(x_i, x_j))).

    The kernel is von Mises-Fisher (Wang & Isola 2020), as in Virchow2. Lower is more spread out; 1 is a single point.
    OpenMidnight's code has the opposite sign, which rewards collapse.

    Args:
        concentration: Concentration κ of the kernel.
    """

    def __init__(self, *, concentration: float = 5.0) -> None:
        super().__init__()
        self.concentration = concentration

    def forward(self, x: Tensor) -> Tensor:
        """Loss of representations (N, D), N ≥ 2."""
        unit = F.normalize(x, dim=-1, eps=1e-8)
        cosine = (unit @ unit.T).fill_diagonal_(-torch.inf)
        density = torch.logsumexp(self.concentration * cosine, dim=1) - math.log(len(x) - 1)
        return density.mean() / self.concentration


class GramLoss(nn.Module):
    """Gram anchoring of DINOv3 (arXiv 2508.10104): the cosines among an image's patches stay those of an anchor.

    Mean over images and over all pairs of patches of (cos(s_i, s_j) − cos(a_i, a_j))², with patch tokens s of the
    student and a of the anchor, an earlier teacher. The paper's squared Frobenius norm is this mean times the number of
    pairs; its code has the mean.
    """

    def forward(self, student: Tensor, anchor: Tensor) -> Tensor:
        """Loss of patch tokens (N, T, D); only the student gets a gradient."""
        ours, theirs = (F.normalize(tokens, dim=-1) for tokens in (student, anchor.detach()))
        return F.mse_loss(ours @ ours.mT, theirs @ theirs.mT)
