"""Default evaluation interval, chosen so that evaluation costs at most 1 % of training in forward passes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

MAX_OVERHEAD = 0.01
"""Largest share of training that evaluations cost by default."""

MIN_EVALUATIONS = 10
"""Evaluations of a run of known length, whatever they cost."""

PASSES_PER_STEP = 3
"""Cost of a training step per sample, in forward passes: one forward, and a backward pass of twice that."""


def default_interval(*, samples: int, batch_size: int, total_steps: float) -> int:
    r"""Optimizer steps between evaluations: ⌈samples / (0.01·3·batch_size)⌉, but at most a tenth of the run.

    The cost is counted and not timed, so that all ranks and all repetitions of a run evaluate at the same steps. A
    training step of self-distillation costs more than three passes per sample, so the true share is smaller.

    Args:
        samples: Forward passes of one evaluation: held-out samples, their views, labeled samples.
        batch_size: Training samples per optimizer step, over all ranks.
        total_steps: Steps of the run; inf if unknown.

    Example:
        >>> default_interval(samples=4096, batch_size=1024, total_steps=100_000)
        134
        >>> default_interval(samples=4096, batch_size=64, total_steps=5_000)  # 2134 steps would leave two evaluations
        500
    """
    interval = math.ceil(samples / (MAX_OVERHEAD * PASSES_PER_STEP * batch_size))
    return interval if math.isinf(total_steps) else max(1, min(interval, int(total_steps) // MIN_EVALUATIONS))


def infer_batch_size(batch: Any) -> int | None:
    """Length of the first tensor in a batch, at any nesting; None without tensors.

    Example:
        >>> import torch
        >>> infer_batch_size(([torch.zeros(8, 3), torch.zeros(8, 3)], torch.zeros(8)))
        8
    """
    if isinstance(batch, Tensor):
        return len(batch) if batch.ndim else None
    parts: Iterable[Any] = batch.values() if isinstance(batch, Mapping) else ()
    if isinstance(batch, list | tuple):
        parts = batch
    return next((size for part in parts if (size := infer_batch_size(part)) is not None), None)
