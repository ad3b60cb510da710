"""The report page of runs, section by section."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from statistics import median

from repmetrics.measurement.registry import METRICS
from repmetrics.measurement.result import Measurement, format_value
from repmetrics.measurement.titles import ARROWS, metric_title, names_by_text
from repmetrics.monitoring.record import Record
from repmetrics.report.charts import Chart, charted_metrics, metric_chart, spectrum_chart
from repmetrics.report.page import details, document, figure, items, table
from repmetrics.report.pictures import pictures_section
from repmetrics.report.runs import Run
from repmetrics.report.settings import varying_settings
from repmetrics.report.verdict import Verdict, compare_runs, judge, probes_below_references, signal

LONGEST_SETTING = 24
"""Characters of a setting's value in the table of runs."""


def page(runs: Sequence[Run], *, by: str | None = None, pictures: bool = True) -> str:
    """The whole page.

    Args:
        runs: Runs to report on.
        by: Metric that decides, also which step to keep. Default: the metric of
            :func:`repmetrics.report.verdict.signal`, and the last step without an alarm.
        pictures: Whether to show held-out images, where the runs have pictures.
    """
    keep_best, by = by is not None, signal(runs, by)
    verdicts = [judge(run, by, keep_best=keep_best) for run in runs]
    name = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    parts = [
        f"<p class=lead>{escape(_subject(runs))} Decided by {escape(metric_title(by))}.</p>",
        *_verdict_parts(runs, verdicts, by),
        "<h2>Charts</h2>",
        _charts(runs, verdicts, by),
        pictures_section(runs) if pictures else "",
        _comparison(runs, verdicts, by),
        "<h2>Alarms</h2>",
        _alarms(runs),
        "<h2>Values</h2>",
        *(details(f"{run.name}: all values at the last evaluation", _values(run)) for run in runs),
        *(details(f"{run.name}: all evaluations", _evaluations(run, by, runs)) for run in runs if len(run.records) > 1),
        "<h2>Cost</h2>",
        items([_cost(run) for run in runs]),
        "<footer>Written by repmetrics report. The page loads nothing from elsewhere.</footer>",
    ]
    return document(f"Representation report: {name}", parts)


def verdict_lines(runs: Sequence[Run], *, by: str | None = None) -> list[str]:
    """The verdict in lines for a terminal."""
    keep_best, by = by is not None, signal(runs, by)
    lines = compare_runs(runs, by)
    for run in runs:
        sentences = [judge(run, by, keep_best=keep_best).sentence, *probes_below_references(run)]
        lines += sentences if len(runs) == 1 else [f"{run.name}: {sentence}" for sentence in sentences]
    return lines


def _subject(runs: Sequence[Run]) -> str:
    m = next((m for run in runs for m in run.records[-1].measurements.values()), None)
    if m is None:
        return "Nothing could be measured."
    groups = "no groups known" if m.groups is None else f"{m.groups} groups"
    return f"{m.n:,} held-out samples, {groups}, {m.d} features."


def _verdict_parts(runs: Sequence[Run], verdicts: Sequence[Verdict], by: str) -> list[str]:
    parts = []
    if between := compare_runs(runs, by):
        parts.append(f"<div class=verdict><b>{escape(between[0])}</b>{items(between[1:])}</div>")
    for run, verdict in zip(runs, verdicts, strict=True):
        kind = {"alarm": " alarm", "not known": " unknown"}.get(verdict.state, "")
        name = "" if len(runs) == 1 or not run.steps else f"{escape(run.name)}: "
        parts.append(
            f"<div class='verdict{kind}'>{name}<b>{escape(verdict.sentence)}</b>"
            f"{items([*verdict.reasons, *run.notes])}</div>"
        )
    return parts if len(parts) <= 9 else [*parts[:9], f"<p>And {len(parts) - 9} more runs, in the table below.</p>"]


def _charts(runs: Sequence[Run], verdicts: Sequence[Verdict], by: str) -> str:
    charts = [metric_chart(runs, name, verdicts) for name in charted_metrics(runs, by)]
    spectrum = spectrum_chart(runs, verdicts)
    drawn = [figure(chart.svg, chart.caption) for chart in [*charts, *([spectrum] if spectrum else [])]]
    notes = _missing_intervals(charts)
    notes += [] if spectrum else ["No spectrum is recorded in these files."]
    missing = "".join(f"<p class=lead>{escape(note)}</p>" for note in notes)
    return f"<div class=charts>{''.join(drawn)}</div>{missing}"


