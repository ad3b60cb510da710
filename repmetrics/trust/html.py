"""The trust report as one self-contained HTML page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import get_args

from repmetrics.atomic_write import write_text
from repmetrics.report.page import details, document, figure, items, table
from repmetrics.trust.bootstrap import Interval
from repmetrics.trust.charts import agreement_chart, regret_chart, scatter_chart
from repmetrics.trust.multiplicity import Question, shown_signs
from repmetrics.trust.report import Trust, in_scope
from repmetrics.trust.runs import Evaluation
from repmetrics.trust.summary import (
    format_interval,
    lead,
    multiplicity,
    multiplicity_note,
    report_summary,
    selection_rows,
)

LEAD = (
    "How well each label-free metric tracks the probe. Intervals are 95 % each, by a bootstrap over runs: one in "
    "twenty excludes zero by chance. Marks and sentences hold for all metrics of a target together, at 95 %. A "
    "positive sign means that better values of the metric occur with better values of the probe."
)
QUESTIONS = ("within a run", "beyond the step", "beats the last", "among runs", "beats chance")
MARK = {1: "<b class=yes>+</b>", -1: "<b class=no>−</b>", 0: "·"}
MARKS = (
    "+ correlates with the probe, or selects better; − correlates negatively, or selects worse; · not shown. Within a "
    "run: over its evaluations. Beyond the step: information beyond the step. Beats the last: selecting a checkpoint, "
    "against the last. Among runs: over their last evaluations. Beats chance: selecting a run, against a random one."
)


def page(reports: Sequence[Trust], evaluations: Sequence[Evaluation], *, targets: Sequence[str], title: str) -> str:
    """The whole page: per scope an overview table, the conclusions in sentences, and tables and charts to unfold."""
    parts = []
    for target in targets if reports[-1].selections else ():
        heads, *body = selection_rows(reports[-1], target)
        parts.append(f"<div class=verdict><b>{escape(lead(reports[-1], target))}</b></div>")
        parts.append(table(heads, [[escape(cell) for cell in row] for row in body]))
        parts.append(f"<p class=lead>{escape(multiplicity(reports[-1], target))}</p>")
    parts.append(f"<p class=lead>{LEAD}</p>")
    for report in reversed(reports):  # all methods first
        parts.append(f"<h2>{escape(report.scope)}: {report.runs} runs, {report.looks} evaluations</h2>")
        parts += [f"<p><em>{escape(note)}.</em></p>" for note in report.notes]
        parts.append(f"{overview_table(report, targets)}<p class=lead>{MARKS}</p>")
        for target in targets:
            sentences = [*report_summary(report, target), multiplicity_note(report, target)]
            listed = items([line for line in sentences if line])
            parts.append(f"<h3>{escape(target)}{_color_baseline(evaluations, report, target)}</h3>{listed}")
        for target in targets:
            content = [
                agreement_table(report, target),
                figure(agreement_chart(report, target)),
                regret_table(report, target),
                figure(regret_chart(report, target)),
                figure(scatter_chart(report, evaluations, target)),
            ]
            parts.append(details(f"{target}, in figures", "".join(content)))
    return document(title, parts)


def write(text: str, path: Path) -> None:
    """Write a page or a plot."""
    write_text(path, text)


def _color_baseline(evaluations: Sequence[Evaluation], report: Trust, target: str) -> str:
    scope = in_scope(report, evaluations)
    color = [x.values[f"{target}_colour"] for x in scope if f"{target}_colour" in x.values]
    if not color:
        return ""
    last = {x.run: x.values[target] for x in sorted(scope, key=lambda x: x.step) if target in x.values}
    above = sum(value > color[0] for value in last.values())
    return f" (color statistics alone: {color[0]:.3f}; {above} of {len(last)} runs end above)"


def overview_table(report: Trust, targets: Sequence[str]) -> str:
    """One row per metric with a direction: for each target, a mark per question, as all intervals answer together."""
    signs = {target: shown_signs(report, target) for target in targets}
    body = []
    for metric in dict.fromkeys(a.metric for a in report.agreements if a.directed):
        marks = [escape(metric)]
        for target in targets:
            marks += [MARK[signs[target][question, metric]] for question in get_args(Question)]
        body.append(marks)
    over = "".join(f"<th colspan={len(QUESTIONS)}>{escape(target)}" for target in targets)
    shown = table(("metric", *QUESTIONS * len(targets)), body)
    return shown.replace("<table>", f"<table class=marks><tr><th>{over}")


def agreement_table(report: Trust, target: str) -> str:
    """τ-b and ρ of every metric: within runs, among runs, and with the step partialled out."""
    heads = ("metric", "τ within", "ρ within", "beyond the step", "τ among runs", "ρ among runs", "all, given log step")
    body = []
    for a in (a for a in report.agreements if a.target == target):
        name = a.metric if a.directed else f"{a.metric} (no direction)"
        cells = (a.within, a.within_rho, a.beyond_time, a.across, a.across_rho, a.across_beyond_time)
        body.append([escape(name), *map(_highlight, cells)])
    return table(heads, body)


def regret_table(report: Trust, target: str) -> str:
    """Cost of selecting by each signal."""
    heads = ("selected by", "checkpoint: regret", "of best − median", "last − this",
             "run: regret", "of best − median", "random − this")  # fmt: skip
    body = []
    for r in (r for r in report.regrets if r.target == target):
        gain = "–" if r.signal == "last" else _highlight(r.against_last, places=4)
        relative, run_relative = (
            "–" if v is None or math.isnan(v) else f"{v:.2f}" for v in (r.relative, r.run_relative)
        )
        chance = _highlight(r.against_random, places=4) if r.against_random and r.signal != "random" else "–"
        checkpoint, run = format_interval(r.checkpoint), format_interval(r.run)
        body.append([escape(r.signal), checkpoint, relative, gain, run, run_relative, chance])
    return table(heads, body)


def _highlight(interval: Interval, *, places: int = 2) -> str:
    """The interval; green if it lies above zero, red if below."""
    text = format_interval(interval, places=places)
    kind = {1: "yes", -1: "no"}.get(interval.sign())
    return f"<b class={kind}>{text}</b>" if kind else text
