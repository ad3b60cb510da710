"""Seconds that evaluations take of a fit."""

from __future__ import annotations

import time


class EvaluationTime:
    """Clock of one fit: its training, and the evaluations in it, logging included."""

    def __init__(self) -> None:
        self.start_fit()

    @property
    def seconds(self) -> float:
        """Seconds of the fit so far that evaluations kept training waiting."""
        return self._in_all

    def start_fit(self) -> None:
        """Begin a fit."""
        self._fit_start = time.perf_counter()
        self._train_start: float | None = None
        self._train_end: float | None = None
        self._first_step = 0
        self._in_training = 0.0
        self._in_all = 0.0

    def start_first_evaluation(self) -> None:
        """Count the fit from here: what Lightning prepared before is no part of it."""
        self._fit_start = time.perf_counter()

    def start_training(self, step: int) -> None:
        """Begin the training steps, at the count of optimizer steps ``step``."""
        self._train_start, self._first_step = time.perf_counter(), step

    def end_training(self) -> None:
        """End the training steps."""
        self._train_end = time.perf_counter()

    def add(self, seconds: float) -> None:
        """Add seconds of an evaluation or of its logging."""
        self._in_all += seconds
        if self._train_start is not None and self._train_end is None:
            self._in_training += seconds

    def seconds_per_step(self, step: int) -> tuple[int, float] | None:
        """Steps so far, and the seconds of one without evaluations; None before the first step."""
        if self._train_start is None or (steps := step - self._first_step) < 1:
            return None
        return steps, (time.perf_counter() - self._train_start - self._in_training) / steps

    def shares(self) -> dict[str, float]:
        """Shares of time in evaluations: ``overhead`` of the training steps, ``overhead_total`` of the fit.

        Empty before the training steps.
        """
        if self._train_start is None:
            return {}
        now = time.perf_counter()
        return {
            "overhead": self._in_training / ((self._train_end or now) - self._train_start),
            "overhead_total": self._in_all / (now - self._fit_start),
        }
