"""What a sweep file says, and whether Optuna understands it: everything is refused before a trial."""

from __future__ import annotations

import inspect
import json
import shlex
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml
from optuna import pruners, samplers
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
    distribution_to_json,
)
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler

POSTGRESQL = "postgresql+psycopg://"
Direction = Literal["maximize", "minimize"]
DIRECTIONS: tuple[Direction, ...] = ("maximize", "minimize")

NUMBER = (int, float)
ENTRIES: Mapping[str, tuple[type, ...]] = {
    "study": (str,),
    "fit": (str, list),
    "metric": (str, list),
    "parameters": (dict,),
    "trials": (int,),
    "direction": (str, list),
    "out": (str,),
    "storage": (str, dict),
    "sampler": (str, dict),
    "pruner": (str, dict),
    "launcher": (str,),
    "stop_seconds": NUMBER,
    "probe": (str, dict),
}
RANGE: Mapping[str, tuple[type, ...]] = {
    "low": NUMBER,
    "high": NUMBER,
    "log": (bool,),
    "step": NUMBER,
    "choices": (list,),
}
STORAGE: Mapping[str, tuple[type, ...]] = {
    "url": (str,),
    "heartbeat_seconds": (int,),
    "grace_seconds": (int,),
    "patience_seconds": NUMBER,
}
PROBE: Mapping[str, tuple[type, ...]] = {"data": (str,), "best": (int,)}
NAMES = {str: "text", list: "a list", dict: "a table", int: "a whole number", float: "a number", bool: "true or false"}


class Grid(samplers.GridSampler):
    """Every combination once; the number of trials says when to end, where Optuna's own can end only `optimize`."""

    def after_trial(self, *_: object) -> None:
        """Nothing."""


SAMPLERS: Mapping[str, type[BaseSampler]] = {"tpe": samplers.TPESampler, "random": samplers.RandomSampler, "grid": Grid}
PRUNERS: Mapping[str, type[BasePruner]] = {
    "none": pruners.NopPruner,
    "median": pruners.MedianPruner,
    "percentile": pruners.PercentilePruner,
    "halving": pruners.SuccessiveHalvingPruner,
    "hyperband": pruners.HyperbandPruner,
    "threshold": pruners.ThresholdPruner,
}


class NamedOptions(NamedTuple):
    """A sampler or pruner by name, and the arguments of its constructor."""

    name: str
    options: Mapping[str, Any]


class Storage(NamedTuple):
    """Where the study is kept.

    Attributes:
        url: Of a PostgreSQL database; None: a journal file in the sweep's folder.
        heartbeat_seconds: How often a driver tells the database that its trial is alive.
        grace_seconds: Without a heartbeat for so long, a trial is given to another driver.
        patience_seconds: How long a driver waits for a database that has gone.
    """

    url: str | None = None
    heartbeat_seconds: int = 30
    grace_seconds: int = 120
    patience_seconds: float = 600.0


class Probe(NamedTuple):
    """What the best trials' last checkpoints are probed on at the end: the only step that sees labels."""

    data: str
    best: int = 3


TPE, NO_PRUNER, JOURNAL = NamedOptions("tpe", {}), NamedOptions("none", {}), Storage()


