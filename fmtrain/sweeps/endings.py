"""How a trial ended, and what follows: whether it is resumed, and what the sampler learns of it."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from optuna.trial import FrozenTrial, TrialState, create_trial

from fmtrain.stop_signals import STOP_SIGNALS
from fmtrain.sweeps.command_line import RUN
from fmtrain.sweeps.process import Evaluation, saved_since

EndingKind = Literal["complete", "pruned", "collapsed", "diverged", "stopped", "out of memory", "crashed"]
Interruption = Literal["ordered", "stopped", "out of memory"]
"""Why an attempt is resumed. "ordered": the sweep was interrupted; "stopped": the attempt or its driver ended alone."""

MAX_STALLED = 5
"""Attempts in a row without progress after which a trial is given up. An orderly interruption is none."""
MAX_OUT_OF_MEMORY = 2
"""Attempts in a row without progress that end for lack of memory after which a setting has failed."""

OUT_OF_MEMORY = re.compile(r"out of memory|OutOfMemory|MemoryError|oom.?kill|cannot allocate memory", re.IGNORECASE)
NOT_FINITE = re.compile(r"\b(nan|inf)\b|(not|non).?finite", re.IGNORECASE)
WORKER_SIGNAL = re.compile(r"Signal (\d+) \(SIG[A-Z0-9]+\) received by PID")
"""How torchrun reports a worker that a signal ended. Its own exit code is 1."""

STOPPED_IN_ORDER = re.compile(r"Received SIGTERM")
"""What Lightning prints before it ends with exit code 0."""
CANCELLED = re.compile(r"CANCELLED AT \S+ DUE TO (PREEMPTION|TIME LIMIT|JOB REQUEUE|NODE FAILURE)")
"""What SLURM prints of a step that it ended; srun's exit code may be 1."""


class Ending(NamedTuple):
    """How a trial ended, and why."""

    kind: EndingKind
    reason: str


def ending(
    code: int, evaluations: Sequence[Evaluation], lines: Sequence[str], *, metrics: Sequence[str], pruned: str | None
) -> Ending:
    """Ending of a trial.

    Args:
        code: Exit code; that of a signal is negative, or above 128.
        evaluations: Its evaluations, oldest first; those of earlier attempts may be absent.
        lines: Last lines of its log.
        metrics: Metrics of the sweep.
        pruned: Reason for which the driver stopped it, or None.

    Example:
        >>> evaluations = [Evaluation(10, (), {"rankme": (9.0, 0.5)}, finite=True)]
        >>> ending(0, evaluations, [], metrics=["rankme"], pruned=None).kind
        'complete'
        >>> ending(1, evaluations, ["the gradient is not finite at step 12"], metrics=["rankme"], pruned=None).kind
        'diverged'
        >>> ending(137, evaluations, [], metrics=["rankme"], pruned=None).kind
        'out of memory'
    """
    last_line = lines[-1] if lines else ""
    if pruned is not None:
        return Ending("pruned", pruned)
    number = _signal_number(code, lines)
    if code and OUT_OF_MEMORY.search("\n".join(lines)):
        return Ending("out of memory", last_line)
    if number == signal.SIGKILL:
        return Ending("out of memory", "it was killed (SIGKILL), as for lack of memory")
    if number == 0 and (STOPPED_IN_ORDER if code == 0 else CANCELLED).search("\n".join(lines)):
        number = signal.SIGTERM
    if number in STOP_SIGNALS:
        return Ending("stopped", f"it was ended by {signal.Signals(number).name}")
    if code and NOT_FINITE.search(last_line):
        return Ending("diverged", last_line)
    if code:
        what = f"ended by {signal.Signals(number).name}" if number else f"ended with exit code {code}"
        return Ending("crashed", f"{what}: {last_line}" if last_line else what)
    return _orderly_ending(evaluations, last_line, metrics=metrics)


def _orderly_ending(evaluations: Sequence[Evaluation], last_line: str, *, metrics: Sequence[str]) -> Ending:
    last = evaluations[-1] if evaluations else None
    if last is not None and all(name in last.values for name in metrics):
        if last.alarms:
            return Ending("collapsed", f"alarm at its end: {', '.join(last.alarms)}")
        return Ending("complete", "")
    absent = [name for name in metrics if last is None or name not in last.values]
    names = " and ".join(absent)
    if last is not None and (not last.finite or any(name in e.values for e in evaluations for name in absent)):
        return Ending("diverged", f"{names} is not finite at its end")
    reason = f"has no {names} at its end"
    return Ending("crashed", f"{reason}: {last_line}" if last_line else reason)


