"""The driver of a sweep: it asks Optuna for settings, runs each in its own process and reports the measurements."""

from __future__ import annotations

import json
import math
import os
import shutil
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, TypeVar

import optuna
from optuna import Trial
from optuna.exceptions import ExperimentalWarning, UpdateFinishedTrialError
from optuna.storages import JournalStorage, RDBStorage, fail_stale_trials
from optuna.trial import FrozenTrial, TrialState

from fmtrain.stop_signals import StopRequest
from fmtrain.sweeps.config import Sweep
from fmtrain.sweeps.process import (
    LOG,
    MEASUREMENTS,
    RUN,
    JsonlTail,
    TrialProcess,
    create_lock,
    format_setting,
    last_lines,
    read_values,
    run_command,
    try_lock,
)
from fmtrain.sweeps.study import (
    first_number,
    initial_crashes,
    is_connection_error,
    is_surplus,
    make_retry,
    next_step,
    open_storage,
    open_study,
    sampler,
    suggest,
)
from repmetrics.atomic_write import write_text
from repmetrics.measurement.result import format_value

Result = TypeVar("Result")


class SweepWorker:
    """Works on a study until its trials are finished. Any number of drivers may work on one study.

    Args:
        sweep: Validated sweep.
        log: Called with one line per event.
    """

    def __init__(self, sweep: Sweep, *, log: Callable[[str], None]) -> None:
        self.sweep = sweep
        self.log = log
        self.name = f"{os.uname().nodename}:{os.getpid()}"
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.storage = open_storage(sweep)
        self.study = open_study(sweep, self.storage)
        if not self.study.trials and any((sweep.out / "trials").glob("*")):
            raise ValueError(f"{sweep.out} holds trials of another study: name another out")
        self._ownerless: dict[int, float] = {}  # trials without a driver's name, and when they were first seen

    def run(self) -> list[FrozenTrial]:
        """Run trials until the wanted number is finished, and return all trials of the study."""
        waiting = False
        while True:
            self._requeue_stale()
            step = next_step(self._trials(), wanted=self.sweep.trials)
            if step == "done":
                return self._trials()
            if step == "ask":
                self._run_trial()
            elif not waiting:
                self.log("waiting for the trials of other drivers")
            waiting = step == "wait"
            if waiting:
                time.sleep(4 * self.sweep.poll_seconds)

    def close(self) -> None:
        """Close the connections to the database."""
        if isinstance(self.storage, RDBStorage):
            self.storage.scoped_session.remove()
            self.storage.engine.dispose()

    def _trials(self) -> list[FrozenTrial]:
        return self._with_retries(lambda: self.study.get_trials(deepcopy=False))

    def _with_retries(self, call: Callable[[], Result]) -> Result:
        """Result of a call, repeated after a pause while the database is unreachable."""
        deadline, pause = None, 0.5
        while True:
            try:
                return call()
            except Exception as error:
                if not is_connection_error(error):
                    raise
                patience = self.sweep.storage.patience_seconds
                if deadline is None:
                    deadline = time.monotonic() + patience
                    self.log("the database is unreachable: retrying while the training continues")
                elif time.monotonic() > deadline:
                    raise ConnectionError(f"the database has been unreachable for {patience:g} seconds") from error
            time.sleep(pause)
            pause = min(2 * pause, 5.0)

    # ── one trial ──────────────────────────────────────────────────────────────────────────────────────────────────

    def _run_trial(self) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Heartbeat of storage")  # below
            trial = self._with_retries(self.study.ask)
        self._beat(trial)
        if self.sweep.sampler.name != "grid":
            self.study.sampler = sampler(self.sweep, trial.number)
        params = {
            name: self._with_retries(lambda name=name, space=space: suggest(trial, name, space))  # type: ignore[misc]
            for name, space in self.sweep.parameters.items()
        }
        with create_lock(self._lock(trial.number)) as lock:
            self._attr(trial, "driver", self.name)
            if is_surplus(self._trials(), trial.number, wanted=self.sweep.trials):
                self._tell(trial, state=TrialState.FAIL)
                return
            frozen = self._trials()[trial.number]
            for number in frozen.system_attrs.get("retry_history", []):
                with try_lock(self._lock(number), wait=True):  # its process may still be saving
                    pass
            folder = self.sweep.out / "trials" / f"{first_number(frozen):04}"
            resume = any((folder / RUN / "checkpoints").glob("*.ckpt"))
            if not resume and (folder / RUN).exists():
                shutil.rmtree(folder / RUN)  # of a process that ended before it saved
            command = run_command(
                launcher=self.sweep.launcher,
                fit=self.sweep.fit,
                params=params,
                folder=folder,
                number=trial.number,
                resume=resume,
            )
            entry = {"number": trial.number, "driver": self.name, "params": params, "command": command}
            write_text(folder / "trial.json", json.dumps(entry, indent=2) + "\n")
            self._attr(trial, "folder", str(folder))
            settings = " · ".join(f"{name} {format_setting(value)}" for name, value in params.items())
            self.log(f"trial {trial.number}{' resumes' if resume else ''}: {settings}")
            process = TrialProcess(command, log=folder / LOG, lock=lock, grace_seconds=self.sweep.stop_seconds)
            try:
                self._follow(trial, process, folder)
            except UpdateFinishedTrialError:
                process.stop()
                process.wait()
                self.log(f"trial {trial.number} was given to another driver: this driver had lost contact for too long")
            except BaseException as error:
                self._end(trial, process, interrupted=isinstance(error, KeyboardInterrupt))
                raise

    def _follow(self, trial: Trial, process: TrialProcess, folder: Path) -> None:
        """Report the measurements of the trial until it ends, then report its end."""
        tail, values, pruned = JsonlTail(folder / RUN / MEASUREMENTS), {}, None
        last_beat = time.monotonic()
        while True:
            code = process.poll()  # before reading, so that no line can follow
            for entry in tail.new():
                values = self._record_evaluation(trial, entry)
                if pruned is None and code is None and self._should_prune(trial, entry["step"], values):
                    pruned = entry["step"]
                    process.stop()
            if code is not None:
                break
            if time.monotonic() - last_beat > self.sweep.storage.heartbeat_seconds:
                last_beat = time.monotonic()
                self._beat(trial)
            time.sleep(self.sweep.poll_seconds)
        pairs = {name: values.get(name, (math.nan, None)) for name in self.sweep.metrics}
        text = ", ".join(f"{name} {format_value(*pair)}" for name, pair in pairs.items())
        if pruned is not None:
            self._tell(trial, state=TrialState.PRUNED)
            self.log(f"trial {trial.number} was pruned at step {pruned}: {text}")
        elif code == 0 and all(math.isfinite(value) for value, _ in pairs.values()):
            self._tell(trial, values=[value for value, _ in pairs.values()], state=TrialState.COMPLETE)
            self.log(f"trial {trial.number} has {text}")
        else:
            self._fail(trial, code, folder)

    def _record_evaluation(self, trial: Trial, entry: Mapping[str, Any]) -> dict[str, tuple[float, float | None]]:
        """Store the values of an evaluation. Report the metric, except at step 0: no setting has had an effect yet."""
        values = read_values(entry)
        self._attr(trial, "look", {"step": entry["step"], "alarms": len(entry["alarms"]), "signals": values})
        metric = self.sweep.metrics[0]
        if len(self.sweep.metrics) == 1 and entry["step"] > 0 and metric in values:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*is already reported")  # a resumed run measures it again
                self._with_retries(lambda: trial.report(values[metric][0], entry["step"]))
        return values

    def _should_prune(self, trial: Trial, step: int, values: Mapping[str, object]) -> bool:
        if self.sweep.pruner.name == "none" or step == 0 or self.sweep.metrics[0] not in values:
            return False
        return self._with_retries(trial.should_prune)

    def _fail(self, trial: Trial, code: int, folder: Path) -> None:
        lines = last_lines(folder / LOG)
        reason = f"ended with exit code {code}" if code else f"has no {' and '.join(self.sweep.metrics)} at its end"
        self._attr(trial, "crash", f"{reason}: {lines[-1]}" if lines else reason)
        self._tell(trial, state=TrialState.FAIL)
        self.log("\n  ".join([f"trial {trial.number} {reason}; the end of {folder / LOG}:", *lines]))
        if crashes := initial_crashes(self._trials(), wanted=self.sweep.trials):
            raise ValueError(
                f"the first {crashes} trials crashed and none succeeded: see the end of {folder / LOG}, fix the "
                "cause and start the sweep under another name"
            )

    def _end(self, trial: Trial, process: TrialProcess, *, interrupted: bool) -> None:
        """Stop the process of the trial. After an interruption, re-queue the trial for the next call."""
        process.stop()
        try:
            if interrupted:
                self.log(f"stopping trial {trial.number}, which saves first; press Ctrl-C again to kill it")
            process.wait()
        except KeyboardInterrupt:
            process.kill()
        if interrupted:
            with suppress(UpdateFinishedTrialError):
                self._requeue(self._trials()[trial.number])

    # ── reports to Optuna ──────────────────────────────────────────────────────────────────────────────────────────

    def _attr(self, trial: Trial, name: str, value: object) -> None:
        self._with_retries(lambda: trial.set_user_attr(name, value))

    def _tell(self, trial: Trial, *, state: TrialState, values: list[float] | None = None) -> None:
        """Report the end of a trial once, even if the answer to a first attempt was lost."""
        self._with_retries(lambda: self.study.tell(trial.number, values, state=state, skip_if_finished=True))

    def _beat(self, trial: Trial) -> None:
        """Tell the database that the trial is alive."""

        def beat() -> None:
            study = self.storage.get_study_id_from_name(self.sweep.study)
            number = self.storage.get_trial_id_from_study_id_trial_number(study, trial.number)
            if self.storage.get_trial(number).state.is_finished():
                raise UpdateFinishedTrialError
            if isinstance(self.storage, RDBStorage):
                self.storage.record_heartbeat(number)

        self._with_retries(beat)

    # ── trials of drivers that died ────────────────────────────────────────────────────────────────────────────────

    def _lock(self, number: int) -> Path:
        return self.sweep.out / "locks" / f"{number:04}"

    def _requeue_stale(self) -> None:
        """Re-queue the trials of drivers that died.

        In a database, their heartbeats have stopped. With a journal, their locks are free; a driver that cannot see
        the lock of another driver cannot judge it. A driver that died in `ask` leaves a trial without a name. That
        trial holds no settings to save, and fails after the grace period.
        """
        if isinstance(self.storage, RDBStorage):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ExperimentalWarning)
                self._with_retries(lambda: fail_stale_trials(self.study))
        now = time.monotonic()
        for trial in self._trials():
            if trial.state != TrialState.RUNNING:
                self._ownerless.pop(trial.number, None)
            elif "driver" not in trial.user_attrs:
                if now - self._ownerless.setdefault(trial.number, now) > self.sweep.storage.grace_seconds:
                    with suppress(UpdateFinishedTrialError, ValueError):
                        self._with_retries(lambda number=trial.number: self.study.tell(number, state=TrialState.FAIL))  # type: ignore[misc]
            elif isinstance(self.storage, JournalStorage):
                with try_lock(self._lock(trial.number)) as free, suppress(UpdateFinishedTrialError, ValueError):
                    if free:
                        self.log(f"trial {trial.number}: its driver died; trial re-queued")
                        self._requeue(trial)

    def _requeue(self, trial: FrozenTrial) -> None:
        self._with_retries(lambda: self.study.tell(trial.number, state=TrialState.FAIL))
        if (retry := make_retry(trial)) is not None:
            self._with_retries(lambda: self.study.add_trial(retry))


def run_sweep(sweep: Sweep, *, log: Callable[[str], None], again: str) -> list[FrozenTrial]:
    """Drive a sweep to its end. A signal ends it as Ctrl-C does: the trial saves first."""

    def interrupt(number: int) -> None:
        raise KeyboardInterrupt

    try:
        with StopRequest(interrupt).installed(), closing(SweepWorker(sweep, log=log)) as driver:
            trials = driver.run()
    except KeyboardInterrupt:
        log(f"interrupted: fmtrain sweep {again} resumes from this point")
        raise
    if not any(trial.state == TrialState.COMPLETE for trial in trials):
        raise ValueError(f"none of {len(trials)} trials was completed: nothing can be chosen")
    return trials
