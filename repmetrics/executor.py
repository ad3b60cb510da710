"""Where tasks run: in processes of this machine, one per GPU, or on the workers of a dask cluster. No torch.

Everything that maps over slides or checkpoints takes a `concurrent.futures.Executor`, or None for this process.
"""

from __future__ import annotations

import logging
import math
import multiprocessing
import os
import pickle
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import (
    FIRST_COMPLETED,
    BrokenExecutor,
    CancelledError,
    Executor,
    Future,
    ProcessPoolExecutor,
    ThreadPoolExecutor,
    wait,
)
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.connection import wait as wait_for_any
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import Any, NamedTuple, TypeVar

from repmetrics.progress import print_line

T = TypeVar("T")
R = TypeVar("R")

CONNECT_SECONDS = 10
DEVICES = "CUDA_VISIBLE_DEVICES"


def cores() -> int:
    """Number of CPU cores that this process may use: those of its affinity, and no more than its container's quota."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min([allowed, *(max(1, math.ceil(quota)) for quota in quotas())])


def quotas(groups: Path = Path("/proc/self/cgroup"), mount: Path = Path("/sys/fs/cgroup")) -> Iterator[float]:
    """Yield the CPU seconds a second of each control group of this process that limits them, both versions of Linux.

    Docker's ``--cpus`` and Kubernetes' limits are such quotas, which neither the affinity nor Python knows.
    """
    try:
        lines = groups.read_text(encoding="utf-8").splitlines()
    except OSError:  # no Linux
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        root = mount / "cpu" if controllers else mount
        innermost = root / path.lstrip("/")
        for folder in {root, innermost, *(parent for parent in innermost.parents if parent.is_relative_to(root))}:
            names = ("cpu.cfs_quota_us", "cpu.cfs_period_us") if controllers else ("cpu.max",)
            try:
                quota, period = " ".join((folder / name).read_text(encoding="utf-8") for name in names).split()
            except (OSError, ValueError):  # a container sees its own groups at the mount
                continue
            if quota not in ("max", "-1"):
                yield int(quota) / int(period)


# ── tasks ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def as_completed(
    executor: Executor | None, function: Callable[[T], R], tasks: Sequence[T], *, died: Callable[[T], R]
) -> Iterator[tuple[int, R]]:
    """(number of the task, its result), as tasks finish.

    Tasks whose process dies run again after all others, one at a time: a process may die for the memory that other
    tasks take. Other errors of a task are raised.

    Args:
        executor: Where the tasks run; None: one after the other in this process.
        function: Function of a task. Outside of this process it must be importable, and its tasks must pickle.
        tasks: Its arguments.
        died: Result of a task whose process died both times.
    """
    if executor is None:
        yield from enumerate(map(function, tasks))
        return
    numbers = {executor.submit(function, task): number for number, task in enumerate(tasks)}
    again = []
    try:
        while numbers:
            for future in wait(numbers, return_when=FIRST_COMPLETED).done:
                number = numbers.pop(future)
                try:
                    result = _result(future)
                except _deaths():
                    again.append(number)
                else:
                    yield number, result
        for number in sorted(again):
            try:
                result = _result(executor.submit(function, tasks[number]))
            except _deaths():
                result = died(tasks[number])
            yield number, result
    finally:
        for future in numbers:
            future.cancel()


def in_order(
    executor: Executor | None, function: Callable[[T], R], tasks: Sequence[T], *, died: Callable[[T], R]
) -> Iterator[R]:
    """Results in the order of the tasks; see `as_completed`."""
    results: dict[int, R] = {}
    following = 0
    for number, result in as_completed(executor, function, tasks, died=died):
        results[number] = result
        while following in results:
            yield results.pop(following)
            following += 1


def _deaths() -> tuple[type[Exception], ...]:
    """Errors of a task whose process died."""
    distributed = sys.modules.get("distributed")
    return (BrokenExecutor,) if distributed is None else (BrokenExecutor, distributed.KilledWorker)


def _result(future: Future[R]) -> R:
    try:
        return future.result()
    except CancelledError:
        raise OSError("the dask scheduler ended before the tasks did: start it and run the command again") from None
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in ("repmetrics", "fmtrain"):
            raise ValueError("a dask worker has no repmetrics: install the version of this process there") from error
        raise


# ── processes ──────────────────────────────────────────────────────────────────────────────────────────────────────


class Processes(ThreadPoolExecutor):
    """Executor of tasks in processes, each behind a thread: a process that dies fails its own task and no other.

    The task fails with `BrokenExecutor`, and the next one gets a new process.

    Args:
        count: Number of processes.
        environments: Variables of each process, set before it imports what its tasks need; default: none.
    """

    def __init__(self, count: int, environments: Sequence[Mapping[str, str]] = ()) -> None:
        self._environments: SimpleQueue[dict[str, str]] = SimpleQueue()
        for number in range(count):
            self._environments.put(dict(environments[number]) if environments else {})
        self._local = threading.local()
        self._stops: dict[ProcessPoolExecutor, Connection] = {}
        self._lock, self._ended = threading.Lock(), False
        super().__init__(count, initializer=self._prepare_thread)

    def _prepare_thread(self) -> None:
        self._local.environment, self._local.pool = self._environments.get(), None

    def submit(self, fn: Callable[..., R], /, *args: Any, **kwargs: Any) -> Future[R]:
        """Schedule a task."""
        return super().submit(self._run, fn, *args, **kwargs)

    def _run(self, fn: Callable[..., R], /, *args: Any, **kwargs: Any) -> R:
        pool: ProcessPoolExecutor | None = self._local.pool
        if pool is None:
            receiver, stop = multiprocessing.Pipe(duplex=False)
            # Not forked: this process may have threads (of torch, OpenSlide), and locks do not survive a fork.
            context = multiprocessing.get_context("spawn")
            arguments = (self._local.environment, receiver)
            with self._lock:
                if self._ended:
                    raise BrokenExecutor("the executor has ended")
                pool = ProcessPoolExecutor(1, mp_context=context, initializer=_begin, initargs=arguments)
                self._local.pool, self._stops[pool] = pool, stop
        try:
            return pool.submit(fn, *args, **kwargs).result()
        except BrokenExecutor:
            self._local.pool = None
            with self._lock:  # another thread may end all processes
                stop = self._stops.pop(pool)
            stop.close()
            pool.shutdown(wait=False)
            raise

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """End the processes: after their tasks, or without `wait` immediately."""
        super().shutdown(wait=False, cancel_futures=cancel_futures or not wait)
        if not wait:
            self._end_processes()
        super().shutdown(wait=True)
        for pool in self._stops:
            pool.shutdown()
        self._end_processes()

    def _end_processes(self) -> None:
        with self._lock:
            self._ended = True
            for stop in self._stops.values():
                stop.close()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """End the processes, immediately after an error."""
        self.shutdown(wait=kind is None)


def _begin(environment: Mapping[str, str], stop: Connection) -> None:
    """Begin a process: it ends when its parent closes `stop`, or dies. Ctrl-C reaches the parent alone."""
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        wait_for_any([parent.sentinel, stop])
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def gpu_environments(count: int, *, available: int) -> list[dict[str, str]]:
    """Variables of `count` processes with one GPU each.

    Args:
        count: Number of processes.
        available: Number of GPUs that this process sees.

    Raises:
        ValueError: There are fewer GPUs.
    """
    if count > available:
        raise ValueError(f"--gpus {count}: this machine shows {available} GPUs ({DEVICES} may hide some)")
    visible = [name.strip() for name in os.environ.get(DEVICES, "").split(",") if name.strip()]
    return [{DEVICES: name} for name in (visible or list(map(str, range(available))))[:count]]


# ── dask ───────────────────────────────────────────────────────────────────────────────────────────────────────────


class _Caller(NamedTuple):
    """What a worker must share with the process that sends it tasks."""

    folder: str
    version: str


class _Dask(Executor):
    """Executor of a dask client; each task begins with a check of its worker."""

    def __init__(self, client: Any) -> None:
        from repmetrics import __version__

        self._executor: Executor = client.get_executor(pure=False)
        self._caller = _Caller(os.getcwd(), __version__)

    def submit(self, fn: Callable[..., R], /, *args: Any, **kwargs: Any) -> Future[R]:
        """Schedule a task. The scheduler sees bytes alone, and needs no repmetrics."""
        payload = pickle.dumps(_Call((self._caller, partial(fn, *args, **kwargs))))
        return self._executor.submit(pickle.loads, payload)


class _Call:
    """A call that unpickling makes: its result takes the place of the object."""

    def __init__(self, arguments: tuple[Any, ...]) -> None:
        self.arguments = arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return _run_on_worker, self.arguments


def _run_on_worker(caller: _Caller, task: Callable[[], R]) -> R:
    """A task in the folder of the caller, to which its paths are relative."""
    from repmetrics import __version__

    host = socket.gethostname()
    if __version__ != caller.version:
        raise ValueError(f"the dask worker on {host} has repmetrics {__version__}, this process {caller.version}")
    try:
        os.chdir(caller.folder)
    except OSError:
        raise ValueError(
            f"the dask worker on {host} has no folder {caller.folder}: workers need the file system of this process"
        ) from None
    return task()


@contextmanager
def dask_executor(address: str) -> Iterator[Executor]:
    """Executor of the workers of a dask scheduler.

    Args:
        address: Address of the scheduler, like "tcp://host:8786".

    Raises:
        ValueError: No scheduler answers, a worker runs several tasks in one process, or a worker lacks the package.
    """
    from distributed import Client

    for name in ("distributed", "asyncio", "tornado"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # what matters is raised, too
    try:
        client = Client(address, timeout=CONNECT_SECONDS, set_as_default=False)
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(
            f"--dask {address}: no scheduler answers there within {CONNECT_SECONDS} s: "
            "start one with `dask scheduler`, and give the address that it prints"
        ) from error
    with client:
        if not client.nthreads():
            print_line(f"waiting for a worker of {address}: start some with `dask worker {address} --nthreads 1`")
            client.wait_for_workers(1)
        if several := {worker: n for worker, n in client.nthreads().items() if n > 1}:
            worker, n = next(iter(several.items()))
            raise ValueError(
                f"--dask {address}: worker {worker} runs {n} tasks in one process, which decoders and torch do not "
                "allow for: start workers with --nthreads 1, and as many with --nworkers as there are cores or GPUs"
            )
        yield _Dask(client)


@contextmanager
def open_executor(
    *, processes: int = 0, gpus: int | None = None, available_gpus: int = 0, dask: str | None = None
) -> Iterator[Executor | None]:
    """The executor that the options of a command name.

    Args:
        processes: Number of processes; 0: none besides this one, and no executor.
        gpus: Number of processes, each with one GPU.
        available_gpus: Number of GPUs that this process sees.
        dask: Address of a dask scheduler.
    """
    if dask is not None:
        with dask_executor(dask) as executor:
            yield executor
    elif gpus is not None:
        with Processes(gpus, gpu_environments(gpus, available=available_gpus)) as executor:
            yield executor
    elif processes:
        with Processes(processes) as executor:
            yield executor
    else:
        yield None
