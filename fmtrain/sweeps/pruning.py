"""Pruners that compare trials by their values at one step.

Optuna's median and percentile pruners compare the best value so far. A rank is highest in an untrained network, so that
a run that collapses keeps a high best value.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from optuna import Study
from optuna.pruners import BasePruner
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from fmtrain.sweeps.process import Evaluation

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
        self.percentile = percentile
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
        return is_behind(trial, trials, share=self.percentile / 100, minimum=self.n_min_trials, study=study)


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
    step = last_steps(trial)[0]
    others = [t for t in trials if t.number != trial.number and t.state != TrialState.FAIL]
    reached = [t for t in others if last_steps(t)[0] >= step]
    if len(reached) < minimum:
        return False
    sign = 1 if study.direction == StudyDirection.MAXIMIZE else -1
    scores = [_score(sign * value_at(t, step)) for t in reached]
    score = _score(sign * trial.intermediate_values[step])
    threshold = float(np.quantile([*scores, score], 1 - share, method="lower"))
    return score < threshold


def value_at(trial: FrozenTrial, step: int) -> float:
    """Last value at or before a step; NaN without one."""
    steps = [s for s in trial.intermediate_values if s <= step]
    return trial.intermediate_values[max(steps)] if steps else math.nan


def _score(value: float) -> float:
    return -math.inf if math.isnan(value) else value


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
