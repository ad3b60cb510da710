"""Reading and validation of a sweep file."""

from __future__ import annotations

import inspect
import json
import re
import shlex
import tomllib
from argparse import ArgumentError
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, cast

import yaml
from jsonargparse import ArgumentParser
from optuna import pruners, samplers
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
    distribution_to_json,
)

from repmetrics.measurement.registry import METRICS

Direction = Literal["maximize", "minimize"]
POSTGRESQL = "postgresql+psycopg://"
LOADERS: Mapping[str, Callable[[str], Any]] = {".toml": tomllib.loads, ".yaml": yaml.safe_load, ".yml": yaml.safe_load}


class Grid(samplers.GridSampler):
    """Every combination once. The number of trials ends the sweep; Optuna's class can only end `optimize`."""

    def after_trial(self, *_: object) -> None:
        """Do nothing."""


SAMPLERS: Mapping[str, type[samplers.BaseSampler]] = {
    "tpe": samplers.TPESampler,
    "random": samplers.RandomSampler,
    "grid": Grid,
}
PRUNERS: Mapping[str, type[pruners.BasePruner]] = {
    "none": pruners.NopPruner,
    "median": pruners.MedianPruner,
    "percentile": pruners.PercentilePruner,
    "halving": pruners.SuccessiveHalvingPruner,
    "hyperband": pruners.HyperbandPruner,
    "threshold": pruners.ThresholdPruner,
}


@dataclass(frozen=True)
class NamedOptions:
    """Name of a sampler or pruner, and the arguments of its class."""

    name: str
    options: Mapping[str, Any]


@dataclass(frozen=True)
class Storage:
    """Where the study is kept.

    Attributes:
        url: Address of a PostgreSQL database; None for a journal file in the sweep's folder.
        heartbeat_seconds: Interval at which a driver tells the database that its trial is alive.
        grace_seconds: Time without a heartbeat after which a trial is given to another driver.
        patience_seconds: Time for which a driver retries an unreachable database.
    """

    url: str | None = None
    heartbeat_seconds: int = 30
    grace_seconds: int = 120
    patience_seconds: float = 600.0

    def __post_init__(self) -> None:
        if self.url is not None and not self.url.startswith(POSTGRESQL):
            scheme = self.url.partition("://")[0]
            raise ValueError(f"url must begin with {POSTGRESQL}, or be left out for a journal file, got {scheme}")
        if not 1 <= self.heartbeat_seconds < self.grace_seconds:
            seconds = f"{self.grace_seconds} and {self.heartbeat_seconds}"
            raise ValueError(f"grace_seconds must be above heartbeat_seconds, got {seconds}")


@dataclass(frozen=True)
class Probe:
    """Labeled data on which the last checkpoints of the `best` trials are probed at the end."""

    data: str
    best: int = 3

    def __post_init__(self) -> None:
        if self.best < 1:
            raise ValueError(f"best must be at least 1, got {self.best}")


@dataclass(frozen=True)
class Choices:
    """Values of one parameter. Text stays text, also where it spells a number."""

    choices: list[str | int | float | bool | None]

    def __post_init__(self) -> None:
        if not self.choices:
            raise ValueError("choices must hold a value, got none")


@dataclass(frozen=True)
class SweepFile:
    """Entries of a sweep file, as described in docs/sweeps.md."""

    study: str
    fit: str | list[str | int | float | bool]
    metric: str | list[str]
    parameters: dict[str, Any]
    trials: int
    direction: str | list[str] | None = None
    out: str = ""
    storage: str | dict[str, Any] = field(default_factory=dict)
    sampler: str | dict[str, Any] = "tpe"
    pruner: str | dict[str, Any] = "none"
    launcher: str = "{python} -m {command}"
    stop_seconds: float = 60.0
    probe: str | dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if not self.study:
            raise ValueError("study must be a name, got an empty one: it also names the folder of the sweep")
        if self.trials < 1:
            raise ValueError(f"trials must be at least 1, got {self.trials}")
        if not self.metric or not all(self.metric):
            raise ValueError(f"metric must be a name or a list of names, got {self.metric!r}")
        if "{command}" not in self.launcher and "{out}" not in self.launcher:
            raise ValueError("launcher must hold {command}, which is replaced by fmtrain fit and its arguments")


@dataclass(frozen=True)
class Sweep:
    """Validated sweep: the entries of a :class:`SweepFile` in the types that the driver needs.

    Attributes:
        directions: "maximize" or "minimize", one per metric.
        parameters: Distributions by key of `fmtrain fit`.
        poll_seconds: Interval at which the driver reads the measurements of its trial.
    """

    study: str
    fit: tuple[str, ...]
    metrics: tuple[str, ...]
    directions: tuple[Direction, ...]
    parameters: Mapping[str, BaseDistribution]
    trials: int
    out: Path
    storage: Storage = Storage()
    sampler: NamedOptions = NamedOptions("tpe", {})
    pruner: NamedOptions = NamedOptions("none", {})
    launcher: str = SweepFile.launcher
    stop_seconds: float = SweepFile.stop_seconds
    probe: Probe | None = None
    poll_seconds: float = field(default=0.25, compare=False)

    def identity(self) -> dict[str, Any]:
        """Definition that all drivers of one study must share."""
        return {
            "fit": list(self.fit),
            "metric": list(self.metrics),
            "direction": list(self.directions),
            "parameters": {name: json.loads(distribution_to_json(d)) for name, d in self.parameters.items()},
        }


