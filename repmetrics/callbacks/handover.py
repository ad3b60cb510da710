"""Handover: the history of a fit in processes that Lightning starts, back to the process that called ``fit``."""

from __future__ import annotations

import json
import os
import tempfile
import uuid
from collections.abc import Sequence
from pathlib import Path

from repmetrics.atomic_write import write_text
from repmetrics.monitoring.record import Record


class Handover:
    """Hands records from a child process to its parent, through a temporary file.

    With ``ddp_spawn``, ``ddp_fork`` and ``ddp_notebook``, callbacks are copied into child processes, and Lightning
    returns only weights and ``callback_metrics``. A copy knows the path that the original chose.
    """

    def __init__(self) -> None:
        self._path = Path(tempfile.gettempdir()) / f"repmetrics-{uuid.uuid4().hex}.json"
        self._process = os.getpid()

    def send(self, history: Sequence[Record]) -> None:
        """Write the records, if this process is a child."""
        if os.getpid() != self._process:
            write_text(self._path, json.dumps([record.to_state() for record in history]))

    def receive(self) -> list[Record] | None:
        """Records that a child wrote since the last call; None without."""
        if os.getpid() != self._process or not self._path.exists():
            return None
        states = json.loads(self._path.read_text(encoding="utf-8"))
        self._path.unlink()
        return [Record.from_state(state) for state in states]
