"""Checkpoints that are whole or not there, and the newest of them that can be read."""

from __future__ import annotations

import functools
import os
import pickle
import shutil
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor

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


def newest(folder: Path, *, on_skipped: Callable[[Path, str], None]) -> tuple[Path, int]:
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


def difference(own: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> str | None:
    """How a checkpoint's weights differ from a model's in names and shapes, in words; None if they do not.

    Example:
        >>> difference({"a": torch.zeros(2), "b": torch.zeros(1)}, {"a": torch.zeros(3), "c": torch.zeros(1)})
        '1 of another shape, such as a: (3,) there, (2,) here; 1 missing there, such as b; 1 unknown here, such as c'
    """
    shapes = [name for name in own if name in found and found[name].shape != own[name].shape]
    missing = [name for name in own if name not in found]
    unknown = [name for name in found if name not in own]
    parts = []
    if shapes:
        theirs, ours = tuple(found[shapes[0]].shape), tuple(own[shapes[0]].shape)
        parts.append(f"{len(shapes)} of another shape, such as {shapes[0]}: {theirs} there, {ours} here")
    if missing:
        parts.append(f"{len(missing)} missing there, such as {missing[0]}")
    if unknown:
        parts.append(f"{len(unknown)} unknown here, such as {unknown[0]}")
    return "; ".join(parts) or None


@functools.cache
def code() -> str:
    """The version of this package, with the commit where it runs from a checkout."""
    from repmetrics import __version__

    checkout, git = Path(__file__).parents[1], shutil.which("git")
    if git is None or not (checkout / ".git").exists():  # a user's own repository around an installation is not ours
        return __version__
    asked = [git, "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    found = subprocess.run(asked, capture_output=True, text=True, check=False)  # fails where git distrusts the owner
    return f"{__version__} ({found.stdout.strip()})" if found.returncode == 0 else __version__
