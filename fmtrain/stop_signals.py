"""Signals that ask a process to stop, as one request: whoever sends them, and however often. Standard library only."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

REQUEUE_SIGNALS = (signal.SIGUSR1, signal.SIGUSR2)  # by which SLURM announces the end of a job
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, *REQUEUE_SIGNALS)
REPEAT_SECONDS = 2.0


class StopRequest:
    """One request to stop from any number of signals.

    SLURM and systemd send SIGTERM to every process of a job, and launchers such as torchrun pass on what they receive:
    one process then gets the same signal several times. All of them are one request. Only Ctrl-C again, more than
    `REPEAT_SECONDS` after the first, asks for an end at once.

    Args:
        on_request: Called once, with the number of the first signal. An exception from it propagates.

    Attributes:
        received: Numbers of the signals received.
    """

    def __init__(self, on_request: Callable[[int], None]) -> None:
        self.on_request = on_request
        self.received: set[int] = set()
        self._interrupted: float | None = None

    @property
    def requested(self) -> bool:
        """Whether any signal arrived."""
        return bool(self.received)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Handle the signals inside the block; restore the previous handlers after it."""
        previous = {number: signal.getsignal(number) for number in STOP_SIGNALS}
        self.install()
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def install(self) -> None:
        """Handle the signals from now on. SIGHUP and the others stay ignored where they are, as under nohup."""
        for number in STOP_SIGNALS:
            if number in (signal.SIGINT, signal.SIGTERM) or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self.handle)

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Receive one signal.

        Raises:
            KeyboardInterrupt: Ctrl-C came again.
        """
        first, now = not self.received, time.monotonic()
        self.received.add(number)
        if number == signal.SIGINT:
            if self._interrupted is not None and now - self._interrupted > REPEAT_SECONDS:
                raise KeyboardInterrupt
            self._interrupted = self._interrupted or now
        if first:
            self.on_request(number)
