"""Comparison of two checkpoints, and the choice of the one to keep, as pure functions of measurements."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np

from repmetrics.decisions.alarms import Alarm
from repmetrics.decisions.slide_draws import draw_values, format_share
from repmetrics.measurement.registry import depends_on_width
from repmetrics.measurement.result import Measurement, difference

Scores = Mapping[str, Measurement]
Outcome = Literal["better", "worse", "no difference", "unknown"]


class Comparison(NamedTuple):
    """Comparison of the second checkpoint with the first, on one metric.

    Attributes:
        name: Name of the metric.
        change: Second − first.
        standard_error: Standard error of the change, paired over the same groups; None without groups.
        margin: Half-width of the 95 % interval of the change; None without groups.
        degrees_of_freedom: Degrees of freedom of the margin.
        outcome: "better" or "worse" beyond noise, "no difference" within it, "unknown" without an error or direction.
        reason: Reason of "unknown".
    """

    name: str
    change: float
    standard_error: float | None
    outcome: Outcome
    reason: str | None = None
    margin: float | None = None
    degrees_of_freedom: float | None = None

    @property
    def z(self) -> float:
        """Change in standard errors; NaN without an error, 0 for no change."""
        if self.standard_error is None:
            return math.nan
        if self.change == 0:
            return 0.0
        return self.change / self.standard_error if self.standard_error else math.copysign(math.inf, self.change)


def compare(first: Scores, second: Scores) -> list[Comparison]:
    """Compare two checkpoints on each common metric.

    The error of a change is that of the paired jackknife: the variation that both checkpoints share over the same
    slides cancels. A change counts as a difference beyond the margin of its 95 % interval. Where nothing differs, it
    does so in at most 6 % of cases, from 2 groups up, equal or not (``benchmarks/coverage.py``).
    """
    names = [name for name in first if name in second]
    if not names:
        raise ValueError("nothing to compare: the two have no metric in common")
    return [_compare_metric(first[name], second[name]) for name in names]


def _compare_metric(first: Measurement, second: Measurement) -> Comparison:
    change = second.value - first.value
    if math.isnan(change):
        return Comparison(first.name, change, None, "unknown", first.reason or second.reason)
    if first.n != second.n:
        raise ValueError(f"{first.name} was measured on {first.n} and on {second.n} rows: compare on the same data")
    if first.d != second.d and depends_on_width(first.name):
        widths = f"D = {first.d} and D = {second.d}: it compares only at one D"
        return Comparison(first.name, change, None, "unknown", widths)
    if first.standard_error is None or second.standard_error is None:
        return Comparison(first.name, change, None, "unknown", first.reason or second.reason)
    value, error, margin, freedom = difference(first, second)
    reason: str | None = None
    outcome: Outcome = "no difference"
    if first.direction == "neither":
        outcome, reason = "unknown", "neither direction is better"
    elif abs(value) > margin:
        outcome = "better" if (value > 0) == (first.direction == "higher") else "worse"
    return Comparison(first.name, value, error, outcome, reason, margin, freedom)


class Choice(NamedTuple):
    """The checkpoint to keep.

    Attributes:
        position: Its position in the order of training.
        by: Metric of the choice.
        peak: Position of the best value.
        tied: Positions that are not worse than the best beyond noise.
        reason: Reason of the choice, in words.
        confidence: Confidence in the choice, in words.
        share: Share of bootstrap draws in which the same checkpoint is chosen; None without errors.
    """

    position: int
    by: str
    peak: int
    tied: tuple[int, ...]
    reason: str
    confidence: str
    share: float | None = None


def select_checkpoint(scores: Sequence[Scores], *, by: str = "rankme") -> Choice:
    """Select a checkpoint by RankMe's rule: the best value, and on a plateau the first checkpoint that reaches it.

    A checkpoint is on the plateau if the best is not better beyond the margin of the paired difference. Without errors
    there is no plateau, and the best value is selected.

    Args:
        scores: Measurements of each checkpoint, in the order of training.
        by: Metric of the choice.
    """
    if len(scores) < 2:
        raise ValueError(f"a choice needs at least 2 checkpoints, got {len(scores)}")
    if missing := sum(by not in score for score in scores):
        raise ValueError(f"{by!r} was not measured for {missing} of {len(scores)} checkpoints")
    measured = [score[by] for score in scores]
    if measured[0].direction == "neither":
        raise ValueError(f"{by} has no better direction: choose by another")
    sign = 1 if measured[0].direction == "higher" else -1
    valid = [i for i, m in enumerate(measured) if not math.isnan(m.value)]
    if not valid:
        raise ValueError(f"{by} is NaN for every checkpoint: {measured[0].reason}")
    peak = max(valid, key=lambda i: sign * measured[i].value)
    comparisons = {i: _compare_metric(measured[i], measured[peak]) for i in valid if i != peak}
    tied = tuple(i for i in valid if i == peak or comparisons[i].outcome == "no difference")
    extreme = "highest" if sign > 0 else "lowest"
    if tied[0] == peak:
        reason = f"it has the {extreme} {by}, {measured[peak].value:.6g}"
    else:
        reason = (
            f"the first whose {by} ({measured[tied[0]].value:.6g}) is within noise of the {extreme}, "
            f"{measured[peak].value:.6g}"
        )
    share = None
    if all(comparison.standard_error is not None for comparison in comparisons.values()):
        share = choice_share([measured[i] for i in valid], chosen=valid.index(tied[0]), sign=sign)
    confidence = _confidence(list(comparisons.values()), tied)
    if share is not None:
        confidence += f"; it is chosen in {format_share(share)} of draws over groups"
    return Choice(tied[0], by, peak, tied, reason, confidence, share)


EVIDENCE_FOR_LAST = (
    "no metric chose better within a run than the last checkpoint, beyond noise; it lost 0.5 to 1.8 points against the "
    "best one (docs/trust.md)"
)


def last_without_alarm(alarms: Sequence[Sequence[Alarm]]) -> Choice:
    """Select the last checkpoint that raises no alarm: the default within one run.

    Where every checkpoint raises one, as networks with a large common offset may, it is the last; the reason says so.

    Args:
        alarms: Alarms of each checkpoint, in the order of training.

    Example:
        >>> from repmetrics.decisions.alarms import Alarm
        >>> last_without_alarm([(), (), (Alarm("dead features", "30% of the features do not vary"),)]).position
        1
    """
    if len(alarms) < 2:
        raise ValueError(f"a choice needs at least 2 checkpoints, got {len(alarms)}")
    healthy = [position for position, raised in enumerate(alarms) if not raised]
    position = healthy[-1] if healthy else len(alarms) - 1
    reason = "it is the last checkpoint, and raises no alarm"
    if not healthy:
        reason = f"it is the last checkpoint, but every one raises an alarm, the last: {_alarm_text(alarms[-1])}"
    elif later := alarms[position + 1 :]:
        count = f"the {len(later)} later ones raise" if len(later) > 1 else "the later one raises"
        reason = f"it is the last checkpoint without an alarm; {count}: {_alarm_text(later[0])}"
    return Choice(position, "last", position, (position,), reason, EVIDENCE_FOR_LAST)


def _alarm_text(alarms: Sequence[Alarm]) -> str:
    return ", ".join(f"{alarm.kind} ({alarm.reason})" for alarm in alarms)


def choice_share(measured: Sequence[Measurement], *, chosen: int, sign: int) -> float | None:
    """Share of draws of the slides in which the rule chooses the same checkpoint; None without paired errors.

    Args:
        measured: Measurements of the checkpoints, in the order of training.
        chosen: Position of the chosen one.
        sign: 1 if higher is better, else −1.
    """
    values = draw_values(measured) if len(measured) > 1 else None
    if values is None:
        return None
    margins = np.array([[0.0 if a is b else difference(a, b).margin for b in measured] for a in measured])
    scores = sign * values
    peak = scores.argmax(1)
    tied = scores.max(1, keepdims=True) - scores <= margins[peak]
    return float((tied.argmax(1) == chosen).mean())


def _confidence(comparisons: Sequence[Comparison], tied: Sequence[int]) -> str:
    if not comparisons:
        return "it is the only one that has a value"
    if unknown := [comparison for comparison in comparisons if comparison.standard_error is None]:
        return f"not known: {unknown[0].reason}"
    if len(tied) > 1:
        return f"{len(tied)} of {len(comparisons) + 1} checkpoints cannot be told apart"
    nearest = min(abs(comparison.z) for comparison in comparisons)
    return f"the nearest other is {nearest:.1f} paired standard errors away"
