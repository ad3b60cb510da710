"""Pruners that compare trials by their values at one step.

Optuna's median and percentile pruners compare the best value so far. A rank is highest in an untrained network, so that
a run that collapses keeps a high best value.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from optuna import Study
from optuna.pruners import BasePruner
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from fmtrain.sweeps.process import Evaluation

DRAWS = 2_000
"""Draws of the standard errors, for the confidence in pruning a trial."""

STANDING = 2
"""Evaluations in a row at which an alarm must be active before it ends a trial."""


class PercentileAtStep(BasePruner):
    """Prunes a trial whose value at a step is below the percentile of all trials that reached this step.

    The options are those of Optuna's PercentilePruner.

    Args:
        percentile: Share of the trials that continue, in percent.
        n_startup_trials: Completed trials before the first decision.
        n_warmup_steps: Steps before the first decision.
        interval_steps: Steps between decisions.
        n_min_trials: Other trials that must have reached the step.
    """

    def __init__(
        self,
        percentile: float,
        n_startup_trials: int = 5,
        n_warmup_steps: int = 0,
        interval_steps: int = 1,
        *,
        n_min_trials: int = 1,
    ) -> None:
        if not 0 <= percentile <= 100:
            raise ValueError(f"percentile must be between 0 and 100, got {percentile}")
        if min(n_startup_trials, n_warmup_steps) < 0 or min(interval_steps, n_min_trials) < 1:
            raise ValueError("interval_steps and n_min_trials must be at least 1, the other options at least 0")
        self.keep = percentile / 100
        self.n_startup_trials, self.n_warmup_steps = n_startup_trials, n_warmup_steps
        self.interval_steps, self.n_min_trials = interval_steps, n_min_trials

    def prune(self, study: Study, trial: FrozenTrial) -> bool:
        """Whether to prune the trial at its last step."""
        trials = study.get_trials(deepcopy=False)
        step, previous = last_steps(trial)
        if step <= self.n_warmup_steps or step // self.interval_steps == previous // self.interval_steps:
            return False
        if sum(t.state == TrialState.COMPLETE for t in trials) < self.n_startup_trials:
            return False
        return is_behind(trial, trials, share=self.keep, minimum=self.n_min_trials, study=study)


class MedianAtStep(PercentileAtStep):
    """Prunes a trial whose value at a step is below the median of all trials that reached this step.

    Args:
        n_startup_trials: Completed trials before the first decision.
        n_warmup_steps: Steps before the first decision.
        interval_steps: Steps between decisions.
        n_min_trials: Other trials that must have reached the step.
    """

    def __init__(
        self, n_startup_trials: int = 5, n_warmup_steps: int = 0, interval_steps: int = 1, *, n_min_trials: int = 1
    ) -> None:
        super().__init__(50.0, n_startup_trials, n_warmup_steps, interval_steps, n_min_trials=n_min_trials)


class Stages(BasePruner):
    """Keeps the better half of the trials at shares of a run's length, as in the experiment of docs/trust.md.

    Args:
        run_steps: Steps of a whole run.
        shares: Shares of the run after which trials are compared, each once.
        keep: Share of the trials that continue.
        n_min_trials: Other trials that must have reached the stage.
    """

    def __init__(
        self, run_steps: int, shares: Sequence[float] = (0.15, 0.3), keep: float = 0.5, n_min_trials: int = 3
    ) -> None:
        if not shares or not all(0 < share < 1 for share in shares) or not 0 < keep < 1:
            raise ValueError("shares and keep must be between 0 and 1")
        self.steps = [math.ceil(share * run_steps) for share in shares]
        self.keep, self.n_min_trials = keep, n_min_trials

    def prune(self, study: Study, trial: FrozenTrial) -> bool:
        """Whether to prune the trial at its last step."""
        step, previous = last_steps(trial)
        if not any(previous < stage <= step for stage in self.steps):
            return False
        trials = study.get_trials(deepcopy=False)
        return is_behind(trial, trials, share=self.keep, minimum=self.n_min_trials, study=study)


def last_steps(trial: FrozenTrial) -> tuple[int, int]:
    """Steps of the last value and of the one before it; −1 for none."""
    steps = [-1, -1, *sorted(trial.intermediate_values)]
    return steps[-1], steps[-2]


def is_behind(trial: FrozenTrial, trials: Sequence[FrozenTrial], *, share: float, minimum: int, study: Study) -> bool:
    """Whether the trial's last value is not among this share of the best at its step. NaN is worst."""
    compared = _compared(trial, trials)
    return len(compared) > minimum and bool(_behind(np.array([_scores(compared, study)]), share=share)[0])


def share_behind(pruner: BasePruner, study: Study, trial: FrozenTrial, *, metric: str) -> float | None:
    """Share of draws of the standard errors in which the trial is pruned too: the confidence in pruning it.

    The errors are those of each trial's last evaluation, drawn independently. What trials share over the same slides
    does not cancel, so that the share is rather too close to the half than too far from it.

    Args:
        pruner: Pruner of the study.
        study: Study, with the trial.
        trial: Trial that is pruned.
        metric: Metric of the study.

    Returns:
        The share, or None for other pruners than those of this module, or without errors.
    """
    if not isinstance(pruner, PercentileAtStep | Stages):
        return None
    compared = _compared(trial, study.get_trials(deepcopy=False))
    errors = [(t.user_attrs.get("look", {}).get("signals", {}).get(metric) or (0.0, None))[1] for t in compared]
    if any(error is None for error in errors):
        return None
    noise = np.random.default_rng(0).standard_normal((DRAWS, len(compared)))
    return float(_behind(_scores(compared, study) + noise * np.array(errors), share=pruner.keep).mean())


def _compared(trial: FrozenTrial, trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """The trials that have reached the trial's step, and last the trial."""
    step = last_steps(trial)[0]
    others = [t for t in trials if t.number != trial.number and t.state != TrialState.FAIL]
    return [*(t for t in others if last_steps(t)[0] >= step), trial]


def _scores(compared: Sequence[FrozenTrial], study: Study) -> NDArray[np.float64]:
    """Value of each trial at the last one's step, higher is better. NaN is worst."""
    step = last_steps(compared[-1])[0]
    sign = 1 if study.direction == StudyDirection.MAXIMIZE else -1
    values = np.array([sign * value_at(t, step) for t in compared])
    return np.nan_to_num(values, nan=-np.inf, posinf=np.inf, neginf=-np.inf)


def _behind(scores: NDArray[np.float64], *, share: float) -> NDArray[np.bool_]:
    """Whether the last of each row (draws, trials) is not among this share of the best."""
    return scores[:, -1] < np.quantile(scores, 1 - share, axis=1, method="lower")


def value_at(trial: FrozenTrial, step: int) -> float:
    """Last value at or before a step; NaN without one."""
    steps = [s for s in trial.intermediate_values if s <= step]
    return trial.intermediate_values[max(steps)] if steps else math.nan


def standing_alarms(evaluations: Sequence[Evaluation]) -> tuple[str, ...]:
    """Alarms that the last :data:`STANDING` evaluations share.

    Example:
        >>> standing_alarms([Evaluation(k, ("collapse",), {}, finite=True) for k in (1, 2)])
        ('collapse',)
    """
    recent = evaluations[-STANDING:]
    if len(recent) < STANDING:
        return ()
    return tuple(kind for kind in recent[-1].alarms if all(kind in e.alarms for e in recent))
