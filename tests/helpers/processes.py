"""Processes that begin with torch and Lightning imported: forks of one server, which saves seconds of imports each."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import runpy
import signal
import socket
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fmtrain.cli import main

CONTEXT = multiprocessing.get_context("forkserver")
PRELOADED = ["fmtrain.training.fit", "fmtrain.methods", "repmetrics.monitoring.monitor"]
CONTEXT.set_forkserver_preload(PRELOADED)
RANKS = "TEST_RANKS"
"""Variable that names the folder in which each rank of `torchrun_forks` leaves its process id."""


class Program:
    """A function in a process of its own, with its output in two files.

    Args:
        function: Importable function; ``SystemExit`` sets the exit code.
        arguments: Arguments, which are pickled.
        folder: Existing folder of the files ``stdout`` and ``stderr``.
        environment: Environment variables to set.
    """

    def __init__(
        self, function: Callable[..., Any], *arguments: Any, folder: Path, environment: Mapping[str, str] | None = None
    ) -> None:
        self.stdout, self.stderr = folder / "stdout", folder / "stderr"
        self.stdout.touch()  # can be read before the process has begun
        self.stderr.touch()
        self.process = CONTEXT.Process(
            target=_call, args=(function, arguments, self.stdout, self.stderr, dict(environment or {}))
        )
        self.process.start()

    def poll(self) -> int | None:
        """Exit code, minus the number of the signal that ended the process, or None while it runs."""
        return self.process.exitcode

    def send_signal(self, number: int) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def wait(self, *, timeout: float = 240) -> int:
        """Wait for the end; return the exit code."""
        self.process.join(timeout)
        code = self.process.exitcode
        if code is None:
            self.kill()
            raise TimeoutError(f"the process runs for more than {timeout} s: {self.stderr.read_text()[-3000:]}")
        return code


def run_ranks(function: Callable[..., Any], *arguments: Any, folder: Path, world: int = 2) -> None:
    """Run a function on several ranks of one node, with the environment that torchrun gives them, to its end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "GROUP_RANK": "0",
        "TORCHELASTIC_RUN_ID": "test",
    }
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    programs = []
    for rank in range(world):
        output = folder / f"output-of-rank-{rank}"
        output.mkdir()
        environment = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        programs.append(Program(function, *arguments, folder=output, environment=environment))
    for program in programs:
        assert program.wait() == 0, program.stderr.read_text()[-3000:]


def run_fmtrain(*arguments: object) -> None:
    """The command ``fmtrain``."""
    main([str(argument) for argument in arguments])


def torchrun_forks(*words: str) -> None:
    """``torchrun --no-python fmtrain`` with these words, whose ranks are forks and import nothing again."""
    from torch.distributed import launcher, run

    config, _, arguments = run.config_from_args(run.parse_args(["--start-method", "fork", *words]))
    launcher.elastic_launch(config, _return_from_fmtrain)(*arguments)


def _return_from_fmtrain(*arguments: str) -> None:
    """The command ``fmtrain``, which ends with SystemExit: the launcher waits for a value that is returned.

    Signals are handled as in a new process: a fork inherits the launcher's handlers.
    """
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if folder := os.environ.get(RANKS):
        Path(folder, os.environ["LOCAL_RANK"]).write_text(str(os.getpid()))
    try:
        run_fmtrain(*arguments)
    except SystemExit as ended:
        if ended.code:
            raise RuntimeError(f"fmtrain ended with exit code {ended.code}") from None


def run_script(path: Path, *arguments: str) -> None:
    """A script, as ``python path arguments`` runs it."""
    sys.argv, sys.path[:0] = [str(path), *arguments], [str(path.parent)]
    runpy.run_path(str(path), run_name="__main__")


def _call(
    function: Callable[..., Any], arguments: tuple[Any, ...], stdout: Path, stderr: Path, environment: dict[str, str]
) -> None:
    os.environ.update(environment)
    for path, stream in ((stdout, sys.stdout), (stderr, sys.stderr)):
        stream.flush()
        with path.open("wb") as file:
            os.dup2(file.fileno(), stream.fileno())
    function(*arguments)


if __name__ == "__main__":  # `torchrun_forks` as a program
    for module in PRELOADED:
        importlib.import_module(module)
    torchrun_forks(*sys.argv[1:])
