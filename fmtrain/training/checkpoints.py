"""Checkpoints that are whole or not there, and the newest of them that can be read."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

LAST = "last.ckpt"
DATA = "SlidePatches"  # where Lightning keeps what the data module states of itself


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write beside the place, make sure it is on the disk, then rename: a crash leaves the file before untouched.

    Raises:
        OSError: It cannot be written, with the place and the cause.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write one checkpoint."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.part")
        try:
            with temporary.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except (OSError, RuntimeError) as error:
            temporary.unlink(missing_ok=True)
            cause = error if isinstance(error, OSError) else error.__context__  # torch says something of positions
            if isinstance(cause, OSError) and cause.errno is not None:
                raise OSError(cause.errno, os.strerror(cause.errno), str(path)) from error
            raise


def latest_checkpoint(folder: Path, *, on_skipped: Callable[[Path, str], None]) -> tuple[Path, int]:
    """The checkpoint with the highest step, and that step; files that cannot be read are skipped.

    Args:
        folder: Of the checkpoints.
        on_skipped: Called with each such file and what is wrong with it.

    Raises:
        ValueError: If there is none, or none that can be read.
    """
    found: list[tuple[int, float, Path]] = []
    for path in sorted(folder.glob("*.ckpt")):
        try:
            step = torch.load(path, weights_only=True, map_location="cpu")["global_step"]
        except (RuntimeError, EOFError, OSError, KeyError, TypeError, pickle.UnpicklingError) as error:
            on_skipped(path, (str(error).splitlines() or [type(error).__name__])[0])
            continue
        found.append((step, path.stat().st_mtime, path))
    if not found:
        raise ValueError(f"nothing to resume: no readable checkpoint in {folder}")
    step, _, path = max(found)
    return path, step