def _signal_number(code: int, lines: Sequence[str]) -> int:
    """Number of the signal that ended the command, or 0."""
    number = -code if code < 0 else code - 128 if code > 128 else 0
    if number in set(signal.Signals):
        return number
    match = WORKER_SIGNAL.search("\n".join(lines)) if code else None
    return int(match[1]) if match else 0


# ── another attempt ────────────────────────────────────────────────────────────────────────────────────────────────


class Attempts(NamedTuple):
    """Attempts at a trial so far, which the next attempt carries in its system attributes.

    Attributes:
        reached: Step of the last evaluation of any attempt; −1 without one.
        stalled: Attempts in a row that ended without progress.
        out_of_memory: The same, of those that ended for lack of memory.
    """

    reached: int = -1
    stalled: int = 0
    out_of_memory: int = 0


def reached_step(trial: FrozenTrial) -> int:
    """Step of the last evaluation of this attempt, −1 without one."""
    return int(trial.user_attrs.get("look", {}).get("step", -1))


def has_saved(trial: FrozenTrial) -> bool:
    """Whether this attempt wrote a checkpoint, as far as this machine can see."""
    start, folder = trial.datetime_start, trial.user_attrs.get("folder")
    return start is not None and folder is not None and saved_since(Path(folder) / RUN, start)


def next_attempts(trial: FrozenTrial, kind: Interruption, *, saved: bool) -> Attempts:
    """Attempts after this one ended.

    Args:
        trial: The attempt.
        kind: Why it ended.
        saved: Whether it wrote a checkpoint.
    """
    before = Attempts(*trial.system_attrs.get("attempts", ()))
    progress = saved or reached_step(trial) > before.reached
    reached = max(before.reached, reached_step(trial))
    if kind == "ordered":
        return before._replace(reached=reached, stalled=0 if progress else before.stalled)
    memory = int(kind == "out of memory")
    if progress:
        return Attempts(reached, 0, memory)
    return Attempts(reached, before.stalled + 1, before.out_of_memory + memory)


def first_number(trial: FrozenTrial) -> int:
    """Number of the trial that first drew these settings; it names their folder."""
    return int(trial.system_attrs.get("failed_trial", trial.number))


def make_retry(trial: FrozenTrial, kind: Interruption, *, saved: bool) -> FrozenTrial:
    """Trial that replaces an attempt that ended: a waiting one with the same settings, or a failed one.

    It has failed after :data:`MAX_STALLED` attempts in a row without progress, and where memory did not suffice for
    :data:`MAX_OUT_OF_MEMORY` attempts. Optuna's callback would also copy the user attributes, which describe the
    process that ended.
    """
    attempts = next_attempts(trial, kind, saved=saved)
    history = [*trial.system_attrs.get("retry_history", []), trial.number]
    attrs = {
        **trial.system_attrs,
        "failed_trial": first_number(trial),
        "retry_history": history,
        "attempts": list(attempts),
    }
    user_attrs = {name: value for name, value in trial.user_attrs.items() if name in ("seed", "repeats", "drawn")}
    state = TrialState.WAITING
    if attempts.out_of_memory >= MAX_OUT_OF_MEMORY:
        state = TrialState.PRUNED  # a sampler learns from it: a failed trial would be ignored
        user_attrs["ending"] = ["out of memory", f"memory did not suffice {attempts.out_of_memory} times"]
    elif attempts.stalled >= MAX_STALLED:
        state = TrialState.FAIL
        user_attrs["crash"] = f"given up after {attempts.stalled} attempts without progress"
    if state != TrialState.WAITING:
        user_attrs |= {name: trial.user_attrs[name] for name in ("look", "folder") if name in trial.user_attrs}
    return create_trial(
        state=state, params=trial.params, distributions=trial.distributions, user_attrs=user_attrs, system_attrs=attrs
    )


def is_replaced(number: int, trials: Iterable[FrozenTrial]) -> bool:
    """Whether another trial already replaces this attempt."""
    return any(number in t.system_attrs.get("retry_history", ()) for t in trials)
