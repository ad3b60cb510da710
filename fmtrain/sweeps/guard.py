"""A trial's command and the watch over it: when the driver lets go of the pipe, or dies, the command is stopped.

Run as a script, so that it starts in milliseconds: ``python guard.py GRACE_SECONDS COMMAND …``. It ends with the
command's exit code.
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
    """Run the command; at the end of standard input send it SIGTERM, and after the grace kill the process group.

    SIGTERM goes to the command alone: launchers such as torchrun pass it on, and a second one would keep `fmtrain
    fit` from saving.
    """
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: None)  # not SIG_IGN: the command would inherit that
    try:
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    except OSError as error:
        print(f"{command[0]} cannot be started: {error.strerror}", file=sys.stderr)
        return NOT_FOUND

    def watch() -> None:
        os.read(sys.stdin.fileno(), 1)  # returns when no one holds the other end
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
