"""A trial as a process: log, measurements, checkpoints and lock. No Optuna here."""

from __future__ import annotations

import fcntl
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from types import MappingProxyType
from typing import IO, NamedTuple

from fmtrain.sweeps import watchdog
from repmetrics.monitoring import MEASUREMENTS

LOG = "log.txt"
CHECKPOINT_SUFFIXES = {".ckpt", ".pt", ".pth", ".safetensors"}


def last_lines(path: Path, count: int = 8) -> list[str]:
    """The last lines of a log that are not blank; none if the file does not exist."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").replace("\r", "\n").splitlines()
    return [line.rstrip() for line in lines if line.strip()][-count:]


class Evaluation(NamedTuple):
    """What the driver reads of one evaluation.

    Attributes:
        step: Optimizer steps before it.
        alarms: Kinds of the active alarms.
        values: Value and standard error by metric; metrics without a value are absent.
        finite: Whether the features were finite.
    """

    step: int
    alarms: tuple[str, ...]
    values: Mapping[str, tuple[float, float | None]]
    finite: bool


def parse_evaluation(line: bytes) -> Evaluation:
    """Evaluation in a line of ``measurements.jsonl``. Needed are `step` and `measurements`, with a `value` each.

    Raises:
        ValueError: The line is no evaluation.

    Example:
        >>> parse_evaluation(b'{"step": 9, "loss": 6.2, "measurements": {"rankme": {"value": 40.5}}}').values
        {'rankme': (40.5, None), 'loss': (6.2, None)}
    """
    try:
        entry = json.loads(line)
        pairs = {str(name): (m["value"], m.get("standard_error")) for name, m in entry["measurements"].items()}
        pairs["loss"] = (entry.get("loss"), None)
        values = {
            name: (float(value), None if error is None or not math.isfinite(error) else float(error))
            for name, (value, error) in pairs.items()
            if value is not None and math.isfinite(value)
        }
        alarms = tuple(str(alarm if isinstance(alarm, str) else alarm[0]) for alarm in entry.get("alarms") or ())
        step = int(entry["step"])
    except (KeyError, TypeError, AttributeError, IndexError, OverflowError, RecursionError) as error:
        raise ValueError(f"no evaluation: {error}") from error
    if step < 0:
        raise ValueError(f"no evaluation: step {step}")
    return Evaluation(step, alarms, values, finite=not entry.get("nonfinite"))


class MeasurementsTail:
    """Reads each line of a growing ``measurements.jsonl`` once, when it is complete.

    Args:
        folder: Folder of the run. The file may lie deeper, in the folder of a logger; then the newest counts.

    Attributes:
        unreadable: Number of lines so far that are no evaluation, as a full disk or a power cut leaves them.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.unreadable = 0
        self._position = self._inode = 0

    def new(self) -> list[Evaluation]:
        """Evaluations added since the last call."""
        path = self._find()
        if path is None:
            return []
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            if status.st_ino != self._inode or status.st_size < self._position:  # a resumed run wrote its history again
                self._position, self._inode = 0, status.st_ino
            file.seek(self._position)
            content = file.read()
        self._position += content.rfind(b"\n") + 1
        evaluations = []
        for line in content[: content.rfind(b"\n") + 1].split(b"\n")[:-1]:
            try:
                evaluations.append(parse_evaluation(line))
            except ValueError:
                self.unreadable += 1
        return evaluations

    def _find(self) -> Path | None:
        if (path := self.folder / MEASUREMENTS).is_file():
            return path
        return max(self.folder.rglob(MEASUREMENTS), key=lambda path: path.stat().st_mtime, default=None)


def saved_since(folder: Path, start: datetime) -> bool:
    """Whether the run in this folder wrote a checkpoint since this time."""
    return any(file.stat().st_mtime >= start.timestamp() for file in checkpoints(folder))


def checkpoints(folder: Path) -> list[Path]:
    """Checkpoints of the run in this folder, of any script."""
    files = sorted(folder.rglob("*"))
    return [file for file in files if file.suffix in CHECKPOINT_SUFFIXES or file.name.startswith("checkpoint-")]


# ── the lock of a trial ─────────────────────────────────────────────────────────────────────────────────────────────


@contextmanager
def create_lock(path: Path) -> Iterator[IO[bytes]]:
    """Create a lock that is held from the moment its file exists until every process with the file open has ended."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.uname().nodename}.{os.getpid()}")
    with temporary.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        temporary.rename(path)
        yield file


@contextmanager
def try_lock(path: Path) -> Iterator[bool]:
    """Take the lock within the block if it exists and is free, and yield whether it was taken."""
    if not path.is_file():
        yield False
        return
    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def is_locked(path: Path) -> bool:
    """Whether some process holds the lock."""
    with try_lock(path) as taken:
        return path.is_file() and not taken


# ── the process ────────────────────────────────────────────────────────────────────────────────────────────────────


class TrialProcess:
    """The command of a trial in its own process group, supervised by :mod:`fmtrain.sweeps.watchdog`.

    Args:
        command: Command line.
        log: File to which the output is appended.
        lock: Lock that is held as long as the command runs, even after this process has ended.
        grace_seconds: Time between SIGTERM and SIGKILL.
        environment: Variables for the command, in addition to those of this process.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        log: Path,
        lock: IO[bytes],
        grace_seconds: float,
        environment: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        with log.open("ab") as output:
            self._watchdog = subprocess.Popen(
                [sys.executable, "-I", watchdog.__file__, str(grace_seconds), *command],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=(lock.fileno(),),
                env={**os.environ, **environment},
            )

    def poll(self) -> int | None:
        """Exit code, or None while the command runs. After the end, the rest of its group is killed."""
        code = self._watchdog.poll()
        if code is not None:
            self.stop()  # closes the pipe
            self._kill_group()
        return code

    def stop(self) -> None:
        """Have the watchdog send SIGTERM, and SIGKILL after the grace period. Do not wait."""
        assert self._watchdog.stdin is not None
        self._watchdog.stdin.close()

    def kill(self) -> None:
        """Kill the process group at once."""
        self._kill_group()
        self._watchdog.wait()

    def wait(self) -> int:
        """Wait for the end and return the exit code."""
        self._watchdog.wait()
        code = self.poll()
        assert code is not None
        return code

    def _kill_group(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._watchdog.pid, signal.SIGKILL)
