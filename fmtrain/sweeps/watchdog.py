"""Watchdog of a trial: it stops the command when the driver closes the pipe or dies.

It runs as a script without imports of the package, so that it starts in milliseconds:
``python watchdog.py GRACE_SECONDS COMMAND …``. It ends with the exit code of the command.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence

NOT_FOUND = 127


def main(grace_seconds: float, command: Sequence[str]) -> int:
    """Run the command. At the end of standard input, send it SIGTERM; after the grace period, kill the process group.

    SIGTERM goes to the command alone. Launchers such as torchrun forward it.
    """
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, lambda *_: None)  # not SIG_IGN: the command would inherit that
    try:
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    except OSError as error:
        print(f"{command[0]} cannot be started: {error.strerror}", file=sys.stderr)
        return NOT_FOUND

    def watch() -> None:
        os.read(sys.stdin.fileno(), 1)  # returns when no process holds the other end
        child.terminate()
        try:
            child.wait(grace_seconds)
        except subprocess.TimeoutExpired:
            os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()
    code = child.wait()
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]), sys.argv[2:]))
