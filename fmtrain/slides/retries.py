"""Retries for storage that fails for a moment. No torch."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from openslide.lowlevel import OpenSlideError

T = TypeVar("T")

WAITS_SECONDS = (0.1, 0.4, 1.6, 6.4)  # before each retry
_TRANSIENT = frozenset(
    [errno.EIO, errno.EAGAIN, errno.EINTR, errno.ETIMEDOUT, errno.ESTALE, errno.ECONNRESET, errno.EBUSY, errno.ENOTCONN]
)


def with_retries(
    action: Callable[[], T],
    *,
    waits: Sequence[float] = WAITS_SECONDS,
    passes: Callable[[Exception], bool] | None = None,
    wait: Callable[[float], None] = time.sleep,
) -> T:
    """Result of an action, retried after 0.1, 0.4, 1.6 and 6.4 s if it fails with an error that may pass.

    The action opens its files anew: errors of OpenSlide latch. Errors that cannot pass (a broken tile, a missing file,
    no permission) are raised immediately.

    Args:
        action: Function to call.
        waits: Seconds before each retry.
        passes: Whether an error may pass; default `may_pass`.
        wait: Function that waits.
    """
    for seconds in waits:
        try:
            return action()
        except Exception as error:
            if not (passes or may_pass)(error):
                raise
            wait(seconds)
    return action()


def may_pass(error: Exception) -> bool:
    """Whether an error may be one of the storage. OpenSlide passes no errno on: any error of it may be one.

    Example:
        >>> may_pass(OSError(errno.EIO, "Input/output error")), may_pass(FileNotFoundError(errno.ENOENT, "no file"))
        (True, False)
    """
    cause = error.__cause__ or error
    return isinstance(cause, OpenSlideError) or (isinstance(cause, OSError) and cause.errno in _TRANSIENT)
