"""Settings of a sweep, validated, and Optuna's samplers and pruners by name."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from optuna import pruners, samplers
from optuna.distributions import BaseDistribution, distribution_to_json

from fmtrain.sweeps.parameters import count_combinations
from fmtrain.sweeps.pruning import MedianAtStep, PercentileAtStep, Stages

Direction = Literal["maximize", "minimize"]
POSTGRESQL = "postgresql+psycopg://"
SEED = "seed_everything"
"""Setting of `fmtrain fit` that holds the seed of a run."""
LAUNCHER = "{python} -m {command}"
STOP_SECONDS = 60.0
Jobs = int | Literal["auto"]
"""Trials that a driver runs at a time; "auto": one per visible GPU."""


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
    "stages": Stages,
    "median": MedianAtStep,
    "percentile": PercentileAtStep,
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
class Seeds:
    """Repetition of the best settings with other seeds, after the search.

    Attributes:
        count: Runs of each of these settings, with the first.
        best: Number of settings to repeat.
    """

    count: int
    best: int = 3

    def __post_init__(self) -> None:
        if min(self.count, self.best) < 1:
            raise ValueError(f"count and best must be at least 1, got {self.count} and {self.best}")


@dataclass(frozen=True)
class Sweep:
    """Validated sweep: the entries of a :class:`~fmtrain.sweeps.config.SweepFile` in the types that a driver needs.

    Attributes:
        metrics: Names in measurements.jsonl; "consensus" is resolved.
        directions: "maximize" or "minimize", one per metric.
        parameters: Distributions by key of `fmtrain fit`, or by placeholder of `command`.
        trials: Trials to be finished; None if only another budget ends the sweep.
        steps: Optimizer steps of all trials together after which no trial is begun.
        hours: Hours of all trials together after which no trial is begun.
        view_set: View set that the domain requires, or None.
        run_steps: Steps of a whole run, where known.
        first: Known settings to try before any other.
        finished: Folders of runs whose results the study takes over.
        jobs: Trials that a driver runs at a time.
        slurm: Options of a job of SLURM, by name.
        poll_seconds: Interval at which the driver reads the measurements of its trial.
    """

    study: str
    fit: tuple[str, ...]
    metrics: tuple[str, ...]
    directions: tuple[Direction, ...]
    parameters: Mapping[str, BaseDistribution]
    trials: int | None
    out: Path
    steps: int | None = None
    hours: float | None = None
    command: str | None = None
    view_set: str | None = None
    storage: Storage = Storage()
    sampler: NamedOptions = NamedOptions("tpe", {})
    pruner: NamedOptions = NamedOptions("none", {})
    run_steps: int | None = None
    seeds: Seeds = Seeds(1)
    first: tuple[Mapping[str, Any], ...] = ()
    finished: tuple[Path, ...] = ()
    launcher: str = LAUNCHER
    stop_seconds: float = STOP_SECONDS
    probe: Probe | None = None
    jobs: Jobs = 1
    slurm: Mapping[str, str | int | bool] = field(default_factory=dict)
    poll_seconds: float = field(default=0.25, compare=False)

    @property
    def wanted(self) -> float:
        """Number of trials after which the search ends: a grid has no more than its combinations."""
        trials = math.inf if self.trials is None else self.trials
        return min(trials, count_combinations(self.parameters)) if self.sampler.name == "grid" else trials

    def identity(self) -> dict[str, Any]:
        """Definition that all drivers of one study must share."""
        return {
            "fit": list(self.fit) if self.command is None else self.command,
            "metric": list(self.metrics),
            "direction": list(self.directions),
            "parameters": {name: json.loads(distribution_to_json(d)) for name, d in self.parameters.items()},
        }
