"""The trust report in sentences and as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence

from repmetrics.trust.agreement import Agreement
from repmetrics.trust.bootstrap import Interval
from repmetrics.trust.regret import BASELINES, Regret
from repmetrics.trust.report import Trust


def report_summary(report: Trust, target: str) -> list[str]:
    """Conclusions for one target, in sentences. Only what an interval supports is stated."""
    agreements = [a for a in report.agreements if a.target == target]
    regrets = {r.signal: r for r in report.regrets if r.target == target}
    return [_within(agreements), _checkpoints(regrets, report.noise[target]), _among(agreements, regrets)]


def summarize(reports: Sequence[Trust], targets: Sequence[str]) -> list[str]:
    """The whole report in lines, the widest scope first."""
    lines = []
    for report in reversed(reports):
        lines.append(f"{report.scope}: {report.runs} runs, {report.looks} evaluations")
        lines += [f"  ({note})" for note in report.notes]
        for target in targets:
            lines += [f"  {target}", *(f"    {line}" for line in report_summary(report, target))]
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


def _within(agreements: Sequence[Agreement]) -> str:
    text, positive = _correlations(agreements, "within a run", lambda a: a.within)
    if step_only := [a.metric for a in positive if a.beyond_time.sign() != 1]:
        text += f"; no information beyond the step is shown for {', '.join(step_only)}"
    return f"{text}."


def _checkpoints(regrets: Mapping[str, Regret], noise: float) -> str:
    text = f"selecting a checkpoint: the last costs {format_interval(regrets['last'].checkpoint)}"
    if not math.isnan(noise):
        text += f" (the probe's noise alone would cost a perfect selector up to {noise:.4f})"
    return f"{text}; {_costs({signal: r.against_last for signal, r in regrets.items()})}."


def _among(agreements: Sequence[Agreement], regrets: Mapping[str, Regret]) -> str:
    text, _ = _correlations(agreements, "among runs", lambda a: a.across)
    text += f"; selecting a run: a random one costs {format_interval(regrets['random'].run)}"
    return f"{text}; {_costs({signal: r.against_random for signal, r in regrets.items()})}."


def _correlations(
    agreements: Sequence[Agreement], scope: str, tau: Callable[[Agreement], Interval]
) -> tuple[str, list[Agreement]]:
    """The metrics shown to correlate with the probe in words, and those that correlate positively."""
    shown = sorted((a for a in agreements if a.directed and tau(a).sign()), key=lambda a: -tau(a).value)
    positive, negative = ([a for a in shown if tau(a).sign() == sign] for sign in (1, -1))
    agree, disagree = (
        _join([f"{a.metric} (τ {format_interval(tau(a), places=2)})" for a in metrics], "correlate")
        for metrics in (positive, negative)
    )
    text = f"{scope}, {agree or 'no metric is shown to correlate positively'} with the probe"
    return text + (f"; {disagree} negatively" if negative else ""), positive


def _costs(gains: Mapping[str, Interval | None]) -> str:
    """The signals shown to cost less than a baseline, and more, in words."""
    signs = {signal: gain.sign() for signal, gain in gains.items() if gain is not None and signal not in BASELINES}
    less, more = (_join([signal for signal in signs if signs[signal] == sign], "cost") for sign in (1, -1))
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