def _missing_intervals(charts: Sequence[Chart]) -> list[str]:
    """Reasons why charts have no interval, each once; with the titles of its charts if it does not concern all."""
    titles = names_by_text((chart.no_interval, chart.title) for chart in charts if chart.no_interval)
    return [
        f"No intervals: {reason}." if len(which) == len(charts) else f"No intervals of {', '.join(which)}: {reason}."
        for reason, which in titles.items()
    ]


def _comparison(runs: Sequence[Run], verdicts: Sequence[Verdict], by: str) -> str:
    if len(runs) < 2:
        return ""
    varying = varying_settings([run.settings for run in runs])
    names = charted_metrics(runs, by)
    heads = ["run", *(name.rpartition(".")[2] for name in varying), "steps", *_headings(runs, names), "keep step",
             "alarms at the end"]  # fmt: skip
    body = []
    for run, verdict in zip(runs, verdicts, strict=True):
        last = run.records[-1]
        settings = [_shorten(run.settings.get(name, "–")) for name in varying]
        cells = [_cell(last.measurements.get(name)) for name in names]
        keep = f"{verdict.keep.step:,}" if verdict.keep is not None and run.steps else "–"
        alarms = ", ".join(alarm.kind for alarm in last.alarms) or "none"
        body.append([run.name, *settings, f"{last.step:,}" if run.steps else "–", *cells, keep, alarms])
    note = "Values are those of the last evaluation, ± standard error." + ("" if varying else " No settings differ.")
    content = table(heads, [[escape(cell) for cell in row] for row in body])
    return f"<h2>Comparison</h2>{content}<p class=lead>{note}</p>"


def _headings(runs: Sequence[Run], names: Sequence[str]) -> list[str]:
    measured = {name: m for run in reversed(runs) for name in names for _, m in run.values(name)}
    return [metric_title(name) + ARROWS[measured[name].direction] for name in names]


def _shorten(text: str) -> str:
    return text if len(text) <= LONGEST_SETTING else f"{text[: LONGEST_SETTING - 1]}…"


def _cell(m: Measurement | None) -> str:
    return "–" if m is None else format_value(m.value, m.standard_error)


def _alarms(runs: Sequence[Run]) -> str:
    rows = [
        [escape(run.name), f"{record.step:,}", escape(alarm.kind), escape(alarm.reason)]
        for run in runs
        for record in run.records
        for alarm in record.alarms
    ]
    if not rows:
        return "<p>No evaluation raised an alarm.</p>"
    shown = table(("run", "step", "alarm", "numbers"), rows[:20], texts=("alarm", "numbers"))
    return shown + (f"<p class=lead>And {len(rows) - 20} more.</p>" if len(rows) > 20 else "")


def _values(run: Run) -> str:
    first, last = run.records[0], run.records[-1]
    body = []
    for name, m in last.measurements.items():
        before = first.measurements.get(name)
        known = before is not None and before is not m and not math.isnan(m.value - before.value)
        change = f"{m.value - before.value:+.3g}" if before is not None and known else "–"
        spec = METRICS.get(name.rpartition("/")[2])
        body.append([escape(metric_title(name) + ARROWS[m.direction]), escape(_cell(m)), change,
                     escape(spec.summary if spec else m.convention)])  # fmt: skip
    warnings = list(dict.fromkeys(text for m in last.measurements.values() for text in m.warnings))
    reasons = list(dict.fromkeys(m.reason for m in last.measurements.values() if m.reason))
    heads = ("metric", "value ± standard error", f"since step {first.step:,}", "meaning")
    return table(heads, body, texts=("meaning",)) + items(
        [f"{text[0].upper()}{text[1:]}." for text in [*reasons, *warnings]]
    )


def _evaluations(run: Run, by: str, runs: Sequence[Run]) -> str:
    names = charted_metrics(runs, by)
    heads = ["step", *_headings(runs, names), "loss", "seconds", "alarms"]
    body = [
        [
            f"{r.step:,}",
            *(_cell(r.measurements.get(name)) for name in names),
            _number(r.loss),
            f"{r.seconds:.2g}",
            str(len(r.alarms)),
        ]
        for r in run.records
    ]
    return table(heads, body)


def _number(value: float | None) -> str:
    return "–" if value is None or math.isnan(value) else f"{value:.4g}"


def _cost(run: Run) -> str:
    seconds = [record.seconds for record in run.records]
    total = f"{sum(seconds):.3g} s in total, {median(seconds):.2g} s each (median)"
    broken = _broken(run.records)
    return f"{run.name}: {len(seconds)} evaluation{'s' if len(seconds) > 1 else ''} took {total}.{broken}"


def _broken(records: Sequence[Record]) -> str:
    count = sum(bool(record.nonfinite) for record in records)
    return f" At {count} of them, features held NaN or Inf." if count else ""
