"""Plots of a trust report as SVG text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from xml.sax.saxutils import escape, quoteattr

from repmetrics.trust.bootstrap import Interval
from repmetrics.trust.regret import BASELINES
from repmetrics.trust.report import Trust
from repmetrics.trust.runs import Evaluation

INK = ("#3b6fb6", "#c8553d", "#4f8a5b", "#8a6fb0", "#b8892b")
ROW, LEFT, WIDTH = 22, 150, 620
COLUMNS, SIDE = 4, 190
# The plots are also standalone files, so the style is part of each.
STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#4a5160}.t{font-weight:600}.g{stroke:#c9ced8;fill:none}"
    ".z{stroke:#8b93a3}@media(prefers-color-scheme:dark){text{fill:#b6bfce}.g{stroke:#3a4250}}"
)


def plots(reports: Sequence[Trust], evaluations: Sequence[Evaluation], *, targets: Sequence[str]) -> dict[str, str]:
    """All plots of the last report, the one with the widest scope, by file name."""
    report = reports[-1]
    drawings = {}
    for target in targets:
        drawings[f"agreement-{target}.svg"] = agreement_plot(report, target)
        drawings[f"regret-{target}.svg"] = regret_plot(report, target)
        drawings[f"scatter-{target}.svg"] = scatter_plot(report, evaluations, target)
    return drawings


def agreement_plot(report: Trust, target: str) -> str:
    """τ of each metric with its interval: within runs, with the step partialled out, and among runs."""
    rows = [a for a in report.agreements if a.target == target]
    body = _axis([-1, -0.5, 0, 0.5, 1], len(rows))
    for k, a in enumerate(rows):
        body += _row_label(a.metric, k)
        for j, value in enumerate((a.within, a.beyond_time, a.across)):
            body += _whisker(value, _y(k) + (j - 1) * 5, -1, 1, INK[j])
    legend = ["within a run", "beyond the step", "among runs"]
    return _chart(body, f"{target}: agreement with the probe", legend, len(rows))


def regret_plot(report: Trust, target: str) -> str:
    """Cost of selecting a checkpoint by each signal, baselines first."""
    rows = [r for r in report.regrets if r.target == target and not math.isnan(r.checkpoint.value)]
    ends = [r.checkpoint.value if math.isnan(r.checkpoint.high) else r.checkpoint.high for r in rows]
    ticks = round_ticks(max(ends, default=1.0) or 1.0)
    body = _axis(ticks, len(rows))
    for k, row in enumerate(rows):
        body += _row_label(row.signal, k)
        body += _whisker(row.checkpoint, _y(k), 0, ticks[-1], INK[1] if row.signal in BASELINES else INK[0])
    caption = f"{target}: what choosing a checkpoint by it costs, mean over runs"
    return _chart(body, caption, ["a metric", "a baseline"], len(rows))


def round_ticks(top: float) -> list[float]:
    """Ticks from 0 to `top` or just above it, in steps of 1, 2 or 5 times a power of ten.

    Example:
        >>> round_ticks(0.0218)
        [0.0, 0.005, 0.01, 0.015, 0.02, 0.025]
    """
    power = 10.0 ** math.floor(math.log10(top / 5))
    step = next(power * k for k in (1, 2, 5, 10) if power * k >= top / 5 * (1 - 1e-9))
    return [float(f"{step * k:.6g}") for k in range(math.ceil(top / step - 1e-9) + 1)]


def scatter_plot(report: Trust, evaluations: Sequence[Evaluation], target: str) -> str:
    """Last evaluation of each run: every metric against the probe, colored by method."""
    in_scope = [x for x in evaluations if report.scope in (x.method or "unnamed", "all methods", "all runs")]
    last = {x.run: x for x in sorted(in_scope, key=lambda x: x.step) if target in x.values}
    methods = sorted({x.method for x in last.values()})
    metrics = [a.metric for a in report.agreements if a.target == target]
    body: list[str] = []
    for i, method in enumerate(methods):
        body += [tag("circle", cx=12 + 120 * i, cy=12, r=4, fill=INK[i % len(INK)])]
        body += [tag("text", method or "runs", x=20 + 120 * i, y=16)]
    ends = sorted(x.values[target] for x in last.values())
    upwards = f"upwards: {target}, {ends[0]:.3g} to {ends[-1]:.3g}"
    body += [tag("text", upwards, x=COLUMNS * SIDE - 20, y=16, text_anchor="end")]
    for k, metric in enumerate(metrics):
        points = [
            (x.values[metric], x.values[target], methods.index(x.method), x.run)
            for x in last.values()
            if metric in x.values
        ]
        body += _panel(points, metric, left=(k % COLUMNS) * SIDE, top=28 + (k // COLUMNS) * SIDE)
    height = 32 + math.ceil(len(metrics) / COLUMNS) * SIDE
    return _svg(body, COLUMNS * SIDE, height, f"{target} against each metric, the last look of each run")


def tag(name: str, *content: str, **attributes: object) -> str:
    """An element. A single string is text, to be escaped; several are elements.

    Example:
        >>> tag("text", "a < b", x=2)
        '<text x="2">a &lt; b</text>'
    """
    pairs = "".join(f" {key.replace('_', '-').strip('-')}={quoteattr(str(v))}" for key, v in attributes.items())
    return f"<{name}{pairs}>{escape(content[0]) if len(content) == 1 else ''.join(content)}</{name}>"


def _panel(points: Sequence[tuple[float, float, int, str]], metric: str, *, left: int, top: int) -> list[str]:
    x0, y0, wide, high = left + 14, top + 18, SIDE - 34, SIDE - 54
    body = [tag("text", metric, x=x0, y=top + 12, _class="t")]
    body += [tag("rect", x=x0, y=y0, width=wide, height=high, _class="g")]
    if not points:
        return body
    xs, ys = [point[0] for point in points], [point[1] for point in points]
    x_low, x_high, y_low, y_high = min(xs), max(xs), min(ys), max(ys)
    for x, y, color, run in points:
        across, up = (x - x_low) / ((x_high - x_low) or 1), (y - y_low) / ((y_high - y_low) or 1)
        center = {"cx": f"{x0 + 6 + (wide - 12) * across:.1f}", "cy": f"{y0 + high - 6 - (high - 12) * up:.1f}"}
        title = tag("title", f"{run}: {x:.4g}, {y:.4g}")
        body += [tag("circle", title, "", **center, r=3.5, fill=INK[color % len(INK)], fill_opacity=0.8)]
    body += [tag("text", f"{x_low:.3g}", x=x0, y=y0 + high + 14)]
    return [*body, tag("text", f"{x_high:.3g}", x=x0 + wide, y=y0 + high + 14, text_anchor="end")]


def _y(row: int) -> int:
    return 44 + row * ROW


def _x(value: float, low: float, high: float) -> float:
    return LEFT + (WIDTH - LEFT - 16) * (min(max(value, low), high) - low) / (high - low)


def _row_label(name: str, row: int) -> list[str]:
    return [tag("text", name, x=LEFT - 8, y=_y(row) + 4, text_anchor="end")]


def _axis(ticks: Sequence[float], rows: int) -> list[str]:
    body, bottom = [], _y(rows)
    for tick in ticks:
        x = f"{_x(tick, ticks[0], ticks[-1]):.1f}"
        body.append(tag("line", x1=x, x2=x, y1=32, y2=bottom - 8, _class="z" if tick == 0 else "g"))
        body.append(tag("text", f"{tick:.3g}", x=x, y=bottom + 8, text_anchor="middle"))
    return body


def _whisker(interval: Interval, y: float, low: float, high: float, ink: str) -> list[str]:
    if math.isnan(interval.value):
        return []
    body = [tag("circle", cx=f"{_x(interval.value, low, high):.1f}", cy=y, r=3.2, fill=ink)]
    if not math.isnan(interval.low):
        a, b = (f"{_x(value, low, high):.1f}" for value in (interval.low, interval.high))
        body.insert(0, tag("line", x1=a, x2=b, y1=y, y2=y, stroke=ink, stroke_width=1.6))
    return body


def _chart(body: Sequence[str], caption: str, legend: Sequence[str], rows: int) -> str:
    head = [tag("text", caption, x=2, y=12, _class="t")]
    for j, name in enumerate(legend):
        head.append(tag("circle", cx=LEFT + 6 + 130 * j, cy=22, r=4, fill=INK[j]))
        head.append(tag("text", name, x=LEFT + 15 + 130 * j, y=26))
    return _svg([*head, *body], WIDTH, _y(rows) + 16, caption)


def _svg(body: Sequence[str], width: int, height: int, label: str) -> str:
    attributes = {"xmlns": "http://www.w3.org/2000/svg", "viewBox": f"0 0 {width} {height}", "role": "img"}
    return tag("svg", tag("style", STYLE), *body, **attributes, aria_label=label)