@dataclass(frozen=True)
class Sweep:
    """A sweep file, checked.

    Attributes:
        study: Its name in the storage.
        fit: Arguments of `fmtrain fit` that all trials share.
        metrics: What is optimised: names in measurements.jsonl. Several mean a Pareto front, and no pruning.
        directions: "maximize" or "minimize", one a metric.
        parameters: What is drawn, by its key in `fmtrain fit`.
        trials: How many are to finish, over all drivers.
        out: The sweep's folder.
        storage: Where the study is kept.
        sampler: How settings are drawn.
        pruner: Which trials are stopped early.
        launcher: How a trial is started, see :func:`fmtrain.sweeps.process.run_command`.
        stop_seconds: What a stopped trial has for saving, before it is killed.
        probe: What the best are probed on at the end.
    """

    study: str
    fit: tuple[str, ...]
    metrics: tuple[str, ...]
    directions: tuple[Direction, ...]
    parameters: Mapping[str, BaseDistribution]
    trials: int
    out: Path
    storage: Storage = JOURNAL
    sampler: NamedOptions = TPE
    pruner: NamedOptions = NO_PRUNER
    launcher: str = "{python} -m {command}"
    stop_seconds: float = 60.0
    probe: Probe | None = None
    poll_seconds: float = field(default=0.25, compare=False)

    def identity(self) -> dict[str, Any]:
        """What may not change between two calls that share a study."""
        return {
            "fit": list(self.fit),
            "metric": list(self.metrics),
            "direction": list(self.directions),
            "parameters": {name: json.loads(distribution_to_json(d)) for name, d in self.parameters.items()},
        }


