"""Connection of a driver to its study: every call is repeated while the storage is unreachable."""

from __future__ import annotations

import os
import time
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import sqlalchemy
from optuna import Trial
from optuna.exceptions import ExperimentalWarning, UpdateFinishedTrialError
from optuna.storages import RDBStorage, fail_stale_trials
from optuna.trial import FrozenTrial, TrialState

from fmtrain.sweeps.known import add_known
from fmtrain.sweeps.settings import Sweep
from fmtrain.sweeps.study import is_connection_error, open_storage, open_study, sampler, suggest
from repmetrics.file_lock import file_lock

Result = TypeVar("Result")


class StudyConnection:
    """The study of a sweep, opened or created.

    Args:
        sweep: Validated sweep.
        log: Called with one line per event.

    Attributes:
        driver: Name of this process, which its trials carry.

    Raises:
        ValueError: The study holds another sweep, or the folder holds trials of another study.
        ConnectionError: The storage is unreachable for `patience_seconds`.
    """

    def __init__(self, sweep: Sweep, *, log: Callable[[str], None]) -> None:
        self.sweep, self.log = sweep, log
        self.driver = f"{os.uname().nodename}:{os.getpid()}"
        self.storage = self.with_retries(lambda: open_storage(sweep, log=log))
        self.study = self.with_retries(lambda: open_study(sweep, self.storage, log=log))
        if not self.trials() and any((sweep.out / "trials").glob("*")):
            raise ValueError(f"{sweep.out} holds trials of another study: name another out")
        if sweep.first or sweep.finished:
            self.with_retries(self._add_known)

    def _add_known(self) -> None:
        with self.alone():
            add_known(self.study, self.sweep, log=self.log)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keep other drivers of the study out of this block."""
        if isinstance(self.storage, RDBStorage):
            key = zlib.crc32(self.sweep.study.encode())
            with self.storage.engine.begin() as connection:
                connection.execute(sqlalchemy.text("SELECT pg_advisory_xact_lock(:key)"), {"key": key})
                yield
        else:
            with file_lock(self.sweep.out / "locks" / "study", wait=True):
                yield

    def with_retries(self, call: Callable[[], Result]) -> Result:
        """Result of a call, repeated after a pause while the storage is unreachable."""
        deadline, pause = None, 0.5
        while True:
            try:
                return call()
            except Exception as error:
                if not is_connection_error(error):
                    raise
                patience = self.sweep.storage.patience_seconds
                disk = isinstance(error, OSError)
                what = f"{self.sweep.out} cannot be written" if disk else "the database is unreachable"
                if deadline is None:
                    deadline = time.monotonic() + patience
                    self.log(f"{what}: retrying while the training continues")
                elif time.monotonic() > deadline:
                    reason = str(error).splitlines()[0]
                    raise ConnectionError(f"{what}, for {patience:g} seconds: {reason}") from error
            time.sleep(pause)
            pause = min(2 * pause, 5.0)

    def trials(self) -> list[FrozenTrial]:
        """All trials of the study."""
        return self.with_retries(lambda: self.study.get_trials(deepcopy=False))

    def trial(self, number: int) -> FrozenTrial:
        """One trial as it is stored."""
        return self.trials()[number]

    def ask(self) -> tuple[Trial, Mapping[str, Any]]:
        """Begin a trial: a waiting one, or one with settings that the sampler draws."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Heartbeat of storage")  # the driver sends them
            trial = self.with_retries(self.study.ask)
        self.beat(trial.number)
        if self.sweep.sampler.name != "grid":
            self.study.sampler = sampler(self.sweep, trial.number)
        return trial, {
            name: self.with_retries(lambda name=name, space=space: suggest(trial, name, space))  # type: ignore[misc]
            for name, space in self.sweep.parameters.items()
        }

    def add(self, trial: FrozenTrial) -> None:
        """Add a trial."""
        self.with_retries(lambda: self.study.add_trial(trial))

    def set_attr(self, trial: Trial, name: str, value: object) -> None:
        """Set a user attribute of a trial."""
        self.with_retries(lambda: trial.set_user_attr(name, value))

    def report(self, trial: Trial, value: float, step: int) -> None:
        """Report the value at a step. That of a step before a resume is reported again, without effect."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*is already reported")
            self.with_retries(lambda: trial.report(value, step))

    def tell(self, number: int, state: TrialState, values: list[float] | None = None) -> None:
        """Report the end of a trial once, even if the answer to a first attempt was lost."""
        self.with_retries(lambda: self.study.tell(number, values, state=state, skip_if_finished=True))

    def beat(self, number: int) -> None:
        """Tell the storage that a trial is alive.

        Raises:
            UpdateFinishedTrialError: It was given to another driver.
        """

        def beat() -> None:
            study = self.storage.get_study_id_from_name(self.sweep.study)
            trial = self.storage.get_trial_id_from_study_id_trial_number(study, number)
            if self.storage.get_trial(trial).state.is_finished():
                raise UpdateFinishedTrialError
            if isinstance(self.storage, RDBStorage):
                self.storage.record_heartbeat(trial)

        self.with_retries(beat)

    def fail_stale(self) -> None:
        """Re-queue the trials whose heartbeats have stopped."""
        if isinstance(self.storage, RDBStorage):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ExperimentalWarning)
                self.with_retries(lambda: fail_stale_trials(self.study))

    def lock(self, number: int) -> Path:
        """Lock of a trial."""
        return self.sweep.out / "locks" / f"{number:04}"

    def close(self) -> None:
        """Close the connections to the database."""
        if isinstance(self.storage, RDBStorage):
            self.storage.scoped_session.remove()
            self.storage.engine.dispose()
