"""Slots of a driver: how many trials it runs at a time, and the GPUs and CPU threads of each. No torch here."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from fmtrain.sweeps.settings import Jobs
from repmetrics.executor import DEVICES
from repmetrics.file_lock import file_lock

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
GPU = re.compile(r"^GPU (\d+):", re.MULTILINE)
MIG = re.compile(r"^\s+MIG .*UUID: (MIG-[^)]+)\)", re.MULTILINE)
"""Lines of ``nvidia-smi -L``: a GPU, and a part of the GPU before it."""


@dataclass(frozen=True)
class Slot:
    """Place for one trial at a time.

    Attributes:
        number: Number of the slot, from 0.
        gpus: Its GPUs, as CUDA_VISIBLE_DEVICES names them.
        threads: CPU threads of each process of a trial; None leaves them to the environment.
        pinned: Whether a trial sees these GPUs alone.
    """

    number: int
    gpus: tuple[str, ...] = ()
    threads: int | None = None
    pinned: bool = False

    @property
    def gpu(self) -> str:
        """The GPUs, separated by commas."""
        return ",".join(self.gpus)

    def environment(self, present: Mapping[str, str] = os.environ) -> dict[str, str]:
        """Variables for a trial. Numbers of threads that the user has set stay.

        Example:
            >>> Slot(1, ("3",), threads=4, pinned=True).environment({"OMP_NUM_THREADS": "2"})
            {'MKL_NUM_THREADS': '4', 'OPENBLAS_NUM_THREADS': '4', 'CUDA_VISIBLE_DEVICES': '3'}
        """
        variables = {name: str(self.threads) for name in THREADS if self.threads is not None and name not in present}
        return variables | ({DEVICES: self.gpu} if self.pinned and self.gpus else {})


def visible_gpus(environment: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """GPUs that this process may use: those of CUDA_VISIBLE_DEVICES, or all that ``nvidia-smi`` lists.

    Raises:
        ValueError: ``nvidia-smi`` is there and fails.

    Example:
        >>> visible_gpus({"CUDA_VISIBLE_DEVICES": "2,GPU-8f,-1,4"})  # CUDA ignores what follows −1
        ('2', 'GPU-8f')
    """
    if DEVICES in environment:
        names = [name.strip() for name in environment[DEVICES].split(",")]
        ends = [k for k, name in enumerate(names) if name in ("", "-1", "NoDevFiles")]
        return tuple(names[: min([*ends, len(names)])])
    program = shutil.which("nvidia-smi", path=environment.get("PATH"))
    if program is None:
        return ()
    listed = subprocess.run([program, "-L"], capture_output=True, text=True, check=False)
    if listed.returncode:
        reason = (listed.stdout + listed.stderr).strip().splitlines() or [f"exit code {listed.returncode}"]
        raise ValueError(
            f"nvidia-smi -L failed ({reason[0]}): set {DEVICES} to the GPUs of this machine, or to nothing"
        )
    devices = list[str]()
    for entry in re.split(r"(?m)^(?=GPU )", listed.stdout):
        devices += MIG.findall(entry) or GPU.findall(entry)
    return tuple(devices)


def make_slots(jobs: Jobs, gpus: Sequence[str], *, cores: int) -> list[Slot]:
    """Slots for a number of trials at a time. They share the GPUs evenly, and the cores.

    Args:
        jobs: Number of slots; "auto": one per GPU, or one without a GPU. 1: the trial is started as a run alone.
        gpus: Visible GPUs.
        cores: CPU cores.

    Raises:
        ValueError: The GPUs cannot be shared evenly.

    Example:
        >>> [(slot.gpu, slot.threads) for slot in make_slots("auto", ["0", "1"], cores=16)]
        [('0', 8), ('1', 8)]
        >>> [slot.gpu for slot in make_slots(2, ["0", "1", "2", "3"], cores=16)]
        ['0,1', '2,3']
        >>> [slot.gpu for slot in make_slots(4, ["0", "1"], cores=16)]
        ['0', '1', '0', '1']
    """
    count = max(len(gpus), 1) if jobs == "auto" else jobs
    if gpus and count % len(gpus) and len(gpus) % count:
        raise ValueError(
            f'jobs must divide the {len(gpus)} visible GPUs evenly, or be a multiple of them, got {count}: "auto" runs '
            "one trial per GPU"
        )
    if jobs == 1:
        return [Slot(0, tuple(gpus))]  # as a run alone
    threads = max(1, cores // max(count, len(gpus)))
    share = max(1, len(gpus) // count)
    places = [k % len(gpus) if count > len(gpus) else share * k for k in range(count)] if gpus else [0] * count
    return [Slot(k, tuple(gpus[first : first + share]), threads, pinned=True) for k, first in enumerate(places)]


@contextmanager
def free_gpus(folder: Path, gpus: Sequence[str]) -> Iterator[list[str]]:
    """Lock GPUs of this machine within the block, and yield those that no other driver has locked."""
    with ExitStack() as stack:
        free = []
        for gpu in gpus:
            lock = folder / f"gpu.{os.uname().nodename}.{gpu.replace('/', '_')}"
            with suppress(BlockingIOError):
                stack.enter_context(file_lock(lock))
                free.append(gpu)
        yield free
