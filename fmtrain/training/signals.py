"""Orderly ends of a run: signals stop it after the step, and every end saves the last step."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from fmtrain.stop_signals import REQUEUE_SIGNALS, StopRequest
from repmetrics.callbacks.representation_monitor import RepresentationMonitor, monitors_in


class StopOnSignal(Callback):
    """Stops all ranks at the end of the step in which a signal arrives at any of them.

    It must be the first callback: from its first hook on, it replaces Lightning's own handlers. That for SIGTERM ends
    the process with exit code 0 before the step is saved; that for SLURM's SIGUSR1 saves in the middle of a step.

    A signal ends an evaluation of the monitor at once, without a record: it may take longer than the job has left.

    Attributes:
        request: The signals received.
    """

    def __init__(self) -> None:
        self.request = StopRequest(self._announce)
        self._monitors: list[RepresentationMonitor] = []

    @property
    def requested(self) -> bool:
        """Whether a signal arrived at any rank."""
        return self.request.requested

    @property
    def requeue(self) -> bool:
        """Whether the signal was the one by which SLURM announces the end of the job."""
        return not self.request.received.isdisjoint(REQUEUE_SIGNALS)

    @contextmanager
    def handlers_installed(self) -> Iterator[None]:
        """Handle the signals inside the block; restore the previous handlers after it."""
        with self.request.installed():
            yield

    def _announce(self, number: int) -> None:
        print(f"{signal.Signals(number).name}: stopping after this step", file=sys.stderr)
        if number == signal.SIGINT:
            print("Ctrl-C again stops immediately", file=sys.stderr)
        for monitor in self._monitors:
            monitor.interrupt()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Replace Lightning's handlers."""
        self._monitors = monitors_in(trainer)
        self.request.install()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop all ranks if any rank received a signal, after the last batch of the step."""
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        if not trainer.strategy.reduce_boolean_decision(self.requested, all=False):
            return
        requeue = trainer.strategy.reduce_boolean_decision(self.requeue, all=False)
        self.request.received.add(signal.SIGUSR1 if requeue else signal.SIGTERM)
        trainer.should_stop = True
        trainer.fit_loop.min_epochs, trainer.fit_loop.epoch_loop.min_steps = None, None  # they would forbid the stop


class SaveAtEnd(Callback):
    """Saves the last step of every run that ends in order: by its length, early stopping, ``max_time`` or a signal.

    It must be the last callback, so that the checkpoint contains the state of the others after the last step.

    Args:
        path: Path of the last checkpoint.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save at once if the run is to stop: the monitor's last evaluation may take longer than the job has left."""
        if trainer.should_stop and not (batch_idx + 1) % trainer.accumulate_grad_batches:
            trainer.save_checkpoint(self.path)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save, with the monitor's evaluation of the last step, which a resumed run then need not repeat."""
        trainer.save_checkpoint(self.path)
        if trainer.should_stop and trainer.is_global_zero:
            print(f"saved {self.path} at step {trainer.global_step}: --resume continues from there", file=sys.stderr)
