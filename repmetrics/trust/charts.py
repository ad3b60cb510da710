"""Charts of a trust report as SVG text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from repmetrics.measurement.titles import name_texts
from repmetrics.report.drawing import SERIES, SOFT, Drawing
from repmetrics.trust.bootstrap import Interval
from repmetrics.trust.regret import BASELINES
from repmetrics.trust.report import Trust, in_scope
from repmetrics.trust.runs import Evaluation

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH, ROW, MARGIN = 7.0, 0.27, 0.9
"""Width of a chart, height of a row, and height of title and axis, in inches."""
COLUMNS = 4
TITLE_POINTS = 180
"""Size of a scatter plot's title times its characters, in points: wider ones would run into the next."""


def charts(reports: Sequence[Trust], evaluations: Sequence[Evaluation], *, targets: Sequence[str]) -> dict[str, str]:
    """All charts of the last report, the one with the widest scope, by file name."""
    report = reports[-1]
    drawings = {}
    for target in targets:
        drawings[f"agreement-{target}.svg"] = agreement_chart(report, target)
        drawings[f"regret-{target}.svg"] = regret_chart(report, target)
        drawings[f"scatter-{target}.svg"] = scatter_chart(report, evaluations, target)
    return drawings


def agreement_chart(report: Trust, target: str) -> str:
    """τ of each metric with its interval: within runs, with the step partialled out, and among runs."""
    rows = [a for a in report.agreements if a.target == target]
    title = f"{target}: agreement with the probe (Kendall's τ)"
    with Drawing(title, width=WIDTH, height=MARGIN + ROW * len(rows)) as drawing:
        ax = drawing.axes[0]
        kinds = {
            "within a run": [a.within for a in rows],
            "beyond the step": [a.beyond_time for a in rows],
            "among runs": [a.across for a in rows],
        }
        for k, (kind, intervals) in enumerate(kinds.items()):
            _whiskers(ax, [y + (k - 1) * 0.2 for y in range(len(rows))], intervals, color=SERIES[k], label=kind)
        ax.axvline(0, color=SOFT, linewidth=1)
        ax.set_xlim(-1.02, 1.02)
        _finish(ax, title, [a.metric for a in rows])
        return drawing.to_svg()


def regret_chart(report: Trust, target: str) -> str:
    """Cost of selecting a checkpoint by each signal, baselines first."""
    rows = [r for r in report.regrets if r.target == target and not math.isnan(r.checkpoint.value)]
    title = f"{target}: cost of selecting a checkpoint, mean over runs"
    with Drawing(title, width=WIDTH, height=MARGIN + ROW * len(rows)) as drawing:
        ax = drawing.axes[0]
        for k, kind in enumerate(("a metric", "a baseline")):
            places = [y for y, row in enumerate(rows) if (row.signal in BASELINES) == bool(k)]
            _whiskers(ax, places, [rows[y].checkpoint for y in places], color=SERIES[k], label=kind)
        ax.margins(x=0.02)
        _finish(ax, title, [row.signal for row in rows])
        return drawing.to_svg()


def scatter_chart(report: Trust, evaluations: Sequence[Evaluation], target: str) -> str:
    """Last evaluation of each run: every metric against the probe, colored by method."""
    last = {x.run: x for x in sorted(in_scope(report, evaluations), key=lambda x: x.step) if target in x.values}
    methods = sorted({x.method for x in last.values()})
    metrics = [a.metric for a in report.agreements if a.target == target]
    columns = min(COLUMNS, len(metrics))
    rows = math.ceil(len(metrics) / COLUMNS)
    label = f"{target} against each metric, the last evaluation of each run"
    with Drawing(label, width=1.8 * COLUMNS, height=1.7 * rows + 0.4, rows=rows, columns=columns) as drawing:
        for ax, metric in zip(drawing.axes, metrics, strict=False):
            marked = []
            for k, method in enumerate(methods):
                points = [x for x in last.values() if x.method == method and metric in x.values]
                marks = ax.scatter(
                    [x.values[metric] for x in points], [x.values[target] for x in points], s=12,
                    color=SERIES[k % len(SERIES)], alpha=0.8,
                )  # fmt: skip
                marked.append(marks)
                titles = [f"{x.run}: {x.values[metric]:.4g}, {x.values[target]:.4g}" for x in points]
                drawing.name_points(marks, titles)
            name_texts([ax.set_title("0", fontsize=min(9, TITLE_POINTS / len(metric)))], [metric])
            ax.tick_params(labelsize=7)
            ax.locator_params(nbins=3)
        for ax in drawing.axes[len(metrics) :]:
            ax.set_axis_off()
        name_texts([drawing.figure.supylabel("0", fontsize=9, color=SOFT)], [target])
        numbers = [str(k) for k in range(len(methods))]
        box = drawing.figure.legend(marked, numbers, loc="outside upper left", ncols=COLUMNS)
        name_texts(box.get_texts(), [method or "runs" for method in methods])
        return drawing.to_svg()


def _whiskers(ax: Axes, places: Sequence[float], intervals: Sequence[Interval], *, color: str, label: str) -> None:
    """Points with their intervals, where known."""
    for place, interval in zip(places, intervals, strict=True):
        if not math.isnan(interval.low):
            ax.plot((interval.low, interval.high), (place, place), color=color, linewidth=1.4)
    known = [
        (interval.value, y) for y, interval in zip(places, intervals, strict=True) if not math.isnan(interval.value)
    ]
    ax.scatter([x for x, _ in known], [y for _, y in known], s=12, color=color, zorder=3, label=label)


def _finish(ax: Axes, title: str, names: Sequence[str]) -> None:
    """Title, names of the rows from the top, and a legend above them."""
    name_texts([ax.set_title("0", pad=20)], [title])
    ax.set_yticks(range(len(names)), names)
    name_texts(ax.get_yticklabels(), names)
    ax.set_ylim(len(names) - 0.5, -0.6)
    ax.grid(visible=False, axis="y")
    ax.grid(axis="x")
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, borderaxespad=0.1)
