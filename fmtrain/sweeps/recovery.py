"""Trials whose driver died, and the next attempt at a trial that was interrupted."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress

from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import JournalStorage
from optuna.trial import FrozenTrial, TrialState

from fmtrain.sweeps.connection import StudyConnection
from fmtrain.sweeps.decisions import current, is_crashed, is_repeat
from fmtrain.sweeps.endings import Interruption, has_saved, is_replaced, make_retry
from fmtrain.sweeps.process import try_lock
from fmtrain.sweeps.study import add_retry


class Recovery:
    """Re-queues trials, so that their next attempt resumes them.

    Args:
        connection: Connection to the study.
    """

    def __init__(self, connection: StudyConnection) -> None:
        self.connection = connection
        self._ownerless: dict[int, float] = {}  # trials without a driver's name, and when they were first seen
        self._unreplaced: dict[int, float] = {}  # ended attempts that no trial replaces yet, likewise

    def requeue_stale(self) -> None:
        """Re-queue the trials of drivers that died.

        In a database, their heartbeats have stopped. With a journal, their locks are free; a driver that cannot see
        the lock of another driver cannot judge it. A driver that died in `ask` leaves a trial without a name, which
        waits for the grace period.
        """
        self.connection.fail_stale()
        grace = self.connection.sweep.storage.grace_seconds
        trials, now = self.connection.trials(), time.monotonic()
        for trial in trials:
            if trial.state == TrialState.RUNNING and "driver" not in trial.user_attrs:
                if now - self._ownerless.setdefault(trial.number, now) > grace:
                    self._give_back(trial)
                continue
            self._ownerless.pop(trial.number, None)
            if trial.state == TrialState.RUNNING and isinstance(self.connection.storage, JournalStorage):
                self._requeue_unlocked(trial)
            elif self._is_lost(trial, trials) and now - self._unreplaced.setdefault(trial.number, now) > min(grace, 30):
                self._add_retry(trial, "stopped")

    def requeue(self, trial: FrozenTrial, kind: Interruption) -> None:
        """Add the next attempt, then end this one: a driver killed in between leaves both, and the first is found."""
        self._add_retry(trial, kind)
        self.connection.tell(trial.number, TrialState.FAIL)

    def requeue_crashed(self) -> None:
        """Re-queue the trials that crashed, once each although several drivers may be asked to."""
        with self.connection.alone():
            for trial in current(self.connection.trials()):
                if is_crashed(trial):
                    retry = make_retry(trial, "ordered", saved=True)
                    add_retry(self.connection.study, trial, retry, log=self.connection.log)

    def _requeue_unlocked(self, trial: FrozenTrial) -> None:
        with try_lock(self.connection.lock(trial.number)) as free, suppress(UpdateFinishedTrialError, ValueError):
            if free:
                self.connection.log(f"trial {trial.number}: its driver died")
                self.requeue(trial, "stopped")

    def _is_lost(self, trial: FrozenTrial, trials: Sequence[FrozenTrial]) -> bool:
        """Whether an attempt ended, and the driver that should have re-queued it was killed before it did."""
        attrs = trial.user_attrs
        ended = trial.state == TrialState.FAIL and "driver" in attrs and not attrs.keys() & {"crash", "surplus"}
        return ended and not is_replaced(trial.number, trials)

    def _give_back(self, trial: FrozenTrial) -> None:
        """Re-queue a trial whose driver died in `ask`; without settings to save, it fails."""
        with suppress(UpdateFinishedTrialError, ValueError):
            if trial.system_attrs.keys() & {"failed_trial", "fixed_params"} or is_repeat(trial):
                self.requeue(trial, "ordered")
            else:
                self.connection.tell(trial.number, TrialState.FAIL)

    def _add_retry(self, trial: FrozenTrial, kind: Interruption) -> None:
        retry = make_retry(trial, kind, saved=has_saved(trial))
        connection = self.connection
        connection.with_retries(lambda: add_retry(connection.study, trial, retry, log=connection.log))
