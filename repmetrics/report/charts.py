"""Charts of a report: metrics over training with their intervals and reference values, and spectra."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from repmetrics.decisions.alarms import RETRIEVAL_METRICS
from repmetrics.measurement.registry import METRICS, PROBES
from repmetrics.measurement.result import Measurement, format_value
from repmetrics.measurement.titles import ARROWS, largest_value, metric_title, name_texts
from repmetrics.monitoring.record import Record
from repmetrics.report.drawing import SERIES, SOFT, Drawing
from repmetrics.report.runs import Run
from repmetrics.report.verdict import Verdict

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH, HEIGHT = 4.9, 3.0
"""Size of a chart in inches; two fit side by side on a page, one on a telephone."""
CHARACTER_WIDTH, NAME_HEIGHT = 0.0135, 0.07
"""Of the name of a reference line, as fractions of the axes: width per character and height, at 7.5 points."""
CLEAR = 0.02
"""Fraction of the axes' height between a name and another line from which no place is better than an earlier one."""
PLACES = tuple((x, above) for x in (0.0, 1.0, 0.5) for above in (True, False))
"""Places of a name along its line, as a fraction, and above or below it; the first are preferred."""
COLUMNS = 201
"""Number of places at which the lines of a chart are compared with a name."""
_STYLES = ("--", ":", "-.")
FAMILIES = (
    ("rankme_centered", "rankme", "effective_rank"),
    ("odcorr", "mean_direction"),
    (*reversed(RETRIEVAL_METRICS), "cluster_agreement"),
    (*PROBES, "alpha_distance"),
)
"""The four charts: the first metric of each family that a run has."""


class Box(NamedTuple):
    """Place of a name, as fractions of the axes."""

    left: float
    right: float
    low: float
    high: float


class Chart(NamedTuple):
    """A chart of a report.

    Attributes:
        svg: The drawing.
        caption: Sentences below it.
        title: Title without the direction.
        no_interval: Reason why no value has an interval; "" if one has.
    """

    svg: str
    caption: str
    title: str
    no_interval: str = ""


def charted_metrics(runs: Sequence[Run], first: str) -> list[str]:
    """Metrics of the charts: the first is the metric that decides."""
    known = {n for run in runs for n in run.metrics if not all(math.isnan(m.value) for _, m in run.values(n))}
    families = [next((name for name in family if name in known), None) for family in FAMILIES]
    family_of_first = [first in family for family in FAMILIES]
    chosen = [name for name, same in zip(families, family_of_first, strict=True) if name is not None and not same]
    return [first, *chosen]


def metric_chart(runs: Sequence[Run], metric: str, verdicts: Sequence[Verdict]) -> Chart:
    """A metric over the steps of all runs, or a value per checkpoint where the checkpoints have no steps."""
    series = [(run, [(s, m) for s, m in run.values(metric) if not math.isnan(m.value)]) for run in runs]
    some = next((m for _, points in series for _, m in points), None)
    title = metric_title(metric) + ("" if some is None else ARROWS[some.direction])
    label = f"{title}: " + "; ".join(_in_words(run, points) for run, points in series)
    with Drawing(label, width=WIDTH, height=HEIGHT) as drawing:
        ax = drawing.axes[0]
        ax.set_title(title)
        values = [m.value for _, points in series for _, m in points]
        references, notes = ({}, []) if some is None else _references(some, values)
        if all(len(points) == 1 for _, points in series):
            _dots(ax, drawing, series)
            for value, style in zip(references.values(), _STYLES, strict=False):
                ax.axvline(value, color=SOFT, linestyle=style, linewidth=1)
        else:
            for value, style in zip(references.values(), _STYLES, strict=False):
                ax.axhline(value, color=SOFT, linestyle=style, linewidth=1)
            names = [run.name for run in runs]
            for k, ((run, points), verdict) in enumerate(zip(series, verdicts, strict=True)):
                _line(ax, drawing, run, points, verdict.keep, color=SERIES[k % len(SERIES)])
            ax.set_xlabel("step")
            if values and _limit(ax, values):
                notes.append("Intervals reach beyond the chart.")
            _label(ax, references, [[(step, m.value) for step, m in points] for _, points in series if points])
            if len(runs) > 1:
                drawing.legend(names)
        svg = drawing.to_svg()
    no_interval = ""
    if any(m.margin is not None for _, points in series for _, m in points):
        notes.insert(0, "Bands: 95 % intervals over groups.")
    elif some is not None:
        no_interval = some.reason or "none is recorded"
    summary = METRICS[metric].summary if metric in METRICS else ""
    caption = " ".join([*([f"{summary[0].upper()}{summary[1:]}."] if summary else []), *notes])
    return Chart(svg, caption, metric_title(metric), no_interval)


