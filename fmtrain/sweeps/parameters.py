"""Parameters of a sweep: distributions from the tables of the file, and combinations for a grid."""

from __future__ import annotations

import inspect
import json
import math
import re
from argparse import ArgumentError
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import combinations as pairs
from typing import Any

import numpy as np
from jsonargparse import ArgumentParser
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

RANGE = {"choices", "low", "high", "log", "step"}
STEP_TOLERANCE = 1e-8
"""Share of a step by which a value may miss it, as in Optuna."""
CONDITIONS = {"when", "if", "condition", "conditions", "parent", "depends_on"}


@dataclass(frozen=True)
class Choices:
    """Values of one parameter. Text stays text, also where it spells a number. Lists and tables become JSON text."""

    choices: list[str | int | float | bool | None]

    def __post_init__(self) -> None:
        if not self.choices:
            raise ValueError("choices must hold a value, got none")
        for a, b in pairs(self.choices, 2):
            if a == b:  # Optuna takes true and 1, 1 and 1.0 for one choice
                raise ValueError(f"choices must differ, got {a!r} and {b!r}")


def distributions(table: Mapping[str, Any], prefix: str = "") -> dict[str, BaseDistribution]:
    """Distributions by key; dots join the keys of nested tables.

    Example:
        >>> distributions({"model": {"schedules": {"lr": {"low": 1e-4, "high": 1e-2, "log": True}}}})
        {'model.schedules.lr': FloatDistribution(high=0.01, log=True, low=0.0001, step=None)}
    """
    if not table:
        raise ValueError(f"{prefix or 'parameters'} must be a table of ranges, got {table!r}")
    space: dict[str, BaseDistribution] = {}
    for name, entry in table.items():
        key = f"{prefix}.{name}" if prefix else str(name)
        if not isinstance(entry, Mapping):
            raise ValueError(
                f"{key} must be {{low = …, high = …}} or {{choices = […]}}, got {entry!r}; a fixed setting "
                "belongs in fit"
            )
        if conditions := entry.keys() & CONDITIONS:
            raise ValueError(
                f"{key} has {', '.join(sorted(conditions))}: a parameter that depends on another is not supported; "
                "make one sweep for each value of the other"
            )
        if entry.keys() & RANGE:
            space[key] = distribution(key, entry)
        else:
            space |= distributions(entry, key)
    return space


def distribution(key: str, entry: Mapping[str, Any]) -> BaseDistribution:
    """``{choices = […]}``, or ``{low, high, log?, step?}`` of integers if both ends are.

    Example:
        >>> distribution("scale", {"choices": [[0.4, 1.0], [0.2, 1.0]]})
        CategoricalDistribution(choices=('[0.4, 1.0]', '[0.2, 1.0]'))
    """
    if isinstance(entry.get("choices"), list):
        entry = {**entry, "choices": [choice_label(value) for value in entry["choices"]]}
    if "choices" in entry:
        return CategoricalDistribution(**parse_table(Choices, entry, what=key))
    integers = all(isinstance(entry.get(end), int) for end in ("low", "high"))
    cls = IntDistribution if integers else FloatDistribution
    arguments = parse_table(cls, entry, what=key)
    if not all(math.isfinite(arguments[end]) for end in ("low", "high") if end in arguments):
        raise ValueError(f"{key}: low and high must be finite")
    if arguments["low"] == arguments["high"]:
        raise ValueError(f"{key}: low must be below high, got {arguments['low']} for both")
    return cls(**arguments)


def choice_label(value: Any) -> Any:
    """A value as Optuna stores it: lists and tables as JSON text."""
    return json.dumps(value) if isinstance(value, list | dict) else value


def is_inside(value: Any, d: BaseDistribution) -> bool:
    """Whether a distribution can give this value.

    Example:
        >>> [is_inside(value, IntDistribution(16, 64, step=16)) for value in (32, 32.0, 24, 16.5, "32")]
        [True, True, False, False, False]
        >>> is_inside(0.3, FloatDistribution(0.1, 0.5, step=0.1))
        True
    """
    if isinstance(d, CategoricalDistribution):
        return any(value == choice and isinstance(value, bool) == isinstance(choice, bool) for choice in d.choices)
    assert isinstance(d, IntDistribution | FloatDistribution)
    if isinstance(value, bool) or not isinstance(value, int | float) or not d.low <= value <= d.high:
        return False
    steps = (value - d.low) / d.step if d.step else 0.0
    return abs(steps - round(steps)) < STEP_TOLERANCE


def flatten(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Values of nested tables by keys with dots.

    Example:
        >>> dict(flatten({"model": {"lr": 0.1}, "data.batch_size": 32}))
        {'model.lr': 0.1, 'data.batch_size': 32}
    """
    for name, value in table.items():
        key = f"{prefix}.{name}" if prefix else str(name)
        if isinstance(value, Mapping):
            yield from flatten(value, key)
        else:
            yield key, value


def combinations(parameters: Mapping[str, BaseDistribution]) -> dict[str, list[Any]]:
    """Every value of every parameter, for a grid.

    Example:
        >>> combinations({"x": FloatDistribution(0.1, 0.3, step=0.1), "y": CategoricalDistribution([True, False])})
        {'x': [0.1, 0.2, 0.3], 'y': [True, False]}
    """
    values: dict[str, list[Any]] = {}
    for name, d in parameters.items():
        if isinstance(d, CategoricalDistribution):
            values[name] = list(d.choices)
        elif isinstance(d, IntDistribution) and not d.log:
            values[name] = list(range(d.low, d.high + 1, d.step))
        elif isinstance(d, FloatDistribution) and d.step is not None:
            count = round((d.high - d.low) / d.step) + 1
            values[name] = [float(f"{value:.12g}") for value in np.linspace(d.low, d.high, count)]
        else:
            raise ValueError(f"a grid needs choices, integers without log, or a range with a step for {name}")
    return values


def count_combinations(parameters: Mapping[str, BaseDistribution]) -> int:
    """Number of points of a grid."""
    return math.prod(len(values) for values in combinations(parameters).values())


def parse_table(cls: type, entries: Mapping[str, Any], *, what: str, **fixed: object) -> dict[str, Any]:
    """Arguments of a class from a table of the file, which jsonargparse checks and converts.

    Example:
        >>> parse_table(Choices, {"choices": 3}, what="lr")
        Traceback (most recent call last):
        ValueError: lr: choices must be list[str | int | float | bool | None], got 3
    """
    signature = inspect.signature(cls).parameters
    types = {
        name: getattr(p.annotation, "__name__", p.annotation) for name, p in signature.items() if name not in fixed
    }
    if unknown := [str(name) for name in entries if name not in types]:
        near = get_close_matches(unknown[0], types, n=1)
        raise ValueError(f"{what} has no {unknown[0]!r}: {f'did you mean {near[0]}?' if near else ', '.join(types)}")
    parser = ArgumentParser(exit_on_error=False, parser_mode="json")  # as YAML, text such as "{a: 1}" would be a table
    parser.add_class_arguments(cls, skip=set(fixed))
    try:
        parsed = vars(parser.parse_object(dict(entries)))
        arguments = {name: parsed[name] for name in entries}
        cls(**arguments, **fixed)
    except ArgumentError as error:
        if (key := re.match(r'Parser key "(\w+)"', str(error))) is not None:
            raise ValueError(f"{what}: {key[1]} must be {types[key[1]]}, got {entries[key[1]]!r}") from error
        raise ValueError(f"{what}: {str(error).replace('arguments', 'entries')}") from error
    except (TypeError, ValueError) as error:
        raise ValueError(f"{what}: {error}") from error
    return arguments
