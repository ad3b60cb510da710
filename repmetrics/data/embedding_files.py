"""Arrays from files of embeddings: NumPy, torch, HDF5, Parquet, CSV and Zarr."""

from __future__ import annotations

import re
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from repmetrics.data.read_csv import read_csv
from repmetrics.encoders.safe_load import flatten, read_checkpoint

MAX_EXPANSION = 100
"""Largest ratio of a compressed file's content to its size: features compress by less."""

ZARR_FILES = (".zarray", ".zgroup", "zarr.json")
"""Files of which a Zarr store has one."""


def read_arrays(path: Path) -> dict[str, Any]:
    """All arrays of a file or of a Zarr store, by their names; "" for an array without a name.

    Raises:
        ValueError: The file is damaged, or would expand to more than memory may hold.
    """
    return _read_zarr(path) if path.is_dir() else READERS[path.suffix.lower()](path)


def _read_numpy(path: Path) -> dict[str, Any]:
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                check_expansion(path, sum(entry.file_size for entry in archive.infolist()))
        loaded = np.load(path, allow_pickle=False, mmap_mode="c")  # a memory map cannot exceed the file
        if isinstance(loaded, np.ndarray):
            return {"": _native_byteorder(loaded)}
        with loaded:
            return {key: _native_byteorder(loaded[key]) for key in loaded.files}
    except (ValueError, OSError, EOFError, MemoryError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path.name} cannot be read as NumPy: {error}") from error


def check_expansion(path: Path, size: int) -> None:
    """Raise ValueError for a compressed file that would expand more than `MAX_EXPANSION`."""
    stored = stored_bytes(path)
    if size > MAX_EXPANSION * stored:
        raise ValueError(f"it would grow to {size:,} bytes from {stored:,}")


def is_embeddings(path: Path) -> bool:
    """Whether the path is a file of embeddings by its suffix, or a Zarr store, which is a folder."""
    if path.is_dir():
        return any((path / name).is_file() for name in ZARR_FILES)
    return path.suffix.lower() in EMBEDDING_SUFFIXES and path.is_file()


def stored_bytes(path: Path) -> int:
    """Size of a file, or of all files in a folder."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def _native_byteorder(array: Any) -> Any:
    """The same values in this machine's byte order, which torch requires."""
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))


def _read_torch(path: Path) -> dict[str, Any]:
    content = read_checkpoint(path)
    if isinstance(content, Tensor):
        return {"": content.detach()}
    if isinstance(content, list | tuple) and content and all(isinstance(item, Tensor) for item in content):
        rows = [item.detach().reshape(-1, item.shape[-1]) for item in content if item.ndim]  # eva: a list of vectors
        if len({row.shape[1] for row in rows}) == 1:
            return {"": torch.cat(rows)}
    arrays: dict[str, Any] = {key: value.detach() for key, value in flatten(content).items()}
    if isinstance(content, Mapping):  # ids are often plain lists
        arrays |= {
            key: np.asarray(value)
            for key, value in content.items()
            if isinstance(value, list | tuple) and not any(isinstance(item, Tensor) for item in value)
        }
    return arrays


def _read_hdf5(path: Path) -> dict[str, Any]:
    """All data sets of an HDF5 file. TRIDENT and CLAM write features (N, D) and coords (N, 2)."""
    import h5py

    arrays: dict[str, Any] = {}

    def visit(name: str, node: Any) -> None:
        if isinstance(node, h5py.Dataset):
            check_expansion(path, int(node.size) * node.dtype.itemsize)
            values = node.asstr()[()] if h5py.check_string_dtype(node.dtype) else node[()]
            arrays[name] = _native_byteorder(np.asarray(values))

    try:
        with h5py.File(path, "r") as file:
            file.visititems(visit)
    except (OSError, RuntimeError, KeyError, TypeError, MemoryError) as error:
        raise ValueError(f"{path.name} cannot be read as HDF5: {error}") from error
    return arrays


def _read_zarr(path: Path) -> dict[str, Any]:
    """All arrays of a Zarr store, by their paths in it; the matrix ``X`` of AnnData under "features"."""
    import zarr
    from zarr.errors import BaseZarrError

    arrays: dict[str, Any] = {}
    try:
        node = zarr.open(store=str(path), mode="r")
        members = [("", node)] if isinstance(node, zarr.Array) else node.members(max_depth=None)
        for name, array in members:
            if isinstance(array, zarr.Array):
                check_expansion(path, array.nbytes)
                if array.ndim > 1 and array.nchunks_initialized < array.nchunks:
                    whole = f"{array.nchunks_initialized} of {array.nchunks}"
                    raise ValueError(f"{name or 'the array'} has {whole} chunks: rows of the others would be zeros")
                values = np.asarray(array[...])
                arrays["features" if name == "X" else name] = _native_byteorder(values)
    except (BaseZarrError, OSError, ValueError, TypeError, KeyError, RuntimeError, MemoryError) as error:
        raise ValueError(f"{path.name} cannot be read as Zarr: {error}") from error
    return arrays


def _read_parquet(path: Path) -> dict[str, Any]:
    """All columns by name; columns of lists as matrices."""
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path.name} cannot be read as Parquet: {error}") from error
    arrays: dict[str, Any] = {}
    for name, column in zip(table.column_names, table.columns, strict=True):
        if pyarrow.types.is_list(column.type) or pyarrow.types.is_fixed_size_list(column.type):
            lengths = {len(row) for row in column.to_pylist() if row is not None}
            if len(lengths) != 1 or column.null_count:
                raise ValueError(f"{path.name}: the rows of {name!r} have lengths {sorted(lengths)[:4]}")
            arrays[name] = np.asarray(column.combine_chunks().flatten()).reshape(len(column), lengths.pop())
        elif pyarrow.types.is_floating(column.type):
            arrays[name] = column.to_numpy()
        else:
            arrays[name] = np.asarray(column.to_pylist())
    return arrays


def _read_csv(path: Path) -> dict[str, Any]:
    """Columns of a CSV, numbers as arrays; columns embedding_0, embedding_1, … as one matrix."""
    header, rows = read_csv(path)
    columns = embedding_columns(header)
    try:
        matrix = np.array([[float(row[column]) for column in columns] for row in rows], dtype=np.float64)
    except ValueError as error:
        raise ValueError(f"{path.name}: embeddings must be numbers: {error}") from error
    arrays: dict[str, Any] = {name: np.array([row[name] for row in rows]) for name in header if name not in columns}
    return arrays | {"features": matrix.reshape(len(rows), len(columns)).astype(np.float32)}


def embedding_columns(header: Sequence[str]) -> list[str]:
    """Columns of a CSV that are the coordinates of embeddings, as lightly writes them; two at least.

    Example:
        >>> embedding_columns(["filenames", "embedding_0", "embedding_1", "labels"])
        ['embedding_0', 'embedding_1']
    """
    columns = [name for name in header if re.fullmatch(r"(embeddings?|features?|feats?|emb|dim)[_-]?\d+|\d+", name)]
    return columns if len(columns) > 1 else []


READERS: dict[str, Callable[[Path], dict[str, Any]]] = {
    ".npy": _read_numpy,
    ".npz": _read_numpy,
    ".pt": _read_torch,
    ".pth": _read_torch,
    ".safetensors": _read_torch,
    ".h5": _read_hdf5,
    ".hdf5": _read_hdf5,
    ".parquet": _read_parquet,
    ".zarr": _read_zarr,
}
EMBEDDING_SUFFIXES = tuple(READERS)
READERS |= {".csv": _read_csv}  # a CSV may also list images: `embedding_columns` tells
