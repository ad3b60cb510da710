"""Processes that begin with torch and Lightning imported, as forks of a server: each saves seconds of imports."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fork_server import SERVER, Fork, start

PRELOADED = ["fmtrain.training.fit", "fmtrain.methods", "repmetrics.monitoring.monitor"]
multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOADED)  # for programs that use it themselves
RANKS = "TEST_RANKS"
"""Variable that names the folder in which each rank of `torchrun_forks` leaves its process id."""


def start_server() -> Callable[[], None]:
    """Start the server of this process and of those that it starts; return the function that ends it."""
    folder = tempfile.mkdtemp(prefix="forks-")
    os.environ[SERVER] = f"{folder}/server"
    server = start(Path(os.environ[SERVER]), preload=PRELOADED)

    def end() -> None:
        server.kill()
        server.wait()
        shutil.rmtree(folder)

    return end


def ensure_server() -> None:
    """Start the server if pytest runs in one process."""
    if SERVER not in os.environ:
        atexit.register(start_server())


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
        ensure_server()
        self.stdout, self.stderr = folder / "stdout", folder / "stderr"
        with self.stdout.open("wb") as stdout, self.stderr.open("wb") as stderr, open(os.devnull, "rb") as stdin:
            streams = [stream.fileno() for stream in (stdin, stdout, stderr)]
            name = (function.__module__, function.__name__)
            self.process = Fork(name, *arguments, environment=environment, streams=streams)

    def poll(self) -> int | None:
        """Exit code, minus the number of the signal that ended the process, or None while it runs."""
        return self.process.poll()

    def send_signal(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def wait(self, *, timeout: float = 240) -> int:
        """Wait for the end; return the exit code."""
        try:
            return self.process.wait(timeout)
        except TimeoutError:
            self.kill()
            raise TimeoutError(
                f"the process runs for more than {timeout} s: {self.stderr.read_text()[-3000:]}"
            ) from None


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
    from fmtrain.cli import main

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
