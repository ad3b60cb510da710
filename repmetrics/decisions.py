"""Lightning callbacks that act on the monitor's measurements: stop a run, keep its best checkpoints. Wiring only."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from repmetrics.callbacks import Callback
from repmetrics.measurement import Measurement
from repmetrics.monitor import RepresentationMonitor, monitors_in
from repmetrics.record import Record
from repmetrics.stopping import KEEP, MIN_DELTA_ERRORS, PATIENCE, stalled, worth_keeping

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

log = logging.getLogger(__name__)


def monitor_of(trainer: Any, *, prefix: str) -> RepresentationMonitor:
    """The trainer's monitor with that prefix.

    Raises:
        ValueError: there is none.
    """
    found = monitors_in(trainer)
    for monitor in found:
        if monitor.prefix == prefix:
            return monitor
    have = ", ".join(repr(monitor.prefix) for monitor in found) or "none"
    raise ValueError(f"no RepresentationMonitor with prefix {prefix!r} among the trainer's callbacks (found: {have})")


def series(history: list[Record], name: str, *, after_step: int) -> list[tuple[int, Measurement]]:
    """(step, measurement) of one metric after a step, oldest first."""
    return [(r.step, r.measurements[name]) for r in history if r.step > after_step and name in r.measurements]


def refuse_unmeasured(record: Record, metric: str, *, who: str) -> None:
    """A metric that is not measured, or has no better direction to decide by.

    Raises:
        ValueError: it is one.
    """
    if record.nonfinite:
        return
    if metric not in record.measurements:
        known = ", ".join(record.measurements)
        raise ValueError(f"{who} looks at {metric!r}, which is not measured: choose among {known}")
    if record.measurements[metric].better == "neither":
        raise ValueError(f"{who} looks at {metric!r}, of which neither more nor less is better: choose another")


class RepresentationStopping(Callback):
    """Stops a run whose metric no longer improves, right after the measurement that shows it, inside an epoch too.

    The rule is :func:`repmetrics.stopping.stalled`. Every rank holds the same measurements and decides alike.

    Args:
        metric: a name that the monitor measures: "rankme", "odcorr", "linear_probe", "projector/rankme".
        patience: measurements without improvement.
        min_delta_errors: what counts as an improvement, in standard errors of the change.
        warmup_steps: measurements up to this step are not looked at.
        prefix: of the monitor.

    Attributes:
        reason: why it stopped, or how it stands, in words.
        stopped_step: optimizer step at which it stopped, or None.
    """

    def __init__(
        self,
        metric: str = "rankme_centered",
        *,
        patience: int = PATIENCE,
        min_delta_errors: float = MIN_DELTA_ERRORS,
        warmup_steps: int = 0,
        prefix: str = "repmetrics",
    ) -> None:
        if patience < 1:
            raise ValueError(f"patience must be at least 1, got {patience}")
        self.metric = metric
        self.patience = patience
        self.min_delta_errors = min_delta_errors
        self.warmup_steps = warmup_steps
        self.prefix = prefix
        self.reason = "nothing measured yet"
        self.stopped_step: int | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Listen to the monitor."""
        if stage == "fit":
            monitor_of(trainer, prefix=self.prefix).listen(self._decide)

    def _decide(self, trainer: Trainer, record: Record, history: list[Record]) -> None:
        refuse_unmeasured(record, self.metric, who="RepresentationStopping")
        found = [m for _, m in series(history, self.metric, after_step=self.warmup_steps)]
        stop, self.reason = stalled(found, patience=self.patience, min_delta_errors=self.min_delta_errors)
        if stop and self.stopped_step is None:
            self.stopped_step = record.step
            trainer.should_stop = True
            if trainer.is_global_zero:
                log.warning("stopped at step %d: %s", record.step, self.reason)


class KeepLocalMaxima(Callback):
    """Keeps the checkpoints of the best local maxima of a metric, rather than the single best or the last.

    A maximum is known as such one measurement later, so each measurement after step 0 writes a checkpoint, and those
    that turn out to be none are removed. What is kept: :func:`repmetrics.stopping.worth_keeping`.

    Args:
        directory: where; default: "maxima" in the trainer's log directory.
        metric: a name that the monitor measures; its own direction is used.
        k: how many.
        prefix: of the monitor.

    Attributes:
        kept: path of each checkpoint kept, by step.
    """

    def __init__(
        self,
        directory: Path | str | None = None,
        *,
        metric: str = "rankme",
        k: int = KEEP,
        prefix: str = "repmetrics",
    ) -> None:
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        self.directory = None if directory is None else Path(directory)
        self.metric = metric
        self.k = k
        self.prefix = prefix
        self.kept: dict[int, Path] = {}
        self._decided: tuple[int, set[int]] | None = None  # step to save, steps worth keeping

    @property
    def state_key(self) -> str:
        """Unique by metric."""
        return f"KeepLocalMaxima[{self.prefix}/{self.metric}]"

    def state_dict(self) -> dict[str, Any]:
        """The checkpoints kept so far."""
        return {"kept": {str(step): str(path) for step, path in self.kept.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with those still there."""
        self.kept = {int(step): Path(path) for step, path in state_dict["kept"].items() if Path(path).exists()}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Listen to the monitor."""
        if stage == "fit":
            self.directory = self.directory or Path(trainer.log_dir or trainer.default_root_dir) / "maxima"
            monitor_of(trainer, prefix=self.prefix).listen(self._keep)

    def _keep(self, trainer: Trainer, record: Record, history: list[Record]) -> None:
        refuse_unmeasured(record, self.metric, who="KeepLocalMaxima")
        if record.step == 0 or self.metric not in record.measurements:
            return
        found = series(history, self.metric, after_step=0)
        wanted = {found[i][0] for i in worth_keeping([m for _, m in found], k=self.k)}
        self._decided = record.step, wanted
        if not trainer.validating:
            self._save(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Averaged weights are swapped out again: only now does a checkpoint hold them where it should."""
        self._save(trainer)

    def _save(self, trainer: Any) -> None:
        if self._decided is None or self.directory is None:
            return
        (step, wanted), self._decided = self._decided, None
        self.kept[step] = self.directory / f"step={step}.ckpt"
        trainer.save_checkpoint(self.kept[step])
        for other in sorted(set(self.kept) - wanted):
            trainer.strategy.remove_checkpoint(self.kept.pop(other))
