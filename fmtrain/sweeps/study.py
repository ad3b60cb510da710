"""The Optuna study of a sweep: storage, ranges, sampler and pruner. No process here."""

from __future__ import annotations

import errno
import json
import re
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
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

from fmtrain.sweeps.endings import has_saved, is_replaced, make_retry
from fmtrain.sweeps.journal import Journal
from fmtrain.sweeps.parameters import combinations, is_inside
from fmtrain.sweeps.settings import PRUNERS, SAMPLERS, Storage, Sweep

TRANSIENT_FILE_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.ESTALE, errno.EIO}
"""A full disk, or a network file system that is away for a while."""

WRONG_DATABASE = re.compile(r"authentication|does not exist|no pg_hba|resolve|translate host|invalid", re.IGNORECASE)
"""Refusals of a database that do not pass with time."""


def is_connection_error(error: BaseException | None) -> bool:
    """Whether an exception comes from an unreachable or restarting database or a full disk, not from the query."""
    if isinstance(error, ValueError | ConnectionError):
        return False  # a conclusion that was drawn from it
    while error is not None:
        if isinstance(error, OSError) and error.errno in TRANSIENT_FILE_ERRORS:
            return True
        if isinstance(error, sqlalchemy.exc.OperationalError | sqlalchemy.exc.InterfaceError):
            return True
        if isinstance(error, sqlalchemy.exc.DBAPIError) and error.connection_invalidated:
            return True
        error = error.__cause__ or error.__context__
    return False


def open_storage(sweep: Sweep, *, log: Callable[[str], None]) -> BaseStorage:
    """Open the journal in the sweep's folder, or the database, which may be unreachable for a while.

    Raises:
        ConnectionError: The database is unreachable for `patience_seconds`.
        ValueError: It refuses the user, or there is no such database.
    """
    storage = sweep.storage
    if storage.url is None:
        sweep.out.mkdir(parents=True, exist_ok=True)
        return JournalStorage(Journal(journal_path(sweep), log=log))
    url = sqlalchemy.make_url(storage.url).render_as_string(hide_password=True)
    deadline = time.monotonic() + storage.patience_seconds
    waiting = False
    while True:
        try:
            return _database(storage, log=log)
        except (sqlalchemy.exc.SQLAlchemyError, StorageInternalError, ImportError) as error:
            cause = str(error.orig if isinstance(error, sqlalchemy.exc.DBAPIError) else error).strip()
            passes = is_connection_error(error) and not WRONG_DATABASE.search(cause)
            if not passes:
                raise ValueError(f"cannot open a study at {url}: {cause.splitlines()[0]}") from error
            if time.monotonic() > deadline:
                waited = f"{url} is unreachable for {storage.patience_seconds:g} seconds"
                raise ConnectionError(f"{waited}: {cause.splitlines()[0]}") from error
            if not waiting:
                log(f"{url} is unreachable ({cause.splitlines()[0]}): retrying for {storage.patience_seconds:g} s")
        waiting = True
        time.sleep(min(2.0, storage.patience_seconds / 4))


def journal_path(sweep: Sweep) -> Path:
    """Journal of the study. Its lock is a link, which must not depend on the working folder."""
    return (sweep.out / "journal.log").resolve()


def _database(storage: Storage, *, log: Callable[[str], None], attempts: int = 5) -> RDBStorage:
    def requeue(study: Study, trial: FrozenTrial) -> None:
        add_retry(study, trial, make_retry(trial, "stopped", saved=has_saved(trial)), log=log)

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


def open_existing(sweep: Sweep, *, log: Callable[[str], None]) -> Study:
    """Open the study to read it, without a wait for an unreachable database.

    Raises:
        ValueError: It does not exist.
    """
    absent = ValueError(f"no study {sweep.study!r} in {sweep.out}: run the sweep first")
    if sweep.storage.url is None and not journal_path(sweep).is_file():
        raise absent
    at_once = replace(sweep, storage=replace(sweep.storage, patience_seconds=0.0))
    try:
        return optuna.load_study(study_name=sweep.study, storage=open_storage(at_once, log=log))
    except KeyError:
        raise absent from None


def extensions(stored: Mapping[str, Mapping[str, Any]], sweep: Sweep) -> list[str]:
    """Parameters whose ranges contain the stored ones, with the same steps; none if any other parameter has changed.

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
        same = (now.log, now.step) == (before.log, before.step)
        if not (same and is_inside(before.low, now) and is_inside(before.high, now)):
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
