"""A trust report in words: which signal to trust here, and how far."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence

from repmetrics.trust.agreement import Agreement
from repmetrics.trust.bootstrap import Interval
from repmetrics.trust.regret import BASELINES, Regret
from repmetrics.trust.report import Trust


def summary(report: Trust, target: str) -> list[str]:
    """What the report says of one target, in sentences; none of it where the intervals do not carry it."""
    agreements = [a for a in report.agreements if a.target == target]
    regrets = {r.signal: r for r in report.regrets if r.target == target}
    return [_within(agreements, regrets), _beats_last(regrets, report.noise[target]), _across(agreements, regrets)]


def summarize(reports: Sequence[Trust], targets: Sequence[str]) -> list[str]:
    """The whole report in lines, the widest scope first."""
    lines = []
    for report in reversed(reports):
        lines += [
            f"{report.scope}: {report.runs} runs, {report.looks} looks",
            *(f"  ({note})" for note in report.notes),
        ]
        for target in targets:
            lines += [f"  {target}", *(f"    {line}" for line in summary(report, target))]
    return lines


def to_json(reports: Sequence[Trust], targets: Sequence[str]) -> str:
    """Every figure of the report, and the words."""

    def plain(value: object) -> object:
        if isinstance(value, float):
            return value if math.isfinite(value) else None
        if hasattr(value, "_asdict"):
            return {key: plain(part) for key, part in value._asdict().items()}
        if isinstance(value, Mapping):
            return {key: plain(part) for key, part in value.items()}
        return [plain(part) for part in value] if isinstance(value, list) else value

    said = [{"verdict": {target: summary(report, target) for target in targets}} for report in reports]
    made = [{**report._asdict(), **words} for report, words in zip(reports, said, strict=True)]
    return json.dumps(plain(made), indent=2, ensure_ascii=False)


def _within(agreements: list[Agreement], regrets: dict[str, Regret]) -> str:
    following = sorted((a for a in agreements if a.within.sign() and a.directed), key=lambda a: -a.within.value)
    good, bad = ([a for a in following if a.within.sign() == side] for side in (1, -1))
    clocks = [a.metric for a in good if a.beyond_time.sign() != 1]
    parts = [f"within a run, {_named(good)} rise and fall with the probe" if good else
             "within a run, no metric goes with the probe"]  # fmt: skip
    if clocks:
        parts.append(f"of these, {', '.join(clocks)} are not shown to tell more than the step does: a clock")
    if bad:
        parts.append(f"{_named(bad)} go against it")
    return "; ".join(parts) + "."


def _beats_last(regrets: dict[str, Regret], noise: float) -> str:
    last = regrets["last"].checkpoint
    better = [r for s, r in regrets.items() if s not in BASELINES and r.against_last.sign() == 1]
    worse = [r for s, r in regrets.items() if s not in BASELINES and r.against_last.sign() == -1]
    said = f"choosing a checkpoint: the last costs {format_interval(last)}"
    if not math.isnan(noise):
        said += f" (the probe's own noise would cost a perfect selector up to {noise:.4f})"
    said += f"; {', '.join(r.signal for r in better)} cost less" if better else "; no metric is shown to cost less"
    return said + (f"; {', '.join(r.signal for r in worse)} cost more." if worse else ".")


def _across(agreements: list[Agreement], regrets: dict[str, Regret]) -> str:
    following = sorted((a for a in agreements if a.across.sign() and a.directed), key=lambda a: -a.across.value)
    good, bad = ([a for a in following if a.across.sign() == side] for side in (1, -1))
    said = f"among runs, {_named(good, across=True)} rank as the probe does" if good else (
        "among runs, no metric is shown to rank as the probe does"
    )  # fmt: skip
    if bad:
        said += f"; {_named(bad, across=True)} rank against it"
    better, worse = (
        [s for s, r in regrets.items() if s not in BASELINES and r.against_random and r.against_random.sign() == side]
        for side in (1, -1)
    )
    said += f"; choosing a run: a random one costs {format_interval(regrets['random'].run)}; "
    said += f"{', '.join(better)} cost less" if better else "no metric is shown to cost less"
    return said + (f"; {', '.join(worse)} cost more." if worse else ".")


def _named(found: list[Agreement], *, across: bool = False) -> str:
    return ", ".join(f"{a.metric} (τ {format_interval(a.across if across else a.within, places=2)})" for a in found)


def format_interval(found: Interval | None, *, places: int = 4) -> str:
    """An estimate with its interval.

    Example:
        >>> format_interval(Interval(0.5, 0.25, 0.75), places=2)
        '0.50 [0.25, 0.75]'
    """
    if found is None or math.isnan(found.value):
        return "–"
    if math.isnan(found.low):
        return f"{found.value:.{places}f}"
    return f"{found.value:.{places}f} [{found.low:.{places}f}, {found.high:.{places}f}]"
