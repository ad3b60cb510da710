"""`fmtrain fit --check`: a minute of real reading and stepping before a long run, and what it says of that run."""

from __future__ import annotations

import multiprocessing
import os
import resource
import shutil
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from fmtrain.patches.loader import PREFETCH_FACTOR, training_batches
from fmtrain.training.config import FitCLI
from fmtrain.training.progress import WAIT_LIMIT
from repmetrics.progress import format_duration

READING_SECONDS, STEPPING_SECONDS = 20.0, 40.0
FIRST_STEPS = 2  # not measured: compilation, start of the workers
MEMORY_LIMIT = 0.9  # share of the memory above which a run is likely to be killed
GB = 1e9
SHM = Path("/dev/shm")


class Measured(NamedTuple):
    """What the minute showed.

    Attributes:
        read_rate: Patches per second of the data path alone, over all ranks.
        rate: Patches per second of the whole run, over all ranks.
        wait: Share of the time that a rank waits for patches.
        memory: Largest memory of a rank with its workers, in bytes.
        memory_available: Memory of the machine that is not in use by others, per rank, in bytes.
        gpu_memory: Largest GPU memory of a rank and the memory of its GPU, in bytes; None without GPU.
        shm: Shared memory of all ranks of a machine, and what is free, in bytes.
        checkpoint: Size of one checkpoint in bytes.
        files: Number of checkpoints on the disk at the same time.
        disk_free: Free bytes on the disk of the run.
        hours: Hours to the end of the run, without evaluations.
        steps: Steps that were measured.
    """

    read_rate: float
    rate: float
    wait: float
    memory: int
    memory_available: int
    gpu_memory: tuple[int, int] | None
    shm: tuple[int, int]
    checkpoint: int
    files: int
    disk_free: int
    hours: float
    steps: int

    @property
    def model_rate(self) -> float:
        """Patches per second that the model would reach without waiting."""
        return self.rate / max(1 - self.wait, 1e-9)


def problems(m: Measured) -> list[str]:
    """What would stop the run or slow it down, the worst first.

    Example:
        >>> m = Measured(90, 80, 0.2, 4, 5, None, (1, 9), 3, 2, 5, 1.0, 9)
        >>> problems(m)[0]
        'the checkpoints need 0.0 GB, and 0.0 GB are free: set checkpoint.save_top_k, or another --out'
    """
    lines = []
    if m.files * m.checkpoint > m.disk_free:
        lines.append(
            f"the checkpoints need {m.files * m.checkpoint / GB:.1f} GB, and {m.disk_free / GB:.1f} GB are free: set "
            "checkpoint.save_top_k, or another --out"
        )
    if m.shm[0] > m.shm[1]:
        lines.append(
            f"the workers need {m.shm[0] / GB:.1f} GB of {SHM}, and {m.shm[1] / GB:.1f} GB are free: lower "
            "data.num_workers, or start the container with more shared memory"
        )
    if m.memory > MEMORY_LIMIT * m.memory_available:
        lines.append(
            f"a rank with its workers takes {m.memory / GB:.1f} GB of {m.memory_available / GB:.1f} GB: the system may "
            "kill a worker; lower data.num_workers or data.open_slides"
        )
    if m.gpu_memory and m.gpu_memory[0] > MEMORY_LIMIT * m.gpu_memory[1]:
        lines.append(
            f"a rank takes {m.gpu_memory[0] / GB:.1f} GB of its GPU's {m.gpu_memory[1] / GB:.1f} GB: lower "
            "data.batch_size, or set model.grad_checkpointing"
        )
    if m.wait > WAIT_LIMIT:
        lines.append(
            f"{m.wait:.0%} of the time is spent waiting for patches: raise data.num_workers, or data.crops_per_block"
        )
    return lines


def report(m: Measured, *, ranks: int, steps: int) -> str:
    """Report of the check: problems first, then the numbers.

    Args:
        m: Measurements.
        ranks: Number of ranks.
        steps: Steps of the run that are left.
    """
    listed = problems(m)
    lines = [f"problem: {line}" for line in listed] or ["no problems"]
    lines += [
        f"data path alone: {m.read_rate:.4g} img/s; model alone: {m.model_rate:.4g} img/s; together: {m.rate:.4g} img/s"
        + (f" on {ranks} ranks" if ranks > 1 else ""),
        f"waiting for patches: {m.wait:.1%} of the time",
        f"memory of a rank with its workers: {m.memory / GB:.2f} GB of {m.memory_available / GB:.2f} GB",
    ]
    if m.gpu_memory:
        lines.append(f"GPU memory of a rank: {m.gpu_memory[0] / GB:.2f} GB of {m.gpu_memory[1] / GB:.2f} GB")
    lines += [
        f"{SHM}: {m.shm[0] / GB:.2f} GB of {m.shm[1] / GB:.2f} GB free",
        f"checkpoints: {m.files} of {m.checkpoint / GB:.2f} GB, of {m.disk_free / GB:.1f} GB free",
        f"to the end: {format_duration(3600 * m.hours)} for {steps} steps, without evaluations ({m.steps} measured)",
    ]
    return "\n".join(lines)


