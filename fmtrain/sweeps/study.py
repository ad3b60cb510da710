"""The Optuna study of a sweep: storage, sampler, and decisions about trials. No process here."""

from __future__ import annotations

import errno
import json
import re
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import optuna
import sqlalchemy
from optuna import Study, Trial
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution, json_to_distribution
from optuna.exceptions import ExperimentalWarning, StorageInternalError
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.trial import FrozenTrial, TrialState

from fmtrain.sweeps.config import PRUNERS, SAMPLERS, Storage, Sweep
from fmtrain.sweeps.endings import first_number, is_replaced, make_retry, reached_step
from fmtrain.sweeps.journal import Journal
from fmtrain.sweeps.parameters import combinations

MAX_INITIAL_CRASHES = 3
"""Number of crashes before any success after which a driver gives up."""

TRANSIENT_FILE_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.ESTALE, errno.EIO}
"""A full disk, or a network file system that is away for a while."""

WRONG_DATABASE = re.compile(r"authentication|does not exist|no pg_hba|resolve|translate host|invalid", re.IGNORECASE)
"""Refusals of a database that do not pass with time."""


# ── decisions ──────────────────────────────────────────────────────────────────────────────────────────────────────


def finished(trial: FrozenTrial) -> bool:
    """Whether a trial was completed, was pruned or crashed. A trial given to another driver does not count."""
    crashed = trial.state == TrialState.FAIL and "crash" in trial.user_attrs
    return crashed or trial.state in (TrialState.COMPLETE, TrialState.PRUNED)


def is_repeat(trial: FrozenTrial) -> bool:
    """Whether the trial repeats the settings of another with a new seed."""
    return "repeats" in trial.user_attrs


def is_search(trial: FrozenTrial) -> bool:
    """Whether the trial counts as one of the search.

    Finished runs that were imported do not, nor do repeats, apart from settings that the sampler drew again.
    """
    return "drawn" in trial.user_attrs or not trial.user_attrs.keys() & {"repeats", "imported"}


def same_settings(trials: Iterable[FrozenTrial], number: int) -> list[FrozenTrial]:
    """Earlier trials of the search with the settings of this one, unless this one repeats or resumes a trial."""
    trials = list(trials)
    trial = next(t for t in trials if t.number == number)
    if "failed_trial" in trial.system_attrs or is_repeat(trial):
        return []
    alive = (TrialState.RUNNING, TrialState.WAITING)
    earlier = [t for t in trials if t.number < number and is_search(t) and (finished(t) or t.state in alive)]
    return [t for t in earlier if t.params == trial.params]


def next_step(trials: Iterable[FrozenTrial], *, wanted: float, spent: bool = False) -> str:
    """Next step of a driver: "ask" for a trial, "wait" for the trials of other drivers, or "done".

    Args:
        trials: Trials of the study.
        wanted: Number of trials to be finished.
        spent: Whether the budget of steps or hours is spent, so that no trial is begun.
    """
    trials = list(trials)
    done = sum(map(finished, trials))
    running = sum(t.state == TrialState.RUNNING for t in trials)
    if done >= wanted or (spent and not running):
        return "done"
    return "wait" if done + running >= wanted or spent else "ask"


def is_spent(trials: Iterable[FrozenTrial], *, steps: int | None, hours: float | None) -> bool:
    """Whether all trials together have used the budget of optimizer steps, or of hours."""
    ended = [t for t in trials if t.datetime_complete is not None and "imported" not in t.user_attrs]
    used = sum(t.duration.total_seconds() for t in ended if t.duration is not None) / 3600
    reached: dict[int, int] = {}  # attempts at one trial share its steps
    for t in ended:
        reached[first_number(t)] = max(reached.get(first_number(t), 0), reached_step(t))
    return (steps is not None and sum(reached.values()) >= steps) or (hours is not None and used >= hours)


