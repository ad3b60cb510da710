"""Signals of training: what targets, gradients and speed show before a loss does."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from fmtrain.methods.losses import sinkhorn
from fmtrain.methods.sharding import whole


@torch.no_grad()
def target_signals(teacher: Tensor, student: Tensor, *, temperature: float, center: Tensor | None) -> dict[str, Tensor]:
    """Signals of the class-token targets of one batch.

    - ``target_entropy``: mean over samples of −Σ_k q_k·ln q_k, in nats, 0 … ln K;
    - ``prototypes_used``: exp of the entropy of the mean target, over all ranks, divided by K: 1/K … 1;
    - ``teacher_student_cosine``: mean cosine of both branches' logits of the same crop.

    Args:
        teacher: Teacher's logits (N, K).
        student: Student's logits of the same crops (N, K).
        temperature: Temperature of the targets.
        center: Moving center of the targets (1, K); None for Sinkhorn targets.
    """
    teacher, student = teacher.float(), student.float()
    if center is None:
        targets = sinkhorn(teacher, temperature=temperature)
    else:
        targets = ((teacher - center) / temperature).softmax(-1)
    mean = targets.mean(0)
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(mean)
        mean /= dist.get_world_size()
    return {
        "target_entropy": entropy(targets).mean(),
        "prototypes_used": entropy(mean).exp() / mean.numel(),
        "teacher_student_cosine": F.cosine_similarity(teacher, student, dim=-1).mean(),
    }


def entropy(probabilities: Tensor) -> Tensor:
    """Entropy along the last dimension, in nats.

    Example:
        >>> entropy(torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]]))
        tensor([0.6931, 0.0000])
    """
    return torch.special.entr(probabilities).sum(-1)


def gradient_norms(modules: Mapping[str, Iterable[nn.Parameter]]) -> dict[str, Tensor]:
    """Norm of the gradient of each group of parameters, before clipping."""
    gradients = {name: [p.grad for p in group if p.grad is not None] for name, group in modules.items()}
    return {f"grad_norm_{name}": whole(get_total_norm(group)) for name, group in gradients.items() if group}


class Throughput:
    """Images per second and share of waiting since the last reading, without the time of evaluations.

    Args:
        trainer: Trainer whose data module counts the seconds of waiting.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.reset()

    def reset(self) -> None:
        """Begin a new interval."""
        self._since = time.perf_counter()
        self._waited, self._evaluated = self._wait_seconds(), self._evaluation_seconds()

    def read(self) -> tuple[float, float]:
        """Seconds of training, and seconds of these spent waiting for data, since the last reset."""
        seconds = time.perf_counter() - self._since - (self._evaluation_seconds() - self._evaluated)
        return seconds, self._wait_seconds() - self._waited

    def _wait_seconds(self) -> float:
        batches = getattr(getattr(self.trainer, "datamodule", None), "timed_batches", None)
        return float(batches.wait_seconds) if batches is not None else 0.0

    def _evaluation_seconds(self) -> float:
        """Seconds of the monitors so far, which do not count in the training speed."""
        return sum(getattr(callback, "evaluation_seconds", 0.0) for callback in self.trainer.callbacks)


def speed_signals(throughput: Throughput, *, images: int) -> dict[str, float]:
    """Images per second over all ranks, share of waiting, and GPU memory in GB, since the last call."""
    seconds, waited = throughput.read()
    throughput.reset()
    values = {"images_per_second": images / max(seconds, 1e-9), "data_wait": waited / max(seconds, 1e-9)}
    if torch.cuda.is_available():
        values["gpu_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
    return values
