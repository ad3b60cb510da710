"""Repetition of the best settings with other seeds. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence

from optuna.trial import FrozenTrial, TrialState, create_trial

from fmtrain.sweeps.decisions import finished, is_repeat
from fmtrain.sweeps.settings import Sweep

UNREPEATED = {"repeats", "imported", "ending"}
"""Attributes of trials that are not repeated: repeats, imported runs, and those that diverged or collapsed."""


def missing_repeats(trials: Sequence[FrozenTrial], sweep: Sweep) -> list[tuple[int, int]]:
    """Numbers of the best trials and the seeds with which they are still to be repeated.

    Trials that were pruned, diverged or collapsed are not repeated.
    """
    if sweep.seeds.count < 2 or len(sweep.metrics) > 1:
        return []
    search = [t for t in trials if t.state == TrialState.COMPLETE and t.user_attrs.keys().isdisjoint(UNREPEATED)]
    sign = -1 if sweep.directions[0] == "maximize" else 1
    best = sorted(search, key=lambda t: sign * t.values[0])[: sweep.seeds.best]
    alive = (TrialState.RUNNING, TrialState.WAITING)
    present = {(t.user_attrs["repeats"], t.user_attrs["seed"]) for t in trials if is_repeat(t) and _counts(t, alive)}
    pairs = [(t.number, fresh_seed(t.number, k)) for t in best for k in range(1, sweep.seeds.count)]
    return [pair for pair in pairs if pair not in present]


def _counts(trial: FrozenTrial, alive: Sequence[TrialState]) -> bool:
    return finished(trial) or trial.state in alive


def fresh_seed(number: int, repeat: int) -> int:
    """Seed of a repeat, which all drivers agree on.

    Example:
        >>> fresh_seed(3, 1)
        1003
    """
    return 1000 * repeat + number


def make_repeat(trial: FrozenTrial, seed: int) -> FrozenTrial:
    """Waiting trial with the settings of another and a new seed."""
    return create_trial(
        state=TrialState.WAITING,
        params=trial.params,
        distributions=trial.distributions,
        user_attrs={"repeats": trial.number, "seed": seed},
    )
