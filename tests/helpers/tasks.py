"""Tasks for executors, importable by spawned processes."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path


def wait_then_return(seconds: float) -> float:
    time.sleep(seconds)
    return seconds


def crash_on(task: int | tuple[int, Path]) -> int | tuple[int, Path]:
    """13 kills its process; a pair kills it the first time."""
    if isinstance(task, tuple) and not (task[1] / str(task[0])).exists():
        (task[1] / str(task[0])).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if task == 13:
        os.kill(os.getpid(), signal.SIGSEGV)
    return task


def device_of(seconds: float) -> str:
    time.sleep(seconds)
    return os.environ["CUDA_VISIBLE_DEVICES"]
