"""Atomic writes: a temporary file beside the target, then a rename."""

from __future__ import annotations

import csv
import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def atomic_path(path: Path, *, sync: bool = False) -> Iterator[Path]:
    """Temporary path beside `path`, renamed to it when the block ends without an exception.

    The name is random, so that several writers may write one target: process ids repeat on other machines and in
    other containers. An exception removes the temporary file and leaves an earlier target as it was.

    Args:
        path: Target; its folder is created.
        sync: Flush to the disk before the rename, so that a power cut leaves either the old or the new file.

    Example:
        >>> import tempfile
        >>> target = Path(tempfile.mkdtemp()) / "new" / "a.txt"
        >>> with atomic_path(target) as temporary:
        ...     _ = temporary.write_text("whole")
        >>> [file.name for file in target.parent.iterdir()], target.read_text()
        (['a.txt'], 'whole')
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_path(path)
    try:
        yield temporary
        if sync:
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def temporary_path(path: Path) -> Path:
    """Unused path beside `path`, on the same file system."""
    return path.with_name(f"{path.name}.{uuid.uuid4().hex[:12]}.part")


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_csv(path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows under a header atomically; a column that a row lacks is empty."""
    with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(rows)
