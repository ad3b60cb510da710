"""Steps of a fit: Lightning's optimizer steps, or batches where Lightning counts none."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch.optim.optimizer import register_optimizer_step_post_hook

if TYPE_CHECKING:
    from lightning.pytorch import Trainer
    from torch.utils.hooks import RemovableHandle


class StepCounter:
    """Counts optimizer steps as ``trainer.global_step`` does, or batches if that number does not change.

    ``global_step`` counts only optimizers that Lightning wraps. With manual optimization, a module may step an
    optimizer of its own, or update its parameters itself.

    Attributes:
        in_batches: Whether batches are counted.
    """

    def __init__(self) -> None:
        self.in_batches = False
        self._start: tuple[int, int] | None = None  # global_step and batches at the start, until the unit is known
        self._stepped = False  # whether any optimizer took a step since
        self._hook: RemovableHandle | None = None

    def start(self, trainer: Trainer, *, last_step: int) -> None:
        """Begin a fit. ``last_step`` is that of the last evaluation: a resumed fit goes on in its unit."""
        self.stop()
        self.in_batches = last_step > trainer.global_step
        if self.in_batches:
            return
        self._start, self._stepped = (trainer.global_step, _batches(trainer)), False
        if not trainer.lightning_module.automatic_optimization:
            self._hook = register_optimizer_step_post_hook(self._on_step)

    def stop(self) -> None:
        """End the observation of optimizers."""
        self._start = None
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def _on_step(self, *_: Any) -> None:
        self._stepped = True

    def step(self, trainer: Trainer) -> int:
        """Steps so far."""
        return _batches(trainer) if self.in_batches else trainer.global_step

    def observe(self, trainer: Trainer, *, epoch_end: bool = False) -> bool:
        """Read ``global_step`` after a batch, and return whether batches are counted from now on.

        An epoch without a step shows it in any case: Lightning's optimizers step in its last batch at the latest.
        """
        if self._start is None:
            return False
        step, batches = self._start
        if trainer.global_step != step:
            self.stop()
        elif self._stepped or (epoch_end and _batches(trainer) > batches):
            self.stop()
            self.in_batches = True
        return self.in_batches


def _batches(trainer: Trainer) -> int:
    """Batches trained, over all epochs and resumes."""
    return trainer.fit_loop.total_batch_idx + 1