class Stopwatch(Callback):
    """Times the steps of a trainer and stops it after some seconds, or at its own end."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.steps, self.elapsed, self.waited = 0, 0.0, 0.0
        self.memory = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the limit of the time."""
        self._end = time.perf_counter() + self.seconds
        self._first = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the step, and stop all ranks when the time of any is over."""
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        if trainer.strategy.root_device.type == "cuda":
            torch.cuda.synchronize()
        now, waited = time.perf_counter(), trainer.datamodule.timed_batches.wait_seconds  # type: ignore[attr-defined]
        done = trainer.global_step - self._first
        if done <= FIRST_STEPS:
            self._start, self._waited = now, waited
        self.steps, self.elapsed = max(done - FIRST_STEPS, 0), now - self._start
        self.waited = waited - self._waited
        self.memory = max(self.memory, memory_with_workers())
        if trainer.strategy.reduce_boolean_decision(now > self._end and self.steps > 0, all=False):
            trainer.should_stop = True


def memory_with_workers() -> int:
    """Largest resident memory so far of this process, plus that of its workers, in bytes. Shared pages count twice."""
    peaks = [resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024]
    for child in multiprocessing.active_children():
        try:
            text = Path(f"/proc/{child.pid}/status").read_text(encoding="utf-8")
        except OSError:
            continue
        peaks += [int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("VmHWM")]
    return sum(peaks)


def memory_available() -> int:
    """Memory that this machine, or the container's limit, leaves to new processes, in bytes."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="utf-8").strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text(encoding="utf-8"))
        return free if limit == "max" else min(free, int(limit) - used)
    except (OSError, StopIteration, ValueError):
        return free


def read_rate(cli: FitCLI, *, seconds: float) -> float:
    """Patches per second of this rank's data path alone."""
    data = cli.datamodule
    batches = training_batches(
        data.patches, batch_size=data.batch_size, rank=cli.trainer.global_rank, world=cli.trainer.world_size,
        num_workers=data.num_workers,
    )  # fmt: skip
    for _ in range(FIRST_STEPS + data.num_workers * PREFETCH_FACTOR):  # what is read while the workers start
        next(batches)
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < seconds or not count:
        count += len(next(batches))
    rate = count / (time.perf_counter() - start)
    batches.close()  # type: ignore[attr-defined]
    return rate


def checkpoint_bytes(model: LightningModule) -> int:
    """Size of a checkpoint: weights and buffers, and AdamW's two averages of each trained weight."""
    state = sum(value.numel() * value.element_size() for value in model.state_dict().values())
    return state + sum(2 * p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)


def checkpoints_on_disk(settings: Any, *, steps: int) -> int:
    """Checkpoints on the disk at one time: those kept, the last one, and the one that is being written."""
    kept = settings.save_top_k
    if kept < 0:
        kept = steps // max(settings.every_n_train_steps or steps, 1)
    return int(kept) + 2


def shared_memory(cli: FitCLI) -> tuple[int, int]:
    """Shared memory that the batches of this machine's ranks need, and what is free, in bytes."""
    data, trainer = cli.datamodule, cli.trainer
    slots = data.num_workers * PREFETCH_FACTOR + 1 if data.num_workers else 0
    ring = slots * data.patches.crops_per_block * data.batch_size * data.patches.size_px**2 * 3
    free = shutil.disk_usage(SHM).free if SHM.is_dir() else 0
    ranks = trainer.world_size // max(trainer.num_nodes, 1)
    return ring * ranks, free + (0 if SHM.is_dir() else ring * ranks)


def check_run(
    cli: FitCLI, *, reading_seconds: float = READING_SECONDS, stepping_seconds: float = STEPPING_SECONDS
) -> tuple[str, Sequence[str]]:
    """Read and step for a minute as the run would; nothing is written.

    Returns:
        Report, and the problems in it; empty on ranks other than 0.
    """
    trainer, model = cli.trainer, cli.model
    available = memory_available() + memory_with_workers()
    rate = read_rate(cli, seconds=reading_seconds)
    watch = Stopwatch(stepping_seconds)
    trainer.callbacks[:] = [watch]  # type: ignore[attr-defined]
    trainer.loggers = []
    first = trainer.global_step if cli.step is None else cli.step
    steps = trainer.estimated_stepping_batches if trainer.max_steps < 0 else trainer.max_steps
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", category=UserWarning)
        trainer.fit(model, datamodule=cli.datamodule)
    if not watch.steps:
        raise ValueError(f"the run has too few steps to measure: fit --check needs more than {FIRST_STEPS}")
    per_step = cli.datamodule.patches_per_step(trainer)
    device, folder = trainer.strategy.root_device, cli.out.absolute()
    gpu = (torch.cuda.max_memory_allocated(), torch.cuda.mem_get_info()[1]) if device.type == "cuda" else None
    while not folder.is_dir():
        folder = folder.parent
    left = int(steps) - first
    local_ranks = trainer.world_size // max(trainer.num_nodes, 1)
    measured = Measured(
        read_rate=rate * trainer.world_size,
        rate=watch.steps * per_step / watch.elapsed,
        wait=watch.waited / watch.elapsed,
        memory=watch.memory,
        memory_available=available // local_ranks,
        gpu_memory=gpu,
        shm=shared_memory(cli),
        checkpoint=checkpoint_bytes(model),
        files=checkpoints_on_disk(cli.config.checkpoint, steps=left),
        disk_free=shutil.disk_usage(folder).free,
        hours=left * watch.elapsed / watch.steps / 3600,
        steps=watch.steps,
    )
    if not trainer.is_global_zero:
        return "", ()
    return report(measured, ranks=trainer.world_size, steps=left), problems(measured)
