"""One line that says how the run is doing: on a terminal it is redrawn, elsewhere it is printed now and then."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

WAIT_LIMIT = 0.1
SHOWN = (
    ("train/loss", "loss", ".3f"),
    ("repmetrics/rankme", "RankMe", ".1f"),
    ("repmetrics/odcorr", "ODCorr", ".3f"),
)


def describe(*, step: int, steps: int, images: float, seconds: float, waited: float, metrics: Mapping[str, Any]) -> str:
    """How a run stands, in one line.

    Args:
        step: Optimizer steps taken.
        steps: Of the whole run.
        images: Trained on since the last line.
        seconds: That this took, without the monitor's share.
        waited: Of these, for data.
        metrics: What was logged; shown are the loss and the monitor's rank and correlation.

    Example:
        >>> describe(step=50, steps=100, images=640, seconds=20, waited=1, metrics={"train/loss": 6.25})
        'step 50/100 · 32 img/s · data wait 5 % · loss 6.250'
    """
    parts = [f"step {step}/{steps}"]
    if seconds > 0:
        parts += [f"{images / seconds:.3g} img/s", f"data wait {waited / seconds:.0%}".replace("%", " %")]
    parts += [f"{label} {float(metrics[key]):{form}}" for key, label, form in SHOWN if key in metrics]
    return " · ".join(parts)


def remaining(seconds: float) -> str:
    """A duration for the reader.

    Example:
        >>> remaining(75), remaining(7384)
        ('1:15', '2:03:04')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class ProgressLine(ProgressBar):
    """Speed, share of time spent waiting for data, loss, the monitor's last rank and correlation, time left.

    Args:
        every_seconds: Between two lines where there is no terminal.
    """

    def __init__(self, *, every_seconds: float = 10.0) -> None:
        super().__init__()
        self.every_seconds = every_seconds
        self.console = Console(stderr=True)
        self.bar: Progress | None = None
        self._warned = False

    def disable(self) -> None:
        """Lightning calls this on the other ranks."""
        self.console.quiet = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin."""
        self._since(trainer)
        self._first, self._start = trainer.global_step, time.perf_counter()
        if self.console.is_terminal and not self.console.quiet:
            self.bar = Progress(BarColumn(bar_width=24), TextColumn("{task.description}"), console=self.console)
            self.task = self.bar.add_task("the first step", total=trainer.max_steps, completed=trainer.global_step)
            self.bar.start()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Say how it stands, if it is time to."""
        self._images += len(batch) * trainer.world_size
        last = trainer.global_step >= trainer.max_steps
        if time.perf_counter() - self._last < (1.0 if self.bar else self.every_seconds) and not last:
            return
        done, spent = trainer.global_step - self._first, time.perf_counter() - self._start
        seconds = time.perf_counter() - self._last - (self._measuring(trainer) - self._measured)
        waited = self._wait(trainer) - self._waited
        line = describe(
            step=trainer.global_step,
            steps=trainer.max_steps,
            images=self._images,
            seconds=seconds,
            waited=waited,
            metrics=trainer.callback_metrics,
        )
        if done and not last:
            line += f" · {remaining(spent / done * (trainer.max_steps - trainer.global_step))} left"
        if self.bar:
            self.bar.update(self.task, description=line, completed=trainer.global_step)
        else:
            self.console.print(line, soft_wrap=True, highlight=False)
        if done > 20 and waited > WAIT_LIMIT * seconds and not self._warned:
            self._warned = True
            self.console.print(
                f"warning: {waited / seconds:.0%} of the time goes into waiting for patches: raise data.num_workers",
                style="yellow",
            )
        self._since(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the last line standing."""
        self._stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give the terminal back."""
        self._stop()

    def _stop(self) -> None:
        if self.bar:
            self.bar.stop()
            self.bar = None

    def _since(self, trainer: Trainer) -> None:
        self._last, self._images = time.perf_counter(), 0
        self._waited, self._measured = self._wait(trainer), self._measuring(trainer)

    def _wait(self, trainer: Trainer) -> float:
        waiting = getattr(getattr(trainer, "datamodule", None), "waiting", None)
        return float(waiting.seconds) if waiting is not None else 0.0

    def _measuring(self, trainer: Trainer) -> float:
        """Seconds the monitors have taken so far: no part of the training's speed."""
        histories = [getattr(callback, "history", ()) for callback in trainer.callbacks]  # type: ignore[attr-defined]
        return sum(record.seconds for history in histories for record in history)
