"""The driver of a sweep: it asks Optuna for settings, runs each in its own process and reports the measurements."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from types import FrameType

import optuna
from optuna import Study
from optuna.trial import FrozenTrial, TrialState

from fmtrain.stop_signals import StopRequest
from fmtrain.sweeps.command_line import placeholders
from fmtrain.sweeps.connection import StudyConnection
from fmtrain.sweeps.decisions import current, finished, is_search, is_spent, next_step
from fmtrain.sweeps.recovery import Recovery
from fmtrain.sweeps.repeats import make_repeat, missing_repeats
from fmtrain.sweeps.settings import Sweep
from fmtrain.sweeps.slots import Slot, free_gpus, make_slots, visible_gpus
from fmtrain.sweeps.trial_run import TrialRun
from repmetrics.executor import cores


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
        self._resources = ExitStack()
        self.slots = self._take_slots()
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.connection = StudyConnection(sweep, log=log)
        self.recovery = Recovery(self.connection)
        self.running: list[TrialRun] = []
        self._wait_until = 0.0
        self._waiting = False

    @property
    def study(self) -> Study:
        """The study."""
        return self.connection.study

    def run(self) -> list[FrozenTrial]:
        """Run trials until the wanted number is finished, and return all trials of the study."""
        self._log_slots()
        self._log_grid()
        error: BaseException | None = None
        try:
            while self._fill_slots() or self.running:
                time.sleep(self.sweep.poll_seconds)
                self._advance()
        except BaseException as raised:
            error = raised
            raise
        finally:
            self._end(error)
        trials = self.connection.trials()
        if left := sum(t.state == TrialState.WAITING for t in trials):
            self.log(f"{left} queued trials are not run: the budget is spent")
        return trials

    def close(self) -> None:
        """Close the connections to the database, and release the GPUs."""
        self.connection.close()
        self._resources.close()

    # ── slots ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def _take_slots(self) -> list[Slot]:
        """Slots of this driver. With jobs = "auto", GPUs of another driver on this machine are left to it."""
        jobs, template = self.sweep.jobs, self.sweep.command or self.sweep.launcher
        named = "gpu" in placeholders(template)
        if jobs == 1 and not named:
            return make_slots(1, (), cores=1)
        gpus: Sequence[str] = visible_gpus()
        if named and not gpus:
            raise ValueError(f"{{gpu}} needs a visible GPU, and there is none: {template}")
        if jobs == "auto" and gpus:
            free = self._resources.enter_context(free_gpus(self.sweep.out / "locks", gpus))
            if not free:
                raise ValueError(f"all {len(gpus)} visible GPUs belong to other drivers of this sweep: wait for them")
            gpus = free
        return make_slots(jobs, gpus, cores=cores())

    def _log_slots(self) -> None:
        if self.sweep.jobs == 1:
            return
        gpus = sorted({gpu for slot in self.slots for gpu in slot.gpus}, key=lambda gpu: (len(gpu), gpu))
        what = f"GPUs {', '.join(gpus)}" if gpus else "no GPU is visible"
        self.log(f"{len(self.slots)} trials at a time; {what}; {self.slots[0].threads} CPU threads each")

    def _fill_slots(self) -> bool:
        """Begin trials in free slots. Return False if the search has ended: no trial is begun any more."""
        if time.monotonic() < self._wait_until:
            return True
        while free := [slot for slot in self.slots if all(slot is not run.slot for run in self.running)]:
            for run in self.running:
                run.beat()  # else its silence during an outage might look like its end
            self.recovery.requeue_stale()
            step = self._next_step()
            if step == "done" and not self.running:
                return False
            if step != "ask":
                self._wait()
                return True
            self._waiting = False
            self._begin(free[0])
        return True

    def _wait(self) -> None:
        """Wait for other trials for a while."""
        if not self.running and not self._waiting:
            self.log("waiting for the trials of other drivers")
        self._waiting = not self.running
        if self._waiting:
            self._changed()
        self._wait_until = time.monotonic() + 4 * self.sweep.poll_seconds

    def _begin(self, slot: Slot) -> None:
        run = TrialRun(self.connection, self.recovery, slot, on_change=self._changed)
        self.running.append(run)  # before it has a trial, so that no signal can lose one
        if not run.begin() or not run.advance():
            self._remove(run)

    def _advance(self) -> None:
        for run in list(self.running):
            if not run.advance():
                self._remove(run)
                self._wait_until = 0.0

    def _remove(self, run: TrialRun) -> None:
        self.running.remove(run)
        run.close()

    def _end(self, error: BaseException | None) -> None:
        """Stop the trials that still run, all at once, and re-queue them if the study can be reached."""
        interrupted = isinstance(error, KeyboardInterrupt)
        for run in self.running:
            run.stop()
        try:
            if interrupted and (numbers := [str(run.number) for run in self.running if run.process is not None]):
                what = (
                    f"trial {numbers[0]}, which saves"
                    if len(numbers) == 1
                    else f"trials {', '.join(numbers)}, which save"
                )
                self.log(f"stopping {what} first; press Ctrl-C again to kill {'it' if len(numbers) == 1 else 'them'}")
            for run in self.running:
                run.end(requeue=False)
        except KeyboardInterrupt:
            for run in self.running:
                run.kill()
        for run in self.running:
            run.end(requeue=interrupted or isinstance(error, ValueError))
            run.close()
        self.running = []

    # ── the search ─────────────────────────────────────────────────────────────────────────────────────────────────

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


def run_sweep(
    sweep: Sweep,
    *,
    log: Callable[[str], None],
    again: str,
    on_change: Callable[[list[FrozenTrial]], None] | None = None,
    retry_crashed: bool = False,
    seconds: float | None = None,
) -> list[FrozenTrial]:
    """Drive a sweep to its end. A signal ends it as Ctrl-C does: the trials save first.

    Args:
        sweep: Validated sweep.
        log: Called with one line per event.
        again: Name of the sweep file, for the message after an interruption.
        on_change: Called with all trials when one has changed.
        retry_crashed: Whether to run the trials again that crashed in earlier calls.
        seconds: Time after which the trials save and the driver ends, or None.

    Returns:
        All trials of the study; none if the time ended first.

    Raises:
        NoTrialCompletedError: All trials crashed, were pruned, diverged or collapsed.
    """
    cause: list[int] = []

    def interrupt(number: int) -> None:
        cause.append(number)
        raise KeyboardInterrupt

    request = StopRequest(interrupt)
    try:
        with (
            request.installed(),
            timer(seconds, request.handle),
            closing(SweepWorker(sweep, log=log, on_change=on_change)) as driver,
        ):
            if retry_crashed:
                driver.connection.with_retries(driver.recovery.requeue_crashed)
            trials = driver.run()
    except KeyboardInterrupt:
        timed = cause[:1] == [signal.SIGALRM]
        log(f"{'the time is over' if timed else 'interrupted'}: fmtrain sweep {again} resumes from this point")
        if timed:
            return []
        raise
    if not any(trial.state == TrialState.COMPLETE and "ending" not in trial.user_attrs for trial in trials):
        count = sum(is_search(trial) and finished(trial) for trial in current(trials))
        raise NoTrialCompletedError(f"none of {count} trials was completed: nothing can be chosen")
    return trials


@contextmanager
def timer(seconds: float | None, handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Have SIGALRM handled after this time, if the block still runs."""
    if seconds is None:
        yield
        return
    previous = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
