"""A stub of SLURM for one machine: ``sbatch``, ``srun``, ``scontrol`` and ``scancel`` as one program.

`install(folder)` writes the four commands and returns the environment in which they are on the path. As in SLURM, a
requeued job keeps its id, starts the same script again, and counts SLURM_RESTART_COUNT; signals go to every process of
the job's step, or to the shell of the script with ``--batch``; ``scontrol requeue`` ends the job first. The tasks of an
array run at the same time, their output in the files that ``--output`` names.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from fork_server import Fork

COMMANDS = ("sbatch", "srun", "scontrol", "scancel")
STATE = "SLURM_STUB_STATE"
JOB = "7"
TORCHRUN = "torchrun-of-forks"
"""Command of ``srun`` that stands for ``torchrun``: launcher and ranks are forks, which import nothing again."""


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


def sbatch(*arguments: str) -> int:
    """``sbatch [--wait] SCRIPT``: start a job. With ``--wait``, return its exit code at its end."""
    script, command = Path(arguments[-1]), [sys.executable, __file__, "run", arguments[-1]]
    (state() / "options").write_text("\n".join("=".join(option) for option in script_options(script).items()))
    if "--wait" in arguments:
        return subprocess.run(command, check=False).returncode
    subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    print(f"Submitted batch job {JOB}")
    return 0


def script_options(script: Path) -> dict[str, str]:
    """Options that the script states in lines of ``#SBATCH``."""
    lines = re.findall(r"^#SBATCH --(.*)$", script.read_text(), re.MULTILINE)
    words = [shlex.split(line)[0].partition("=") for line in lines]
    return {name: value for name, _, value in words}


def run(script: str) -> int:
    """Run a job's script, or all tasks of its array."""
    options = script_options(Path(script))
    if "array" not in options:
        return task(script, {"SLURM_JOB_ID": JOB, "SLURM_JOB_NAME": "train"}, None)
    first, last = map(int, options["array"].partition("%")[0].split("-"))
    numbers = range(first, last + 1)

    def run_task(number: int) -> int:
        log = options["output"].replace("%A", JOB).replace("%a", str(number))
        variables = {
            "SLURM_JOB_ID": str(100 + number),
            "SLURM_JOB_NAME": options.get("job-name", ""),
            "SLURM_ARRAY_JOB_ID": JOB,
            "SLURM_ARRAY_TASK_ID": str(number),
            "SLURM_PROCID": "0",
            "SLURM_LOCALID": "0",
            "SLURM_NODEID": "0",
            "SLURM_NTASKS": "1",
        }
        return task(script, variables, log)

    with ThreadPoolExecutor(len(numbers)) as pool:
        return max(pool.map(run_task, numbers))


def task(script: str, variables: dict[str, str], log: str | None) -> int:
    """Run a script until it ends without having been requeued; return its last exit code."""
    restarts = 0
    while True:
        if restarts:
            variables["SLURM_RESTART_COUNT"] = str(restarts)
        output = None if log is None else Path(log).open("ab")  # noqa: SIM115 — until the process has ended
        process = subprocess.Popen(["bash", script], env=os.environ | variables, stdout=output, stderr=output)
        (state() / f"batch-{variables['SLURM_JOB_ID']}").write_text(str(process.pid))
        code = process.wait()
        (state() / f"batch-{variables['SLURM_JOB_ID']}").unlink()
        (state() / "codes").open("a").write(f"{code}\n")
        if not (state() / "requeue").exists():
            return code
        (state() / "requeue").unlink()
        restarts += 1


def srun(*command: str) -> int:
    """Run the step, and note its process for `scancel`."""
    if command[0] == TORCHRUN:
        step: Fork | subprocess.Popen[bytes] = Fork(("processes", "torchrun_forks"), *command[1:])
    else:
        step = subprocess.Popen(command)
    (state() / "step").write_text(str(step.pid))
    code = step.wait()
    (state() / "step").unlink()
    return code


def scancel(*arguments: str) -> int:
    """``scancel [--batch] --signal=USR1 JOB``: send a signal to every process of the step, or to each script's shell.

    Preemption is TERM and a requeue.
    """
    name = next(word.partition("=")[2] for word in arguments if word.startswith("--signal="))
    if "--batch" in arguments:
        processes = [int(file.read_text()) for file in state().glob("batch-*")]
    else:
        processes = family(int((state() / "step").read_text()))
    for process in processes:
        with suppress(ProcessLookupError):
            os.kill(process, signal.Signals[f"SIG{name}"])
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
