"""A slide scan that crashes or hangs on some slides, importable by spawned processes."""

from __future__ import annotations

import os
import signal

from fmtrain.manifest.scan import Job, ScanResult


def crash_or_hang(job: Job) -> ScanResult:
    """Slide 2 crashes the process, slide 5 hangs until the alarm."""
    if "2" in job.path.name:
        os.kill(os.getpid(), signal.SIGSEGV)
    if "5" in job.path.name:
        signal.alarm(1)
        while True:
            pass
    return ScanResult(job.path, None, 1.0, "")
