"""A trial as a process: command, folder, log, measurements and lock. No Optuna here."""

from __future__ import annotations

import fcntl
import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from fmtrain.sweeps import watchdog
from repmetrics.monitoring.record import parse_lines

LOG = "log.txt"
RUN = "run"
MEASUREMENTS = "measurements.jsonl"


def run_command(
    *, launcher: str, fit: Sequence[str], params: Mapping[str, object], folder: Path, number: int, resume: bool = False
) -> list[str]:
    """Command line of a trial.

    In the launcher, ``{command}`` is replaced by ``fmtrain fit …``, ``{out}`` by the folder of the run, ``{number}``
    by the number of the trial, ``{python}`` by this interpreter.

    Example:
        >>> parts = dict(fit=["--config", "demo"], params={"model.schedules.lr": 1e-3}, folder=Path("s/trials/0004"))
        >>> shlex.join(run_command(launcher="torchrun -m {command}", number=4, **parts))
        'torchrun -m fmtrain fit --config demo --model.schedules.lr 0.001 --out s/trials/0004/run'
        >>> remote = run_command(launcher="ssh gpu1 'cd /data && {command}'", number=4, **parts)
        >>> shlex.join(remote).count("'cd /data && fm")
        1
    """
    out = str(folder / RUN)
    settings = [part for name, value in params.items() for part in (f"--{name}", cli_value(value))]
    command = ["fmtrain", "fit", *fit, *settings, "--out", out, *(["--resume"] if resume else [])]
    replacements = {"{command}": shlex.join(command), "{out}": out, "{number}": str(number), "{python}": sys.executable}
    parts: list[str] = []
    for part in shlex.split(launcher):
        if part == "{command}":
            parts += command
            continue
        for name, value in replacements.items():
            part = part.replace(name, value)
        parts.append(part)
    return parts


def cli_value(value: object) -> str:
    """A value as an argument of the command line.

    Example:
        >>> cli_value(0.001), cli_value("kde"), cli_value(True), cli_value(None)
        ('0.001', 'kde', 'true', 'null')
    """
    return value if isinstance(value, str) else json.dumps(value)


def format_setting(value: object) -> str:
    """A value as messages and tables show it.

    Example:
        >>> format_setting(0.00123456), format_setting("kde"), format_setting(None)
        ('0.00123', 'kde', 'None')
    """
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def last_lines(path: Path, count: int = 8) -> list[str]:
    """The last lines of a log that are not blank; none if the file does not exist."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").replace("\r", "\n").splitlines()
    return [line.rstrip() for line in lines if line.strip()][-count:]


class JsonlTail:
    """Reads each line of a growing JSONL file once, when it is complete."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._position = 0

    def new(self) -> list[dict[str, Any]]:
        """Lines added since the last call."""
        if not self.path.is_file():
            return []
        with self.path.open("rb") as file:
            file.seek(self._position)
            content = file.read()
        self._position += content.rfind(b"\n") + 1
        return parse_lines(content)


def read_values(entry: Mapping[str, Any]) -> dict[str, tuple[float, float | None]]:
    """Value and standard error by name from a line of measurements.jsonl, without metrics that have no value.

    Example:
        >>> read_values({"loss": 6.2, "measurements": {"rankme": {"value": 40.5, "standard_error": 1.5}}})
        {'rankme': (40.5, 1.5), 'loss': (6.2, None)}
    """
    pairs = {name: (m["value"], m["standard_error"]) for name, m in entry["measurements"].items()}
    pairs["loss"] = (entry["loss"], None)
    return {name: pair for name, pair in pairs.items() if pair[0] is not None}


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
def try_lock(path: Path, *, wait: bool = False) -> Iterator[bool]:
    """Take the lock within the block if it exists and is free, and yield whether it was taken. `wait` until free."""
    if not path.is_file():
        yield False
        return
    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True


# ── the process ────────────────────────────────────────────────────────────────────────────────────────────────────


class TrialProcess:
    """The command of a trial in its own process group, supervised by :mod:`fmtrain.sweeps.watchdog`.

    Args:
        command: Command line.
        log: File to which the output is appended.
        lock: Lock that is held as long as the command runs, even after this process has ended.
        grace_seconds: Time between SIGTERM and SIGKILL.
    """

    def __init__(self, command: Sequence[str], *, log: Path, lock: IO[bytes], grace_seconds: float) -> None:
        with log.open("ab") as output:
            self._watchdog = subprocess.Popen(
                [sys.executable, "-I", watchdog.__file__, str(grace_seconds), *command],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=(lock.fileno(),),
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
