"""The driver of a sweep: asks Optuna for settings, runs each as a process of its own, reports what it measures."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import closing, suppress
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import optuna
from optuna import Trial
from optuna.exceptions import ExperimentalWarning, UpdateFinishedTrialError
from optuna.storages import JournalStorage, RDBStorage, fail_stale_trials
from optuna.trial import FrozenTrial, TrialState

from fmtrain.sweeps.config import Sweep
from fmtrain.sweeps.process import (
    LOG,
    MEASUREMENTS,
    RUN,
    JsonlTail,
    TrialProcess,
    create_lock,
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

Result = TypeVar("Result")


class SweepWorker:
    """Works a study until its trials are finished; any number of drivers may work one.

    Args:
        sweep: What to do.
        say: Is told, in a line, of what happens.
    """

    def __init__(self, sweep: Sweep, *, say: Callable[[str], None]) -> None:
        self.sweep = sweep
        self.say = say
        self.name = f"{os.uname().nodename}:{os.getpid()}"
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.storage = open_storage(sweep)
        self.study = open_study(sweep, self.storage)
        if not self.study.trials and any((sweep.out / "trials").glob("*")):
            raise ValueError(f"{sweep.out} holds trials of another study: name another out")
        self._ownerless: dict[int, float] = {}  # trials that no driver has put its name on, and when they were seen

    def run(self) -> list[FrozenTrial]:
        """All trials of the study, once as many are finished as were wanted.

        Raises:
            ValueError: If nothing but crashes comes.
            ConnectionError: If the database stays away.
            KeyboardInterrupt: On Ctrl-C, after the trial has ended and was put back.
        """
        waiting = False
        while True:
            self._requeue_stale()
            step = next_step(self._trials(), wanted=self.sweep.trials)
            if step == "done":
                return self._trials()
            if step == "ask":
                self._one()
            elif not waiting:
                self.say("waiting for the trials of other drivers")
            waiting = step == "wait"
            if waiting:
                time.sleep(4 * self.sweep.poll_seconds)

    def close(self) -> None:
        """Let go of the database."""
        if isinstance(self.storage, RDBStorage):
            self.storage.scoped_session.remove()
            self.storage.engine.dispose()

    def _trials(self) -> list[FrozenTrial]:
        return self._with_retries(lambda: self.study.get_trials(deepcopy=False))

    def _with_retries(self, call: Callable[[], Result]) -> Result:
        """Its result; while the database cannot be reached, once more after a pause."""
        until, pause = None, 0.5
        while True:
            try:
                return call()
            except Exception as error:
                if not is_connection_error(error):
                    raise
                if until is None:
                    until = time.monotonic() + self.sweep.storage.patience_seconds
                    self.say("the database is gone: trying again; the training goes on")
                elif time.monotonic() > until:
                    waited = self.sweep.storage.patience_seconds
                    raise ConnectionError(f"the database has been gone for {waited:g} seconds") from error
            time.sleep(pause)
            pause = min(2 * pause, 5.0)

    # ── one trial ──────────────────────────────────────────────────────────────────────────────────────────────────

    def _one(self) -> None:
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
            for before in frozen.system_attrs.get("retry_history", []):
                with try_lock(self._lock(before), wait=True):  # its process may still be saving
                    pass
            folder = self.sweep.out / "trials" / f"{first_number(frozen):04}"
            resume = any((folder / RUN / "checkpoints").glob("*.ckpt"))
            if not resume and (folder / RUN).exists():
                shutil.rmtree(folder / RUN)  # of a process that ended before it saved
            line = run_command(
                launcher=self.sweep.launcher,
                fit=self.sweep.fit,
                params=params,
                folder=folder,
                number=trial.number,
                resume=resume,
            )
            folder.mkdir(parents=True, exist_ok=True)
            stated = {"number": trial.number, "driver": self.name, "params": params, "command": line}
            (folder / "trial.json").write_text(json.dumps(stated, indent=2) + "\n", encoding="utf-8")
            self._attr(trial, "folder", str(folder))
            self.say(f"trial {trial.number}{' goes on' if resume else ''}: {settings(params)}")
            process = TrialProcess(line, log=folder / LOG, lock=lock, grace_seconds=self.sweep.stop_seconds)
            try:
                self._follow(trial, process, folder)
            except UpdateFinishedTrialError:
                process.stop()
                process.wait()
                self.say(f"trial {trial.number} was given to another driver: this one had no contact for too long")
            except BaseException as error:
                self._end(trial, process, interrupted=isinstance(error, KeyboardInterrupt))
                raise

    def _follow(self, trial: Trial, process: TrialProcess, folder: Path) -> None:
        """Report what the trial measures until it ends, and tell Optuna how it ended."""
        tail, last, pruned = JsonlTail(folder / RUN / MEASUREMENTS), {}, None
        beat = time.monotonic()
        while True:
            code = process.poll()  # before reading: what stands then is all
            for entry in tail.new():
                last = self._note(trial, entry)
                if pruned is None and code is None and self._prune(trial, entry["step"], last):
                    pruned = entry["step"]
                    process.stop()
            if code is not None:
                break
            if time.monotonic() - beat > self.sweep.storage.heartbeat_seconds:
                beat = time.monotonic()
                self._beat(trial)
            time.sleep(self.sweep.poll_seconds)
        values = [last.get(name, (math.nan, None))[0] for name in self.sweep.metrics]
        if pruned is not None:
            self._tell(trial, state=TrialState.PRUNED)
            self.say(f"trial {trial.number} was pruned at step {pruned}: {shown(self.sweep, last)}")
        elif code == 0 and all(math.isfinite(value) for value in values):
            self._tell(trial, values=values, state=TrialState.COMPLETE)
            self.say(f"trial {trial.number} has {shown(self.sweep, last)}")
        else:
            self._crashed(trial, code, folder)

    def _note(self, trial: Trial, entry: Mapping[str, Any]) -> dict[str, tuple[float, float | None]]:
        """Keep the signals of a look; report the metric, but not before the first step: no setting has had effect."""
        found = read_values(entry)
        self._attr(trial, "look", {"step": entry["step"], "alarms": len(entry["alarms"]), "signals": found})
        metric = self.sweep.metrics[0]
        if len(self.sweep.metrics) == 1 and entry["step"] > 0 and metric in found:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*is already reported")  # a continued run measures it again
                self._with_retries(lambda: trial.report(found[metric][0], entry["step"]))
        return found

    def _prune(self, trial: Trial, step: int, found: Mapping[str, object]) -> bool:
        if self.sweep.pruner.name == "none" or step == 0 or self.sweep.metrics[0] not in found:
            return False
        return self._with_retries(trial.should_prune)

    def _crashed(self, trial: Trial, code: int, folder: Path) -> None:
        lines = last_lines(folder / LOG)
        why = f"ended with exit code {code}" if code else f"has no {' and '.join(self.sweep.metrics)} at its end"
        self._attr(trial, "crash", f"{why}: {lines[-1]}" if lines else why)
        self._tell(trial, state=TrialState.FAIL)
        self.say("\n  ".join([f"trial {trial.number} {why}; the end of {folder / LOG}:", *lines]))
        if crashes := initial_crashes(self._trials(), wanted=self.sweep.trials):
            raise ValueError(
                f"the first {crashes} trials crashed and none succeeded: see the end of {folder / LOG}, mend the "
                "cause and start the sweep under another name"
            )

    def _end(self, trial: Trial, process: TrialProcess, *, interrupted: bool) -> None:
        """Stop the trial's process, and put the trial back for whoever continues."""
        process.stop()
        try:
            if interrupted:
                self.say(f"stopping trial {trial.number}, which saves first; Ctrl-C once more to end it at once")
            process.wait()
        except KeyboardInterrupt:
            process.kill()
        if interrupted:
            with suppress(UpdateFinishedTrialError):
                self._requeue(self._trials()[trial.number])

    # ── what Optuna is told ────────────────────────────────────────────────────────────────────────────────────────

    def _attr(self, trial: Trial, name: str, value: object) -> None:
        self._with_retries(lambda: trial.set_user_attr(name, value))

    def _tell(self, trial: Trial, *, state: TrialState, values: list[float] | None = None) -> None:
        """Once only, also where the answer to the first attempt was lost."""
        self._with_retries(lambda: self.study.tell(trial.number, values, state=state, skip_if_finished=True))

    def _beat(self, trial: Trial) -> None:
        """Tell the database that the trial is alive.

        Raises:
            UpdateFinishedTrialError: If it was given to another driver.
        """

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
        """Put back the trials of drivers that are no more.

        In a database their heartbeats have stopped. Beside a journal their locks are free; a driver that cannot see
        the lock of another cannot judge it. A driver that died while asking leaves a trial without its name: it
        holds no settings to save, and is failed after the grace.
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
                        self.say(f"the driver of trial {trial.number} is no more: it is put back")
                        self._requeue(trial)

    def _requeue(self, trial: FrozenTrial) -> None:
        self._with_retries(lambda: self.study.tell(trial.number, state=TrialState.FAIL))
        if (anew := make_retry(trial)) is not None:
            self._with_retries(lambda: self.study.add_trial(anew))


def run_sweep(sweep: Sweep, *, say: Callable[[str], None], again: str) -> list[FrozenTrial]:
    """Drive a sweep to its end. SIGTERM and the terminal's hang-up end it as Ctrl-C does: the trial saves first.

    A signal that was being ignored, as a hang-up is under nohup, still is.

    Args:
        sweep: What to do.
        say: Is told, in a line, of what happens.
        again: The sweep's file, to say how to go on.

    Raises:
        ValueError: If no trial succeeds.
    """

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    heard = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) != signal.SIG_IGN]
    before = {number: signal.signal(number, interrupt) for number in heard}
    try:
        with closing(SweepWorker(sweep, say=say)) as driver:
            trials = driver.run()
    except KeyboardInterrupt:
        say(f"interrupted: fmtrain sweep {again} goes on from here")
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if not any(trial.state == TrialState.COMPLETE for trial in trials):
        raise ValueError(f"none of {len(trials)} trials was completed: nothing can be chosen")
    return trials


def settings(params: Mapping[str, object]) -> str:
    """Settings in a line.

    Example:
        >>> settings({"model.schedules.lr": 0.00123456, "data.batch_size": 32})
        'model.schedules.lr 0.00123 · data.batch_size 32'
    """
    parts = (f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}" for name, value in params.items())
    return " · ".join(parts)


def shown(sweep: Sweep, found: Mapping[str, tuple[float, float | None]]) -> str:
    """The metrics with their errors."""
    pairs = [(name, *found.get(name, (math.nan, None))) for name in sweep.metrics]
    return ", ".join(f"{name} {value:.4g}" + (f" ± {error:.2g}" if error else "") for name, value, error in pairs)
