"""Ids of any type as integer codes."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import Any

import torch
from torch import Tensor


def check_ids(ids: Iterable[Any], *, name: str) -> None:
    """Raise ValueError if ids are missing: None, NaN, NaT, pandas' NA or an empty text.

    Example:
        >>> check_ids(["a", None, float("nan")], name="groups")
        Traceback (most recent call last):
        ValueError: groups are missing for 2 of 3 rows: give every row its id
    """
    rows = list(ids)
    try:
        distinct: Iterable[Any] = set(rows)
    except TypeError:  # a comparison with pandas' NA is NA
        distinct = rows
    if any(map(_is_missing, distinct)):
        missing = sum(map(_is_missing, rows))
        raise ValueError(f"{name} are missing for {missing} of {len(rows)} rows: give every row its id")


def _is_missing(value: Any) -> bool:
    try:
        return bool(value is None or value == "" or value != value)
    except TypeError:  # a comparison with pandas' NA is NA, which is neither true nor false
        return True


def factorize(ids: Iterable[Hashable] | Tensor, *, key: Callable[[Any], Any] | None = None) -> tuple[Tensor, list[Any]]:
    """Code of each row, and the distinct ids in the order of their codes.

    Args:
        ids: One id per row; a tensor is read as Python numbers.
        key: Sort key of the distinct ids; None keeps the order of first appearance.

    Returns:
        Codes (N,) int64, and the distinct ids.

    Example:
        >>> factorize(["b", "a", "b"])
        (tensor([0, 1, 0]), ['b', 'a'])
        >>> factorize(["b", "a", "b"], key=str)
        (tensor([1, 0, 1]), ['a', 'b'])
    """
    rows = ids.tolist() if isinstance(ids, Tensor) else list(ids)
    distinct = list(dict.fromkeys(rows)) if key is None else sorted(set(rows), key=key)
    codes = {name: code for code, name in enumerate(distinct)}
    return torch.tensor([codes[row] for row in rows], dtype=torch.int64), distinct


def means_without_blocks(values: Tensor, blocks: Tensor | None, *, count: int = 0) -> Tensor:
    """Means (1 + G,): of all values, and of those outside of each block.

    Args:
        values: (N,) one value per row.
        blocks: (N,) int64 in 0 … G − 1, the block of each row; None: G = 0.
        count: G.

    Example:
        >>> means_without_blocks(torch.tensor([1.0, 3.0, 5.0]), torch.tensor([0, 1, 1]), count=2).tolist()
        [3.0, 4.0, 1.0]
    """
    if blocks is None:
        return values.mean()[None]
    block = blocks.to(values.device)
    return torch.stack([values.mean(), *(values[block != number].mean() for number in range(count))])


def count_blocks(blocks: Tensor | None) -> int:
    """G of blocks 0 … G − 1; 0 without blocks."""
    return 0 if blocks is None else int(blocks.max()) + 1
