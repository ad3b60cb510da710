"""How seldom the monitor looks by default: so that it costs a hundredth of training at most, in forward passes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

MAX_OVERHEAD = 0.01
"""Of training that looks may cost by default."""

MIN_EVALUATIONS = 10
"""Looks that a run of known length gets all the same."""

PASSES_PER_STEP = 3
"""Forward passes that a training step costs a sample, at least: its own, and twice that backward."""


def default_interval(*, samples: int, batch_size: int, total_steps: float) -> int:
    r"""Optimizer steps between looks: ⌈samples / (0.01·3·batch_size)⌉, but a tenth of the run at the most.

    Counted rather than timed, so that every rank and every repetition of a run looks at the same steps. A training
    step of self-distillation costs more than three passes a sample, so the true share is smaller.

    Args:
        samples: forward passes of one look: held-out samples, their views, labelled samples.
        batch_size: training samples an optimizer step, over all ranks.
        total_steps: of the run; inf where unknown.

    Example:
        >>> default_interval(samples=4096, batch_size=1024, total_steps=100_000)
        134
        >>> default_interval(samples=4096, batch_size=64, total_steps=5_000)   # 2134 steps would leave two looks
        500
    """
    seldom = math.ceil(samples / (MAX_OVERHEAD * PASSES_PER_STEP * batch_size))
    return seldom if math.isinf(total_steps) else max(1, min(seldom, int(total_steps) // MIN_EVALUATIONS))


def infer_batch_size(batch: Any) -> int | None:
    """Length of the first tensor in a batch, however it is nested; None where there is none.

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
