"""Held-out patches decoded once: a memory-mapped uint8 file beside the manifest, for all ranks and all runs."""

from __future__ import annotations

import errno
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fmtrain.manifest.manifest import Manifest, assets_dir
from repmetrics.atomic_write import atomic_path

VERSION = 1
"""Part of the file's name; to be raised if the pixels of a patch change."""


def cache_path(manifest: Manifest) -> Path:
    """File of the held-out patches of a manifest; its name has the manifest's content hash."""
    return assets_dir(manifest.path) / f"held_out-{manifest.content_hash()[:16]}-v{VERSION}.npy"


def open_cache(manifest: Manifest) -> NDArray[np.uint8] | None:
    """Patches (N, 3, S, S), mapped into memory; None if the file does not exist."""
    path = cache_path(manifest)
    if not path.exists():
        return None
    try:
        patches: NDArray[np.uint8] = np.load(path, mmap_mode="r")
    except (ValueError, EOFError) as error:  # cut off, empty, or another file
        raise ValueError(f"{path} is damaged, as by an interrupted copy ({error}): delete it") from error
    if patches.shape != _shape(manifest) or patches.dtype != np.uint8:
        raise ValueError(f"{path} does not hold the held-out patches {_shape(manifest)} of its manifest: delete it")
    return patches


def build_cache(
    manifest: Manifest,
    read: Callable[[], Iterable[NDArray[np.uint8]]],
    *,
    order: Sequence[int],
    on_batch: Callable[[int], None],
) -> bool:
    """Write the file unless it exists, and return whether it exists now.

    A folder that cannot be written to gives a line on stderr, and patches are decoded at each reading.

    Args:
        manifest: Manifest of the patches.
        read: Function that returns all patches, in batches (B, 3, S, S); it is called only if they are needed.
        order: Index of each patch that `read` returns.
        on_batch: Function called with the number of patches of each batch, to show progress.

    Raises:
        ValueError: The disk has too little space; the message names the setting that needs none.
    """
    path, shape = cache_path(manifest), _shape(manifest)
    if path.exists():
        return True
    needed = int(np.prod(shape))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if (free := shutil.disk_usage(path.parent).free) < needed:
            raise ValueError(
                f"{len(manifest.held_out)} held-out patches take {needed / 1e6:.0f} MB beside the manifest, but "
                f"{free / 1e6:.0f} MB are free: give --data.cache false to decode them at each evaluation"
            )
        with atomic_path(path) as temporary, temporary.open("xb") as file:
            # Not mapped into memory: where another program fills the disk, that would end the process without a word.
            np.lib.format.write_array_header_2_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
            begin, size, done = file.tell(), int(np.prod(shape[1:])), 0
            for batch in read():
                for patch in batch:
                    file.seek(begin + order[done] * size)
                    file.write(patch.tobytes())
                    done += 1
                on_batch(len(batch))
    except PermissionError as error:
        print(f"held-out patches are decoded at each evaluation: {error}", file=sys.stderr)
        return False
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise ValueError(
            f"{path.parent} has no space left for the {needed / 1e6:.0f} MB of {len(manifest.held_out)} held-out "
            "patches: give --data.cache false to decode them at each evaluation"
        ) from error
    return True


def remove_caches(manifest: Path) -> int:
    """Delete all files of held-out patches beside a manifest file, and return the number of bytes."""
    freed = 0
    for path in assets_dir(manifest).glob("held_out-*.npy"):
        freed += path.stat().st_size
        path.unlink()
    return freed


def _shape(manifest: Manifest) -> tuple[int, int, int, int]:
    return len(manifest.held_out), 3, manifest.size_px, manifest.size_px
