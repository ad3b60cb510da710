"""The trust report in sentences and as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence

from repmetrics.trust.agreement import Agreement
from repmetrics.trust.bootstrap import Interval
from repmetrics.trust.multiplicity import FAMILY_ERROR, Question, answers, holm, shown_signs
from repmetrics.trust.report import Trust
from repmetrics.trust.selection import SET_SIZE


def report_summary(report: Trust, target: str) -> list[str]:
    """Conclusions for one target, in sentences. Only what holds for all metrics and questions together is stated."""
    agreements = [a for a in report.agreements if a.target == target]
    regrets = {r.signal: r for r in report.regrets if r.target == target}
    signs = shown_signs(report, target)
    within, positive = _correlations(agreements, "within a run", "within", signs)
    if step_only := [metric for metric in positive if signs["beyond_time", metric] != 1]:
        within += f"; no information beyond the step is shown for {', '.join(step_only)}"
    checkpoint = f"selecting a checkpoint: the last costs {format_interval(regrets['last'].checkpoint)}"
    if not math.isnan(noise := report.noise[target]):
        checkpoint += f" (the probe's noise alone would cost a perfect selector up to {noise:.4f})"
    among, _ = _correlations(agreements, "among runs", "across", signs)
    among += f"; selecting a run: a random one costs {format_interval(regrets['random'].run)}"
    return [
        f"{within}.",
        f"{checkpoint}; {_costs('against_last', signs)}.",
        f"{among}; {_costs('against_random', signs)}.",
    ]


def multiplicity_note(report: Trust, target: str) -> str:
    """How the sentences of one target hold together, and how many single intervals exclude zero."""
    intervals = [interval for interval in answers(report, target).values() if not math.isnan(interval.p)]
    if not intervals:
        return ""
    excluding = sum(interval.sign() != 0 for interval in intervals)
    return (
        f"these sentences hold together at 95 % (Holm's method over {len(intervals)} intervals); taken singly, "
        f"{excluding} of the intervals exclude zero, and {FAMILY_ERROR * len(intervals):.0f} would by chance"
    )


def lead(report: Trust, target: str) -> str:
    """One sentence: what choosing a run by the best signal loses, next to a random choice."""
    best, *_ = selections = report.selections[target]
    k, chance = min(SET_SIZE, best.runs), best.regret.value + best.gain.value
    cost = f"loses {format_interval(best.regret)} of {target}, a random choice {chance:.4f}"
    if math.isnan(best.gain.low):
        shown = f"; {best.runs} runs are too few to tell whether it is better"
    elif best.gain.value > 0 and holm([s.gain.p for s in selections])[0] <= FAMILY_ERROR:
        shown = ""
    else:
        shown = "; it is not shown to be better"
    return f"Choosing the best of {k} random runs by {best.signal} {cost}{shown}."


def selection_rows(report: Trust, target: str) -> list[tuple[str, ...]]:
    """Heads and rows of the table of signals that select among runs, best first."""
    rows: list[tuple[str, ...]] = [
        ("signal", "pairwise accuracy", "within a method", f"regret, best of {SET_SIZE}", "random - regret")
    ]
    for s in report.selections[target]:
        shares = [format_interval(accuracy, places=2) for accuracy in (s.pairwise, s.pairwise_within)]
        rows.append((s.signal, *shares, format_interval(s.regret), format_interval(s.gain)))
    return rows


def multiplicity(report: Trust, target: str) -> str:
    """What the number of compared signals means for the sentence and the table."""
    count = len(report.selections[target])
    return (
        f"{count} signals are compared: the sentence counts them (Holm's method), the intervals of the table do not. "
        "The first row looks better than it is: confirm it on other runs."
    )


def summarize(reports: Sequence[Trust], targets: Sequence[str]) -> list[str]:
    """The whole report in lines: a sentence and a table per target, then all scopes, the widest first."""
    lines = []
    for target in targets if reports[-1].selections else ():
        table = selection_rows(reports[-1], target)
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines += [lead(reports[-1], target), ""]
        lines += [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table
        ]
        lines += ["", multiplicity(reports[-1], target), ""]
    for report in reversed(reports):
        lines.append(f"{report.scope}: {report.runs} runs, {report.looks} evaluations")
        lines += [f"  ({note})" for note in report.notes]
        for target in targets:
            sentences = [*report_summary(report, target), multiplicity_note(report, target)]
            lines += [f"  {target}", *(f"    {line}" for line in sentences if line)]
    return lines


def to_json(reports: Sequence[Trust], targets: Sequence[str]) -> str:
    """All numbers of the report, and the sentences."""

    def plain(value: object) -> object:
        if isinstance(value, float):
            return value if math.isfinite(value) else None
        if hasattr(value, "_asdict"):
            return plain(value._asdict())
        if isinstance(value, Mapping):
            return {key: plain(part) for key, part in value.items()}
        return [plain(part) for part in value] if isinstance(value, list) else value

    content = [r._asdict() | {"verdict": {target: report_summary(r, target) for target in targets}} for r in reports]
    return json.dumps(plain(content), indent=2, ensure_ascii=False)


def _correlations(
    agreements: Sequence[Agreement], scope: str, question: Question, signs: Mapping[tuple[Question, str], int]
) -> tuple[str, list[str]]:
    """The metrics shown to correlate with the probe in words, and those that correlate positively."""
    taus = {a.metric: a.within if question == "within" else a.across for a in agreements if a.directed}
    metrics = sorted(taus, key=lambda metric: -taus[metric].value)
    positive, negative = ([m for m in metrics if signs[question, m] == sign] for sign in (1, -1))
    agree, disagree = (
        _join([f"{m} (τ {format_interval(taus[m], places=2)})" for m in listed], "correlate")
        for listed in (positive, negative)
    )
    text = f"{scope}, {agree or 'no metric is shown to correlate positively'} with the probe"
    return text + (f"; {disagree} negatively" if negative else ""), positive


def _costs(question: Question, signs: Mapping[tuple[Question, str], int]) -> str:
    """The signals shown to cost less than a baseline, and more, in words."""
    gains = {signal: sign for (asked, signal), sign in signs.items() if asked == question}
    less, more = (_join([signal for signal in gains if gains[signal] == sign], "cost") for sign in (1, -1))
    return f"{less or 'no metric is shown to cost'} less" + (f"; {more} more" if more else "")


def _join(subjects: Sequence[str], verb: str) -> str:
    """Subjects with their verb; empty without a subject."""
    return f"{', '.join(subjects)} {verb}{'s' if len(subjects) == 1 else ''}" if subjects else ""


def format_interval(interval: Interval | None, *, places: int = 4) -> str:
    """An estimate with its interval.

    Example:
        >>> format_interval(Interval(0.5, 0.25, 0.75), places=2)
        '0.50 [0.25, 0.75]'
    """
    if interval is None or math.isnan(interval.value):
        return "–"
    if math.isnan(interval.low):
        return f"{interval.value:.{places}f}"
    return f"{interval.value:.{places}f} [{interval.low:.{places}f}, {interval.high:.{places}f}]"