def _in_words(run: Run, points: Sequence[tuple[int, Measurement]]) -> str:
    if not points:
        return f"{run.name} has no value"
    (start, first), (end, last) = points[0], points[-1]
    if len(points) == 1:
        return f"{run.name} {_value(first)}"
    return f"{run.name} from {_value(first)} at step {start:,} to {_value(last)} at step {end:,}"


def _value(m: Measurement) -> str:
    return format_value(m.value, m.standard_error)


def _line(
    ax: Axes, drawing: Drawing, run: Run, points: Sequence[tuple[int, Measurement]], keep: Record | None, *, color: str
) -> None:
    steps, values = [step for step, _ in points], [m.value for _, m in points]
    ax.plot(steps, values, color=color)
    if any(m.margin is not None for _, m in points):
        low, high = zip(*(m.interval or (m.value, m.value) for _, m in points), strict=True)
        ax.fill_between(steps, low, high, color=color, alpha=0.18, linewidth=0)
    kept = [keep is not None and step == keep.step for step in steps]
    marks = ax.scatter(steps, values, s=[46 if k else 14 for k in kept], color=color, zorder=3)
    titles = [f"{run.name}, step {s:,}: {_value(m)}{' (keep)' if k else ''}"
              for (s, m), k in zip(points, kept, strict=True)]  # fmt: skip
    drawing.name_points(marks, titles)


def _dots(ax: Axes, drawing: Drawing, series: Sequence[tuple[Run, Sequence[tuple[int, Measurement]]]]) -> None:
    names = [run.name for run, _ in series]
    measured = [points[0][1] for _, points in series]
    rows = range(len(names))
    low, high = zip(*(m.interval or (m.value, m.value) for m in measured), strict=True)
    ax.hlines(rows, low, high, colors=SERIES[0], linewidth=1.4)
    marks = ax.scatter([m.value for m in measured], rows, s=22, color=SERIES[0], zorder=3)
    drawing.name_points(marks, [f"{name}: {_value(m)}" for name, m in zip(names, measured, strict=True)])
    ax.set_yticks(list(rows), names)
    name_texts(ax.get_yticklabels(), names)
    ax.invert_yaxis()
    ax.grid(axis="x")


def _limit(ax: Axes, values: Sequence[float]) -> bool:
    """Limit the axis to a few times the range of the values, so that wide intervals do not flatten them."""
    low, high = min(values), max(values)
    reach = 2 * max(high - low, 0.05 * abs(high))
    bottom, top = ax.get_ylim()
    ax.set_ylim(max(bottom, low - 1.2 * reach), min(top, high + 1.2 * reach))
    return bottom < low - 1.2 * reach or top > high + 1.2 * reach


def _references(m: Measurement, values: Sequence[float]) -> tuple[dict[str, float], list[str]]:
    """Values to compare with, by name, where they are near the data; and all of them in sentences."""
    horizontal = {}
    if "null_floor" in m.details and not math.isnan(m.details["null_floor"]):
        what = "color statistics alone" if m.name in PROBES else "independent features"
        horizontal[what] = m.details["null_floor"]
    if "chance" in m.details:
        horizontal["chance"] = m.details["chance"]
    if m.name in RETRIEVAL_METRICS:
        horizontal["chance"] = 2 / m.n  # of the two views of each image
    sentences = [f"{what[0].upper()}{what[1:]}: {value:.3g}." for what, value in horizontal.items()]
    if (highest := largest_value(m)) is not None:
        horizontal["largest possible"] = highest
        sentences.append(f"Largest possible: {highest}.")
    low, high = min(values), max(values)
    reach = max(high - low, 0.05 * abs(high))
    near = {what: value for what, value in horizontal.items() if low - 2 * reach <= value <= high + 2 * reach}
    return near, sentences


