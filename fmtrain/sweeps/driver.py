"""The driver of a sweep: it asks Optuna for settings, runs each in its own process and reports the measurements."""

from __future__ import annotations

import json
import os
import shutil
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, Literal, TypeVar

import optuna
from optuna import Trial
from optuna.exceptions import ExperimentalWarning, UpdateFinishedTrialError
from optuna.storages import JournalStorage, RDBStorage, fail_stale_trials
from optuna.trial import FrozenTrial, TrialState

from fmtrain.stop_signals import StopRequest
from fmtrain.sweeps.config import SEED, Sweep
from fmtrain.sweeps.endings import Attempts, Ending, ending, first_number, is_replaced, make_retry, worst_values
from fmtrain.sweeps.known import add_known
from fmtrain.sweeps.process import (
    LOG,
    RUN,
    Evaluation,
    MeasurementsTail,
    TrialProcess,
    checkpoints,
    create_lock,
    fill_command,
    last_lines,
    run_command,
    saved_since,
    try_lock,
)
from fmtrain.sweeps.pruning import standing_alarms
from fmtrain.sweeps.repeats import fresh_seed, make_repeat, missing_repeats
from fmtrain.sweeps.study import (
    add_retry,
    initial_crashes,
    is_connection_error,
    is_repeat,
    is_search,
    is_spent,
    is_surplus,
    next_step,
    open_storage,
    open_study,
    same_settings,
    sampler,
    suggest,
)
from repmetrics.atomic_write import write_text
from repmetrics.measurement.result import format_value
from repmetrics.scoring.run_table import format_setting

Result = TypeVar("Result")


