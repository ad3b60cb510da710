"""Features with their groups and labels from files of embeddings that other tools write."""

from __future__ import annotations

import re
import zipfile
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from repmetrics.data.features import Features
from repmetrics.data.labels import GROUP_KEYS, LABEL_KEYS, encode_labels, is_continuous, is_missing, label_notes
from repmetrics.data.read_csv import read_csv
from repmetrics.data.source import Source
from repmetrics.encoders.safe_load import flatten, join_first, read_checkpoint
from repmetrics.functional.linalg import row_blocks

FEATURE_KEYS = ("features", "embeddings", "representations", "feats", "embedding", "x")
COORDINATE_KEYS = ("x", "y", "coord_x", "coord_y", "x_coord", "y_coord", "row", "col")

MAX_EXPANSION = 100
"""Largest ratio of a compressed file's content to its size: features compress by less."""


def read_embeddings(path: Path, *, labels: str | None = None, groups: str | None = None) -> Source:
    """Features (N, D) in a file, with group ids and labels where it holds them.

    A file of several arrays is read by name. Features are under one of `FEATURE_KEYS`, or are the only matrix. Groups
    and labels are under one of `GROUP_KEYS` and `LABEL_KEYS`, or under the keys given. In a Parquet file without a
    matrix, the features are all floating columns except labels, groups and coordinates.
    """
    values, (group_key, ids), (label_key, targets), notes = read_rows(path, labels=labels, groups=groups)
    n, d = values.shape
    classes, label_ids, of_labels = parse_labels(path, label_key, targets, explicit=labels is not None)
    notes = [*notes, *of_labels]
    if ids is not None:
        notes.append(f"groups: {group_key!r} of {path.name}")
    if (distinct := distinct_rows(values)) < n:
        notes.append(f"{n - distinct} of {n} rows repeat an earlier row")
    if n < d:
        notes = [*notes, f"N = {n} < D = {d}: if rows are features and columns samples, transpose the file"]
    features = Features(values, tuple(map(str, ids)) if ids is not None else None, label_ids)
    return Source(path, "embeddings", features=features, classes=classes, notes=tuple(notes))


class Rows(NamedTuple):
    """Features (N, D) of one file, and its columns of groups and labels: a key and the values, or no values."""

    values: Tensor
    groups: tuple[str, list[Any] | None]
    labels: tuple[str, list[Any] | None]
    notes: list[str]


def read_rows(path: Path, *, labels: str | None = None, groups: str | None = None, vector: bool = False) -> Rows:
    """Features of one file with its groups and labels, by the keys given or by known names.

    With ``vector``, features (D,) are one row: the embedding of a slide, for example.
    """
    requested = {key for key in (labels, groups) if key is not None}
    read = _read_zarr if path.is_dir() else READERS[path.suffix.lower()]
    arrays = _drop_coordinates(read(path), requested)
    if vector:
        arrays = {key: _as_row(value) if key in ("", *FEATURE_KEYS) else value for key, value in arrays.items()}
    values, notes = _features(path, arrays, exclude=requested)
    of_groups = _column(path, arrays, groups, GROUP_KEYS, len(values), kind="groups")
    return Rows(values, of_groups, _column(path, arrays, labels, LABEL_KEYS, len(values), kind="labels"), notes)


def parse_labels(
    path: Path, key: str, values: Sequence[Any] | None, *, explicit: bool
) -> tuple[tuple[str, ...], Tensor | None, list[str]]:
    """Class names, class indices and notes of a column of labels.

    Numbers that are no classes are refused if the user named the column, otherwise left out with a note.
    """
    if values is None:
        return (), None, []
    if is_continuous(values):
        reason = f"{key!r} of {path.name} has {len(set(values))} numbers in {len(values)} rows, not classes"
        if explicit:
            raise ValueError(f"--labels {key}: {reason}: group them into classes, or pass --labels none")
        return (), None, [f"no labels: {reason}"]
    if missing := sum(map(is_missing, values)):
        raise ValueError(f"{path.name}: {key!r} is missing for {missing} of {len(values)} rows: pass --labels none")
    classes, indices = encode_labels(values)
    return classes, indices, [f"labels: {key!r} of {path.name}", *label_notes(classes, indices)]


def _features(path: Path, arrays: Mapping[str, Any], *, exclude: Collection[str] = ()) -> tuple[Tensor, list[str]]:
    """The matrix, or the floating columns of a Parquet file and a note that lists them."""
    columns = _feature_columns(arrays, exclude) if path.suffix.lower() == ".parquet" else []
    if not columns:
        return _check_matrix(path, arrays[_features_key(path, arrays)]), []
    listed = ", ".join(columns) if len(columns) < 5 else f"{columns[0]}, {columns[1]} … {columns[-1]}"
    values = _check_matrix(path, np.stack([arrays[key] for key in columns], axis=1))
    return values, [f"features: {len(columns)} floating columns, {listed}"]


