"""Runs a command line: an error becomes one sentence on stderr and exit code 1."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from io import TextIOWrapper

import typer

from repmetrics.cli_options import DEBUG

EXTRAS = {
    **dict.fromkeys(("h5py", "timm", "safetensors", "PIL", "torchvision"), "repmetrics[score]"),
    **dict.fromkeys(("lightning", "tensorboard"), "repmetrics[lightning]"),
    **dict.fromkeys(("optuna", "psycopg"), "repmetrics[sweep]"),
    **dict.fromkeys(("matplotlib", "yaml"), "repmetrics[report]"),
    "distributed": "repmetrics[dask]",
    "pyarrow": "pyarrow",
    "zarr": "zarr",
}


def run_app(application: typer.Typer, args: Sequence[str], *, extras: Mapping[str, str] = EXTRAS) -> None:
    """Run a typer application. Without ``--debug``, an error becomes one sentence on stderr and exit code 1.

    Args:
        application: The application.
        args: Its arguments.
        extras: What to install for a module that is absent.
    """
    debug = DEBUG in args
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal without "±" must not end a command
    try:
        application(args=[arg for arg in args if arg != DEBUG], prog_name=application.info.name)
    except Exception as error:
        if debug:
            raise
        name = application.info.name
        print(f"{name}: {format_error(error, extras=extras)}", file=sys.stderr)
        if not isinstance(error, ValueError | OSError):
            print(f"run '{name} {DEBUG} ...' for the traceback", file=sys.stderr)
        raise SystemExit(1) from None


def format_error(error: Exception, *, extras: Mapping[str, str] = EXTRAS) -> str:
    """An exception as one sentence.

    Example:
        >>> format_error(FileNotFoundError(2, "No such file or directory", "x.pt"))
        'x.pt: No such file or directory'
        >>> format_error(KeyError("a"))
        "KeyError: 'a'"
    """
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, ModuleNotFoundError) and (remedy := extras.get(error.name or "")):
        return f"this needs {error.name}: pip install '{remedy}'"
    text = " ".join(_unwrap_worker_error(str(error)).split())
    return text if isinstance(error, ValueError | OSError) and text else f"{type(error).__name__}: {text}"


def _unwrap_worker_error(text: str) -> str:
    r"""Error message without the traceback that a DataLoader's worker puts before it.

    Example:
        >>> _unwrap_worker_error("Caught SlideError in DataLoader worker 0.\nOriginal Traceback ...\nSlideError: no")
        'SlideError: no'
    """
    return text.strip().splitlines()[-1] if text.startswith("Caught ") and "Original Traceback" in text else text