def is_surplus(trials: Iterable[FrozenTrial], number: int, *, wanted: float, grid: bool = False) -> bool:
    """Whether the trial is one too many: two drivers asked at the same time, this one later.

    Either the wanted number is reached without it, or an earlier trial has the same settings and seed where each is
    wanted once: in a grid, and among repeats.
    """
    trials = list(trials)
    trial = next(t for t in trials if t.number == number)
    alive = (TrialState.RUNNING, TrialState.WAITING)
    earlier = [t for t in trials if t.number < number and (finished(t) or t.state in alive)]
    if is_repeat(trial) and not is_search(trial):
        key = (trial.user_attrs["repeats"], trial.user_attrs["seed"])
        return any((t.user_attrs.get("repeats"), t.user_attrs.get("seed")) == key for t in earlier)
    search = [t for t in earlier if is_search(t)]
    return len(search) >= wanted or (grid and any(t.params == trial.params for t in search))


def initial_crashes(trials: Iterable[FrozenTrial], *, wanted: float) -> int:
    """Number of crashed trials if it is enough to give up, else 0.

    It is enough if no trial of any driver was completed or pruned before.
    """
    counted = [trial for trial in trials if finished(trial)]
    crashed = sum(trial.state == TrialState.FAIL for trial in counted)
    return crashed if crashed == len(counted) and crashed >= min(MAX_INITIAL_CRASHES, wanted) else 0


def is_connection_error(error: BaseException | None) -> bool:
    """Whether an exception comes from an unreachable or restarting database or a full disk, not from the query."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in TRANSIENT_FILE_ERRORS:
            return True
        if isinstance(error, sqlalchemy.exc.OperationalError | sqlalchemy.exc.InterfaceError):
            return True
        if isinstance(error, sqlalchemy.exc.DBAPIError) and error.connection_invalidated:
            return True
        error = error.__cause__ or error.__context__
    return False


# ── the study ──────────────────────────────────────────────────────────────────────────────────────────────────────


def open_storage(sweep: Sweep, *, log: Callable[[str], None]) -> BaseStorage:
    """Open the journal in the sweep's folder, or the database, which may be unreachable for a while."""
    storage = sweep.storage
    if storage.url is None:
        sweep.out.mkdir(parents=True, exist_ok=True)
        journal = (sweep.out / "journal.log").resolve()  # its lock is a link: it must not depend on the working folder
        return JournalStorage(Journal(journal, log=log))
    url = sqlalchemy.make_url(storage.url).render_as_string(hide_password=True)
    deadline = time.monotonic() + storage.patience_seconds
    waiting = False
    while True:
        try:
            return _database(storage, log=log)
        except (sqlalchemy.exc.SQLAlchemyError, StorageInternalError, ImportError) as error:
            cause = str(error.orig if isinstance(error, sqlalchemy.exc.DBAPIError) else error).strip()
            passes = is_connection_error(error) and not WRONG_DATABASE.search(cause)
            if not passes or time.monotonic() > deadline:
                raise ValueError(f"cannot open a study at {url}: {cause.splitlines()[0]}") from error
            if not waiting:
                log(f"{url} is unreachable ({cause.splitlines()[0]}): retrying for {storage.patience_seconds:g} s")
        waiting = True
        time.sleep(min(2.0, storage.patience_seconds / 4))


def _database(storage: Storage, *, log: Callable[[str], None], attempts: int = 5) -> RDBStorage:
    def requeue(study: Study, trial: FrozenTrial) -> None:
        add_retry(study, trial, make_retry(trial), log=log)

    while True:
        attempts -= 1
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ExperimentalWarning)  # heartbeats
                return RDBStorage(
                    str(storage.url),
                    engine_kwargs={"pool_pre_ping": True, "connect_args": {"connect_timeout": 10}},
                    heartbeat_interval=storage.heartbeat_seconds,
                    grace_period=storage.grace_seconds,
                    heartbeat_stale_trial_callback=requeue,
                )
        except (sqlalchemy.exc.IntegrityError, sqlalchemy.exc.ProgrammingError):
            if not attempts:  # two drivers create the tables at the same time
                raise
            time.sleep(0.5)


def add_retry(study: Study, trial: FrozenTrial, retry: FrozenTrial, *, log: Callable[[str], None]) -> None:
    """Add the trial that replaces an attempt, once: several drivers may see that it ended."""
    if is_replaced(trial.number, study.get_trials(deepcopy=False)):
        return
    study.add_trial(retry)
    if retry.state == TrialState.WAITING:
        log(f"trial {trial.number}: trial re-queued")
    else:
        why = retry.user_attrs.get("crash") or ": ".join(retry.user_attrs["ending"])
        log(f"trial {trial.number} is not tried again: {why}")


