"""Output folders: never mixed, never deleted by surprise."""

from __future__ import annotations

import shutil
from pathlib import Path


def prepare_output_dir(out: Path, *, overwrite: bool, marker: str, flags: str) -> None:
    """Refuse a folder that holds something; with `overwrite`, delete it, if it holds `marker` and is thus known.

    Args:
        out: The folder.
        overwrite: Whether it may be deleted.
        marker: A file that shows that an earlier call made the folder.
        flags: What the message offers.

    Raises:
        ValueError: If the folder is not empty and not to be deleted, or not marker to delete.
    """
    if not out.exists() or not any(out.iterdir()):
        return
    if not overwrite:
        raise ValueError(f"{out} is not empty: {flags}")
    if not (out / marker).is_file():
        raise ValueError(f"{out} holds no {marker}, so it is not for --overwrite to delete: name another folder")
    shutil.rmtree(out)
