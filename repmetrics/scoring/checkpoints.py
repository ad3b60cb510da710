"""Find checkpoint files, and watch a folder for new ones."""

from __future__ import annotations

import glob
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

SUFFIXES = (".ckpt", ".pt", ".pth", ".safetensors", ".bin")


def find_checkpoints(names: Sequence[Path]) -> list[Path]:
    """Files in their order, each once: matches of globs and, at any depth, checkpoints of folders, in natural order."""
    paths: list[Path] = []
    for name in names:
        if name.is_dir():
            files = [file for file in name.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file()]
            if not files:
                raise ValueError(f"{name} holds no checkpoint: expected {' '.join(SUFFIXES)}")
        elif not name.exists() and glob.has_magic(str(name)):
            files = [Path(match) for match in glob.glob(str(name), recursive=True)]
            if not files:
                raise ValueError(f"nothing matches {name}")
        else:
            files = [name]
        paths.extend(sorted(files, key=natural_key))
    first = {path.resolve(): path for path in reversed(paths)}  # "last.ckpt" may link to another
    return [path for path in paths if first[path.resolve()] is path]


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


def watch_checkpoints(
    folder: Path, *, poll_seconds: float, sleep: Callable[[float], object] = time.sleep, until: Callable[[], bool]
) -> Iterator[Path]:
    """Checkpoints of a folder, each as soon as it is complete, until `until()` is true.

    A file is complete when its size and modification time are the same in two successive polls.
    """
    if not folder.is_dir():
        raise ValueError(f"--watch needs a folder, got {folder}: pass the one that the checkpoints are written to")
    states: dict[Path, tuple[int, int]] = {}
    done: set[Path] = set()
    while True:
        last = until()
        for file in sorted((f for f in folder.rglob("*") if f.suffix.lower() in SUFFIXES), key=natural_key):
            try:
                stat = file.stat()
            except FileNotFoundError:  # a callback that keeps the best checkpoints removed it
                continue
            state = (stat.st_size, stat.st_mtime_ns)
            if states.get(file) == state and file not in done:
                done.add(file)
                yield file
            elif states.get(file) != state:
                done.discard(file)
            states[file] = state
        if last:
            return
        sleep(poll_seconds)
