"""The driver of a sweep: it asks Optuna for settings, runs each in its own process and reports the measurements."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import optuna
from optuna import Study, Trial
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState

from fmtrain.stop_signals import StopRequest
from fmtrain.sweeps.config import SEED, Sweep
from fmtrain.sweeps.connection import StudyConnection
from fmtrain.sweeps.decisions import (
    current,
    finished,
    initial_crashes,
    is_repeat,
    is_search,
    is_spent,
    is_surplus,
    next_step,
    same_settings,
)
from fmtrain.sweeps.endings import Attempts, Ending, Interruption, ending, first_number
from fmtrain.sweeps.process import (
    LOG,
    RUN,
    Evaluation,
    MeasurementsTail,
    TrialProcess,
    checkpoints,
    create_lock,
    fill_command,
    is_locked,
    last_lines,
    run_command,
)
from fmtrain.sweeps.pruning import standing_alarms
from fmtrain.sweeps.recovery import Recovery
from fmtrain.sweeps.repeats import fresh_seed, make_repeat, missing_repeats
from repmetrics.atomic_write import write_text
from repmetrics.measurement.result import format_value
from repmetrics.scoring.run_table import format_setting


class NoTrialCompletedError(ValueError):
    """The sweep has ended and nothing can be chosen."""


class SweepWorker:
    """Works on a study until its trials are finished. Any number of drivers may work on one study.

    Args:
        sweep: Validated sweep.
        log: Called with one line per event.
        on_change: Called with all trials after each evaluation and each end, and while it waits for other drivers.
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
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.connection = StudyConnection(sweep, log=log)
        self.recovery = Recovery(self.connection)

    @property
    def study(self) -> Study:
        """The study."""
        return self.connection.study

    def run(self) -> list[FrozenTrial]:
        """Run trials until the wanted number is finished, and return all trials of the study."""
        waiting = False
        self._log_grid()
        while True:
            self.recovery.requeue_stale()
            step = self._next_step()
            if step == "done":
                trials = self.connection.trials()
                if left := sum(t.state == TrialState.WAITING for t in trials):
                    self.log(f"{left} queued trials are not run: the budget is spent")
                return trials
            if step == "ask":
                self._run_trial()
            elif not waiting:
                self.log("waiting for the trials of other drivers")
            waiting = step == "wait"
            if waiting:
                self._changed()
                time.sleep(4 * self.sweep.poll_seconds)

    def close(self) -> None:
        """Close the connections to the database."""
        self.connection.close()

    def _next_step(self) -> str:
        """Next step in the search; after its end, in the repetition of the best settings with other seeds."""
        trials, sweep = self.connection.trials(), self.sweep
        search = [t for t in current(trials) if is_search(t)]
        spent = is_spent(trials, steps=sweep.steps, hours=sweep.hours)
        if (step := next_step(search, wanted=sweep.wanted, spent=spent)) != "done":
            return step
        for number, seed in missing_repeats(trials, sweep):
            self.connection.add(make_repeat(trials[number], seed))
        states = [t.state for t in self.connection.trials() if not is_search(t)]
        return "ask" if TrialState.WAITING in states else "wait" if TrialState.RUNNING in states else "done"

    def _log_grid(self) -> None:
        count = self.sweep.wanted
        if self.sweep.sampler.name != "grid" or self.sweep.trials in (None, count):
            return
        if self.sweep.trials is not None and self.sweep.trials > count:
            self.log(f"the grid has {count} combinations: it ends after {count} trials, not {self.sweep.trials}")
        else:
            self.log(f"only {count} combinations of the grid are run: trials = {self.sweep.trials}")

    def _changed(self) -> None:
        if self.on_change is not None:
            self.on_change(self.connection.trials())

    # ── one trial ──────────────────────────────────────────────────────────────────────────────────────────────────

    def _run_trial(self) -> None:
        trial, params = self.connection.ask()
        process = None
        with create_lock(self.connection.lock(trial.number)) as lock:
            try:
                if not self._claim(trial):
                    return
                folder, command = self._prepare(trial, params)
                process = TrialProcess(command, log=folder / LOG, lock=lock, grace_seconds=self.sweep.stop_seconds)
                self._follow(trial, process, folder)
            except UpdateFinishedTrialError:
                if process is not None:
                    process.stop()
                    process.wait()
                self.log(f"trial {trial.number} was given to another driver: this driver had lost contact for too long")
            except BaseException as error:
                self._stop(trial, process, interrupted=isinstance(error, KeyboardInterrupt))
                raise

    def _claim(self, trial: Trial) -> bool:
        """Name this driver in the trial, unless another driver runs the same one or the last wanted one."""
        self.connection.set_attr(trial, "driver", self.connection.driver)
        trials, grid = self.connection.trials(), self.sweep.sampler.name == "grid"
        if is_surplus(trials, trial.number, wanted=self.sweep.wanted, grid=grid):
            self.connection.set_attr(trial, "surplus", True)
            self.connection.tell(trial.number, TrialState.FAIL)
            return False
        earlier = same_settings(trials, trial.number)
        takes_seed = self.sweep.command is None or "{seed}" in self.sweep.command
        if earlier and takes_seed and SEED not in self.sweep.parameters:  # drawn again: with one seed, one run
            first = earlier[0].number
            for name, value in {"repeats": first, "seed": fresh_seed(first, 500 + len(earlier)), "drawn": True}.items():
                self.connection.set_attr(trial, name, value)
        return True

    def _prepare(self, trial: Trial, params: Mapping[str, Any]) -> tuple[Path, list[str]]:
        """Folder and command of the trial, once the processes of its earlier attempts have ended."""
        frozen = self.connection.trial(trial.number)
        for number in frozen.system_attrs.get("retry_history", []):
            while is_locked(self.connection.lock(number)):  # its process may still be saving
                self.connection.beat(trial.number)
                time.sleep(4 * self.sweep.poll_seconds)
        folder = self.sweep.out / "trials" / f"{first_number(frozen):04}"
        command, resume = self._command(frozen, params, folder=folder)
        entry = {"number": trial.number, "driver": self.connection.driver, "params": params, "command": command}
        text = json.dumps(entry, indent=2) + "\n"
        self.connection.with_retries(lambda: write_text(folder / "trial.json", text))
        self.connection.set_attr(trial, "folder", str(folder))
        settings = " · ".join(f"{name} {format_setting(value)}" for name, value in params.items())
        seed = f" · seed {frozen.user_attrs['seed']}" if is_repeat(frozen) else ""
        self.log(f"trial {trial.number}{' resumes' if resume else ''}: {settings}{seed}")
        return folder, command

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

    def _follow(self, trial: Trial, process: TrialProcess, folder: Path) -> None:
        """Report the measurements of the trial until it ends, then report its end.

        It is not pruned for steps that an earlier attempt reached.
        """
        reached = Attempts(*self.connection.trial(trial.number).system_attrs.get("attempts", ())).reached
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
                self.connection.beat(trial.number)
            time.sleep(self.sweep.poll_seconds)
        if tail.unreadable:
            self.log(f"trial {trial.number}: {tail.unreadable} lines of its measurements are no evaluations: left out")
        lines = last_lines(folder / LOG)
        self._report(trial, ending(code, evaluations, lines, metrics=self.sweep.metrics, pruned=pruned), evaluations)
        self._changed()

    def _record_evaluation(self, trial: Trial, evaluation: Evaluation) -> None:
        """Store the values of an evaluation. Report the metric, except at step 0: no setting has had an effect yet."""
        step, values, metric = evaluation.step, evaluation.values, self.sweep.metrics[0]
        start = trial.datetime_start
        seconds = 0.0 if start is None else (datetime.now() - start).total_seconds()
        summary = {"step": step, "alarms": len(evaluation.alarms), "signals": values, "kinds": evaluation.alarms}
        self.connection.set_attr(trial, "look", {**summary, "seconds": seconds})
        if len(self.sweep.metrics) == 1 and step > 0 and metric in values:
            self.connection.report(trial, values[metric][0], step)

    def _prune_reason(self, trial: Trial, evaluations: Sequence[Evaluation]) -> str | None:
        """Reason to prune the trial now, or None."""
        last, metric = evaluations[-1], self.sweep.metrics[0]
        if self.sweep.pruner.name == "none":
            return None
        if alarms := standing_alarms(evaluations):
            return f"at step {last.step}, alarm: {', '.join(alarms)}"
        if metric in last.values and self.connection.with_retries(trial.should_prune):
            return f"at step {last.step}"
        return None

    # ── its end ────────────────────────────────────────────────────────────────────────────────────────────────────

    def _report(self, trial: Trial, end: Ending, evaluations: Sequence[Evaluation]) -> None:
        """Report the end of a trial to the study and to the user."""
        last = evaluations[-1].values if evaluations else {}
        values = ", ".join(f"{name} {format_value(*last[name])}" for name in self.sweep.metrics if name in last)
        if end.kind == "complete":
            self.connection.tell(trial.number, TrialState.COMPLETE, [last[name][0] for name in self.sweep.metrics])
            self.log(f"trial {trial.number} has {values}")
        elif end.kind == "pruned":
            self.connection.tell(trial.number, TrialState.PRUNED)
            self.log(f"trial {trial.number} was pruned {end.reason}: {values}")
        elif end.kind in ("collapsed", "diverged"):
            self.connection.set_attr(trial, "ending", list(end))
            self.connection.tell(trial.number, TrialState.PRUNED)  # a sampler ranks it below all that are complete
            self.log(f"trial {trial.number} {end.kind}, ranked below all complete trials: {end.reason}")
        elif end.kind == "crashed":
            self._fail(trial, end.reason)
        else:
            self.log(f"trial {trial.number}: {end.reason}")
            kind: Interruption = "stopped" if end.kind == "stopped" else "out of memory"
            self.recovery.requeue(self.connection.trial(trial.number), kind)

    def _fail(self, trial: Trial, reason: str) -> None:
        log = self.sweep.out / "trials" / f"{first_number(self.connection.trial(trial.number)):04}" / LOG
        self.connection.set_attr(trial, "crash", reason)
        self.connection.tell(trial.number, TrialState.FAIL)
        self.log("\n  ".join([f"trial {trial.number} {reason}; the end of {log}:", *last_lines(log)]))
        if crashes := initial_crashes(self.connection.trials(), wanted=self.sweep.wanted):
            raise ValueError(
                f"the first {crashes} trials crashed and none succeeded: see the end of {log}, fix the cause and run "
                "the sweep again with --retry-crashed, or under another name"
            )

    def _stop(self, trial: Trial, process: TrialProcess | None, *, interrupted: bool) -> None:
        """Stop the process of the trial. After an interruption, re-queue the trial for the next call."""
        if process is not None:
            process.stop()
            try:
                if interrupted:
                    self.log(f"stopping trial {trial.number}, which saves first; press Ctrl-C again to kill it")
                process.wait()
            except KeyboardInterrupt:
                process.kill()
        frozen = self.connection.trial(trial.number) if interrupted else None
        if frozen is not None and not frozen.state.is_finished():  # its end may have been reported already
            with suppress(UpdateFinishedTrialError):
                self.recovery.requeue(frozen, "ordered")


