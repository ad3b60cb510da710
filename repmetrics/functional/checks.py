"""Input checks shared by all metrics: shape, dtype, finite values, row lengths."""

from __future__ import annotations

from math import isfinite

import torch
from torch import Tensor

from repmetrics.functional.linalg import row_blocks

LARGEST = 1e70
"""Largest absolute value. Only float64 can hold more, and the sum of its fourth powers would overflow."""

SMALLEST = 1e-70
"""Smallest absolute value that the largest feature may have, unless all are 0: fourth powers would underflow."""


def check_features(features: Tensor, *, min_rows: int = 1) -> None:
    """Raise an error unless ``features`` is a finite, floating (N, D) matrix.

    Args:
        features: Object to check.
        min_rows: Smallest N that the caller accepts.

    Raises:
        TypeError: Not a tensor, or not of a floating dtype.
        ValueError: Wrong rank, too few rows, no columns, NaN/Inf (counted and named by column), too large or too small.
    """
    if not isinstance(features, Tensor):
        raise TypeError(f"features must be a torch.Tensor (N, D), got {type(features).__name__}")
    if features.ndim != 2:
        hint = ": pool the tokens first" if features.ndim == 3 else ""
        raise ValueError(f"features must be (N, D), got {tuple(features.shape)}{hint}")
    if not features.is_floating_point():
        raise TypeError(f"features must be of a floating dtype, got {features.dtype}: convert them with .float()")
    rows, columns = features.shape
    if rows < min_rows or columns == 0:
        least = f"at least {min_rows} row{'s' * (min_rows > 1)} and one column"
        raise ValueError(f"features must have {least}, got {tuple(features.shape)}")
    # A sum is finite only if its terms are. If it is not, it may have overflowed, so the terms are checked.
    if not all(isfinite(block.sum()) or torch.isfinite(block).all() for block in row_blocks(features)):
        bad = ~torch.isfinite(features)
        columns_hit = bad.any(0).nonzero().flatten().tolist()
        shown = ", ".join(map(str, columns_hit[:5])) + (", …" if len(columns_hit) > 5 else "")
        raise ValueError(
            f"features hold {int(bad.sum())} NaN or Inf in {int(bad.any(1).sum())} of {rows} rows, "
            f"columns {shown}: fix the encoder, or drop those rows with drop_nonfinite()"
        )
    _check_range(features, name="features")


def _check_range(values: Tensor, *, name: str) -> None:
    """Raise ValueError if powers of the values leave float64. Narrower dtypes cannot hold such values."""
    if values.dtype != torch.float64:
        return
    top = max(float(block.abs().max()) for block in row_blocks(values))
    if top > LARGEST:
        raise ValueError(f"{name} reach {top:.3g}: beyond {LARGEST:g}, fourth powers overflow; scale them down")
    if 0 < top < SMALLEST:
        raise ValueError(f"{name} reach only {top:.3g}: below {SMALLEST:g}, fourth powers underflow; scale them up")


def drop_nonfinite(features: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rows without NaN or Inf, and the mask (N,) that selects them.

    Example:
        >>> drop_nonfinite(torch.tensor([[1.0, 2.0], [float("nan"), 0.0]]))[1].tolist()
        [True, False]
    """
    finite = torch.isfinite(features).all(1)
    return features[finite], finite


class UndefinedError(ValueError):
    """A metric that has no value for these features, although their shapes are right."""


def check_lengths(features: Tensor) -> None:
    """Raise UndefinedError if a row has length 0, hence no direction."""
    zero = sum(int((block == 0).all(1).sum()) for block in row_blocks(features))
    if zero:
        raise UndefinedError(f"{zero} of {len(features)} features have length 0, hence no direction")


def check_tokens(tokens: Tensor) -> None:
    """Raise an error unless ``tokens`` is a finite, floating (B, T, D) tensor.

    Raises:
        TypeError: Not a floating tensor.
        ValueError: Wrong rank, an empty axis, NaN or Inf.
    """
    if not isinstance(tokens, Tensor) or not tokens.is_floating_point():
        raise TypeError(f"tokens must be a floating tensor (B, T, D), got {getattr(tokens, 'dtype', type(tokens))}")
    if tokens.ndim != 3 or 0 in tokens.shape:
        raise ValueError(f"tokens must be (B, T, D) without the CLS token, got {tuple(tokens.shape)}")
    if not torch.isfinite(tokens).all():
        raise ValueError(f"tokens hold {int((~torch.isfinite(tokens)).sum())} NaN or Inf: fix the encoder")
    _check_range(tokens, name="tokens")
