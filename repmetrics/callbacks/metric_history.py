"""One metric of a run's records, for callbacks that decide by it."""

from __future__ import annotations

from repmetrics.measurement.result import Measurement
from repmetrics.monitoring.record import Record


def metric_history(history: list[Record], name: str, *, after_step: int) -> list[tuple[int, Measurement]]:
    """Step and measurement of one metric after a step, oldest first."""
    return [(r.step, r.measurements[name]) for r in history if r.step > after_step and name in r.measurements]


def check_measured(record: Record, metric: str, *, callback: str) -> None:
    """Check that a callback can use a metric of a record.

    Raises:
        ValueError: The metric is not measured, or has no better direction.
    """
    if record.nonfinite:
        return
    if metric not in record.measurements:
        known = ", ".join(record.measurements)
        raise ValueError(f"{callback} uses {metric!r}, which is not measured: choose among {known}")
    if record.measurements[metric].direction == "neither":
        raise ValueError(f"{callback} uses {metric!r}, which is neither better higher nor lower: choose another")
