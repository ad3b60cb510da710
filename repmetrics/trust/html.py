"""The trust report as one self-contained HTML page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import get_args

from repmetrics.atomic_write import write_text
from repmetrics.trust.bootstrap import Interval
from repmetrics.trust.multiplicity import Question, shown_signs
from repmetrics.trust.report import Trust
from repmetrics.trust.runs import Evaluation
from repmetrics.trust.summary import (
    format_interval,
    lead,
    multiplicity,
    multiplicity_note,
    report_summary,
    selection_rows,
)
from repmetrics.trust.svg import agreement_plot, regret_plot, scatter_plot

STYLE = """
:root{--ink:#1d2430;--soft:#667084;--line:#d5d9e0;--paper:#fff;--band:#f4f6f9}
@media(prefers-color-scheme:dark){:root{--ink:#e6e9ef;--soft:#9aa4b5;--line:#3a4250;--paper:#15181e;--band:#1d222b}}
body{font:16px/1.55 system-ui,sans-serif;color:var(--ink);background:var(--paper);max-width:66rem;margin:2.5rem auto;
padding:0 1.2rem}h1{font-size:1.7rem;margin:0 0 .3rem}h2{margin:2.4rem 0 .4rem;font-size:1.25rem}
h3{font-size:1rem;margin:1.6rem 0 .3rem}p.lead{color:var(--soft);margin-top:0}ul{padding-left:1.2rem}
table{border-collapse:collapse;font-size:.78rem;font-variant-numeric:tabular-nums;width:100%}
th,td{padding:.28rem .35rem;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
th{white-space:normal}table.marks th,table.marks td{text-align:center}table.marks td:first-child{text-align:left}
th:first-child,td:first-child{text-align:left}tr:nth-child(even){background:var(--band)}.wide{overflow-x:auto}
b.yes{color:#3a8a4d}b.no{color:#c8553d}svg{max-width:100%;height:auto}figure{margin:.6rem 0 1.2rem}
figcaption{color:var(--soft);font-size:.86rem}summary{cursor:pointer;font-weight:600;margin:.8rem 0}
"""

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
    """The whole page: per scope an overview table, the conclusions in sentences, and tables and plots to unfold."""
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>",
        f"<title>{escape(title)}</title><style>{STYLE}</style><h1>{escape(title)}</h1>",
        f"<p class=lead>{LEAD}</p>",
    ]
    for target in targets if reports[-1].selections else ():
        heads, *body = ([escape(cell) for cell in row] for row in selection_rows(reports[-1], target))
        parts.append(f"<p><b>{escape(lead(reports[-1], target))}</b></p><div class=wide>{_table(heads, body)}</div>")
        parts.append(f"<p class=lead>{escape(multiplicity(reports[-1], target))}</p>")
    for report in reversed(reports):  # all methods first
        parts.append(f"<h2>{escape(report.scope)}: {report.runs} runs, {report.looks} evaluations</h2>")
        parts += [f"<p><em>{escape(note)}.</em></p>" for note in report.notes]
        parts.append(f"<div class=wide>{overview_table(report, targets)}</div><p class=lead>{MARKS}</p>")
        for target in targets:
            sentences = [*report_summary(report, target), multiplicity_note(report, target)]
            items = "".join(f"<li>{escape(line)}" for line in sentences if line)
            parts.append(f"<h3>{escape(target)}{_color_baseline(evaluations, target)}</h3><ul>{items}</ul>")
        for target in targets:
            parts.append(f"<details><summary>{escape(target)}, in figures</summary>")
            parts.append(f"<div class=wide>{agreement_table(report, target)}</div>")
            parts.append(f"<figure>{agreement_plot(report, target)}</figure>")
            parts.append(f"<div class=wide>{regret_table(report, target)}</div>")
            parts.append(f"<figure>{regret_plot(report, target)}</figure>")
            parts.append(f"<figure>{scatter_plot(report, evaluations, target)}</figure></details>")
    return "\n".join(parts) + "</html>\n"


def write(text: str, path: Path) -> None:
    """Write a page or a plot."""
    write_text(path, text)


def _color_baseline(evaluations: Sequence[Evaluation], target: str) -> str:
    color = [x.values[f"{target}_colour"] for x in evaluations if f"{target}_colour" in x.values]
    if not color:
        return ""
    last = {x.run: x.values[target] for x in sorted(evaluations, key=lambda x: x.step) if target in x.values}
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
    return _table(("metric", *QUESTIONS * len(targets)), body).replace("<table>", f"<table class=marks><tr><th>{over}")


def agreement_table(report: Trust, target: str) -> str:
    """τ-b and ρ of every metric: within runs, among runs, and with the step partialled out."""
    heads = ("metric", "τ within", "ρ within", "beyond the step", "τ among runs", "ρ among runs", "all, given log step")
    body = []
    for a in (a for a in report.agreements if a.target == target):
        name = a.metric if a.directed else f"{a.metric} (no direction)"
        cells = (a.within, a.within_rho, a.beyond_time, a.across, a.across_rho, a.across_beyond_time)
        body.append([escape(name), *map(_highlight, cells)])
    return _table(heads, body)


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
    return _table(heads, body)


def _highlight(interval: Interval, *, places: int = 2) -> str:
    """The interval; green if it lies above zero, red if below."""
    text = format_interval(interval, places=places)
    kind = {1: "yes", -1: "no"}.get(interval.sign())
    return f"<b class={kind}>{text}</b>" if kind else text


def _table(heads: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    rows = "".join("<tr>" + "".join(f"<td>{cell}" for cell in row) for row in body)
    return "<table><tr>" + "".join(f"<th>{escape(h)}" for h in heads) + f"{rows}</table>"