def open_study(sweep: Sweep, storage: BaseStorage, *, log: Callable[[str], None]) -> Study:
    """Open the study, or create it. Ranges may be extended, and drivers may start at the same moment."""
    study = optuna.create_study(
        storage=storage,
        study_name=sweep.study,
        sampler=sampler(sweep, 0),
        directions=sweep.directions,
        pruner=pruner(sweep),
        load_if_exists=True,
    )
    identity = sweep.identity()
    stored = study.user_attrs.get("sweep")
    if stored is None:
        if study.trials:  # by a driver that has written its definition in the meantime, or of another program
            stored = study.user_attrs.get("sweep")
        else:
            study.set_user_attr("sweep", identity)
            stored = study.user_attrs["sweep"]
    if changed := [name for name in identity if (stored or {}).get(name) != identity[name]]:
        if stored is None or changed != ["parameters"] or not (extended := extensions(stored["parameters"], sweep)):
            raise ValueError(
                f"study {sweep.study!r} holds another sweep: {', '.join(changed)} differ; give this sweep another name"
            )
        log(f"the ranges of {', '.join(extended)} were extended")
        study.set_user_attr("sweep", identity)
    return study


def open_existing(sweep: Sweep, storage: BaseStorage) -> Study:
    """Open the study to read it.

    Raises:
        ValueError: It does not exist.
    """
    try:
        return optuna.load_study(study_name=sweep.study, storage=storage)
    except KeyError:
        raise ValueError(f"no study {sweep.study!r} in {sweep.out}: run the sweep first") from None


def extensions(stored: Mapping[str, Mapping[str, Any]], sweep: Sweep) -> list[str]:
    """Parameters whose ranges contain the stored ones; none if any other parameter has changed.

    Optuna cannot add choices to a study.
    """
    changed = []
    if stored.keys() != sweep.parameters.keys():
        return []
    for name, entry in stored.items():
        before, now = json_to_distribution(json.dumps(entry)), sweep.parameters[name]
        if before == now:
            continue
        if type(before) is not type(now) or isinstance(now, CategoricalDistribution):
            return []
        assert isinstance(before, FloatDistribution | IntDistribution)
        assert isinstance(now, FloatDistribution | IntDistribution)
        if now.low > before.low or now.high < before.high or now.log != before.log:
            return []
        changed.append(name)
    return changed


def pruner(sweep: Sweep) -> BasePruner:
    """Pruner of the sweep; at stages, if the length of a run is known."""
    options = dict(sweep.pruner.options)
    if sweep.pruner.name == "stages":
        if sweep.run_steps is None:
            raise ValueError("pruner stages needs the number of steps of a run: set trainer.max_steps in fit")
        options["run_steps"] = sweep.run_steps
    return PRUNERS[sweep.pruner.name](**options)


def sampler(sweep: Sweep, number: int) -> BaseSampler:
    """Sampler of one trial. Its draws depend on the seed, the trial's number and the results so far.

    A resumed sweep therefore draws as an uninterrupted one, and two drivers never draw the same settings.
    """
    options = dict(sweep.sampler.options)
    if sweep.sampler.name == "grid":
        return SAMPLERS["grid"](combinations(sweep.parameters), **options)  # type: ignore[call-arg]
    seed = np.random.SeedSequence([options.pop("seed", 0), number]).generate_state(1)[0]
    return SAMPLERS[sweep.sampler.name](seed=int(seed), **options)  # type: ignore[call-arg]


def suggest(trial: Trial, name: str, space: object) -> Any:
    """Draw a value of this parameter; a retried trial keeps its value."""
    if isinstance(space, CategoricalDistribution):
        return trial.suggest_categorical(name, space.choices)
    if isinstance(space, IntDistribution):
        return trial.suggest_int(name, space.low, space.high, step=space.step, log=space.log)
    assert isinstance(space, FloatDistribution)
    return trial.suggest_float(name, space.low, space.high, step=space.step, log=space.log)
