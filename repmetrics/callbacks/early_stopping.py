"""RepresentationEarlyStopping: the Lightning callback that stops a run by the monitor's measurements."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from repmetrics.callbacks.base import Callback, LightningModule, Trainer
from repmetrics.callbacks.metric_history import check_measured, metric_history
from repmetrics.callbacks.representation_monitor import monitor_of
from repmetrics.decisions.early_stopping import MIN_DELTA_ERRORS, PATIENCE, should_stop
from repmetrics.decisions.run_selection import CONSENSUS_METRIC
from repmetrics.monitoring.record import Record

log = logging.getLogger(__name__)


class RepresentationEarlyStopping(Callback):
    """Stops a run whose metric no longer improves, immediately after the measurement, also within an epoch.

    The rule is :func:`repmetrics.decisions.early_stopping.should_stop`. All ranks reach the same decision.

    Args:
        metric: Name that the monitor measures: "rankme", "odcorr", "linear_probe", "projector/rankme". Default: that of
            the rule of docs/trust.md, whitened view retrieval, if the monitor measures it; else "rankme_centered".
        patience: Number of measurements without improvement before the run stops.
        min_delta_errors: Smallest improvement that counts, in standard errors of the change.
        warmup_steps: Steps up to which measurements are ignored.
        prefix: Prefix of the monitor.

    Attributes:
        reason: Reason for stopping, or the state of the metric.
        stopped_step: Optimizer step at which the run stopped, or None.
    """

    def __init__(
        self,
        metric: str | None = None,
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
        """Forget the decision of an earlier fit."""
        if stage == "fit":
            self.reason, self.stopped_step = "nothing measured yet", None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Register with the monitor."""
        monitor_of(trainer, prefix=self.prefix).add_listener(self._decide)

    def _decide(self, trainer: Trainer, record: Record, history: list[Record]) -> None:
        metric = self.metric or default_metric(history)
        check_measured(record, metric, callback="RepresentationEarlyStopping")
        values = [m for _, m in metric_history(history, metric, after_step=self.warmup_steps)]
        decision = should_stop(values, patience=self.patience, min_delta_errors=self.min_delta_errors)
        self.reason = decision.reason
        if decision.stop and self.stopped_step is None:
            self.stopped_step = record.step
            trainer.should_stop = True
            if trainer.is_global_zero:
                log.warning("stopped at step %d: %s", record.step, self.reason)


def default_metric(history: Sequence[Record]) -> str:
    """Metric that decides without a name: that of the rule of docs/trust.md, if any evaluation measured it."""
    measured = any(CONSENSUS_METRIC in record.measurements for record in history)
    return CONSENSUS_METRIC if measured else "rankme_centered"