def _feature_columns(arrays: Mapping[str, Any], exclude: Collection[str]) -> list[str]:
    """Floating columns that are not labels, groups or coordinates; empty if there is a matrix."""
    if any(value.ndim > 1 for value in arrays.values()):
        return []
    known = {*GROUP_KEYS, *LABEL_KEYS, *COORDINATE_KEYS}
    candidates = [key for key in arrays if key.lower() not in known and key not in exclude]
    return [key for key in candidates if _is_float(arrays[key])]


def _drop_coordinates(arrays: Mapping[str, Any], requested: Collection[str]) -> dict[str, Any]:
    """The arrays without columns x and y, which are coordinates if there are both, except those requested."""
    columns = {key for key, value in arrays.items() if value.ndim == 1}
    coordinates = {"x", "y"} - set(requested) if {"x", "y"} <= columns else set()
    return {key: value for key, value in arrays.items() if key not in coordinates}


def _features_key(path: Path, arrays: Mapping[str, Any]) -> str:
    matrices = [key for key, value in arrays.items() if _is_matrix(value)]
    named = [key for key in FEATURE_KEYS if key in arrays]
    if named:
        return named[0]
    if len(matrices) == 1:
        return matrices[0]
    shapes = [f"{key or 'array'} {tuple(value.shape)} {value.dtype}" for key, value in arrays.items()]
    problem = "several matrices" if matrices else "no floating matrix (N, D)"
    raise ValueError(
        f"{path.name} holds {problem}: found {join_first(shapes) or 'nothing'}; name the features 'features'"
    )


def _check_matrix(path: Path, array: Any) -> Tensor:
    try:
        values = array if isinstance(array, Tensor) else torch.from_numpy(np.require(array, requirements=["C", "W"]))
    except TypeError as error:
        raise ValueError(f"{path.name}: features must be floating, of 64 bits at most, got {array.dtype}") from error
    if values.ndim == 3 and values.shape[0] == 1:
        values = values[0]  # a bag of patches with a batch axis
    if values.ndim != 2:
        hint = ": pool the tokens first" if values.ndim == 3 else ""
        raise ValueError(f"{path.name}: features must be (N, D), got {tuple(values.shape)}{hint}")
    if not values.is_floating_point():
        raise ValueError(f"{path.name}: features must be floating, got {str(values.dtype).removeprefix('torch.')}")
    if not all(torch.isfinite(block).all() for block in row_blocks(values)):
        bad = (~torch.isfinite(values)).any(dim=1)
        raise ValueError(
            f"{path.name}: {int(bad.sum())} of {len(values)} rows hold NaN or Inf (first: row "
            f"{int(bad.nonzero()[0])}): remove them"
        )
    return values


def _column(
    path: Path, arrays: Mapping[str, Any], wanted: str | None, known: Sequence[str], n: int, *, kind: str
) -> tuple[str, list[Any] | None]:
    """Key and values of a column; no values without one."""
    if wanted == "none":
        return "", None
    if wanted is not None and wanted not in arrays:
        raise ValueError(f"{path.name} has no {kind} under {wanted!r}: it holds {', '.join(arrays) or 'nothing else'}")
    key = wanted or next((key for key in known if key in arrays and arrays[key].ndim), None)
    if key is None:
        return "", None
    column = arrays[key]
    if column.ndim != 1 or len(column) != n:
        raise ValueError(f"{path.name}: {kind} under {key!r} must be ({n},), got {tuple(column.shape)}")
    values = [value.decode() if isinstance(value, bytes) else value for value in column.tolist()]
    if missing := sum(map(is_missing, values)):
        raise ValueError(
            f"{path.name}: {kind} under {key!r} are missing for {missing} of {n} rows: remove these rows, or leave the "
            f"{kind} out with --{kind} none"
        )
    return key, [value.strip() if isinstance(value, str) else value for value in values]


def distinct_rows(values: Tensor) -> int:
    """Number of rows that differ from every earlier one, by the hash of their bytes."""
    array = values.view(torch.uint8) if values.dtype == torch.bfloat16 else values
    return len({hash(row.tobytes()) for row in array.numpy()})


def _as_row(array: Any) -> Any:
    """A floating vector (D,) as a matrix (1, D); anything else unchanged."""
    return array[None] if _is_float(array) and array.ndim == 1 else array


def _is_matrix(array: Any) -> bool:
    return _is_float(array) and (array.ndim == 2 or (array.ndim == 3 and array.shape[0] == 1))


def _is_float(array: Any) -> bool:
    return array.is_floating_point() if isinstance(array, Tensor) else np.issubdtype(array.dtype, np.floating)


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
    return (
        sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) if path.is_dir() else path.stat().st_size
    )


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
ZARR_FILES = (".zarray", ".zgroup", "zarr.json")
READERS |= {".csv": _read_csv}  # a CSV may also list images: `embedding_columns` tells
