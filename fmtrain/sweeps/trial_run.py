"""One attempt at a trial in a slot of the driver: asked for, started, followed and reported, a step at a time."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from optuna import Trial
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState

from fmtrain.sweeps.command_line import RUN, fill_command, run_command
from fmtrain.sweeps.connection import StudyConnection
from fmtrain.sweeps.decisions import initial_crashes, is_repeat, is_surplus, same_settings
from fmtrain.sweeps.endings import Attempts, Ending, Interruption, ending, first_number
from fmtrain.sweeps.process import (
    LOG,
    Evaluation,
    MeasurementsTail,
    TrialProcess,
    checkpoints,
    create_lock,
    is_locked,
    last_lines,
)
from fmtrain.sweeps.pruning import share_behind, standing_alarms
from fmtrain.sweeps.recovery import Recovery
from fmtrain.sweeps.repeats import fresh_seed
from fmtrain.sweeps.settings import SEED
from fmtrain.sweeps.slots import Slot
from repmetrics.atomic_write import write_text
from repmetrics.decisions.slide_draws import format_share
from repmetrics.measurement.result import format_value
from repmetrics.scoring.run_table import format_setting


class TrialRun:
    """One attempt at a trial. :meth:`begin` asks for it; :meth:`advance` never waits for its process.

    Args:
        connection: Connection to the study.
        recovery: Re-queues the trial if it is interrupted.
        slot: GPUs and threads for its process.
        on_change: Called after each evaluation and at the end.
    """

    def __init__(
        self, connection: StudyConnection, recovery: Recovery, slot: Slot, *, on_change: Callable[[], None]
    ) -> None:
        self.connection, self.recovery, self.slot, self.on_change = connection, recovery, slot, on_change
        self.sweep, self.log = connection.sweep, connection.log
        self.trial: Trial | None = None
        self.process: TrialProcess | None = None
        self._params: Mapping[str, Any] = {}
        self._folder = Path()
        self._resources = ExitStack()
        self._evaluations: list[Evaluation] = []
        self._pruned: str | None = None
        self._lost = False
        self._last_beat = 0.0

    @property
    def number(self) -> int:
        """Number of the trial."""
        assert self.trial is not None
        return self.trial.number

    def begin(self) -> bool:
        """Ask for a trial. Return False where this driver must not run it."""
        self.trial, self._params = self.connection.ask()
        self._last_beat = time.monotonic()
        self._lock = self._resources.enter_context(create_lock(self.connection.lock(self.number)))
        return self._unless_lost(self._claim)

    def advance(self) -> bool:
        """Start the process, report its new evaluations, or report its end. Return whether the attempt goes on."""
        return self._unless_lost(self._advance)

    def beat(self) -> None:
        """Tell the storage that the trial is alive, if it is time."""
        if self.trial is not None and time.monotonic() - self._last_beat > self.sweep.storage.heartbeat_seconds:
            self._last_beat = time.monotonic()
            with suppress(UpdateFinishedTrialError):  # `advance` learns of it too
                self.connection.beat(self.number)

    def _unless_lost(self, step: Callable[[], bool]) -> bool:
        """Do a step. If the trial was given to another driver, stop its process, which may take a while."""
        if not self._lost:
            try:
                return step()
            except UpdateFinishedTrialError:
                self._lost = True
                if self.process is not None:
                    self.process.stop()
                what = f"trial {self.number} was given to another driver"
                self.log(f"{what}: this driver had lost contact for too long")
        return self.process is not None and self.process.poll() is None

    # ── its start ──────────────────────────────────────────────────────────────────────────────────────────────────

    def _claim(self) -> bool:
        """Name this driver in the trial, unless another driver runs the same one or the last wanted one."""
        assert self.trial is not None
        self.connection.set_attr(self.trial, "driver", self.connection.driver)
        trials, grid = self.connection.trials(), self.sweep.sampler.name == "grid"
        if is_surplus(trials, self.number, wanted=self.sweep.wanted, grid=grid):
            self.connection.set_attr(self.trial, "surplus", True)
            self.connection.tell(self.number, TrialState.FAIL)
            return False
        earlier = same_settings(trials, self.number)
        takes_seed = self.sweep.command is None or "{seed}" in self.sweep.command
        if earlier and takes_seed and SEED not in self.sweep.parameters:  # drawn again: with one seed, one run
            first = earlier[0].number
            for name, value in {"repeats": first, "seed": fresh_seed(first, 500 + len(earlier)), "drawn": True}.items():
                self.connection.set_attr(self.trial, name, value)
        return True

    def _advance(self) -> bool:
        if self.process is not None:
            return self._follow(self.process)
        frozen = self.connection.trial(self.number)
        if any(is_locked(self.connection.lock(n)) for n in frozen.system_attrs.get("retry_history", [])):
            self.connection.beat(self.number)  # the process of an earlier attempt may still be saving
            return True
        command = self._prepare(frozen)
        self.process = TrialProcess(
            command,
            log=self._folder / LOG,
            lock=self._lock,
            grace_seconds=self.sweep.stop_seconds,
            environment=self.slot.environment(),
        )
        self._reached = Attempts(*frozen.system_attrs.get("attempts", ())).reached
        self._tail = MeasurementsTail(self._folder / RUN)
        return True

    def _prepare(self, frozen: FrozenTrial) -> list[str]:
        """Write what is to run into the folder of the trial, and return its command."""
        assert self.trial is not None
        self._folder = folder = self.sweep.out / "trials" / f"{first_number(frozen):04}"
        command, resume = self._command(frozen)
        entry = {"number": self.number, "driver": self.connection.driver, "params": self._params, "command": command}
        text = json.dumps({**entry, "environment": self.slot.environment()}, indent=2) + "\n"
        self.connection.with_retries(lambda: write_text(folder / "trial.json", text))
        self.connection.set_attr(self.trial, "folder", str(folder))
        settings = " · ".join(f"{name} {format_setting(value)}" for name, value in self._params.items())
        seed = f" · seed {frozen.user_attrs['seed']}" if is_repeat(frozen) else ""
        self.log(f"trial {self.number}{' resumes' if resume else ''}: {settings}{seed}")
        return command

    def _command(self, trial: FrozenTrial) -> tuple[list[str], bool]:
        """Command of a trial, and whether it resumes. What an attempt left that ended before it saved is removed."""
        sweep, folder = self.sweep, self._folder
        resume = bool(checkpoints(folder / RUN))
        if not resume and (folder / RUN).exists():
            shutil.rmtree(folder / RUN)
        common: dict[str, Any] = {"params": self._params, "folder": folder, "number": self.number}
        common |= {"seed": trial.user_attrs.get("seed"), "gpu": self.slot.gpu}
        if sweep.command is not None:
            return fill_command(sweep.command, **common), resume
        return run_command(launcher=sweep.launcher, fit=sweep.fit, resume=resume, **common), resume

    # ── while it runs ──────────────────────────────────────────────────────────────────────────────────────────────

    def _follow(self, process: TrialProcess) -> bool:
        """Report the new measurements of the trial, and its end once its process has ended.

        It is not pruned for steps that an earlier attempt reached.
        """
        code = process.poll()  # before reading, so that no line can follow
        for evaluation in self._tail.new():
            self._evaluations.append(evaluation)
            self._record_evaluation(evaluation)
            self.on_change()
            if self._pruned is None and code is None and evaluation.step > max(0, self._reached):
                self._pruned = self._prune_reason()
                if self._pruned is not None:
                    process.stop()
        if code is None:
            if time.monotonic() - self._last_beat > self.sweep.storage.heartbeat_seconds:
                self._last_beat = time.monotonic()
                self.connection.beat(self.number)
            return True
        if self._tail.unreadable:
            self.log(
                f"trial {self.number}: {self._tail.unreadable} lines of its measurements are no evaluations: left out"
            )
        lines = last_lines(self._folder / LOG)
        self._report(ending(code, self._evaluations, lines, metrics=self.sweep.metrics, pruned=self._pruned))
        self.on_change()
        return False

    def _record_evaluation(self, evaluation: Evaluation) -> None:
        """Store the values of an evaluation. Report the metric, except at step 0: no setting has had an effect yet."""
        assert self.trial is not None
        step, values, metric = evaluation.step, evaluation.values, self.sweep.metrics[0]
        start = self.trial.datetime_start
        seconds = 0.0 if start is None else (datetime.now() - start).total_seconds()
        summary = {"step": step, "alarms": len(evaluation.alarms), "signals": values, "kinds": evaluation.alarms}
        self.connection.set_attr(self.trial, "look", {**summary, "seconds": seconds})
        if len(self.sweep.metrics) == 1 and step > 0 and metric in values:
            self.connection.report(self.trial, values[metric][0], step)

    def _prune_reason(self) -> str | None:
        """Reason to prune the trial now, or None."""
        assert self.trial is not None
        last, metric = self._evaluations[-1], self.sweep.metrics[0]
        if self.sweep.pruner.name == "none":
            return None
        if alarms := standing_alarms(self._evaluations):
            return f"at step {last.step}, alarm: {', '.join(alarms)}"
        if metric in last.values and self.connection.with_retries(self.trial.should_prune):
            return f"at step {last.step}{self._confidence(metric)}"
        return None

    def _confidence(self, metric: str) -> str:
        study, trial = self.connection.study, self.connection.trial(self.number)
        share = self.connection.with_retries(lambda: share_behind(study.pruner, study, trial, metric=metric))
        return "" if share is None else f", in {format_share(share)} of draws of the errors"

    # ── its end ────────────────────────────────────────────────────────────────────────────────────────────────────

    def _report(self, end: Ending) -> None:
        """Report the end of the trial to the study and to the user."""
        assert self.trial is not None
        last = self._evaluations[-1].values if self._evaluations else {}
        values = ", ".join(f"{name} {format_value(*last[name])}" for name in self.sweep.metrics if name in last)
        if end.kind == "complete":
            self.connection.tell(self.number, TrialState.COMPLETE, [last[name][0] for name in self.sweep.metrics])
            self.log(f"trial {self.number} has {values}")
        elif end.kind == "pruned":
            self.connection.tell(self.number, TrialState.PRUNED)
            self.log(f"trial {self.number} was pruned {end.reason}: {values}")
        elif end.kind in ("collapsed", "diverged"):
            self.connection.set_attr(self.trial, "ending", list(end))
            self.connection.tell(self.number, TrialState.PRUNED)  # a sampler ranks it below all that are complete
            self.log(f"trial {self.number} {end.kind}, ranked below all complete trials: {end.reason}")
        elif end.kind == "crashed":
            self._fail(self.trial, end.reason)
        else:
            self.log(f"trial {self.number}: {end.reason}")
            kind: Interruption = "stopped" if end.kind == "stopped" else "out of memory"
            self.recovery.requeue(self.connection.trial(self.number), kind)

    def _fail(self, trial: Trial, reason: str) -> None:
        log = self._folder / LOG
        self.connection.set_attr(trial, "crash", reason)
        self.connection.tell(trial.number, TrialState.FAIL)
        self.log("\n  ".join([f"trial {trial.number} {reason}; the end of {log}:", *last_lines(log)]))
        if crashes := initial_crashes(self.connection.trials(), wanted=self.sweep.wanted):
            raise ValueError(
                f"the first {crashes} trials crashed and none succeeded: see the end of {log}, fix the cause and run "
                "the sweep again with --retry-crashed, or under another name"
            )

    def stop(self) -> None:
        """Have the process save and end. Do not wait for it."""
        if self.process is not None:
            self.process.stop()

    def kill(self) -> None:
        """Kill the process."""
        if self.process is not None:
            self.process.kill()

    def end(self, *, requeue: bool) -> None:
        """Wait for the process that was stopped. Re-queue the trial for the next call, unless its end is reported."""
        if self.process is not None:
            self.process.wait()
        if not requeue or self.trial is None or self._lost:
            return
        frozen = self.connection.trial(self.number)
        if not frozen.state.is_finished():
            with suppress(UpdateFinishedTrialError):
                self.recovery.requeue(frozen, "ordered")

    def close(self) -> None:
        """Release the lock of the trial."""
        self._resources.close()
