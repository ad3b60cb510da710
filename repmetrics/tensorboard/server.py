"""TensorBoard on a run directory, opened where the layout is."""

from __future__ import annotations

import os
import sys
import threading
import webbrowser
from collections.abc import Callable
from pathlib import Path

CUSTOM_SCALARS_PAGE = "#custom_scalars&_smoothingWeight=0"
"""The layout's page; the lines as measured: an error band says what smoothing would hide."""
EVENTS = "*tfevents*"


def event_files(run: Path) -> list[Path]:
    """All TensorBoard event files under a directory, those of several runs included.

    Raises:
        FileNotFoundError: no such directory, or no event file in it; says what is there.
    """
    if not run.is_dir():
        raise FileNotFoundError(f"{run} is not a directory: give the folder of a run, or one with several runs in it")
    files = sorted(run.rglob(EVENTS))
    if not files:
        found = ", ".join(sorted(path.name for path in run.iterdir())[:5]) or "nothing"
        raise FileNotFoundError(
            f"no TensorBoard event files under {run} (found: {found}): is the run elsewhere, or its logger another one?"
        )
    return files


def launch(run: Path, *, port: int = 6006, host: str = "localhost") -> str:
    """Start TensorBoard in this process and return the address at which the laid-out charts are.

    Several runs under one directory overlay. A port that is taken passes on to the next free one.

    Args:
        run: directory with event files, at any depth.
        port: to listen on; 0 takes any free one.
        host: to listen on; "0.0.0.0" for all.

    Raises:
        FileNotFoundError: see :func:`event_files`.
        ImportError: TensorBoard is not installed.
        OSError: the host is no address of this machine.
        RuntimeError: TensorBoard could not start; holds its own words.
    """
    event_files(run)
    try:
        from tensorboard import program
    except ModuleNotFoundError as error:
        raise ImportError("the board needs TensorBoard: pip install 'repmetrics[lightning]'") from error
    # The loader in Rust warns on stderr about every file that is still growing.
    arguments = ["tensorboard", "--logdir", str(run), "--host", host, "--load_fast", "false", "--reload_interval", "5"]
    server = program.TensorBoard()
    server.configure(argv=[*arguments, *(["--port", str(port)] if _free(host, port) else ["--port", "0"])])
    try:
        url: str = server.launch()
    except Exception as error:  # TensorBoard's own exceptions differ between versions
        raise RuntimeError(f"TensorBoard could not start on {host}:{port}: {error}") from error
    except SystemExit as error:  # of its web server, which has printed the system's words
        raise OSError(f"TensorBoard could not listen on {host}:{port}: is that an address of this machine?") from error
    return f"{url}{CUSTOM_SCALARS_PAGE}"


def _free(host: str, port: int) -> bool:
    import socket

    with socket.socket() as probe:
        probe.settimeout(1)  # an address that nobody answers for would be waited for
        return probe.connect_ex((host, port)) != 0


def serve(
    run: Path,
    *,
    port: int = 6006,
    host: str = "localhost",
    open_browser: bool = True,
    wait: Callable[[], object] | None = None,
) -> None:
    """Start the board, print its address, open it, and stay until interrupted.

    Args:
        run: directory with event files, at any depth.
        port: to listen on.
        host: to listen on.
        open_browser: open the address where a desktop is at hand.
        wait: what to wait for; default: for ever, which an interrupt ends.
    """
    address = launch(run, port=port, host=host)
    print(address, flush=True)
    print("Ctrl-C ends it", file=sys.stderr)
    if open_browser and (sys.platform != "linux" or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        webbrowser.open(address)
    (wait or threading.Event().wait)()
