"""Response of a callback to alarms: log, warn, stop, or call a function."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Literal

from repmetrics.data.held_out import rank_and_world
from repmetrics.decisions.alarms import Alarm
from repmetrics.monitoring.record import Record

OnAlarm = Literal["log", "warn", "stop"] | Callable[[Alarm, Record], None]


class AlarmResponse:
    """Responds to the alarms of each record as ``on_alarm`` says; warns once per kind of alarm, on rank 0.

    Args:
        on_alarm: "log" does nothing further, "warn" warns, "stop" warns and ends the run. A function
            ``(alarm, record)`` is called on every rank.

    Raises:
        ValueError: Another text.
    """

    def __init__(self, on_alarm: OnAlarm) -> None:
        if isinstance(on_alarm, str) and on_alarm not in ("log", "warn", "stop"):
            raise ValueError(f"on_alarm must be log, warn, stop or a function, got {on_alarm!r}")
        self.on_alarm = on_alarm
        self._warned: set[str] = set()

    def reset(self) -> None:
        """Begin another run, which warns again."""
        self._warned.clear()

    def respond(self, record: Record) -> bool:
        """Respond to the alarms of a record, and return whether they end the run."""
        for alarm in record.alarms:
            if callable(self.on_alarm):
                self.on_alarm(alarm, record)
            elif self.on_alarm != "log" and alarm.kind not in self._warned:
                self._warned.add(alarm.kind)
                if rank_and_world()[0] == 0:
                    warnings.warn(f"{alarm.kind} at step {record.step}: {alarm.reason}", stacklevel=3)
        return self.on_alarm == "stop" and bool(record.alarms)
