"""Features with their groups and labels from files of embeddings that other tools write."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from repmetrics.data.embedding_files import read_arrays
from repmetrics.data.features import Features
from repmetrics.data.labels import GROUP_KEYS, LABEL_KEYS, encode_labels, is_continuous, is_missing, label_notes
from repmetrics.data.source import Source
from repmetrics.encoders.safe_load import join_first
from repmetrics.functional.linalg import row_blocks

FEATURE_KEYS = ("features", "embeddings", "representations", "feats", "embedding", "x")
COORDINATE_KEYS = ("x", "y", "coord_x", "coord_y", "x_coord", "y_coord", "row", "col")


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
    arrays = _drop_coordinates(read_arrays(path), requested)
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