def read(path: Path) -> dict[str, Any]:
    """Read the entries of a sweep file."""
    if path.suffix not in LOADERS:
        raise ValueError(f"{path}: a sweep file ends in .toml, .yaml or .yml")
    try:
        entries = LOADERS[path.suffix](path.read_text(encoding="utf-8"))
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(entries, dict):
        raise ValueError(f"{path} must hold a table of study, fit, metric, parameters, trials")
    return entries


def parse_sweep(entries: Mapping[str, Any]) -> Sweep:
    """Validate the entries of a sweep file."""
    file = SweepFile(**parse_table(SweepFile, entries, what="the sweep file"))
    metrics = (file.metric,) if isinstance(file.metric, str) else tuple(file.metric)
    parameters = distributions(file.parameters)
    pruner = parse_options(file.pruner, PRUNERS, parameters, what="pruner")
    if len(metrics) > 1 and pruner.name != "none":
        raise ValueError(
            f"{len(metrics)} metrics and pruner {pruner.name!r} exclude each other: a trial can be behind in one "
            "metric and ahead in another. Prune on one metric; the study stores the others too"
        )
    storage = {"url": file.storage} if isinstance(file.storage, str) else file.storage
    probe = {"data": file.probe} if isinstance(file.probe, str) else file.probe
    return Sweep(
        study=file.study,
        fit=fit_arguments(file.fit),
        metrics=metrics,
        directions=directions(metrics, file.direction),
        parameters=parameters,
        trials=file.trials,
        out=Path(file.out or file.study),
        storage=Storage(**parse_table(Storage, storage, what="storage")),
        sampler=parse_options(file.sampler, SAMPLERS, parameters, what="sampler"),
        pruner=pruner,
        launcher=file.launcher,
        stop_seconds=file.stop_seconds,
        probe=None if probe is None else Probe(**parse_table(Probe, probe, what="probe")),
    )


def parse_table(cls: type, entries: Mapping[str, Any], *, what: str, **fixed: object) -> dict[str, Any]:
    """Arguments of a class from a table of the file, which jsonargparse checks and converts.

    Example:
        >>> parse_table(Probe, {"data": "pcam", "best": "three"}, what="probe")
        Traceback (most recent call last):
        ValueError: probe: best must be int, got 'three'
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


def parse_options(
    entry: str | Mapping[str, Any],
    classes: Mapping[str, type],
    parameters: Mapping[str, BaseDistribution],
    *,
    what: str,
) -> NamedOptions:
    """A sampler or pruner from its name, or from a table of its name and the arguments of its class."""
    options = {"name": entry} if isinstance(entry, str) else dict(entry)
    if (name := options.pop("name", None)) not in list(classes):  # also where it is no text
        raise ValueError(f"{what} must be one of {', '.join(classes)}, got {entry!r}")
    fixed = {"search_space": combinations(parameters)} if name == "grid" else {}
    return NamedOptions(name, parse_table(classes[name], options, what=f"{what} {name}", **fixed))


def fit_arguments(entry: str | Sequence[object]) -> tuple[str, ...]:
    """Arguments of `fmtrain fit`, without those that the driver adds per trial."""
    arguments = shlex.split(entry) if isinstance(entry, str) else [str(part) for part in entry]
    names = [argument.partition("=")[0] for argument in arguments]
    if refused := {"--out", "--resume", "--overwrite"} & set(names):
        raise ValueError(f"fit must not hold {', '.join(refused)}: the driver gives every trial its own folder")
    if "--config" not in names:
        raise ValueError("fit must name a configuration, like --config tissue-small")
    return tuple(arguments)


def directions(metrics: Sequence[str], entry: str | Sequence[str] | None) -> tuple[Direction, ...]:
    """Directions as the file gives them, or those of the registered metrics."""
    if entry is not None:
        names = [entry] if isinstance(entry, str) else entry
        if len(names) != len(metrics) or not set(names) <= {"maximize", "minimize"}:
            raise ValueError(f"direction must be maximize or minimize, one per metric, got {entry!r}")
        return tuple(cast("Direction", name) for name in names)
    for name in metrics:
        if name not in METRICS:
            raise ValueError(f"{name} is not a registered metric: give its direction, maximize or minimize")
        if METRICS[name].direction == "neither":
            raise ValueError(f"{name} has no better direction: choose another metric, or give a direction")
    return tuple("maximize" if METRICS[name].direction == "higher" else "minimize" for name in metrics)


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
            raise ValueError(f"{key} must be {{low = …, high = …}} or {{choices = […]}}, got {entry!r}")
        if entry.keys() & {"choices", "low", "high", "log", "step"}:
            space[key] = distribution(key, entry)
        else:
            space |= distributions(entry, key)
    return space


def distribution(key: str, entry: Mapping[str, Any]) -> BaseDistribution:
    """``{choices = […]}``, or ``{low, high, log?, step?}`` of integers if both ends are."""
    if "choices" in entry:
        return CategoricalDistribution(**parse_table(Choices, entry, what=key))
    integers = all(isinstance(entry.get(end), int) for end in ("low", "high"))
    cls = IntDistribution if integers else FloatDistribution
    arguments = parse_table(cls, entry, what=key)
    if arguments["low"] == arguments["high"]:
        raise ValueError(f"{key}: low must be below high, got {arguments['low']} for both")
    return cls(**arguments)


def combinations(parameters: Mapping[str, BaseDistribution]) -> dict[str, list[Any]]:
    """Every value of every parameter, for a grid."""
    values: dict[str, list[Any]] = {}
    for name, d in parameters.items():
        if isinstance(d, CategoricalDistribution):
            values[name] = list(d.choices)
        elif isinstance(d, IntDistribution) and not d.log:
            values[name] = list(range(d.low, d.high + 1, d.step))
        else:
            raise ValueError(f"a grid needs choices or integers for {name}, got a range without steps")
    return values