def run_sweep(
    sweep: Sweep,
    *,
    log: Callable[[str], None],
    again: str,
    on_change: Callable[[list[FrozenTrial]], None] | None = None,
    retry_crashed: bool = False,
) -> list[FrozenTrial]:
    """Drive a sweep to its end. A signal ends it as Ctrl-C does: the trial saves first.

    Args:
        sweep: Validated sweep.
        log: Called with one line per event.
        again: Name of the sweep file, for the message after an interruption.
        on_change: Called with all trials when one has changed.
        retry_crashed: Whether to run the trials again that crashed in earlier calls.

    Raises:
        NoTrialCompletedError: All trials crashed, were pruned, diverged or collapsed.
    """

    def interrupt(number: int) -> None:
        raise KeyboardInterrupt

    try:
        with StopRequest(interrupt).installed(), closing(SweepWorker(sweep, log=log, on_change=on_change)) as driver:
            if retry_crashed:
                driver.connection.with_retries(driver.recovery.requeue_crashed)
            trials = driver.run()
    except KeyboardInterrupt:
        log(f"interrupted: fmtrain sweep {again} resumes from this point")
        raise
    if not any(trial.state == TrialState.COMPLETE and "ending" not in trial.user_attrs for trial in trials):
        count = sum(is_search(trial) and finished(trial) for trial in current(trials))
        raise NoTrialCompletedError(f"none of {count} trials was completed: nothing can be chosen")
    return trials
