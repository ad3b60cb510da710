"""A TensorBoard server on a run's directory, with the page that opens it."""

from __future__ import annotations

import atexit
import os
import socket
import sys
import tempfile
import threading
import webbrowser
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

EVENTS = "*tfevents*"
ANY_ADDRESS = ("0.0.0.0", "::")


def event_files(run: Path) -> list[Path]:
    """All TensorBoard event files under a directory, which may hold several runs."""
    if not run.is_dir():
        raise FileNotFoundError(f"{run} is not a directory: give the folder of a run, or one with several runs in it")
    files = sorted(run.rglob(EVENTS))
    if not files:
        content = ", ".join(sorted(path.name for path in run.iterdir())[:5]) or "nothing"
        raise FileNotFoundError(
            f"no TensorBoard event files under {run} (found: {content}): "
            "give the folder of a run with a TensorBoard logger"
        )
    return files


def launch(run: Path, *, port: int = 6006, host: str = "localhost") -> str:
    """Start TensorBoard in this process and return the address of its opening page.

    Several runs under one directory are overlaid. If the port is taken, any free port is used.
    """
    event_files(run)
    try:
        from tensorboard import default, program

        from repmetrics.tensorboard.opening_page import PATH, OpeningPage
    except ModuleNotFoundError as error:
        raise ImportError("the board needs TensorBoard: pip install 'repmetrics[lightning]'") from error
    # TensorBoard's fast loader, in Rust, warns on stderr about every file that is still growing.
    arguments = [
        "tensorboard",
        "--logdir",
        str(_named(run)),
        "--host",
        host,
        "--load_fast",
        "false",
        "--reload_interval",
        "5",
    ]
    server = program.TensorBoard(plugins=[*default.get_plugins(), OpeningPage])
    server.configure(argv=[*arguments, *(["--port", str(port)] if _free(host, port) else ["--port", "0"])])
    try:
        url: str = server.launch()
    except Exception as error:  # TensorBoard's exceptions differ between versions
        raise RuntimeError(f"TensorBoard could not start on {host}:{port}: {error}") from error
    except SystemExit as error:  # raised by its web server, which has printed the system's message
        raise OSError(f"TensorBoard could not listen on {host}:{port}: is that an address of this machine?") from error
    if host in ANY_ADDRESS:  # a browser cannot open these everywhere
        bound = urlsplit(url).port or port
        url = f"http://{_reachable_name(bound)}:{bound}/"
    return f"{url}{PATH}"


def _named(run: Path) -> Path:
    """Folder to show: TensorBoard names a run by its path below it, and one that is the folder itself ".".

    For such a run, it is a temporary folder with a link of the run's name, which is removed when the process ends.
    """
    if not any(run.glob(EVENTS)):
        return run
    folder = tempfile.TemporaryDirectory(prefix="repmetrics-board-")
    atexit.register(folder.cleanup)
    link = Path(folder.name, run.resolve().name)
    link.symlink_to(run.resolve(), target_is_directory=True)
    return link.parent


def _reachable_name(port: int) -> str:
    """Name of this machine if a server on all of its addresses is reached by it, else "localhost"."""
    name = socket.gethostname()
    return "localhost" if _free(name, port) else name


def _free(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=1).close()  # without a limit, it may never answer
    except OSError:
        return True
    return False


def serve(
    run: Path,
    *,
    port: int = 6006,
    host: str = "localhost",
    open_browser: bool = True,
    wait: Callable[[], object] | None = None,
) -> None:
    """Start TensorBoard, print its address, open it in a browser, and wait until interrupted."""
    address = launch(run, port=port, host=host)
    print(address, flush=True)
    print("press Ctrl-C to stop", file=sys.stderr)
    if open_browser and (sys.platform != "linux" or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        webbrowser.open(address)
    (wait or threading.Event().wait)()
