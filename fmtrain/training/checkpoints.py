"""Atomic checkpoint files, and the search for the latest readable checkpoint."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from repmetrics.atomic_write import atomic_path

LAST = "last.ckpt"
DATA = "SlidePatches"  # key of the data module's state in a file
DATA_MODULE = "SlideDataModule"  # Lightning's key for it: the name of the class


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint to a temporary file, flushes it to the disk, then renames it.

    A crash leaves the previous file untouched. The key of the data module's state in the file is `DATA`, not the name
    of the class: files stay readable when the class is renamed.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write one checkpoint."""
        try:
            with atomic_path(Path(path), sync=True) as temporary, temporary.open("wb") as file:
                torch.save(_rename_key(checkpoint, DATA_MODULE, DATA), file)
        except (OSError, RuntimeError) as error:
            cause = error if isinstance(error, OSError) else error.__context__  # torch's own message has no cause
            if isinstance(cause, OSError) and cause.errno is not None:
                raise OSError(cause.errno, os.strerror(cause.errno), str(path)) from error
            raise

    def load_checkpoint(self, path: str | Path, *args: Any, **options: Any) -> dict[str, Any]:
        """Read one checkpoint."""
        return _rename_key(super().load_checkpoint(path, *args, **options), DATA, DATA_MODULE)


def _rename_key(content: dict[str, Any], old: str, new: str) -> dict[str, Any]:
    return {new if key == old else key: value for key, value in content.items()}


def latest_checkpoint(folder: Path, *, on_skipped: Callable[[Path, str], None]) -> tuple[Path, int]:
    """Path and step of the readable checkpoint with the highest step.

    Args:
        folder: Folder of the checkpoints.
        on_skipped: Called with the path of each unreadable checkpoint and the reason.
    """
    readable: list[tuple[int, float, Path]] = []
    for path in sorted(folder.glob("*.ckpt")):
        try:
            step = torch.load(path, weights_only=True, map_location="cpu")["global_step"]
        except (RuntimeError, EOFError, OSError, KeyError, TypeError, pickle.UnpicklingError) as error:
            on_skipped(path, (str(error).splitlines() or [type(error).__name__])[0])
            continue
        readable.append((step, path.stat().st_mtime, path))
    if not readable:
        raise ValueError(f"nothing to resume: no readable checkpoint in {folder}")
    step, _, path = max(readable)
    return path, step
