"""Ctrl-C and SIGTERM: finish the step, save, and say how to go on."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class StopOnSignal(Callback):
    """Stops at the end of the step during which SIGINT or SIGTERM came; a second one stops at once.

    The last of the callbacks, so that what the others note of the last step is saved too.

    Args:
        path: Where the last checkpoint goes.

    Attributes:
        asked: Whether a signal came.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.requested = False

    @contextmanager
    def handlers_installed(self) -> Iterator[None]:
        """Take the two signals over, and give them back."""
        before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        print("stopping after this step; once more to stop at once", file=sys.stderr)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take SIGTERM back from Lightning, which would leave before the step is saved, with exit code 0."""
        signal.signal(signal.SIGTERM, self._ask)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save and stop, if asked, on all ranks if any was; of a step that adds up several batches, after the last."""
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        if not trainer.strategy.reduce_boolean_decision(self.requested, all=False):
            return
        self.requested = True
        trainer.save_checkpoint(self.path)
        trainer.should_stop = True
        if trainer.is_global_zero:
            print(f"saved {self.path} at step {trainer.global_step}: --resume goes on from there", file=sys.stderr)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save once more, with the monitor's look at the last step: the resumed run need not repeat it."""
        if self.requested:
            trainer.save_checkpoint(self.path)
