"""Ctrl-C and SIGTERM: finish the step, save a checkpoint, and print how to resume."""

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
    """Stops at the end of the step in which SIGINT or SIGTERM arrives; a second signal stops immediately.

    It must be the last callback, so that the checkpoint contains the state of the others after the last step.

    Args:
        path: Path of the last checkpoint.

    Attributes:
        requested: Whether a signal arrived.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.requested = False

    @contextmanager
    def handlers_installed(self) -> Iterator[None]:
        """Handle the two signals inside the block; restore the previous handlers after it."""
        previous = {number: signal.signal(number, self._request_stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _request_stop(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        print("stopping after this step; repeat to stop immediately", file=sys.stderr)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Replace Lightning's SIGTERM handler, which would exit with code 0 before the step is saved."""
        signal.signal(signal.SIGTERM, self._request_stop)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save and stop all ranks if any rank received a signal, after the last batch of the step."""
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        if not trainer.strategy.reduce_boolean_decision(self.requested, all=False):
            return
        self.requested = True
        trainer.save_checkpoint(self.path)
        trainer.should_stop = True
        if trainer.is_global_zero:
            print(f"saved {self.path} at step {trainer.global_step}: --resume continues from there", file=sys.stderr)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save again with the monitor's evaluation of the last step, which the resumed run then need not repeat."""
        if self.requested:
            trainer.save_checkpoint(self.path)
