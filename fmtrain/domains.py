"""Domain checks of settings: one sentence with the name, the domain and the value."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence


def check_domain(
    name: str,
    value: float | Sequence[float] | None,
    *,
    minimum: float | None = None,
    above: float | None = None,
    maximum: float | None = None,
    below: float | None = None,
) -> None:
    """Raise if a number, or any of several, lies outside the domain. NaN and infinity always do; None never does.

    Args:
        name: Name of the setting in the message.
        value: Value, values, or None for a setting that is not used.
        minimum: Smallest value allowed.
        above: Bound below all values allowed.
        maximum: Largest value allowed.
        below: Bound above all values allowed.

    Raises:
        ValueError: A value lies outside the domain.

    Example:
        >>> check_domain("drop_path_rate", 0.3, minimum=0, below=1)
        >>> check_domain("drop_path_rate", 1.5, minimum=0, below=1)
        Traceback (most recent call last):
        ValueError: drop_path_rate must be 0 or more and below 1, got 1.5
    """
    if value is None:
        return
    bounds = {
        "{:g} or more": (minimum, operator.ge), "above {:g}": (above, operator.gt),
        "at most {:g}": (maximum, operator.le), "below {:g}": (below, operator.lt),
    }  # fmt: skip
    limits = {text.format(bound): (bound, holds) for text, (bound, holds) in bounds.items() if bound is not None}
    for number in value if isinstance(value, Sequence) else [value]:
        if not math.isfinite(number) or not all(holds(number, bound) for bound, holds in limits.values()):
            raise ValueError(f"{name} must be {' and '.join(limits) or 'finite'}, got {number:g}")


def check_range(name: str, value: tuple[float, float], *, above: float | None = None, **bounds: float) -> None:
    """Raise if a pair is not a lower and an upper end within the domain of :func:`check_domain`.

    Example:
        >>> check_range("mask_ratio_min_max", (0.5, 0.1), minimum=0, maximum=1)
        Traceback (most recent call last):
        ValueError: mask_ratio_min_max must be a lower and an upper end, got (0.5, 0.1)
    """
    if len(value) != 2 or value[0] > value[1]:
        raise ValueError(f"{name} must be a lower and an upper end, got ({', '.join(f'{end:g}' for end in value)})")
    check_domain(name, value, above=above, **bounds)
