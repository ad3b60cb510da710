"""Progress line of a run: redrawn on a terminal, printed at intervals elsewhere."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from fmtrain.domains import check_domain
from fmtrain.methods.diagnostics import Throughput
from repmetrics.progress import format_duration

WAIT_LIMIT = 0.1  # share of the time
METRICS = (
    ("train/loss", "loss", ".3f"),
    ("repmetrics/rankme", "RankMe", ".1f"),
    ("repmetrics/odcorr", "ODCorr", ".3f"),
)


def format_progress(
    *, step: int, steps: int, images: float, seconds: float, waited: float, metrics: Mapping[str, Any]
) -> str:
    """Format the progress of a run as one line.

    Args:
        step: Optimizer steps taken.
        steps: Optimizer steps of the whole run.
        images: Images since the last line.
        seconds: Seconds since the last line, without those of the monitor.
        waited: Seconds of these spent waiting for data.
        metrics: Logged values; the loss and the monitor's rank and correlation are shown.

    Example:
        >>> format_progress(step=50, steps=100, images=640, seconds=20, waited=1, metrics={"train/loss": 6.25})
        'step 50/100 · 32 img/s · data wait 5 % · loss 6.250'
    """
    parts = [f"step {step}/{steps}"]
    if seconds > 0:
        parts += [f"{images / seconds:.3g} img/s", f"data wait {waited / seconds:.0%}".replace("%", " %")]
    parts += [f"{label} {float(metrics[key]):{form}}" for key, label, form in METRICS if key in metrics]
    return " · ".join(parts)


class ProgressLine(ProgressBar):
    """Shows speed, share of time spent waiting for data, loss, the monitor's last rank and correlation, and time left.

    Args:
        every_seconds: Seconds between two lines without a terminal.
    """

    def __init__(self, *, every_seconds: float = 10.0) -> None:
        super().__init__()
        check_domain("every_seconds", every_seconds, above=0)
        self.every_seconds = every_seconds
        self.console = Console(stderr=True)
        self.bar: Progress | None = None
        self._warned = False

    def disable(self) -> None:
        """Print nothing; Lightning calls this on the other ranks."""
        self.console.quiet = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the timers and, on a terminal, the bar."""
        self.throughput, self._images = Throughput(trainer), 0
        self._last = time.perf_counter()
        self._first, self._start = trainer.global_step, time.perf_counter()
        if self.console.is_terminal and not self.console.quiet:
            self.bar = Progress(BarColumn(bar_width=24), TextColumn("{task.description}"), console=self.console)
            self.task = self.bar.add_task("the first step", total=trainer.max_steps, completed=trainer.global_step)
            self.bar.start()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Print or redraw the line if the interval is over."""
        self._images += len(batch) * trainer.world_size
        last = trainer.global_step >= trainer.max_steps
        if time.perf_counter() - self._last < (1.0 if self.bar else self.every_seconds) and not last:
            return
        done, spent = trainer.global_step - self._first, time.perf_counter() - self._start
        seconds, waited = self.throughput.read()
        line = format_progress(
            step=trainer.global_step,
            steps=trainer.max_steps,
            images=self._images,
            seconds=seconds,
            waited=waited,
            metrics=trainer.callback_metrics,
        )
        if done and not last:
            line += f" · {format_duration(spent / done * (trainer.max_steps - trainer.global_step))} left"
        if self.bar:
            self.bar.update(self.task, description=line, completed=trainer.global_step)
        else:
            self.console.print(line, soft_wrap=True, highlight=False)
        if done > 20 and waited > WAIT_LIMIT * seconds and not self._warned:
            self._warned = True
            self.console.print(
                f"warning: {waited / seconds:.0%} of the time is spent waiting for patches: raise data.num_workers",
                style="yellow",
            )
        self.throughput.reset()
        self._last, self._images = time.perf_counter(), 0

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop redrawing and keep the last line."""
        self._stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Restore the terminal."""
        self._stop()

    def _stop(self) -> None:
        if self.bar:
            self.bar.stop()
            self.bar = None