class SweepWorker:
    """Works on a study until its trials are finished. Any number of drivers may work on one study.

    Args:
        sweep: Validated sweep.
        log: Called with one line per event.
        on_change: Called with all trials after each evaluation and each end.
    """

    def __init__(
        self,
        sweep: Sweep,
        *,
        log: Callable[[str], None],
        on_change: Callable[[list[FrozenTrial]], None] | None = None,
    ) -> None:
        self.sweep = sweep
        self.log = log
        self.on_change = on_change
        self.name = f"{os.uname().nodename}:{os.getpid()}"
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.storage = self._with_retries(lambda: open_storage(sweep, log=log))
        self.study = self._with_retries(lambda: open_study(sweep, self.storage, log=log))
        if not self._trials() and any((sweep.out / "trials").glob("*")):
            raise ValueError(f"{sweep.out} holds trials of another study: name another out")
        self._with_retries(lambda: add_known(self.study, sweep, log=log))
        self._ownerless: dict[int, float] = {}  # trials without a driver's name, and when they were first seen
        self._unreplaced: dict[int, float] = {}  # ended attempts that no trial replaces yet, likewise

    def run(self) -> list[FrozenTrial]:
        """Run trials until the wanted number is finished, and return all trials of the study."""
        waiting = False
        self._log_grid()
        while True:
            self._requeue_stale()
            step = self._next_step()
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

    def _next_step(self) -> str:
        """Next step in the search; after its end, in the repetition of the best settings with other seeds."""
        trials, sweep = self._trials(), self.sweep
        search = [t for t in trials if is_search(t)]
        spent = is_spent(trials, steps=sweep.steps, hours=sweep.hours)
        if (step := next_step(search, wanted=sweep.wanted, spent=spent)) != "done":
            return step
        for number, seed in missing_repeats(trials, sweep):
            repeat = make_repeat(trials[number], seed)
            self._with_retries(lambda repeat=repeat: self.study.add_trial(repeat))  # type: ignore[misc]
        states = [t.state for t in self._trials() if not is_search(t)]
        return "ask" if TrialState.WAITING in states else "wait" if TrialState.RUNNING in states else "done"

    def _log_grid(self) -> None:
        count = self.sweep.wanted
        if self.sweep.sampler.name != "grid" or self.sweep.trials in (None, count):
            return
        if self.sweep.trials is not None and self.sweep.trials > count:
            self.log(f"the grid has {count} combinations: it ends after {count} trials, not {self.sweep.trials}")
        else:
            self.log(f"only {count} combinations of the grid are run: trials = {self.sweep.trials}")

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
                what = "the journal cannot be written" if isinstance(error, OSError) else "the database is unreachable"
                if deadline is None:
                    deadline = time.monotonic() + patience
                    self.log(f"{what}: retrying while the training continues")
                elif time.monotonic() > deadline:
                    reason = str(error).splitlines()[0]
                    raise ConnectionError(f"{what}, for {patience:g} seconds: {reason}") from error
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
            trials, grid = self._trials(), self.sweep.sampler.name == "grid"
            if is_surplus(trials, trial.number, wanted=self.sweep.wanted, grid=grid):
                self._attr(trial, "surplus", True)
                self._tell(trial, state=TrialState.FAIL)
                return
            self._mark_repeat(trial, trials)
            frozen = self._trials()[trial.number]
            for number in frozen.system_attrs.get("retry_history", []):
                with try_lock(self._lock(number), wait=True):  # its process may still be saving
                    pass
            folder = self.sweep.out / "trials" / f"{first_number(frozen):04}"
            command, resume = self._command(frozen, params, folder=folder)
            entry = {"number": trial.number, "driver": self.name, "params": params, "command": command}
            write_text(folder / "trial.json", json.dumps(entry, indent=2) + "\n")
            self._attr(trial, "folder", str(folder))
            settings = " · ".join(f"{name} {format_setting(value)}" for name, value in params.items())
            seed = f" · seed {frozen.user_attrs['seed']}" if is_repeat(frozen) else ""
            self.log(f"trial {trial.number}{' resumes' if resume else ''}: {settings}{seed}")
            process = TrialProcess(command, log=folder / LOG, lock=lock, grace_seconds=self.sweep.stop_seconds)
            try:
                self._follow(trial, process, folder, reached=Attempts(*frozen.system_attrs.get("attempts", ())).reached)
            except UpdateFinishedTrialError:
                process.stop()
                process.wait()
                self.log(f"trial {trial.number} was given to another driver: this driver had lost contact for too long")
            except BaseException as error:
                self._end(trial, process, interrupted=isinstance(error, KeyboardInterrupt))
                raise

    def _mark_repeat(self, trial: Trial, trials: Sequence[FrozenTrial]) -> None:
        """Give settings that the sampler drew again a new seed: with the same one, the run would be the same."""
        earlier = same_settings(trials, trial.number)
        takes_seed = self.sweep.command is None or "{seed}" in self.sweep.command
        if earlier and takes_seed and SEED not in self.sweep.parameters:
            first = earlier[0].number
            for name, value in {"repeats": first, "seed": fresh_seed(first, 500 + len(earlier)), "drawn": True}.items():
                self._attr(trial, name, value)

    def _command(self, trial: FrozenTrial, params: Mapping[str, object], *, folder: Path) -> tuple[list[str], bool]:
        """Command of a trial, and whether it resumes. What an attempt left that ended before it saved is removed."""
        sweep, seed = self.sweep, trial.user_attrs.get("seed")
        resume = bool(checkpoints(folder / RUN))
        if not resume and (folder / RUN).exists():
            shutil.rmtree(folder / RUN)
        common: dict[str, Any] = {"params": params, "folder": folder, "number": trial.number, "seed": seed}
        if sweep.command is not None:
            return fill_command(sweep.command, **common), resume
        return run_command(launcher=sweep.launcher, fit=sweep.fit, resume=resume, **common), resume

    def _follow(self, trial: Trial, process: TrialProcess, folder: Path, *, reached: int) -> None:
        """Report the measurements of the trial until it ends, then report its end.

        It is not pruned for steps that an earlier attempt reached.
        """
        tail, evaluations, pruned = MeasurementsTail(folder / RUN), list[Evaluation](), None
        last_beat = time.monotonic()
        while True:
            code = process.poll()  # before reading, so that no line can follow
            for evaluation in tail.new():
                evaluations.append(evaluation)
                self._record_evaluation(trial, evaluation)
                self._changed()
                if pruned is None and code is None and evaluation.step > max(0, reached):
                    pruned = self._prune_reason(trial, evaluations)
                    if pruned is not None:
                        process.stop()
            if code is not None:
                break
            if time.monotonic() - last_beat > self.sweep.storage.heartbeat_seconds:
                last_beat = time.monotonic()
                self._beat(trial)
            time.sleep(self.sweep.poll_seconds)
        if tail.unreadable:
            self.log(f"trial {trial.number}: {tail.unreadable} lines of its measurements are no evaluations: left out")
        lines = last_lines(folder / LOG)
        self._report(trial, ending(code, evaluations, lines, metrics=self.sweep.metrics, pruned=pruned), evaluations)
        self._changed()

    def _record_evaluation(self, trial: Trial, evaluation: Evaluation) -> None:
        """Store the values of an evaluation. Report the metric, except at step 0: no setting has had an effect yet."""
        step, values, metric = evaluation.step, evaluation.values, self.sweep.metrics[0]
        summary = {"step": step, "alarms": len(evaluation.alarms), "signals": values, "kinds": evaluation.alarms}
        self._attr(trial, "look", summary)
        if len(self.sweep.metrics) == 1 and step > 0 and metric in values:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*is already reported")  # a resumed run measures it again
                self._with_retries(lambda: trial.report(values[metric][0], step))

    def _changed(self) -> None:
        if self.on_change is not None:
            self.on_change(self._trials())

    def _prune_reason(self, trial: Trial, evaluations: Sequence[Evaluation]) -> str | None:
        """Reason to prune the trial now, or None."""
        last, metric = evaluations[-1], self.sweep.metrics[0]
        if self.sweep.pruner.name == "none":
            return None
        if alarms := standing_alarms(evaluations):
            return f"at step {last.step}, alarm: {', '.join(alarms)}"
        if metric in last.values and self._with_retries(trial.should_prune):
            return f"at step {last.step}"
        return None

    def _report(self, trial: Trial, end: Ending, evaluations: Sequence[Evaluation]) -> None:
        """Report the end of a trial to the study and to the user."""
        last = evaluations[-1].values if evaluations else {}
        values = ", ".join(f"{name} {format_value(*last[name])}" for name in self.sweep.metrics if name in last)
        if end.kind == "complete":
            self._tell(trial, values=[last[name][0] for name in self.sweep.metrics], state=TrialState.COMPLETE)
            self.log(f"trial {trial.number} has {values}")
        elif end.kind == "pruned":
            self._tell(trial, state=TrialState.PRUNED)
            self.log(f"trial {trial.number} was pruned {end.reason}: {values}")
        elif end.kind in ("collapsed", "diverged"):
            self._attr(trial, "ending", list(end))
            worst = worst_values(self._trials(), metrics=self.sweep.metrics, directions=self.sweep.directions)
            self._tell(trial, values=worst, state=TrialState.PRUNED if worst is None else TrialState.COMPLETE)
            self.log(f"trial {trial.number} {end.kind}, reported as the worst so far: {end.reason}")
        elif end.kind == "crashed":
            self._fail(trial, end.reason)
        else:
            self.log(f"trial {trial.number}: {end.reason}")
            self._requeue(self._trials()[trial.number], "stopped" if end.kind == "stopped" else "out of memory")

    def _fail(self, trial: Trial, reason: str) -> None:
        log = self.sweep.out / "trials" / f"{first_number(self._trials()[trial.number]):04}" / LOG
        self._attr(trial, "crash", reason)
        self._tell(trial, state=TrialState.FAIL)
        self.log("\n  ".join([f"trial {trial.number} {reason}; the end of {log}:", *last_lines(log)]))
        if crashes := initial_crashes(self._trials(), wanted=self.sweep.wanted):
            raise ValueError(
                f"the first {crashes} trials crashed and none succeeded: see the end of {log}, fix the "
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
                self._requeue(self._trials()[trial.number], "ordered")

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
        the lock of another driver cannot judge it. A driver that died in `ask` leaves a trial without a name, which
        waits for the grace period.
        """
        if isinstance(self.storage, RDBStorage):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ExperimentalWarning)
                self._with_retries(lambda: fail_stale_trials(self.study))
        trials, now, grace = self._trials(), time.monotonic(), self.sweep.storage.grace_seconds
        for trial in trials:
            if trial.state == TrialState.RUNNING and "driver" not in trial.user_attrs:
                if now - self._ownerless.setdefault(trial.number, now) > grace:
                    self._give_back(trial)
                continue
            self._ownerless.pop(trial.number, None)
            if trial.state == TrialState.RUNNING and isinstance(self.storage, JournalStorage):
                with try_lock(self._lock(trial.number)) as free, suppress(UpdateFinishedTrialError, ValueError):
                    if free:
                        self.log(f"trial {trial.number}: its driver died")
                        self._requeue(trial, "stopped")
            elif self._is_lost(trial, trials) and now - self._unreplaced.setdefault(trial.number, now) > min(grace, 30):
                self._add_retry(trial, "stopped")

    def _is_lost(self, trial: FrozenTrial, trials: Sequence[FrozenTrial]) -> bool:
        """Whether an attempt ended, and the driver that should have re-queued it was killed before it did."""
        attrs = trial.user_attrs
        ended = trial.state == TrialState.FAIL and "driver" in attrs and not attrs.keys() & {"crash", "surplus"}
        return ended and not is_replaced(trial.number, trials)

    def _give_back(self, trial: FrozenTrial) -> None:
        """Re-queue a trial whose driver died in `ask`; without settings to save, it fails."""
        with suppress(UpdateFinishedTrialError, ValueError):
            if trial.system_attrs.keys() & {"failed_trial", "fixed_params"} or is_repeat(trial):
                self._requeue(trial, "ordered")
            else:
                self._with_retries(lambda: self.study.tell(trial.number, state=TrialState.FAIL))

    def _requeue(self, trial: FrozenTrial, kind: Literal["ordered", "stopped", "out of memory"]) -> None:
        """Add the next attempt, then end this one: a driver killed in between leaves both, and the first is found."""
        self._add_retry(trial, kind)
        self._with_retries(lambda: self.study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True))

    def _add_retry(self, trial: FrozenTrial, kind: Literal["ordered", "stopped", "out of memory"]) -> None:
        start, folder = trial.datetime_start, trial.user_attrs.get("folder")
        saved = start is not None and folder is not None and saved_since(Path(folder) / RUN, start)
        retry = make_retry(trial, kind, saved=saved)
        self._with_retries(lambda: add_retry(self.study, trial, retry, log=self.log))


def run_sweep(
    sweep: Sweep,
    *,
    log: Callable[[str], None],
    again: str,
    on_change: Callable[[list[FrozenTrial]], None] | None = None,
) -> list[FrozenTrial]:
    """Drive a sweep to its end. A signal ends it as Ctrl-C does: the trial saves first."""

    def interrupt(number: int) -> None:
        raise KeyboardInterrupt

    try:
        with StopRequest(interrupt).installed(), closing(SweepWorker(sweep, log=log, on_change=on_change)) as driver:
            trials = driver.run()
    except KeyboardInterrupt:
        log(f"interrupted: fmtrain sweep {again} resumes from this point")
        raise
    if not any(trial.state == TrialState.COMPLETE and "ending" not in trial.user_attrs for trial in trials):
        raise ValueError(f"none of {len(trials)} trials was completed: nothing can be chosen")
    return trials
