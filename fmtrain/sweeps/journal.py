"""The journal of a study: Optuna's file, which survives a full disk, a power cut and a kill during a write."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock

from repmetrics.atomic_write import atomic_path

RECORD = b'{"op_code":'
"""How each line begins."""


class Journal(JournalFileBackend):
    """Optuna's journal file. What an interrupted write left is removed under the journal's lock, with a message.

    Optuna stops at such a line for ever, and appends the next record to it. A write that fails leaves nothing.

    Args:
        path: Path of the file; it is created.
        log: Called with a line about what was removed.
    """

    def __init__(self, path: Path, *, log: Callable[[str], None]) -> None:
        self._journal_lock = JournalFileSymlinkLock(str(path))
        super().__init__(str(path), self._journal_lock)
        self.path, self.log = path, log
        self._locked(self._repair)

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Add records: all of them, or nothing if the disk is full."""
        lines = b"".join(json.dumps(entry, separators=(",", ":")).encode() + b"\n" for entry in logs)
        self._locked(lambda: self._append(lines))

    def _append(self, lines: bytes) -> None:
        if not self._ends_whole():
            self._repair()
        before = self.path.stat().st_size
        try:
            with self.path.open("ab") as file:
                file.write(lines)
                file.flush()
                os.fsync(file.fileno())
        except BaseException:
            os.truncate(self.path, before)
            raise

    def _ends_whole(self) -> bool:
        with self.path.open("rb") as file:
            if not file.seek(0, os.SEEK_END):
                return True
            file.seek(-1, os.SEEK_END)
            return file.read() == b"\n"

    def _repair(self) -> None:
        """Keep whole records alone. Other drivers could not read beyond a broken line, so that their places hold."""
        content = self.path.read_bytes()
        kept, removed = split_journal(content)
        if kept == content:
            return
        if content.startswith(kept):
            os.truncate(self.path, len(kept))
        else:
            with atomic_path(self.path, sync=True) as temporary:
                temporary.write_bytes(kept)
        self.log(
            f"{self.path} was damaged, as by a full disk or a power cut: {removed} bytes of incomplete records removed"
        )

    def _locked(self, call: Callable[[], None]) -> None:
        self._journal_lock.acquire()
        try:
            call()
        finally:
            self._journal_lock.release()


def split_journal(content: bytes) -> tuple[bytes, int]:
    r"""Whole records of a journal, one per line, and the number of bytes of everything else.

    Records that share a line, with each other or with a broken one, are kept.

    Example:
        >>> split_journal(b'{"op_code":1}\n{"op_c')
        (b'{"op_code":1}\n', 6)
        >>> split_journal(b'{"op_c{"op_code":1}\n\0\0\n{"op_code":2}{"op_code":3}\n')
        (b'{"op_code":1}\n{"op_code":2}\n{"op_code":3}\n', 8)
    """
    lines = content.split(b"\n")
    records = [record for line in lines[:-1] for record in _whole_records(line)]
    removed = sum(map(len, lines)) - sum(map(len, records))
    return b"".join(record + b"\n" for record in records), removed


def _whole_records(line: bytes) -> list[bytes]:
    if _is_record(line):
        return [line]
    starts = [match.start() for match in re.finditer(re.escape(RECORD), line)]
    return [part for part in (line[a:b] for a, b in pairwise([*starts, len(line)])) if _is_record(part)]


def _is_record(text: bytes) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:  # also UnicodeDecodeError
        return False
