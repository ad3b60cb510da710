"""The sweep file: its entries, read and checked."""

from __future__ import annotations

import shlex
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import yaml
from optuna.distributions import BaseDistribution

from fmtrain.sweeps.command_line import COMMAND, FILLED, check_placeholders, placeholders
from fmtrain.sweeps.parameters import choice_label, combinations, distributions, flatten, is_inside, parse_table
from fmtrain.sweeps.settings import (
    LAUNCHER,
    PRUNERS,
    SAMPLERS,
    SEED,
    STOP_SECONDS,
    Direction,
    Jobs,
    NamedOptions,
    Probe,
    Seeds,
    Storage,
    Sweep,
)
from repmetrics.decisions.run_selection import CONSENSUS, CONSENSUS_METRIC, DOMAIN_VIEW_SETS, Domain
from repmetrics.measurement.registry import METRICS

LOADERS: Mapping[str, Callable[[str], Any]] = {".toml": tomllib.loads, ".yaml": yaml.safe_load, ".yml": yaml.safe_load}


@dataclass(frozen=True)
class SweepFile:
    """Entries of a sweep file, as described in docs/sweeps.md."""

    study: str
    parameters: dict[str, Any]
    fit: str | list[str | int | float | bool] | None = None
    command: str | None = None
    trials: int | None = None
    steps: int | None = None
    hours: float | None = None
    metric: str | list[str] = CONSENSUS
    direction: str | list[str] | None = None
    domain: Domain = "stained"
    out: str = ""
    storage: str | dict[str, Any] = field(default_factory=dict)
    sampler: str | dict[str, Any] = "tpe"
    pruner: str | dict[str, Any] | None = None
    run_steps: int | None = None
    seeds: int | dict[str, int] = 1
    first: list[dict[str, Any]] = field(default_factory=list)
    finished: list[str] = field(default_factory=list)
    launcher: str = LAUNCHER
    stop_seconds: float = STOP_SECONDS
    probe: str | dict[str, Any] | None = None
    jobs: Jobs = 1
    slurm: dict[str, str | int | bool] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.study:
            raise ValueError("study must be a name, got an empty one: it also names the folder of the sweep")
        if (self.fit is None) == (self.command is None):
            raise ValueError("give fit, the arguments of fmtrain fit, or command, a command line of your own")
        for name in ("trials", "steps", "hours", "run_steps", "jobs"):
            value = getattr(self, name)
            if value is not None and value != "auto" and not value > 0:
                raise ValueError(f"{name} must be {'above 0' if name == 'hours' else 'at least 1'}, got {value}")
        if not self.metric or not all(self.metric):
            raise ValueError(f"metric must be a name or a list of names, got {self.metric!r}")
        if self.command is not None and self.launcher != LAUNCHER:
            raise ValueError("launcher is for fit: begin command with it")
        if self.fit is not None and "{command}" not in self.launcher and "{out}" not in self.launcher:
            raise ValueError("launcher must hold {command}, which is replaced by fmtrain fit and its arguments")
        check_placeholders(self.launcher, (COMMAND, *FILLED), what="launcher")


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