def _label(ax: Axes, references: Mapping[str, float], lines: Sequence[Sequence[tuple[float, float]]]) -> None:
    """Name horizontal lines where their names cross no other line and no other name, as far as there is such a place.

    Args:
        ax: Axes with their final limits.
        references: Values of the lines to name.
        lines: Points (step, value) of the lines of the data.
    """
    (left, right), (bottom, top) = ax.get_xlim(), ax.get_ylim()
    steps = np.linspace(left, right, COLUMNS)
    drawn = [np.interp(steps, [s for s, _ in line], [y for _, y in line], left=np.nan, right=np.nan) for line in lines]
    names: list[Box] = []
    for what, value in references.items():
        others = [np.full(COLUMNS, other) for other in references.values() if other != value]
        curves = [(curve - bottom) / (top - bottom) for curve in (*drawn, *others)]
        boxes = {place: _box(what, (value - bottom) / (top - bottom), *place) for place in PLACES}
        x, above = max(boxes, key=lambda place: min(_clearance(boxes[place], curves, names), CLEAR))
        names.append(boxes[x, above])
        ax.annotate(
            what, (x, value), (4 - 8 * x, 2 if above else -2), xycoords=("axes fraction", "data"),
            textcoords="offset points",
            ha={0.0: "left", 0.5: "center", 1.0: "right"}[x], va="bottom" if above else "top", fontsize=7.5, color=SOFT,
        )  # fmt: skip


def _box(name: str, y: float, x: float, above: bool) -> Box:
    width = CHARACTER_WIDTH * len(name)
    low = y if above else y - NAME_HEIGHT
    return Box(x * (1 - width), x * (1 - width) + width, low, low + NAME_HEIGHT)


def _clearance(box: Box, curves: Sequence[NDArray[np.float64]], names: Sequence[Box]) -> float:
    """Vertical distance of the nearest curve, name or edge of the axes from a box; negative where one crosses it."""
    x = np.linspace(0, 1, COLUMNS)
    under = np.array(curves)[:, (x >= box.left) & (x <= box.right)]
    under = under[~np.isnan(under)]
    gaps = np.maximum(box.low - under, under - box.high).tolist()
    stacked = [b for b in names if b.left < box.right and box.left < b.right]
    return min([*gaps, *(max(box.low - b.high, b.low - box.high) for b in stacked), box.low, 1 - box.high])


def spectrum_chart(runs: Sequence[Run], verdicts: Sequence[Verdict]) -> Chart | None:
    """Spectra on logarithmic axes, or None where none are recorded.

    Of one run: at its first evaluation, at the step to keep, and at its last. Of several runs: each at its last.
    """
    lines = [
        (label, record.spectrum)
        for run, verdict in zip(runs, verdicts, strict=True)
        for label, record in _spectrum_records(run, verdict, alone=len(runs) == 1)
        if record.spectrum and record.spectrum[0][1] > 0
    ]
    if not lines:
        return None
    ends = "; ".join(f"{label}: {points[-1][1] / points[0][1]:.2g}" for label, points in lines)
    with Drawing(f"Singular values by rank, smallest over largest: {ends}", width=WIDTH, height=HEIGHT) as drawing:
        ax = drawing.axes[0]
        ax.set_title("Spectrum of the centered features")
        for k, (_, points) in enumerate(lines):
            ranks, values = [rank for rank, _ in points], [value / points[0][1] for _, value in points]
            shown = [value if value > 0 else math.nan for value in values]
            ax.plot(ranks, shown, color=SERIES[k % len(SERIES)])
        ax.set(xscale="log", yscale="log", xlabel="rank of the singular value", ylabel="over the largest")
        ax.minorticks_off()  # their labels would take most of the time
        ax.set_ylim(bottom=max(ax.get_ylim()[0], 1e-8))
        drawing.legend([label for label, _ in lines], inside=True)
        svg = drawing.to_svg()
    caption = "A flat line uses all directions alike. A line that drops early uses few: this is dimensional collapse."
    return Chart(svg, caption, "Spectrum")


def _spectrum_records(run: Run, verdict: Verdict, *, alone: bool) -> list[tuple[str, Record]]:
    last = run.records[-1]
    if not alone:
        return [(run.name, last)]
    records = {"first": run.records[0], "keep": verdict.keep, "last": last}
    distinct = {record.step: record for record in records.values() if record is not None}
    return [(f"step {step:,}", distinct[step]) for step in sorted(distinct)]
