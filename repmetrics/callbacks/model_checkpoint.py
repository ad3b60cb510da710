"""Lightning callback that keeps the checkpoints of the best local maxima of a metric."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from repmetrics.callbacks.base import Callback
from repmetrics.decisions.early_stopping import KEEP, best_local_maxima
from repmetrics.monitoring.record import Record

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer
from repmetrics.callbacks.representation_monitor import check_measured, metric_history, monitor_of

STATE_KEY = "KeepLocalMaxima"
"""Name of this callback's state inside checkpoints: unchanged when the class was renamed."""


class LocalMaximaCheckpoint(Callback):
    """Keeps the checkpoints of the best local maxima of a metric, rather than the single best or the last.

    A maximum is known as such one measurement later, so each measurement after step 0 writes a checkpoint, and those
    that turn out to be none are removed. What is kept: :func:`repmetrics.decisions.early_stopping.best_local_maxima`.

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
        return f"{STATE_KEY}[{self.prefix}/{self.metric}]"

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
            monitor_of(trainer, prefix=self.prefix).add_listener(self._keep)

    def _keep(self, trainer: Trainer, record: Record, history: list[Record]) -> None:
        check_measured(record, self.metric, who="LocalMaximaCheckpoint")
        if record.step == 0 or self.metric not in record.measurements:
            return
        found = metric_history(history, self.metric, after_step=0)
        wanted = {found[i][0] for i in best_local_maxima([m for _, m in found], k=self.k)}
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
