"""Verdict on runs, by the project's rules for alarms, stopping and selection."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from repmetrics.decisions.alarms import CONSECUTIVE, RETRIEVAL_METRICS
from repmetrics.decisions.checkpoint_selection import EVIDENCE_FOR_LAST, select_checkpoint
from repmetrics.decisions.comparability import comparison_warnings
from repmetrics.decisions.early_stopping import PATIENCE, should_stop
from repmetrics.decisions.run_selection import tied_with_best
from repmetrics.measurement.registry import METRICS, PROBES
from repmetrics.measurement.result import Measurement, format_value
from repmetrics.measurement.titles import metric_title
from repmetrics.monitoring.record import Record
from repmetrics.report.runs import Run
from repmetrics.report.settings import varying_settings

SIGNALS = (RETRIEVAL_METRICS[-1], "rankme")
"""Signals that decide, the first that every run has. docs/trust.md tells why view retrieval is before RankMe."""


class Verdict(NamedTuple):
    """Verdict on one run.

    Attributes:
        state: "healthy", "alarm" or "not known".
        sentence: State, trend and step to keep in one sentence.
        keep: Record to keep, or None.
        reasons: Reasons in sentences.
    """

    state: str
    sentence: str
    keep: Record | None
    reasons: tuple[str, ...]


def signal(runs: Sequence[Run], requested: str | None = None) -> str:
    """Metric that decides: the requested one, or the first of :data:`SIGNALS` that every run has.

    Raises:
        ValueError: A run lacks it, or it has no better direction.
    """
    candidates = SIGNALS if requested is None else (requested,)
    for name in candidates:
        if all(any(not math.isnan(m.value) for _, m in run.values(name)) for run in runs):
            if name in METRICS and METRICS[name].direction == "neither":
                raise ValueError(f"{name} has no better direction: decide --by another")
            return name
    common = [name for name in runs[0].metrics if all(name in run.metrics for run in runs)]
    raise ValueError(
        f"not every run has a value of {' or '.join(candidates)}: decide --by one of {', '.join(common) or 'none'}"
    )


def judge(run: Run, by: str, *, keep_best: bool = False) -> Verdict:
    """Verdict on one run by one metric.

    Records after step 0 without an alarm are candidates to keep. Files of records have no jackknife replicates, so that
    no paired errors are known: any improvement counts, and there is no plateau.

    Args:
        run: Run to judge.
        by: Metric of the trend.
        keep_best: Keeps the record with the best value instead of the last one, as is done for records without steps.
    """
    last = run.records[-1]
    alarmed = [record for record in run.records if record.alarms]
    candidates = [r for r in _healthy(run) if _value(r, by) is not None]
    keep, reasons = _keep(candidates, by, best=keep_best or not run.steps)
    step = "" if keep is None else f"keep {_place(run, keep)}"
    if last.alarms:
        state = "alarm"
        text = "; ".join(alarm.kind for alarm in last.alarms)
        sentence = f"Alarm: {text} at {_place(run, last)}; {step or 'no checkpoint to keep'}."
    elif len(candidates) < 2:
        state = "healthy" if candidates else "not known"
        sentence = f"No alarm at {_place(run, last)}; too few evaluations after step 0 for a trend."
        if not run.steps:
            sentence = f"{_value_text(last, by)}: {metric_title(by)} of one checkpoint, without a trend."
    else:
        state = "healthy"
        trend, stop, reason = _trend(candidates, by)
        reasons.insert(0, reason)
        sentence = f"{'Healthy' if not alarmed else 'No alarm now'}, {trend}: {step}; {stop}."
    reasons = [*probes_below_references(run), *reasons]
    reasons += [
        f"{alarm.kind.capitalize()} at {_place(run, record)}: {alarm.reason}."
        for record in alarmed[:3]
        for alarm in record.alarms
    ]
    if len(alarmed) > 3:
        reasons.append(f"An alarm was active at {len(alarmed)} of {len(run.records)} evaluations.")
    return Verdict(state, sentence, keep, tuple(reasons))


def probes_below_references(run: Run) -> list[str]:
    """Sentences on probes whose last value is below that at step 0, or below that of color statistics alone.

    They compare values and show the errors, where these are known. They are no test beyond noise.
    """
    first, last = run.records[0], run.records[-1]
    sentences = []
    for name, m in last.measurements.items():
        if name.rpartition("/")[2] not in PROBES:
            continue
        probe = metric_title(name).replace("kNN", "kNN probe")
        before = first.measurements.get(name) if run.steps and first.step == 0 else None
        if before is not None and m.value < before.value:
            values = f"{_value_text(last, name)} against {_value_text(first, name)}"
            sentences.append(f"At the end, the {probe} is below that of step 0, before training: {values}.")
        colors = m.details.get("null_floor", math.nan)
        if m.value < colors:
            values = f"{_value_text(last, name)} against {format_value(colors, None)}"
            sentences.append(f"At the end, the {probe} is below that of color statistics alone: {values}.")
    return sentences


def _healthy(run: Run) -> list[Record]:
    """Records of a trained network that raise no alarm, nor show what the next ones raise an alarm for.

    Of checkpoints without steps, the first may be trained too.
    """
    shows = [bool(record.nonfinite or record.alarms) for record in run.records]
    for k, record in enumerate(run.records):
        if any(alarm.kind != "not finite" for alarm in record.alarms):  # of CONSECUTIVE evaluations
            shows[max(0, k - CONSECUTIVE + 1) : k] = [True] * min(k, CONSECUTIVE - 1)
    return [r for r, ill in zip(run.records, shows, strict=True) if not ill and (r.step > 0 or not run.steps)]


def _keep(candidates: Sequence[Record], by: str, *, best: bool) -> tuple[Record | None, list[str]]:
    """The record to keep, the last or the one with the best value, and the reasons."""
    if len(candidates) < 2:
        return (candidates[0] if candidates else None), []
    measured = [record.measurements[by] for record in candidates]
    peak = select_checkpoint([{by: _without_error(m)} for m in measured], by=by).position
    extreme = "highest" if measured[0].direction == "higher" else "lowest"
    value = format_value(measured[peak].value, measured[peak].standard_error)
    reasons = [f"Step {candidates[peak].step:,} has the {extreme} {metric_title(by)} after step 0, {value}."]
    if steps := _others_within_noise(candidates, measured, peak):
        reasons.append(
            f"Within two standard errors of it, taken as independent: step {steps}. `repmetrics select` on the "
            "checkpoints compares them by paired differences."
        )
    if best:
        return candidates[peak], reasons
    last = candidates[-1]
    rule = f"Step {last.step:,} is the last without an alarm; {EVIDENCE_FOR_LAST}."
    return last, [rule, *reasons]


def _others_within_noise(candidates: Sequence[Record], measured: Sequence[Measurement], peak: int) -> str:
    """Steps within two standard errors of the best, without the best; empty if there are none or no errors."""
    if measured[peak].standard_error is None:
        return ""
    values, errors = [m.value for m in measured], [m.standard_error for m in measured]
    tied = tied_with_best(values, errors, direction=measured[0].direction)
    steps = [f"{candidates[k].step:,}" for k in tied if k != peak]
    return ", ".join(steps) if len(steps) <= 6 else f"{steps[0]} and {len(steps) - 1} others up to {steps[-1]}"


def _trend(candidates: Sequence[Record], by: str) -> tuple[str, str, str]:
    """Trend and advice of the stopping rule in a few words, and its reason as a sentence."""
    measured = [_without_error(record.measurements[by]) for record in candidates]
    decision, improved = should_stop(measured), not should_stop(measured, patience=1).stop
    if decision.stop:
        trend, stop = "no longer improving", f"training may stop, by the rule with patience {PATIENCE}"
    else:
        trend, stop = ("still improving" if improved else "level for now"), "no reason to stop"
    reason = decision.reason.replace(" by more than 2 standard errors", "")
    return trend, stop, f"Stopping rule, on medians of three: {reason}."


def _without_error(m: Measurement) -> Measurement:
    return replace(m, standard_error=None, reason="paired errors are not in the record")


def _value(record: Record, by: str) -> float | None:
    m = record.measurements.get(by)
    return None if m is None or math.isnan(m.value) else m.value


def _value_text(record: Record, by: str) -> str:
    m = record.measurements[by]
    return format_value(m.value, m.standard_error)


def _place(run: Run, record: Record) -> str:
    return f"step {record.step:,}" if run.steps else run.name


def compare_runs(runs: Sequence[Run], by: str) -> list[str]:
    """Which run is best at its last evaluation without an alarm, what noise cannot distinguish, and unfair comparisons.

    Example:
        >>> from repmetrics.monitoring.record import Record
        >>> value = Measurement("rankme", 3.0, 0.1, None, "higher", 9, 4, 3, "", "float32")
        >>> records = [Record(5, 0, 1.0, {"rankme": replace(value, value=v)}) for v in (3.0, 2.0)]
        >>> runs = [Run(name, [record]) for name, record in zip("ab", records)]
        >>> compare_runs(runs, "rankme")[0]
        'a has the highest RankMe at its end, 3.00 ± 0.10, beyond noise.'
    """
    finals = [(run, run.records[-1].measurements[by]) for run in runs
              if not run.records[-1].alarms and _value(run.records[-1], by) is not None]  # fmt: skip
    if len(runs) < 2:
        return []
    if not finals:
        return ["No run ends without an alarm: none is to be kept as it is."]
    values, errors = [m.value for _, m in finals], [m.standard_error for _, m in finals]
    direction = finals[0][1].direction
    tied = tied_with_best(values, errors, direction=direction)
    best = (max if direction == "higher" else min)(tied, key=lambda k: values[k])
    others = [finals[k][0].name for k in tied if k != best]
    text = f"{finals[best][0].name} has the {'highest' if direction == 'higher' else 'lowest'} {metric_title(by)} "
    text += f"at its end, {format_value(values[best], errors[best])}"
    if others:
        text += f"; noise cannot distinguish it from {', '.join(others)}"
    elif None in errors:
        text += "; without errors, nobody knows whether others are as good"
    elif len(finals) > 1:
        text += ", beyond noise"
    excluded = [run.name for run in runs if run.records[-1].alarms]
    sentences = [f"{text}.", *([f"Left out, since they end with an alarm: {', '.join(excluded)}."] if excluded else [])]
    warnings = comparison_warnings(
        varying_settings([run.settings for run in runs]),
        methods=[run.method for run in runs],
        widths=[m.d for _, m in finals],
        metrics=[by],
    )
    return sentences + [f"{warning[0].upper()}{warning[1:]}." for warning in warnings]
