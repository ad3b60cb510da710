"""Flat values of a record to any function that logs numbers."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from repmetrics.monitoring.record import Record

Sink = Callable[..., Any]
"""Function of a dict of numbers by log key, such as ``wandb.log``, ``mlflow.log_metrics`` or ``print``."""


def send(sink: Sink, record: Record, *, prefix: str) -> None:
    """Call a sink with the numbers of a record.

    A function that takes ``step`` gets the record's step. Any other finds it among the numbers, under ``prefix/step``.
    So does W&B, which drops values whose step is below its own count of calls: ``wandb.define_metric("repmetrics/*",
    step_metric="repmetrics/step")`` makes it the axis.

    Example:
        >>> send(print, Record(step=4, epoch=0, seconds=0.5), prefix="repmetrics")
        {'repmetrics/step': 4, 'repmetrics/seconds': 0.5, 'repmetrics/nonfinite': 0.0, 'repmetrics/alarm': 0.0}
    """
    values = record.scalars(prefix=prefix)
    if _takes_step(sink):
        sink(values, step=record.step)
    else:
        sink({f"{prefix}/step": record.step, **values})


def _takes_step(sink: Sink) -> bool:
    if (getattr(sink, "__module__", None) or "").partition(".")[0] == "wandb":
        return False
    try:
        parameters = inspect.signature(sink).parameters
    except (TypeError, ValueError):  # some built-in functions have none
        return False
    return "step" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())
