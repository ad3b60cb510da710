"""One computation in a thread, while training goes on."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait

import torch

from repmetrics.monitoring.record import Record


class BackgroundComputation:
    """The record of one evaluation, computed in a thread.

    The computation reads features in memory, and neither the module nor a random generator that training uses.

    Example:
        >>> computation = BackgroundComputation()
        >>> computation.start(lambda: Record(step=3, epoch=0, seconds=0.1))
        >>> computation.result().step
        3
    """

    def __init__(self) -> None:
        self._future: Future[Record] | None = None

    @property
    def done(self) -> bool:
        """Whether the result is there, so that taking it does not wait."""
        return self._future is not None and self._future.done()

    def start(self, compute: Callable[[], Record]) -> None:
        """Begin a computation; the result of the last one was taken."""
        assert self._future is None
        # A thread's number of torch threads is its own only after it was read there once.
        torch.get_num_threads()
        pool = ThreadPoolExecutor(1, thread_name_prefix="repmetrics")
        self._future = pool.submit(torch.no_grad()(compute))
        pool.shutdown(wait=False)

    def result(self) -> Record:
        """Wait for the record, and return it or raise what the computation raised."""
        assert self._future is not None
        future, self._future = self._future, None
        return future.result()

    def discard(self) -> None:
        """Wait for the end of a computation, if any, and forget what came of it."""
        future, self._future = self._future, None
        if future is not None:
            wait([future])
