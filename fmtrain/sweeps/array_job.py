"""Drivers as an array job of SLURM: the script, and its submission through submitit. The study carries the trials."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from contextlib import chdir
from pathlib import Path

from fmtrain.sweeps.config import parse_sweep, read
from fmtrain.sweeps.preflight import check_runs_apart
from fmtrain.sweeps.report import run_and_show
from fmtrain.sweeps.settings import Sweep
from repmetrics.progress import parse_duration

LEAD_SECONDS = 120
"""Time before the end of a job at which SLURM sends SIGTERM to its driver; more if a trial may take longer to stop."""
SUBMITTED = "slurm"
"""Folder of submitit's files in the folder of the sweep."""


def print_or_submit(file: Path, sweep: Sweep, drivers: int, *, until: str | None, submitted: bool) -> None:
    """Check the sweep, which spares its drivers that, and print the script of their job, or submit it.

    Args:
        file: Sweep file.
        sweep: The sweep in it.
        drivers: Number of drivers.
        until: Time after which each driver ends, as on the command line.
        submitted: Whether to submit the job.
    """
    seconds = None if until is None else parse_duration(until)
    job = job_options(sweep, drivers)
    check_runs_apart(sweep)
    if drivers > 1 and sweep.storage.url is None:
        warn(
            f"the study is a file in {sweep.out}: the drivers need a file system on which flock works between nodes; "
            'storage = "postgresql+psycopg://…" does not'
        )
    if sweep.jobs == 1:
        warn('each driver runs one trial at a time, on all GPUs of its node: jobs = "auto" runs one trial per GPU')
    if not submitted:
        print(script(file, job, until=until))
        return
    identity = submit(file, sweep, job, drivers, seconds=seconds)
    print(f"job {identity}: {drivers} drivers; logs in {job['output']}")


def warn(text: str) -> None:
    """Print a warning."""
    print(f"warning: {text}", file=sys.stderr)


def job_options(sweep: Sweep, drivers: int) -> dict[str, str | int | bool]:
    """Options of ``sbatch`` for an array of drivers, one per node. Those of the sweep file win.

    Args:
        sweep: Sweep.
        drivers: Number of drivers.
    """
    lead = max(LEAD_SECONDS, round(sweep.stop_seconds) + 60)
    if refused := sorted({"array", "signal"} & sweep.slurm.keys()):
        raise ValueError(
            f"slurm must not hold {', '.join(refused)}: --slurm gives the array, and the signal stops drivers"
        )
    return {
        "job-name": sweep.study,
        "nodes": 1,
        "ntasks-per-node": 1,
        "output": f"{sweep.out}-%A_%a.log",
        "open-mode": "append",
        "requeue": True,
        **{name.replace("_", "-"): value for name, value in sweep.slurm.items()},
        "array": f"0-{drivers - 1}",
        "signal": f"B:TERM@{lead}",
    }


def script(file: Path, job: Mapping[str, str | int | bool], *, until: str | None) -> str:
    """Script for ``sbatch``. The driver takes the place of the shell, to which SLURM sends the signal.

    Args:
        file: Sweep file.
        job: Options of the job.
        until: Time after which each driver ends, as on the command line.
    """
    command = [sys.executable, "-m", "fmtrain", "sweep", str(file.resolve()), *(["--until", until] if until else [])]
    directives = {
        name: "" if value is True else f"={shlex.quote(str(value))}"
        for name, value in job.items()
        if value is not False
    }
    lines = [f"#SBATCH --{name}{value}" for name, value in directives.items()]
    return "\n".join(["#!/bin/bash", *lines, f"exec {shlex.join(command)}"])


def submit(
    file: Path, sweep: Sweep, job: Mapping[str, str | int | bool], drivers: int, *, seconds: float | None
) -> str:
    """Submit the drivers; return the id of the job.

    Raises:
        ValueError: submitit or SLURM is not there, or SLURM refuses the job.
    """
    try:
        from submitit import SlurmExecutor
        from submitit.core.utils import FailedJobError, FailedSubmissionError
    except ImportError:
        raise ValueError(
            "--submit needs submitit: pip install 'repmetrics[slurm]', or sbatch the printed script"
        ) from None
    folder = sweep.out / SUBMITTED
    try:
        executor = SlurmExecutor(folder, python=f"exec {shlex.quote(sys.executable)}")
        executor.update_parameters(
            use_srun=False,  # the driver takes the place of the shell
            time=None,  # submitit's default is five minutes
            wckey=None,
            stderr_to_stdout=True,
            array_parallelism=drivers,
            additional_parameters={name: value for name, value in job.items() if value is not False},
        )
        jobs = executor.map_array(drive, *([argument] * drivers for argument in (str(file.resolve()), seconds)))
    except (FailedJobError, FailedSubmissionError, RuntimeError, FileNotFoundError) as error:
        raise ValueError(f"the drivers were not submitted: {str(error).strip().splitlines()[-1]}") from error
    return str(jobs[0].job_id).partition("_")[0]


def drive(file: str, seconds: float | None) -> None:
    """Run one driver in a job that submitit starts. Its end by a signal is no error of submitit."""
    path = Path(file)
    sweep = parse_sweep(read(path), base=path.parent)
    try:
        with chdir(path.parent):
            run_and_show(sweep, form="table", again=file, seconds=seconds)
    except KeyboardInterrupt:
        sys.exit(130)
