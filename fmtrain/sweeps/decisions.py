"""Decisions about the trials of a study: which count, what a driver does next, when the budget is spent. No I/O."""

from __future__ import annotations

from collections.abc import Iterable

from optuna.trial import FrozenTrial, TrialState

from fmtrain.sweeps.endings import first_number, reached_step

MAX_INITIAL_CRASHES = 3
"""Number of crashes before any success after which a driver gives up."""


def finished(trial: FrozenTrial) -> bool:
    """Whether a trial was completed, was pruned or crashed. A trial given to another driver does not count."""
    return is_crashed(trial) or trial.state in (TrialState.COMPLETE, TrialState.PRUNED)


def current(trials: Iterable[FrozenTrial]) -> list[FrozenTrial]:
    """Trials without the attempts that another trial replaces."""
    trials = list(trials)
    replaced = {number for t in trials for number in t.system_attrs.get("retry_history", ())}
    return [t for t in trials if t.number not in replaced]


def is_crashed(trial: FrozenTrial) -> bool:
    """Whether a trial crashed, or was given up."""
    return trial.state == TrialState.FAIL and "crash" in trial.user_attrs


def is_repeat(trial: FrozenTrial) -> bool:
    """Whether the trial repeats the settings of another with a new seed."""
    return "repeats" in trial.user_attrs


def is_search(trial: FrozenTrial) -> bool:
    """Whether the trial counts as one of the search.

    Finished runs that were imported do not, nor do repeats, apart from settings that the sampler drew again.
    """
    return "drawn" in trial.user_attrs or not trial.user_attrs.keys() & {"repeats", "imported"}


def same_settings(trials: Iterable[FrozenTrial], number: int) -> list[FrozenTrial]:
    """Earlier trials of the search with the settings of this one, unless this one repeats or resumes a trial."""
    trials = list(trials)
    trial = next(t for t in trials if t.number == number)
    if "failed_trial" in trial.system_attrs or is_repeat(trial):
        return []
    return [t for t in _earlier(trials, number) if is_search(t) and t.params == trial.params]


def _earlier(trials: Iterable[FrozenTrial], number: int) -> list[FrozenTrial]:
    """Trials with a lower number that have finished, run or wait."""
    alive = (TrialState.RUNNING, TrialState.WAITING)
    return [t for t in current(trials) if t.number < number and (finished(t) or t.state in alive)]


def next_step(trials: Iterable[FrozenTrial], *, wanted: float, spent: bool = False) -> str:
    """Next step of a driver: "ask" for a trial, "wait" for the trials of other drivers, or "done".

    Args:
        trials: Trials of the study.
        wanted: Number of trials to be finished.
        spent: Whether the budget of steps or hours is spent, so that no trial is begun.
    """
    trials = current(trials)
    done = sum(map(finished, trials))
    running = sum(t.state == TrialState.RUNNING for t in trials)
    if done >= wanted or (spent and not running):
        return "done"
    return "wait" if done + running >= wanted or spent else "ask"


def is_spent(trials: Iterable[FrozenTrial], *, steps: int | None, hours: float | None) -> bool:
    """Whether all trials together have used the budget of optimizer steps, or of hours."""
    ended = [t for t in trials if t.datetime_complete is not None and "imported" not in t.user_attrs]
    reached: dict[int, int] = {}  # attempts at one trial share its steps
    for t in ended:
        reached[first_number(t)] = max(reached.get(first_number(t), 0), reached_step(t))
    used = sum(map(seconds_used, ended)) / 3600
    return (steps is not None and sum(reached.values()) >= steps) or (hours is not None and used >= hours)


def seconds_used(trial: FrozenTrial) -> float:
    """Time for which an attempt ran. The end of an interrupted one may be noticed late: its last evaluation counts."""
    if trial.duration is None:
        return 0.0
    if finished(trial):
        return trial.duration.total_seconds()
    return float(trial.user_attrs.get("look", {}).get("seconds", 0.0))


def is_surplus(trials: Iterable[FrozenTrial], number: int, *, wanted: float, grid: bool = False) -> bool:
    """Whether the trial is one too many: two drivers asked at the same time, this one later.

    Either the wanted number is reached without it, or an earlier trial has the same settings and seed where each is
    wanted once: in a grid, and among repeats.
    """
    trials = list(trials)
    trial = next(t for t in trials if t.number == number)
    earlier = _earlier(trials, number)
    if is_repeat(trial) and not is_search(trial):
        key = (trial.user_attrs["repeats"], trial.user_attrs["seed"])
        return any((t.user_attrs.get("repeats"), t.user_attrs.get("seed")) == key for t in earlier)
    search = [t for t in earlier if is_search(t)]
    return len(search) >= wanted or (grid and any(t.params == trial.params for t in search))


def initial_crashes(trials: Iterable[FrozenTrial], *, wanted: float) -> int:
    """Number of crashed trials if it is enough to give up, else 0.

    It is enough if no trial of any driver was completed or pruned before.
    """
    counted = [trial for trial in current(trials) if finished(trial)]
    crashed = sum(trial.state == TrialState.FAIL for trial in counted)
    return crashed if crashed == len(counted) and crashed >= min(MAX_INITIAL_CRASHES, wanted) else 0
