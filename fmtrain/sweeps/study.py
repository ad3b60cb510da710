"""The study of a sweep: where it is kept, who draws, what counts, and what a driver does next. No process here."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterable, Mapping
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

IN_VAIN = 3
"""So many crashes before any success, and a driver gives up."""

RETRIES = 5
"""How often a trial whose driver died, or was interrupted, is given to another."""


# ── decisions ──────────────────────────────────────────────────────────────────────────────────────────────────────


def finished(trial: FrozenTrial) -> bool:
    """Whether a trial counts: completed, pruned or crashed; not one that was given to another driver."""
    crashed = trial.state == TrialState.FAIL and "crash" in trial.user_attrs
    return crashed or trial.state in (TrialState.COMPLETE, TrialState.PRUNED)


def next_step(trials: Iterable[FrozenTrial], *, wanted: int) -> str:
    """What a driver does next: "ask" for a trial, "wait" for those of other drivers, or it is "done"."""
    states = [(finished(trial), trial.state == TrialState.RUNNING) for trial in trials]
    done, running = sum(f for f, _ in states), sum(r for _, r in states)
    if done >= wanted:
        return "done"
    return "wait" if done + running >= wanted else "ask"


def is_surplus(trials: Iterable[FrozenTrial], number: int, *, wanted: int) -> bool:
    """Whether two drivers asked for the last trial at the same time, and this is the later one's."""
    alive = (TrialState.RUNNING, TrialState.WAITING)
    return sum(t.number < number and (finished(t) or t.state in alive) for t in trials) >= wanted


def initial_crashes(trials: Iterable[FrozenTrial], *, wanted: int) -> int:
    """How many trials crashed, if that is enough to give up: before any, of any driver, was completed or pruned."""
    counted = [trial for trial in trials if finished(trial)]
    crashed = sum(trial.state == TrialState.FAIL for trial in counted)
    return crashed if crashed == len(counted) and crashed >= min(IN_VAIN, wanted) else 0


def first_number(trial: FrozenTrial) -> int:
    """The number under which these settings were drawn, which names their folder."""
    return int(trial.system_attrs.get("failed_trial", trial.number))


def make_retry(trial: FrozenTrial) -> FrozenTrial | None:
    """The trial to be run anew with the same settings; None after :data:`RETRIES` times.

    Optuna's own callback would copy what the driver noted about the old process too.
    """
    history = [*trial.system_attrs.get("retry_history", []), trial.number]
    if len(history) > RETRIES:
        return None
    noted = {**trial.system_attrs, "failed_trial": first_number(trial), "retry_history": history}
    params, spaces = trial.params, trial.distributions
    return create_trial(state=TrialState.WAITING, params=params, distributions=spaces, system_attrs=noted)


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Entries in which two definitions of a sweep differ."""
    return [name for name in now if before.get(name) != now[name]]


def is_connection_error(error: BaseException | None) -> bool:
    """Whether an exception comes from a database that is gone or just coming back, and not from what was asked."""
    while error is not None:
        if isinstance(error, sqlalchemy.exc.OperationalError | sqlalchemy.exc.InterfaceError):
            return True
        if isinstance(error, sqlalchemy.exc.DBAPIError) and error.connection_invalidated:
            return True
        error = error.__cause__ or error.__context__
    return False


# ── the study ──────────────────────────────────────────────────────────────────────────────────────────────────────


def open_storage(sweep: Sweep) -> BaseStorage:
    """The journal in the sweep's folder, or the database.

    Raises:
        ValueError: If it cannot be reached; its URL is shown without the password.
    """
    made = sweep.storage
    if made.url is None:
        sweep.out.mkdir(parents=True, exist_ok=True)
        journal = (sweep.out / "journal.log").resolve()  # its lock is a link, which must not depend on where we are
        return JournalStorage(JournalFileBackend(str(journal)))
    try:
        return _database(made)
    except (sqlalchemy.exc.SQLAlchemyError, StorageInternalError, ImportError) as error:
        url = sqlalchemy.make_url(made.url).render_as_string(hide_password=True)
        cause = error.orig if isinstance(error, sqlalchemy.exc.DBAPIError) else error
        raise ValueError(f"no study can be kept at {url}: {str(cause).strip().splitlines()[0]}") from error


def _database(made: Storage, attempts: int = 5) -> RDBStorage:
    def failed(study: Study, trial: FrozenTrial) -> None:
        if (anew := make_retry(trial)) is not None:
            study.add_trial(anew)

    while True:
        attempts -= 1
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ExperimentalWarning)  # heartbeats
                return RDBStorage(
                    str(made.url),
                    engine_kwargs={"pool_pre_ping": True, "connect_args": {"connect_timeout": 10}},
                    heartbeat_interval=made.heartbeat_seconds,
                    grace_period=made.grace_seconds,
                    heartbeat_stale_trial_callback=failed,
                )
        except (sqlalchemy.exc.IntegrityError, sqlalchemy.exc.ProgrammingError):
            if not attempts:  # two drivers that make the tables at the same time
                raise
            time.sleep(0.5)


def open_study(sweep: Sweep, storage: BaseStorage) -> Study:
    """The study, made if it is not there.

    Raises:
        ValueError: If one of its name holds another sweep.
    """
    study = optuna.create_study(
        storage=storage,
        study_name=sweep.study,
        sampler=sampler(sweep, 0),
        directions=sweep.directions,
        pruner=PRUNERS[sweep.pruner.name](**sweep.pruner.options),
        load_if_exists=True,
    )
    if (before := study.user_attrs.get("sweep")) is None and not study.trials:
        study.set_user_attr("sweep", sweep.identity())
    elif changed := differences(before or {}, sweep.identity()):
        raise ValueError(
            f"study {sweep.study!r} is of another sweep: {', '.join(changed)} differ; give this one another name"
        )
    return study


def sampler(sweep: Sweep, number: int) -> BaseSampler:
    """The sampler of one trial: its draws depend on the seed, the trial's number and the results so far.

    So a sweep that is continued draws what it would have drawn, and two drivers never draw the same.
    """
    options = dict(sweep.sampler.options)
    if sweep.sampler.name == "grid":
        return SAMPLERS["grid"](combinations(sweep.parameters), **options)  # type: ignore[call-arg]
    seed = np.random.SeedSequence([options.pop("seed", 0), number]).generate_state(1)[0]
    return SAMPLERS[sweep.sampler.name](seed=int(seed), **options)  # type: ignore[call-arg]


def suggest(trial: Trial, name: str, space: object) -> Any:
    """A value of this parameter; the one it has already, if the trial is run anew."""
    if isinstance(space, CategoricalDistribution):
        return trial.suggest_categorical(name, space.choices)
    if isinstance(space, IntDistribution):
        return trial.suggest_int(name, space.low, space.high, step=space.step, log=space.log)
    assert isinstance(space, FloatDistribution)
    return trial.suggest_float(name, space.low, space.high, step=space.step, log=space.log)
