"""Names of checkpoint files: their endings, their natural order, the folder that holds all."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

SUFFIXES = (".ckpt", ".pt", ".pth", ".safetensors", ".bin")


def common_folder(files: Sequence[Path]) -> Path:
    """Deepest folder that contains all files.

    Example:
        >>> common_folder([Path("/runs/a/last.ckpt"), Path("/runs/b/last.ckpt")]).as_posix()
        '/runs'
    """
    return Path(os.path.commonpath([os.path.abspath(file.parent) for file in files]))


def natural_key(path: Path) -> list[tuple[int, str]]:
    """Sort key that puts step=9 before step=10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", str(path))]


def in_natural_order(names: Sequence[Path]) -> list[Path]:
    """Names of files in natural order between those that are no files: a shell puts ckpt-10 before ckpt-2."""
    runs = groupby(names, key=Path.is_file)
    return [name for are_files, run in runs for name in (sorted(run, key=natural_key) if are_files else run)]


def export_folder(folder: Path, file: Path, *, files: Sequence[Path]) -> Path:
    """Folder for the output of one file: `folder` itself, or a folder in it if there are several files.

    Example:
        >>> files = [Path("/runs/a/1.ckpt"), Path("/runs/b/1.ckpt")]
        >>> export_folder(Path("out"), files[0], files=files).as_posix()
        'out/a/1'
    """
    if len(files) == 1:
        return folder
    relative = Path(os.path.relpath(file, common_folder(files)))
    return folder / (relative.with_suffix("") if relative.suffix.lower() in SUFFIXES else relative)