def parse_sweep(entries: Mapping[str, Any], *, base: Path = Path()) -> Sweep:
    """Validate the entries of a sweep file.

    Args:
        entries: Entries of the file.
        base: Folder of the file, to which `out` and `finished` are relative.
    """
    file = SweepFile(**parse_table(SweepFile, entries, what="the sweep file"))
    rule = file.metric == CONSENSUS
    metrics = (CONSENSUS_METRIC,) if rule else (file.metric,) if isinstance(file.metric, str) else tuple(file.metric)
    parameters = distributions(file.parameters)
    sampler = parse_options(file.sampler, SAMPLERS, parameters, what="sampler")
    pruner = parse_pruner(file, parameters, rule=rule)
    if len(metrics) > 1 and pruner.name != "none":
        raise ValueError(
            f"{len(metrics)} metrics and pruner {pruner.name!r} exclude each other: a trial can be behind in one "
            "metric and ahead in another. Prune on one metric; the study stores the others too"
        )
    if file.trials is file.steps is file.hours is None and sampler.name != "grid":
        raise ValueError("the sweep has no end: give trials, steps or hours")
    storage = {"url": file.storage} if isinstance(file.storage, str) else file.storage
    probe = {"data": file.probe} if isinstance(file.probe, str) else file.probe
    return Sweep(
        study=file.study,
        fit=() if file.fit is None else fit_arguments(file.fit),
        command=None if file.command is None else check_command(file.command, parameters),
        metrics=metrics,
        directions=directions(metrics, file.direction),
        view_set=DOMAIN_VIEW_SETS[file.domain] if rule else None,
        parameters=parameters,
        trials=file.trials,
        steps=file.steps,
        hours=file.hours,
        out=(base / (file.out or file.study)).resolve(),
        storage=Storage(**parse_table(Storage, storage, what="storage")),
        sampler=sampler,
        pruner=pruner,
        run_steps=file.run_steps,
        seeds=parse_seeds(file, parameters),
        first=tuple(known_setting(entry, parameters) for entry in file.first),
        finished=tuple(base / name for name in file.finished),
        launcher=file.launcher,
        stop_seconds=file.stop_seconds,
        probe=None if probe is None else Probe(**parse_table(Probe, probe, what="probe")),
        jobs=file.jobs,
        slurm=file.slurm,
    )


def parse_pruner(file: SweepFile, parameters: Mapping[str, BaseDistribution], *, rule: bool) -> NamedOptions:
    """The pruner of the file. By default, the rule prunes at stages where the length of a run is known."""
    by_default = "stages" if rule and (file.fit is not None or file.run_steps is not None) else "none"
    pruner = parse_options(by_default if file.pruner is None else file.pruner, PRUNERS, parameters, what="pruner")
    if pruner.name == "stages" and file.fit is None and file.run_steps is None:
        raise ValueError("pruner stages needs run_steps, the number of steps of a whole run of the command")
    return pruner


def parse_seeds(file: SweepFile, parameters: Mapping[str, BaseDistribution]) -> Seeds:
    """Seeds of the file, which the runs must be able to take."""
    entry: dict[str, int] = {"count": file.seeds} if isinstance(file.seeds, int) else file.seeds
    seeds = Seeds(**parse_table(Seeds, entry, what="seeds"))
    if seeds.count > 1 and SEED in parameters:
        raise ValueError(f"seeds and the parameter {SEED} exclude each other")
    if seeds.count > 1 and file.command is not None and "{seed}" not in file.command:
        raise ValueError("seeds needs {seed} in command, which is replaced by the seed of each run")
    return seeds


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
    fixed: dict[str, object] = {}  # given later
    if name in ("grid", "stages"):
        fixed = {"search_space": combinations(parameters)} if name == "grid" else {"run_steps": 1}
    return NamedOptions(str(name), parse_table(classes[str(name)], options, what=f"{what} {name}", **fixed))


def known_setting(entry: Mapping[str, Any], parameters: Mapping[str, BaseDistribution]) -> dict[str, Any]:
    """A known setting of `first`, with dots for nested tables; every parameter, within its range."""
    flat = dict(flatten(entry))
    if wrong := sorted(flat.keys() ^ parameters.keys()):
        raise ValueError(f"first: a known setting has a value for every parameter and no other, see {', '.join(wrong)}")
    for name, d in parameters.items():
        value = flat[name] = choice_label(flat[name])
        if not is_inside(value, d):
            raise ValueError(f"first: {name} = {value!r} is outside its range")
    return flat


def check_command(command: str, parameters: Mapping[str, BaseDistribution]) -> str:
    """A command line with a placeholder for every parameter and for the folder of the run."""
    if not command.strip():
        raise ValueError("command must be a command line, got an empty one")
    if "out" not in placeholders(command):
        raise ValueError("command must hold {out}, which is replaced by the folder of the run")
    if absent := [name for name in parameters if name not in placeholders(command)]:
        raise ValueError(
            f"command must hold {', '.join(f'{{{name}}}' for name in absent)}: each is replaced by a value"
        )
    check_placeholders(command, {*parameters, *FILLED, "seed"}, what="command")
    return command


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