def read(path: Path) -> dict[str, Any]:
    """The entries of a sweep file.

    Raises:
        ValueError: If it is neither TOML nor YAML, or does not hold a table.
    """
    try:
        if path.suffix == ".toml":
            return tomllib.loads(path.read_text(encoding="utf-8"))
        if path.suffix in (".yaml", ".yml"):
            entries = yaml.safe_load(path.read_text(encoding="utf-8"))
        else:
            raise ValueError("a sweep file ends in .toml, .yaml or .yml")
    except (tomllib.TOMLDecodeError, yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(entries, dict):
        raise ValueError(f"{path} must hold a table of study, fit, metric, parameters, trials")
    return entries


def parse_sweep(entries: Mapping[str, Any]) -> Sweep:
    """The sweep that the entries of a file describe.

    Raises:
        ValueError: If they describe none; the sentence names the entry.
    """
    check_entries(entries, ENTRIES, what="a sweep")
    if missing := [name for name in ("study", "fit", "metric", "parameters", "trials") if name not in entries]:
        raise ValueError(f"the sweep has no {', '.join(missing)}: it needs study, fit, metric, parameters and trials")
    metrics = tuple(listed(entries["metric"]))
    pruner = parse_options(entries.get("pruner", "none"), PRUNERS, "pruner")
    if len(metrics) > 1 and pruner.name != "none":
        raise ValueError(
            f"{len(metrics)} metrics and pruner {pruner.name!r} exclude each other: a trial can be behind in one and "
            "ahead in another, so prune on one metric; the others are kept beside it"
        )
    if (trials := entries["trials"]) < 1:
        raise ValueError(f"trials must be a number of at least 1, got {trials!r}")
    if not entries["study"]:
        raise ValueError("study must be a name, got none: it names the sweep's folder too")
    space = parameters(entries["parameters"])
    sampler = parse_options(entries.get("sampler", "tpe"), SAMPLERS, "sampler")
    if sampler.name == "grid":
        combinations(space)
    simple = {name: entries[name] for name in ("launcher", "stop_seconds") if name in entries}
    if "launcher" in simple and not any(word in simple["launcher"] for word in ("{command}", "{out}")):
        raise ValueError("the launcher must hold {command}, which stands for fmtrain fit and its arguments")
    return Sweep(
        study=entries["study"],
        fit=fit_arguments(entries["fit"]),
        metrics=metrics,
        directions=directions(metrics, entries.get("direction")),
        parameters=space,
        trials=trials,
        out=Path(entries.get("out", entries["study"])),
        storage=storage(entries.get("storage", {})),
        sampler=sampler,
        pruner=pruner,
        probe=probe(entries.get("probe")),
        **simple,
    )


def check_known(given: Iterable[str], known: Iterable[str], *, what: str) -> None:
    """Refuse the first that is not known, with the names near it."""
    for name in given:
        if name not in (known := list(known)):
            near = get_close_matches(name, known)
            raise ValueError(f"{what} has no {name!r}: " + (f"did you mean {near[0]}?" if near else ", ".join(known)))


def check_entries(given: Mapping[str, object], kinds: Mapping[str, tuple[type, ...]], *, what: str) -> None:
    """Refuse an entry that is not known, or is of the wrong kind.

    Example:
        >>> check_entries({"best": "three"}, PROBE, what="probe")
        Traceback (most recent call last):
        ValueError: probe: best must be a whole number, got 'three'
    """
    check_known(given, kinds, what=what)
    for name, value in given.items():
        if not isinstance(value, kinds[name]) or (isinstance(value, bool) and bool not in kinds[name]):
            expected = NAMES[float] if kinds[name] == NUMBER else " or ".join(NAMES[kind] for kind in kinds[name])
            hint = ": YAML reads 1e-4 as text, write 1.0e-4" if kinds[name] == NUMBER and isinstance(value, str) else ""
            raise ValueError(f"{what}: {name} must be {expected}, got {value!r}{hint}")


def listed(value: str | Sequence[str]) -> list[str]:
    """One name, or several."""
    names = [value] if isinstance(value, str) else list(value)
    if not names or not all(isinstance(name, str) and name for name in names):
        raise ValueError(f"metric must be a name or a list of names, got {value!r}")
    return names


def fit_arguments(given: str | Sequence[object]) -> tuple[str, ...]:
    """Arguments of `fmtrain fit`, as typed or as a list, without those that each trial has of its own."""
    parts = shlex.split(given) if isinstance(given, str) else [str(part) for part in given]
    for part in parts:
        if part.partition("=")[0] in ("--out", "--resume", "--overwrite"):
            raise ValueError(f"fit must not hold {part}: every trial has a folder of its own")
    if not any(part.partition("=")[0] == "--config" for part in parts):
        raise ValueError("fit must name a configuration, like --config tissue-small")
    return tuple(parts)


def directions(metrics: Sequence[str], given: str | Sequence[str] | None) -> tuple[Direction, ...]:
    """Given, or those of the catalogue.

    Raises:
        ValueError: If the catalogue knows none, or what is given is none.
    """
    if given is not None:
        stated = [given] if isinstance(given, str) else given
        if len(stated) != len(metrics) or not set(stated) <= set(DIRECTIONS):
            raise ValueError(f"direction must be {' or '.join(DIRECTIONS)}, one a metric, got {given!r}")
        return tuple(which for name in stated for which in DIRECTIONS if which == name)
    return tuple(is_better(name) for name in metrics)


def is_better(metric: str) -> Direction:
    """The catalogue's direction."""
    from repmetrics.measurement.registry import METRICS

    if metric not in METRICS:
        raise ValueError(f"{metric} is not in the catalogue: give its direction, maximize or minimize")
    if METRICS[metric].direction == "neither":
        raise ValueError(f"{metric} has no better direction: choose another metric, or give a direction")
    return "maximize" if METRICS[metric].direction == "higher" else "minimize"


def parameters(given: object, prefix: str = "") -> dict[str, BaseDistribution]:
    """Ranges by key; nested tables are joined by dots.

    Example:
        >>> parameters({"model": {"schedules": {"lr": {"low": 1e-4, "high": 1e-2, "log": True}}}})
        {'model.schedules.lr': FloatDistribution(high=0.01, log=True, low=0.0001, step=None)}
    """
    if not isinstance(given, Mapping) or not given:
        raise ValueError(f"{prefix or 'parameters'} must be a table of ranges, got {given!r}")
    found: dict[str, BaseDistribution] = {}
    for name, entry in given.items():
        key = f"{prefix}.{name}" if prefix else str(name)
        if isinstance(entry, Mapping) and not set(RANGE) & set(entry):
            found |= parameters(entry, key)
        else:
            found[key] = distribution(key, entry)
    return found


def distribution(key: str, entry: object) -> BaseDistribution:
    """``{choices = […]}``, or ``{low, high, log?, step?}``, of integers if both ends are.

    Raises:
        ValueError: If it is neither, or the wrong way round.
    """
    if not isinstance(entry, Mapping):
        raise ValueError(f"{key} must be {{low = …, high = …}} or {{choices = […]}}, got {entry!r}")
    check_entries(entry, RANGE, what=key)
    if "choices" in entry:
        choices = entry["choices"]
        if len(entry) > 1 or not choices:
            raise ValueError(f"{key}: choices must be a list of values, with nothing beside it")
        if not all(isinstance(choice, None | bool | int | float | str) for choice in choices):
            raise ValueError(f"{key}: a choice must be a number, a word, true, false or null, got {choices}")
        return CategoricalDistribution(choices)
    if missing := [end for end in ("low", "high") if end not in entry]:
        raise ValueError(f"{key} has no {' and no '.join(missing)}: a range is {{low = …, high = …}}")
    low, high = entry["low"], entry["high"]
    if low >= high:
        raise ValueError(f"{key}: low must be below high, got {low} and {high}")
    options = {name: entry[name] for name in ("log", "step") if name in entry}
    try:
        if isinstance(low, int) and isinstance(high, int):
            return IntDistribution(low, high, **options)
        return FloatDistribution(low, high, **options)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error


def storage(given: object) -> Storage:
    """A URL, or a table with it.

    Raises:
        ValueError: If it is of another kind of database.
    """
    entries = {"url": given} if isinstance(given, str) else given
    if not isinstance(entries, Mapping):
        raise ValueError(f"storage must be a URL or a table with one, got {given!r}")
    check_entries(entries, STORAGE, what="storage")
    made = Storage(**entries)
    if made.url is not None and not made.url.startswith(POSTGRESQL):
        scheme = made.url.partition("://")[0]
        raise ValueError(f"storage must begin with {POSTGRESQL}, or be left out for a journal file, got {scheme}")
    if not 1 <= made.heartbeat_seconds < made.grace_seconds:
        raise ValueError(
            f"grace_seconds must be above heartbeat_seconds, got {made.grace_seconds} and {made.heartbeat_seconds}"
        )
    return made


def parse_options(given: object, among: Mapping[str, type[Any]], what: str) -> NamedOptions:
    """A name, or a table of name and options, which are those of Optuna's class.

    Raises:
        ValueError: If there is none of this name, or Optuna does not take the options.
    """
    entries = {"name": given} if isinstance(given, str) else given
    if not isinstance(entries, Mapping) or entries.get("name") not in among:
        raise ValueError(f"{what} must be one of {', '.join(among)}, got {given!r}")
    made = NamedOptions(entries["name"], {name: value for name, value in entries.items() if name != "name"})
    taken = dict(inspect.signature(among[made.name]).parameters)
    if made.name == "grid":
        del taken["search_space"]
    check_known(made.options, taken, what=f"{what} {made.name}")
    if made.name != "grid":
        try:
            among[made.name](**made.options)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{what} {made.name}: {error}") from error
    return made


def combinations(space: Mapping[str, BaseDistribution]) -> dict[str, list[Any]]:
    """Every value of every parameter, for a grid.

    Raises:
        ValueError: If one has no countable values.
    """
    found: dict[str, list[Any]] = {}
    for name, d in space.items():
        if isinstance(d, CategoricalDistribution):
            found[name] = list(d.choices)
        elif isinstance(d, IntDistribution) and not d.log:
            found[name] = list(range(d.low, d.high + 1, d.step))
        else:
            raise ValueError(f"a grid needs choices for {name}, or integers: it is a range without steps")
    return found


def probe(given: object) -> Probe | None:
    """What to probe on, or nothing."""
    if given is None:
        return None
    entries = {"data": given} if isinstance(given, str) else given
    if not isinstance(entries, Mapping) or "data" not in entries:
        raise ValueError(f"probe must be a labelled data set, or a table of data and best, got {given!r}")
    check_entries(entries, PROBE, what="probe")
    made = Probe(**entries)
    if made.best < 1:
        raise ValueError(f"probe: best must be at least 1, got {made.best}")
    return made
