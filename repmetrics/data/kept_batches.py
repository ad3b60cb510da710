"""Held-out batches kept after the first reading, in memory or in a temporary file."""

from __future__ import annotations

import tempfile
import weakref
from collections.abc import Iterator
from contextlib import suppress
from typing import IO, Literal, NamedTuple

import torch
from torch import Tensor

from repmetrics.data.parse_batch import Batch

Cache = Literal["memory", "disk"]


class _Place(NamedTuple):
    """Where the images of a batch are in the file."""

    offset: int
    shape: torch.Size
    dtype: torch.dtype


class KeptBatches:
    """Batches in the order in which they were added, each image in its own dtype.

    Args:
        cache: "memory" keeps images in memory. "disk" keeps them in a file without a name in ``TMPDIR``, which ends
            with the process; labels and groups stay in memory.

    Example:
        >>> kept = KeptBatches("disk")
        >>> kept.add(Batch(torch.arange(6, dtype=torch.uint8).reshape(2, 3), None, None))
        >>> [batch.images.tolist() for batch in kept]
        [[[0, 1, 2], [3, 4, 5]]]
    """

    def __init__(self, cache: Cache) -> None:
        self._file: IO[bytes] | None = tempfile.TemporaryFile() if cache == "disk" else None  # noqa: SIM115
        if self._file is not None:
            weakref.finalize(self, self._file.close)
        self._batches: list[tuple[Batch, _Place | None]] = []

    def add(self, batch: Batch) -> None:
        """Keep a batch.

        Raises:
            ValueError: The disk is full.
        """
        images = batch.images.detach().cpu().contiguous()
        if self._file is None:
            self._batches.append((batch._replace(images=images.clone()), None))
            return
        place = _Place(self._file.seek(0, 2), images.shape, images.dtype)
        try:
            self._file.write(images.flatten().view(torch.uint8).numpy().tobytes())
            self._file.flush()
        except OSError as error:
            with suppress(OSError):  # it writes what is left
                self._file.close()
            raise ValueError(
                f"cache='disk' cannot keep the held-out images in {tempfile.gettempdir()} after "
                f"{place.offset / 1e6:.0f} MB ({error.strerror}): set TMPDIR to another disk, or give cache=None to "
                "read them at each evaluation"
            ) from error
        self._batches.append((batch._replace(images=images.new_empty(0)), place))

    def __iter__(self) -> Iterator[Batch]:
        """Copies of the batches, which an encoder may write to."""
        for batch, place in self._batches:
            yield batch._replace(images=batch.images.clone() if place is None else self._read(place))

    def _read(self, place: _Place) -> Tensor:
        assert self._file is not None
        content = bytearray(place.shape.numel() * place.dtype.itemsize)
        self._file.seek(place.offset)
        self._file.readinto(content)  # type: ignore[attr-defined]  # of every binary file
        return torch.frombuffer(content, dtype=place.dtype).reshape(place.shape)
