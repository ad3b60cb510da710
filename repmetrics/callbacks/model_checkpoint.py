"""LocalMaximaCheckpoint: the Lightning callback that keeps the checkpoints of the best local maxima of a metric."""

from __future__ import annotations

from itertools import count
from pathlib import Path
from typing import Any

from repmetrics.callbacks.base import Callback, LightningModule, Trainer
from repmetrics.callbacks.metric_history import check_measured, metric_history
from repmetrics.callbacks.representation_monitor import monitor_of
from repmetrics.decisions.early_stopping import KEEP, best_local_maxima
from repmetrics.monitoring.record import Record

STATE_KEY = "KeepLocalMaxima"
"""Name of this callback's state inside checkpoints: unchanged when the class was renamed."""


class LocalMaximaCheckpoint(Callback):
    """Keeps the checkpoints of the best local maxima of a metric, rather than the single best or the last.

    A maximum is known one measurement later. Each measurement after step 0 therefore writes a checkpoint, and those
    that are not maxima are removed. The rule is :func:`repmetrics.decisions.early_stopping.best_local_maxima`.

    Args:
        directory: Directory of the checkpoints; default: "maxima" in the trainer's log directory.
        metric: Name that the monitor measures; its own direction is used.
        k: Number of checkpoints to keep.
        prefix: Prefix of the monitor.

    Attributes:
        kept: Path of each checkpoint kept, by step.
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
        self._pending: tuple[int, set[int]] | None = None  # step to save, steps to keep
        self._folder: Path | None = None  # of this fit
        self._resumed = False

    @property
    def state_key(self) -> str:
        """Key that is unique per metric."""
        return f"{STATE_KEY}[{self.prefix}/{self.metric}]"

    def state_dict(self) -> dict[str, Any]:
        """Checkpoints kept so far."""
        return {"kept": {str(step): str(path) for step, path in self.kept.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the checkpoints that still exist."""
        self._resumed = True
        self.kept = {int(step): Path(path) for step, path in state_dict["kept"].items() if Path(path).exists()}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget the checkpoints of an earlier fit, before a checkpoint is restored, and read the log directory."""
        if stage == "fit":
            self._folder = self.directory or Path(trainer.log_dir or trainer.default_root_dir) / "maxima"
            self.kept, self._pending, self._resumed = {}, None, False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Register with the monitor."""
        monitor_of(trainer, prefix=self.prefix).add_listener(self._keep)

    def _keep(self, trainer: Trainer, record: Record, history: list[Record]) -> None:
        check_measured(record, self.metric, callback="LocalMaximaCheckpoint")
        if record.step == 0 or self.metric not in record.measurements:
            return
        values = metric_history(history, self.metric, after_step=0)
        best = {values[i][0] for i in best_local_maxima([m for _, m in values], k=self.k)}
        self._pending = record.step, best
        if not trainer.validating:
            self._save(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save after validation, when averaged weights are no longer those of the module."""
        self._save(trainer)

    def _save(self, trainer: Any) -> None:
        if self._pending is None:
            return
        (step, best), self._pending = self._pending, None
        self.kept[step] = Path(trainer.strategy.broadcast(str(self._path(step))))
        trainer.save_checkpoint(self.kept[step])
        for other in sorted(set(self.kept) - best):
            trainer.strategy.remove_checkpoint(self.kept.pop(other))

    def _path(self, step: int) -> Path:
        """Path of a step's checkpoint. A file of another run keeps its name; a resumed run replaces its own."""
        assert self._folder is not None
        path = self._folder / f"step={step}.ckpt"
        names = (self._folder / f"step={step}-v{version}.ckpt" for version in count(1))
        return path if self._resumed or not path.exists() else next(name for name in names if not name.exists())
