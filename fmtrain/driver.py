"""The driver of a sweep: asks Optuna for settings, runs each as a process of its own, reports what it measures."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import numpy as np
import optuna
import sqlalchemy
from optuna import Study, Trial
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.exceptions import ExperimentalWarning, StorageInternalError, UpdateFinishedTrialError
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage, JournalStorage, RDBStorage, fail_stale_trials
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState, create_trial

from fmtrain.sweep import PRUNERS, SAMPLERS, Storage, Sweep, combinations
from fmtrain.trials import LOG, MEASUREMENTS, RUN, Process, Tail, command, held, last_lines, signals, taken

IN_VAIN = 3
"""So many crashes before any success, and a driver gives up."""

RETRIES = 5
"""How often a trial whose driver died, or was interrupted, is given to another."""

Result = TypeVar("Result")


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


def surplus(trials: Iterable[FrozenTrial], number: int, *, wanted: int) -> bool:
    """Whether two drivers asked for the last trial at the same time, and this is the later one's."""
    alive = (TrialState.RUNNING, TrialState.WAITING)
    return sum(t.number < number and (finished(t) or t.state in alive) for t in trials) >= wanted


def first_number(trial: FrozenTrial) -> int:
    """The number under which these settings were drawn, which names their folder."""
    return int(trial.system_attrs.get("failed_trial", trial.number))


def again(trial: FrozenTrial) -> FrozenTrial | None:
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


def unreachable(error: BaseException | None) -> bool:
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
        if (anew := again(trial)) is not None:
            study.add_trial(anew)

    while True:
        attempts -= 1
        try:
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


# ── the driver ─────────────────────────────────────────────────────────────────────────────────────────────────────


