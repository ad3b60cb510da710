"""What the user names → the files to score; a folder still being written to, file by file."""

from __future__ import annotations

import glob
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

SUFFIXES = (".ckpt", ".pt", ".pth", ".safetensors", ".bin")


def find_checkpoints(names: Sequence[Path]) -> list[Path]:
    """Files as named, globs filled in, and in a folder every checkpoint at any depth; each once, numbers in order.

    Raises:
        ValueError: a folder or a glob with no checkpoint in it.
    """
    found: list[Path] = []
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
        found.extend(sorted(files, key=natural_key))
    once = {file.resolve(): file for file in reversed(found)}  # "last.ckpt" may link to another
    return [file for file in found if once[file.resolve()] is file]


def common_folder(files: Sequence[Path]) -> Path:
    """The deepest folder that holds all the files.

    Example:
        >>> common_folder([Path("/runs/a/last.ckpt"), Path("/runs/b/last.ckpt")]).as_posix()
        '/runs'
    """
    return Path(os.path.commonpath([os.path.abspath(file.parent) for file in files]))


def natural_key(path: Path) -> list[tuple[int, str]]:
    """A key that sorts step=9 before step=10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", str(path))]


def watch_checkpoints(
    folder: Path, *, poll_seconds: float, sleep: Callable[[float], object] = time.sleep, until: Callable[[], bool]
) -> Iterator[Path]:
    """Checkpoints of a folder, each as soon as it is whole, until `until()`.

    A file is taken for whole when its size and time have not changed from one look to the next.

    Raises:
        ValueError: it is no folder.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder to follow: name the one that the checkpoints are written to")
    seen: dict[Path, tuple[int, int]] = {}
    done: set[Path] = set()
    while True:
        last = until()
        for file in sorted((f for f in folder.rglob("*") if f.suffix.lower() in SUFFIXES), key=natural_key):
            try:
                stat = file.stat()
            except FileNotFoundError:  # a callback that keeps the best removes others
                continue
            state = (stat.st_size, stat.st_mtime_ns)
            if seen.get(file) == state and file not in done:
                done.add(file)
                yield file
            elif seen.get(file) != state:
                done.discard(file)
            seen[file] = state
        if last:
            return
        sleep(poll_seconds)
