"""Locks between processes, of one machine or of several that share a file system."""

from __future__ import annotations

import errno
import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextmanager
def file_lock(path: Path, *, shared: bool = False, wait: bool = False) -> Iterator[None]:
    """Hold a lock within the block. It ends with the process, whatever ends it; its file stays.

    Args:
        path: File of the lock; it and its folder are created.
        shared: Whether other processes may hold the lock at the same time, as long as all of them share it.
        wait: Whether to wait until the lock is free.

    Raises:
        BlockingIOError: Another process holds the lock.
        OSError: The file system has no locks.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
        except OSError as error:
            if error.errno in _NO_LOCKS:
                raise OSError(error.errno, "this file system has no locks: use another one", str(path)) from None
            raise
        yield
