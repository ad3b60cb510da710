"""Default evaluation interval, chosen so that evaluations take at most 1 % of the time of training."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

MAX_OVERHEAD = 0.01
"""Largest share of training that evaluations cost by default."""

MIN_EVALUATIONS = 10
"""Evaluations of a short run, whatever they cost."""

SHORT_SECONDS = 5.0
"""Evaluations of a run shorter than this are spaced by counted passes and not by time."""

PASSES_PER_STEP = 3
"""Cost of a training step per sample, in forward passes: one forward, and a backward pass of twice that."""


def default_interval(*, samples: int, batch_size: int, total_steps: float) -> int:
    r"""Optimizer steps between evaluations: ⌈samples / (0.01·3·batch_size)⌉, but at most a tenth of the run.

    For runs too short to be timed. The cost is counted in forward passes; it leaves out the metrics.

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


class Timing(NamedTuple):
    """Seconds of the first evaluation and of a training step, as rank 0 measured them.

    The same figures give the same steps, on all ranks and after a resume.
    """

    evaluation: float
    step: float

    @property
    def interval(self) -> int:
        """Optimizer steps between evaluations that take :data:`MAX_OVERHEAD` of the time.

        Example:
            >>> Timing(evaluation=2.0, step=0.5).interval
            400
        """
        return max(1, math.ceil(self.evaluation / (MAX_OVERHEAD * self.step)))

    def share(self, interval: float) -> float:
        """Share of the time that evaluations take, one every ``interval`` steps.

        Example:
            >>> Timing(evaluation=2.0, step=0.5).share(36)
            0.1
        """
        return self.evaluation / (self.evaluation + interval * self.step)

    def is_short(self, total_steps: float) -> bool:
        """Whether a run of ``total_steps`` is too short to be spaced by time."""
        return total_steps * self.step < SHORT_SECONDS

    def describe(self, *, total_steps: float, readers: Sequence[str] = (), every: int = 0) -> str | None:
        """Sentence for a run with fewer evaluations than :data:`MIN_EVALUATIONS`, or whose readers cost more than 1 %.

        Args:
            total_steps: Steps of the run; inf if unknown.
            readers: Names of callbacks and schedulers that read a key every ``every`` steps.
            every: Steps between two readings.

        Example:
            >>> Timing(evaluation=2.0, step=0.5).describe(total_steps=1000).partition(":")[0]
            'an evaluation takes 2 s and a step 0.5 s'
            >>> Timing(evaluation=2.0, step=0.5).describe(total_steps=1000, readers=["EarlyStopping"], every=36)
            'an evaluation before each reading of EarlyStopping takes about 10 % of the time'
        """
        if self.is_short(total_steps):
            return None
        if readers:
            share, names = self.share(every), ", ".join(readers)
            if share <= MAX_OVERHEAD:
                return None
            return f"an evaluation before each reading of {names} takes about {100 * share:.2g} % of the time"
        count = total_steps / self.interval
        if count >= MIN_EVALUATIONS:
            return None
        return (
            f"an evaluation takes {self.evaluation:.2g} s and a step {self.step:.2g} s: one every {self.interval} "
            f"steps keeps to {100 * MAX_OVERHEAD:g} % of the time, {int(count)} in this run; give every_n_steps= for "
            "more"
        )


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
