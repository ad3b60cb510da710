"""Preparation of an output folder: no mixing of runs, no unexpected deletion."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Literal

ResumeMode = Literal["continue", "auto"]  # what `--resume` and `--resume auto` do with an earlier run in the folder


def prepare_output_dir(out: Path, *, overwrite: bool, marker: str, flags: str) -> None:
    """Raise if a folder is not empty. With `overwrite`, delete it if it contains `marker`.

    Args:
        out: Output folder.
        overwrite: Whether the folder may be deleted.
        marker: Name of a file that only an earlier call creates.
        flags: Options that the error message offers.
    """
    if not out.exists() or not any(out.iterdir()):
        return
    if not overwrite:
        raise ValueError(f"{out} is not empty: {flags}")
    if not (out / marker).is_file():
        raise ValueError(f"{out} contains no {marker}, so --overwrite does not delete it: choose another folder")
    shutil.rmtree(out)