class Driver:
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
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)  # heartbeats
            self.storage = open_storage(sweep)
            self.study = open_study(sweep, self.storage)
        if not self.study.trials and any((sweep.out / "trials").glob("*")):
            raise ValueError(f"{sweep.out} holds trials of another study: name another out")
        self._crashes = 0
        self._works = False
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
            self._give_back_stale()
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

    def _trials(self) -> list[FrozenTrial]:
        return self._patiently(lambda: self.study.get_trials(deepcopy=False))

    def _patiently(self, call: Callable[[], Result]) -> Result:
        """Its result; while the database cannot be reached, once more after a pause."""
        until, pause = None, 0.5
        while True:
            try:
                return call()
            except Exception as error:
                if not unreachable(error):
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
            trial = self._patiently(self.study.ask)
        self._beat(trial)
        if self.sweep.sampler.name != "grid":
            self.study.sampler = sampler(self.sweep, trial.number)
        params = {
            name: self._patiently(lambda name=name, space=space: suggest(trial, name, space))  # type: ignore[misc]
            for name, space in self.sweep.parameters.items()
        }
        with held(self._lock(trial.number)) as lock:
            self._attr(trial, "driver", self.name)
            if surplus(self._trials(), trial.number, wanted=self.sweep.trials):
                self._tell(trial, state=TrialState.FAIL)
                return
            frozen = self._trials()[trial.number]
            for before in frozen.system_attrs.get("retry_history", []):
                with taken(self._lock(before), wait=True):  # its process may still be saving
                    pass
            folder = self.sweep.out / "trials" / f"{first_number(frozen):04}"
            resume = any((folder / RUN / "checkpoints").glob("*.ckpt"))
            if not resume and (folder / RUN).exists():
                shutil.rmtree(folder / RUN)  # of a process that ended before it saved
            line = command(
                launcher=self.sweep.launcher,
                fit=self.sweep.fit,
                params=params,
                folder=folder,
                number=trial.number,
                resume=resume,
            )
            folder.mkdir(parents=True, exist_ok=True)
            stated = {"number": trial.number, "params": params, "command": line}
            (folder / "trial.json").write_text(json.dumps(stated, indent=2) + "\n", encoding="utf-8")
            self._attr(trial, "folder", str(folder))
            self.say(f"trial {trial.number}{' goes on' if resume else ''}: {settings(params)}")
            process = Process(line, log=folder / LOG, lock=lock, grace_seconds=self.sweep.stop_seconds)
            try:
                self._follow(trial, process, folder)
            except UpdateFinishedTrialError:
                process.stop()
                process.wait()
                self.say(f"trial {trial.number} was given to another driver: this one had no contact for too long")
            except BaseException as error:
                self._end(trial, process, interrupted=isinstance(error, KeyboardInterrupt))
                raise

    def _follow(self, trial: Trial, process: Process, folder: Path) -> None:
        """Report what the trial measures until it ends, and tell Optuna how it ended."""
        tail, last, pruned = Tail(folder / RUN / MEASUREMENTS), {}, None
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
            return
        self._works = True

    def _note(self, trial: Trial, entry: Mapping[str, Any]) -> dict[str, tuple[float, float | None]]:
        """Keep the signals of a look; report the metric, but not before the first step: no setting has had effect."""
        found = signals(entry)
        self._attr(trial, "look", {"step": entry["step"], "signals": found})
        metric = self.sweep.metrics[0]
        if len(self.sweep.metrics) == 1 and entry["step"] > 0 and metric in found:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*is already reported")  # a continued run measures it again
                self._patiently(lambda: trial.report(found[metric][0], entry["step"]))
        return found

    def _prune(self, trial: Trial, step: int, found: Mapping[str, object]) -> bool:
        if self.sweep.pruner.name == "none" or step == 0 or self.sweep.metrics[0] not in found:
            return False
        return self._patiently(trial.should_prune)

    def _crashed(self, trial: Trial, code: int, folder: Path) -> None:
        lines = last_lines(folder / LOG)
        why = f"ended with exit code {code}" if code else f"has no {' and '.join(self.sweep.metrics)} at its end"
        self._attr(trial, "crash", f"{why}: {lines[-1]}" if lines else why)
        self._tell(trial, state=TrialState.FAIL)
        self.say("\n  ".join([f"trial {trial.number} {why}; the end of {folder / LOG}:", *lines]))
        self._crashes += 1
        if not self._works and self._crashes >= min(IN_VAIN, self.sweep.trials):
            raise ValueError(
                f"the first {self._crashes} trials crashed and none succeeded: see the end of {folder / LOG}, mend the "
                "cause and start the sweep under another name"
            )

    def _end(self, trial: Trial, process: Process, *, interrupted: bool) -> None:
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
                self._give_back(self._trials()[trial.number])

    # ── what Optuna is told ────────────────────────────────────────────────────────────────────────────────────────

    def _attr(self, trial: Trial, name: str, value: object) -> None:
        self._patiently(lambda: trial.set_user_attr(name, value))

    def _tell(self, trial: Trial, *, state: TrialState, values: list[float] | None = None) -> None:
        """Once only, also where the answer to the first attempt was lost."""
        self._patiently(lambda: self.study.tell(trial.number, values, state=state, skip_if_finished=True))

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

        self._patiently(beat)

    # ── trials of drivers that died ────────────────────────────────────────────────────────────────────────────────

    def _lock(self, number: int) -> Path:
        return self.sweep.out / "locks" / f"{number:04}"

    def _give_back_stale(self) -> None:
        """Put back the trials of drivers that are no more.

        In a database their heartbeats have stopped. Beside a journal their locks are free; a driver that cannot see
        the lock of another cannot judge it. A driver that died while asking leaves a trial without its name: it
        holds no settings to save, and is failed after the grace.
        """
        if isinstance(self.storage, RDBStorage):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ExperimentalWarning)
                self._patiently(lambda: fail_stale_trials(self.study))
        now = time.monotonic()
        for trial in self._trials():
            if trial.state != TrialState.RUNNING:
                self._ownerless.pop(trial.number, None)
            elif "driver" not in trial.user_attrs:
                if now - self._ownerless.setdefault(trial.number, now) > self.sweep.storage.grace_seconds:
                    with suppress(UpdateFinishedTrialError, ValueError):
                        self._patiently(lambda number=trial.number: self.study.tell(number, state=TrialState.FAIL))  # type: ignore[misc]
            elif isinstance(self.storage, JournalStorage):
                with taken(self._lock(trial.number)) as free, suppress(UpdateFinishedTrialError, ValueError):
                    if free:
                        self.say(f"the driver of trial {trial.number} is no more: it is put back")
                        self._give_back(trial)

    def _give_back(self, trial: FrozenTrial) -> None:
        self._patiently(lambda: self.study.tell(trial.number, state=TrialState.FAIL))
        if (anew := again(trial)) is not None:
            self._patiently(lambda: self.study.add_trial(anew))


def work(sweep: Sweep, *, say: Callable[[str], None], again: str) -> list[FrozenTrial]:
    """Drive a sweep to its end. SIGTERM and the terminal's hang-up end it as Ctrl-C does: the trial saves first.

    Args:
        sweep: What to do.
        say: Is told, in a line, of what happens.
        again: The sweep's file, to say how to go on.

    Raises:
        ValueError: If no trial succeeds.
    """

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupt)
    driver = Driver(sweep, say=say)
    try:
        trials = driver.run()
    except KeyboardInterrupt:
        say(f"interrupted: fmtrain sweep {again} goes on from here")
        raise
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
