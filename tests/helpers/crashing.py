"""A reader of slides that dies on some of them, importable by spawned processes without the test-suite."""

from __future__ import annotations

import os
import signal

from fmtrain.manifest.scan import Job, ScanResult


def crash_or_hang(job: Job) -> ScanResult:
    """As a library does that meets a bad file: 2 crashes, 5 hangs until the alarm."""
    if "2" in job.path.name:
        os.kill(os.getpid(), signal.SIGSEGV)
    if "5" in job.path.name:
        signal.alarm(1)
        while True:
            pass
    return ScanResult(job.path, None, 1.0, "")
