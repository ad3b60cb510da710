"""Interruption: the end of a reading or a computation on request of a signal handler, at points where it is safe."""

from __future__ import annotations

import threading
from typing import Self


class EvaluationInterruptedError(Exception):
    """A signal ended an evaluation. Nothing was recorded, and the model is as before."""


class Interruption:
    """Block that a signal handler may leave. Outside of it, as in a collective call, a request has no effect.

    Signal handlers run in the main thread. In another thread, the block is one like any other.

    Example:
        >>> interruption = Interruption()
        >>> interruption.request()
        >>> with interruption:
        ...     interruption.request()
        Traceback (most recent call last):
        repmetrics.data.interruption.EvaluationInterruptedError
    """

    def __init__(self) -> None:
        self._active = False

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._active = True
        return self

    def __exit__(self, *_: object) -> None:
        if threading.current_thread() is threading.main_thread():
            self._active = False

    def request(self) -> None:
        """Raise inside the block; call it from a signal handler, which runs in the main thread.

        Raises:
            EvaluationInterruptedError: The block runs.
        """
        if self._active:
            self._active = False
            raise EvaluationInterruptedError
