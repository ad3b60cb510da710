"""A trial of a sweep as a process: its command, its folder, its log, what it measures, who holds it. No Optuna here."""

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

from fmtrain.sweeps import guard

LOG = "log.txt"
RUN = "run"
MEASUREMENTS = "measurements.jsonl"


def run_command(
    *, launcher: str, fit: Sequence[str], params: Mapping[str, object], folder: Path, number: int, resume: bool = False
) -> list[str]:
    """The command line of a trial.

    ``{command}`` in the launcher stands for ``fmtrain fit …``, ``{out}`` for the run's folder, ``{number}`` for the
    trial's, ``{python}`` for this interpreter.

    Example:
        >>> parts = dict(fit=["--config", "demo"], params={"model.schedules.lr": 1e-3}, folder=Path("s/trials/0004"))
        >>> shlex.join(run_command(launcher="torchrun -m {command}", number=4, **parts))
        'torchrun -m fmtrain fit --config demo --model.schedules.lr 0.001 --out s/trials/0004/run'
        >>> shlex.join(run_command(launcher="ssh gpu1 'cd /data && {command}'", number=4, **parts)).count("'cd /data && fm")
        1
    """
    out = str(folder / RUN)
    chosen = [part for name, value in params.items() for part in (f"--{name}", cli_value(value))]
    whole = ["fmtrain", "fit", *fit, *chosen, "--out", out, *(["--resume"] if resume else [])]
    filled = {"{command}": shlex.join(whole), "{out}": out, "{number}": str(number), "{python}": sys.executable}
    parts: list[str] = []
    for part in shlex.split(launcher):
        if part == "{command}":
            parts += whole
            continue
        for name, value in filled.items():
            part = part.replace(name, value)
        parts.append(part)
    return parts


def cli_value(value: object) -> str:
    """A value as on the command line.

    Example:
        >>> cli_value(0.001), cli_value("kde"), cli_value(True), cli_value(None)
        ('0.001', 'kde', 'true', 'null')
    """
    return value if isinstance(value, str) else json.dumps(value)


def last_lines(path: Path, count: int = 8) -> list[str]:
    """The last lines of a log that hold anything; none of a file that is not there."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").replace("\r", "\n").splitlines()
    return [line.rstrip() for line in lines if line.strip()][-count:]


class JsonlTail:
    """The lines of a growing JSONL file, each once and only when it is whole."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._read = 0

    def new(self) -> list[dict[str, Any]]:
        """What was added since the last call."""
        if not self.path.is_file():
            return []
        with self.path.open("rb") as file:
            file.seek(self._read)
            whole = file.read().rpartition(b"\n")[0]
        if not whole:
            return []
        self._read += len(whole) + 1
        return [json.loads(line) for line in whole.splitlines()]


def read_values(entry: Mapping[str, Any]) -> dict[str, tuple[float, float | None]]:
    """Value and standard error by name, of a line of measurements.jsonl; what has no value is left out.

    Example:
        >>> read_values({"loss": 6.2, "measurements": {"rankme": {"value": 40.5, "standard_error": 1.5}}})
        {'rankme': (40.5, 1.5), 'loss': (6.2, None)}
    """
    found = {name: (m["value"], m["standard_error"]) for name, m in entry["measurements"].items()}
    found["loss"] = (entry["loss"], None)
    return {name: pair for name, pair in found.items() if pair[0] is not None}


# ── who holds a trial ──────────────────────────────────────────────────────────────────────────────────────────────


@contextmanager
def create_lock(path: Path) -> Iterator[IO[bytes]]:
    """A lock that appears under its name already held, and is free once every process that has the file is gone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f"{path.name}.{os.uname().nodename}.{os.getpid()}")
    with new.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        new.rename(path)
        yield file


@contextmanager
def try_lock(path: Path, *, wait: bool = False) -> Iterator[bool]:
    """Whether the lock exists and was free: then it is ours within the block. `wait` until it is."""
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
    """A trial's command in a process group of its own, watched by :mod:`fmtrain.sweeps.guard`.

    Args:
        line: The command.
        log: Where its output goes, after what stands there.
        lock: Held as long as the command runs, even when this process is gone.
        grace_seconds: Between SIGTERM and SIGKILL.
    """

    def __init__(self, line: Sequence[str], *, log: Path, lock: IO[bytes], grace_seconds: float) -> None:
        with log.open("ab") as output:
            self._guard = subprocess.Popen(
                [sys.executable, "-I", guard.__file__, str(grace_seconds), *line],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=(lock.fileno(),),
            )

    def poll(self) -> int | None:
        """The exit code, or None while it runs. Nothing of its group is left behind."""
        code = self._guard.poll()
        if code is not None:
            self.stop()  # closes the pipe
            self._kill_group()
        return code

    def stop(self) -> None:
        """Have it sent SIGTERM, and SIGKILL after the grace; does not wait."""
        assert self._guard.stdin is not None
        self._guard.stdin.close()

    def kill(self) -> None:
        """End it at once."""
        self._kill_group()
        self._guard.wait()

    def wait(self) -> int:
        """Until it has ended."""
        self._guard.wait()
        code = self.poll()
        assert code is not None
        return code

    def _kill_group(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._guard.pid, signal.SIGKILL)
