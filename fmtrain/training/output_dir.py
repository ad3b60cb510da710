"""Output folders: never mixed, never deleted by surprise."""

from __future__ import annotations

import shutil
from pathlib import Path


def clear(out: Path, *, overwrite: bool, ours: str, flags: str) -> None:
    """Refuse a folder that holds something; with `overwrite`, delete it, if it holds `ours` and is thus known.

    Args:
        out: The folder.
        overwrite: Whether it may be deleted.
        ours: A file that shows that an earlier call made the folder.
        flags: What the message offers.

    Raises:
        ValueError: If the folder is not empty and not to be deleted, or not ours to delete.
    """
    if not out.exists() or not any(out.iterdir()):
        return
    if not overwrite:
        raise ValueError(f"{out} is not empty: {flags}")
    if not (out / ours).is_file():
        raise ValueError(f"{out} holds no {ours}, so it is not for --overwrite to delete: name another folder")
    shutil.rmtree(out)
