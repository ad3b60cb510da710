"""A stub of SLURM for one machine: ``sbatch``, ``srun``, ``scontrol`` and ``scancel`` as one program.

`install(folder)` writes the four commands and returns the environment in which they are on the path. As in SLURM, a
requeued job keeps its id, starts the same script again, and counts SLURM_RESTART_COUNT; signals go to every process of
the job's step; ``scontrol requeue`` ends the job first.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

COMMANDS = ("sbatch", "srun", "scontrol", "scancel")
STATE = "SLURM_STUB_STATE"
JOB = "7"


def install(folder: Path) -> dict[str, str]:
    """Write the commands to `folder`; their state is in it too."""
    folder.mkdir(parents=True)
    for name in COMMANDS:
        path = folder / name
        path.write_text(f'#!/bin/sh\nexec {sys.executable} {__file__} {name} "$@"\n')
        path.chmod(0o755)
    return {"PATH": f"{folder}:{os.environ['PATH']}", STATE: str(folder)}


def state() -> Path:
    return Path(os.environ[STATE])


def sbatch(script: str) -> int:
    """Run a job's script until it ends without having been requeued; return its last exit code."""
    restarts = 0
    while True:
        variables = {"SLURM_JOB_ID": JOB, "SLURM_JOB_NAME": "train"}
        if restarts:
            variables["SLURM_RESTART_COUNT"] = str(restarts)
        code = subprocess.run(["sh", script], env=os.environ | variables, check=False).returncode
        (state() / "codes").open("a").write(f"{code}\n")
        if not (state() / "requeue").exists():
            return code
        (state() / "requeue").unlink()
        restarts += 1


def srun(*command: str) -> int:
    """Run the step, and note its process for `scancel`."""
    step = subprocess.Popen(command)
    (state() / "step").write_text(str(step.pid))
    code = step.wait()
    (state() / "step").unlink()
    return code


def scancel(*arguments: str) -> int:
    """``scancel --signal=USR1 JOB``: send a signal to every process of the step. Preemption is TERM and a requeue."""
    number = signal.Signals[f"SIG{arguments[0].partition('=')[2]}"]
    for process in family(int((state() / "step").read_text())):
        with suppress(ProcessLookupError):
            os.kill(process, number)
    return 0


def family(process: int) -> list[int]:
    """A process and all its descendants, whatever their sessions: SLURM finds them by their control group."""
    parents: dict[int, int] = {}
    for folder in Path("/proc").iterdir():
        with suppress(OSError, ValueError):
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
    members = [process]
    for member in members:
        members += [child for child, parent in parents.items() if parent == member]
    return members


def scontrol(action: str, job: str) -> int:
    """``scontrol requeue JOB``."""
    if (action, job) != ("requeue", JOB):
        print(f"Invalid job id specified for {action} {job}", file=sys.stderr)
        return 1
    (state() / "requeue").touch()
    return 0


if __name__ == "__main__":
    sys.exit(globals()[sys.argv[1]](*sys.argv[2:]))
