"""A server whose forks run functions for other processes: they begin with what the server has imported.

The tests of all processes of pytest share one server. It imports torch and Lightning once, which takes a program of
its own most of its time. A client imports the standard library alone.
"""

from __future__ import annotations

import importlib
import os
import pickle
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

SERVER = "TEST_FORK_SERVER"
"""Variable that names the server's socket."""
FOLDER = os.getcwd()
"""What "" stands for in ``sys.path``, also where a test changes the folder."""


def start(address: Path, *, preload: Sequence[str]) -> subprocess.Popen[bytes]:
    """Start a server, whose socket appears when its modules are imported; output of the imports is in a file."""
    with address.with_suffix(".log").open("wb") as log:
        command = [sys.executable, __file__, str(address), str(os.getpid()), *preload]
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)


def serve(address: str, *, parent: int) -> Callable[[], Any]:
    """Wait for clients, as long as the parent lives. In a fork, return what its client asks for."""
    server = socket.socket(socket.AF_UNIX)
    server.bind(f"{address}.new")
    server.listen(16)
    os.rename(f"{address}.new", address)  # a client that finds it can connect
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        if not select.select([server], [], [], 5)[0]:
            if os.getppid() != parent:  # pytest was killed
                os._exit(1)
            continue
        connection, _ = server.accept()
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            server.close()
            header, streams, _, _ = socket.recv_fds(connection, 4, 3)
            with connection.makefile("rb") as file:
                request = pickle.loads(file.read(int.from_bytes(header, "big")))
            process = os.fork()
            if process == 0:
                connection.close()
                return _prepare(request, streams)
            for stream in streams:
                os.close(stream)
            connection.sendall(f"{process}\n".encode())
            code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
            connection.sendall(f"{code}\n".encode())
            os._exit(0)
        connection.close()


def _prepare(request: Mapping[str, Any], streams: Sequence[int]) -> Callable[[], Any]:
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", buffering=1, closefd=False)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.path[:] = request["path"]
    function = getattr(importlib.import_module(request["module"]), request["name"])
    return partial(function, *pickle.loads(request["arguments"]))


class Fork:
    """A function in a fork of the server, as `subprocess.Popen` would run a program.

    Args:
        function: Name of its module, and its own.
        arguments: Arguments, which are pickled.
        environment: Environment variables to set.
        streams: Descriptors of standard input, output and error.

    Attributes:
        pid: Process id.
    """

    def __init__(
        self,
        function: tuple[str, str],
        *arguments: Any,
        environment: Mapping[str, str] | None = None,
        streams: Sequence[int] = (0, 1, 2),
    ) -> None:
        self._code: int | None = None
        self._connection = _connect(Path(os.environ[SERVER]))
        request = pickle.dumps(
            {
                "folder": os.getcwd(),
                "environment": {**os.environ, **(environment or {})},
                "path": [entry or FOLDER for entry in sys.path],
                "module": function[0],
                "name": function[1],
                "arguments": pickle.dumps(arguments),
            }
        )
        socket.send_fds(self._connection, [len(request).to_bytes(4, "big")], list(streams))
        self._connection.sendall(request)
        self.pid = self._number()

    def poll(self) -> int | None:
        """Exit code, or minus the number of the signal that ended the process; None while it runs."""
        return self._wait(0)

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end; return the exit code as `poll`.

        Raises:
            TimeoutError: It runs for longer.
        """
        code = self._wait(timeout)
        if code is None:
            raise TimeoutError(f"process {self.pid} runs for more than {timeout} s")
        return code

    def _wait(self, timeout: float | None) -> int | None:
        if self._code is None and select.select([self._connection], [], [], timeout)[0]:
            self._code = self._number()
            self._connection.close()
        return self._code

    def _number(self) -> int:
        """Next number that the server sends."""
        line = b""
        while not line.endswith(b"\n"):
            part = self._connection.recv(1)
            assert part, "the server has ended"
            line += part
        return int(line)

    def __del__(self) -> None:
        if hasattr(self, "_connection"):
            self._connection.close()


def _connect(address: Path) -> socket.socket:
    """Connection to the server, which may still import."""
    until = time.monotonic() + 300
    while not address.exists():
        assert time.monotonic() < until, address.with_suffix(".log").read_text()
        time.sleep(0.05)
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(str(address))
    return connection


if __name__ == "__main__":
    for module in sys.argv[3:]:
        importlib.import_module(module)
    serve(sys.argv[1], parent=int(sys.argv[2]))()
