"""The Optuna study of a sweep: storage, sampler, and decisions about trials. No process here."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterable
from typing import Any

import numpy as np
import optuna
import sqlalchemy
from optuna import Study, Trial
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.exceptions import ExperimentalWarning, StorageInternalError
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState, create_trial

from fmtrain.sweeps.config import PRUNERS, SAMPLERS, Storage, Sweep, combinations

MAX_INITIAL_CRASHES = 3
"""Number of crashes before any success after which a driver gives up."""

MAX_RETRIES = 5
"""Number of times that a trial whose driver died, or was interrupted, is given to another driver."""


# ── decisions ──────────────────────────────────────────────────────────────────────────────────────────────────────


def finished(trial: FrozenTrial) -> bool:
    """Whether a trial was completed, was pruned or crashed. A trial given to another driver does not count."""
    crashed = trial.state == TrialState.FAIL and "crash" in trial.user_attrs
    return crashed or trial.state in (TrialState.COMPLETE, TrialState.PRUNED)


def next_step(trials: Iterable[FrozenTrial], *, wanted: int) -> str:
    """Next step of a driver: "ask" for a trial, "wait" for the trials of other drivers, or "done"."""
    states = [(finished(trial), trial.state == TrialState.RUNNING) for trial in trials]
    done, running = sum(f for f, _ in states), sum(r for _, r in states)
    if done >= wanted:
        return "done"
    return "wait" if done + running >= wanted else "ask"


def is_surplus(trials: Iterable[FrozenTrial], number: int, *, wanted: int) -> bool:
    """Whether the trial is one too many: two drivers asked for the last trial at the same time, this one later."""
    alive = (TrialState.RUNNING, TrialState.WAITING)
    return sum(t.number < number and (finished(t) or t.state in alive) for t in trials) >= wanted


def initial_crashes(trials: Iterable[FrozenTrial], *, wanted: int) -> int:
    """Number of crashed trials if it is enough to give up, else 0.

    It is enough if no trial of any driver was completed or pruned before.
    """
    counted = [trial for trial in trials if finished(trial)]
    crashed = sum(trial.state == TrialState.FAIL for trial in counted)
    return crashed if crashed == len(counted) and crashed >= min(MAX_INITIAL_CRASHES, wanted) else 0


def first_number(trial: FrozenTrial) -> int:
    """Number of the trial that first drew these settings; it names their folder."""
    return int(trial.system_attrs.get("failed_trial", trial.number))


def make_retry(trial: FrozenTrial) -> FrozenTrial | None:
    """Waiting trial with the same settings; None after :data:`MAX_RETRIES` retries.

    Optuna's callback would also copy the user attributes, which describe the old process.
    """
    history = [*trial.system_attrs.get("retry_history", []), trial.number]
    if len(history) > MAX_RETRIES:
        return None
    attrs = {**trial.system_attrs, "failed_trial": first_number(trial), "retry_history": history}
    params, spaces = trial.params, trial.distributions
    return create_trial(state=TrialState.WAITING, params=params, distributions=spaces, system_attrs=attrs)


def is_connection_error(error: BaseException | None) -> bool:
    """Whether an exception comes from an unreachable or restarting database, not from the query."""
    while error is not None:
        if isinstance(error, sqlalchemy.exc.OperationalError | sqlalchemy.exc.InterfaceError):
            return True
        if isinstance(error, sqlalchemy.exc.DBAPIError) and error.connection_invalidated:
            return True
        error = error.__cause__ or error.__context__
    return False


# ── the study ──────────────────────────────────────────────────────────────────────────────────────────────────────


def open_storage(sweep: Sweep) -> BaseStorage:
    """Open the journal in the sweep's folder, or the database."""
    storage = sweep.storage
    if storage.url is None:
        sweep.out.mkdir(parents=True, exist_ok=True)
        journal = (sweep.out / "journal.log").resolve()  # its lock is a link: it must not depend on the working folder
        return JournalStorage(JournalFileBackend(str(journal)))
    try:
        return _database(storage)
    except (sqlalchemy.exc.SQLAlchemyError, StorageInternalError, ImportError) as error:
        url = sqlalchemy.make_url(storage.url).render_as_string(hide_password=True)
        cause = error.orig if isinstance(error, sqlalchemy.exc.DBAPIError) else error
        raise ValueError(f"cannot open a study at {url}: {str(cause).strip().splitlines()[0]}") from error


def _database(storage: Storage, attempts: int = 5) -> RDBStorage:
    def requeue(study: Study, trial: FrozenTrial) -> None:
        if (retry := make_retry(trial)) is not None:
            study.add_trial(retry)

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


def open_study(sweep: Sweep, storage: BaseStorage) -> Study:
    """Open the study, or create it."""
    study = optuna.create_study(
        storage=storage,
        study_name=sweep.study,
        sampler=sampler(sweep, 0),
        directions=sweep.directions,
        pruner=PRUNERS[sweep.pruner.name](**sweep.pruner.options),
        load_if_exists=True,
    )
    stored, identity = study.user_attrs.get("sweep"), sweep.identity()
    if stored is None and not study.trials:
        study.set_user_attr("sweep", identity)
    elif changed := [name for name in identity if (stored or {}).get(name) != identity[name]]:
        raise ValueError(
            f"study {sweep.study!r} holds another sweep: {', '.join(changed)} differ; give this sweep another name"
        )
    return study


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
