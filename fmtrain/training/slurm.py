"""Jobs of SLURM: whether this one was started again, and how it asks to be."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

from repmetrics.atomic_write import write_text

MARKER = "requeued.txt"


def job_id(environment: Mapping[str, str] = os.environ) -> str | None:
    """Id of this job as ``scontrol`` takes it; None outside SLURM.

    Example:
        >>> job_id({"SLURM_JOB_ID": "9", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2"})
        '7_2'
    """
    if "SLURM_ARRAY_JOB_ID" in environment:
        return f"{environment['SLURM_ARRAY_JOB_ID']}_{environment['SLURM_ARRAY_TASK_ID']}"
    return environment.get("SLURM_JOB_ID")


def is_restart(out: Path) -> bool:
    """Whether SLURM started this job again, after preemption, a failed node or :func:`requeue`."""
    job, marker = job_id(), out / MARKER
    if job is None:
        return False
    return int(os.environ.get("SLURM_RESTART_COUNT") or 0) > 0 or (marker.is_file() and marker.read_text() == job)


def requeue(out: Path) -> str:
    """Ask SLURM to start this job again; return one sentence on the result."""
    job = job_id()
    if job is None:
        return "there is no SLURM job to requeue"
    write_text(out / MARKER, job)
    again = "submit the job again with --resume auto"
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, check=False)
    except OSError as error:
        return f"scontrol cannot be run ({error.strerror}): {again}"
    if done.returncode:
        reason = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
        return f"scontrol requeue {job} failed ({reason}): {again}"
    return f"requeued SLURM job {job}, which will continue this run"
