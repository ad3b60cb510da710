"""A PostgreSQL server on loopback."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path


def server_binaries() -> Path | None:
    """Folder of the newest installed server, where Debian's packages put it."""
    return max((path.parent for path in Path("/usr/lib/postgresql").glob("*/bin/postgres")), default=None)


def until(true: Callable[[], object], seconds: float = 180) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.02)


class PostgreSQL:
    """A server on loopback, run by an ordinary user."""

    def __init__(self, binaries: Path, folder: Path) -> None:
        self.binaries, self.data = binaries, folder / "data"
        self.user = "postgres" if os.getuid() == 0 else None  # it refuses to run as root
        if self.user:
            shutil.chown(folder, self.user)
        options = ["--pgdata", str(self.data), "--username", "sweeper", "--auth", "trust", "--no-sync"]
        subprocess.run([binaries / "initdb", *options], check=True, capture_output=True, user=self.user, cwd=folder)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.start()

    @property
    def url(self) -> str:
        return f"postgresql+psycopg://sweeper@127.0.0.1:{self.port}/postgres"

    def start(self) -> None:
        options = ["-D", self.data, "-p", str(self.port), "-c", "listen_addresses=127.0.0.1"]
        options += ["-c", "unix_socket_directories=", "-c", "fsync=off"]
        self.server = subprocess.Popen(
            [self.binaries / "postgres", *options], stderr=subprocess.DEVNULL, user=self.user, cwd=self.data
        )
        until(self.answers)

    def answers(self) -> bool:
        assert self.server.poll() is None, "postgres has ended"
        ready = [self.binaries / "pg_isready", "-h", "127.0.0.1", "-p", str(self.port)]
        return subprocess.run(ready, capture_output=True, check=False).returncode == 0

    def stop(self) -> None:
        self.server.send_signal(signal.SIGQUIT)  # at once, as a crash would
        self.server.wait(30)
