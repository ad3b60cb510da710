"""History: the records of a run as a list, a table, a data frame and plots, for notebooks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from html import escape
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from repmetrics.measurement.result import format_value
from repmetrics.measurement.titles import ARROWS, chart_title, metric_title, name_texts
from repmetrics.monitoring import MEASUREMENTS
from repmetrics.monitoring.record import Record, read_jsonl, record_files

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D


class History(list[Record]):
    """All records of a run, oldest first. A list, with views for notebooks.

    Example:
        >>> history = History([Record(step=0, epoch=0, seconds=0.1), Record(step=50, epoch=1, seconds=0.1)])
        >>> history
        History of 2 evaluations, steps 0 to 50
        >>> history[-1].step
        50
    """

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """Read the newest run of a folder with ``measurements.jsonl``, or of such a file.

        Raises:
            FileNotFoundError: There is none; the files of further monitors in the folder are named.
        """
        file = Path(path) / MEASUREMENTS if Path(path).is_dir() else Path(path)
        if not file.is_file() and (others := record_files(file.parent)):
            raise FileNotFoundError(f"{file} does not exist: give one of {', '.join(map(str, others[:5]))}")
        return cls(Record.from_state(entry) for entry in read_jsonl(file))

    @property
    def metrics(self) -> list[str]:
        """Names of everything measured, in the order of the records."""
        return list(dict.fromkeys(name for record in self for name in record.measurements))

    def to_frame(self) -> Any:
        """A pandas DataFrame with a row per evaluation, by its step, and a column per log key without its prefix."""
        import pandas as pd

        rows = [{"step": record.step, "epoch": record.epoch} | record.scalars(prefix="") for record in self]
        frame = pd.DataFrame([{key.removeprefix("/"): value for key, value in row.items()} for row in rows])
        return frame.set_index("step") if rows else frame

    def plot(self, *metrics: str, others: Mapping[str, History] | None = None) -> Figure:
        """Plot metrics over the steps with their 95 % bands; needs matplotlib.

        Args:
            metrics: Names; default: RankMe, ODCorr, whitened view retrieval and the linear probe, as far as measured.
            others: Histories of further runs by name, to compare with.

        Raises:
            ValueError: A metric was not measured.
        """
        runs = {"this run" if others else "": self, **(others or {})}
        known = {name for history in runs.values() for name in history.metrics}
        if unknown := [name for name in metrics if name not in known]:
            raise ValueError(f"{unknown[0]!r} was not measured: choose among {', '.join(sorted(known)) or 'none'}")
        names = metrics or [name for name in _PLOTTED if name in known]
        figure = _figure(max(len(names), 1))
        for ax, name in zip(figure.axes, names, strict=False):
            _plot_metric(ax, name, runs)
        return figure

    def plot_spectrum(self) -> Figure:
        """Plot the spectrum of the first, the middle and the last evaluation; needs matplotlib."""
        records = [record for record in self if record.spectrum]
        figure = _figure(1)
        ax = figure.axes[0]
        chosen = {record.step: record for record in (*records[:1], *records[len(records) // 2 :][:1], *records[-1:])}
        for record in chosen.values():
            ranks, values = zip(*record.spectrum, strict=True)
            ax.plot(ranks, [value / (values[0] or 1.0) for value in values], label=f"step {record.step:,}")
        ax.set(xscale="log", yscale="log", xlabel="rank of the singular value", ylabel="over the largest")
        ax.set_title("spectrum of the centered features")
        if chosen:
            ax.legend()
        return figure

    def __repr__(self) -> str:
        if not self:
            return "History without evaluations"
        steps = f"step {self[0].step:,}" if len(self) == 1 else f"steps {self[0].step:,} to {self[-1].step:,}"
        alarms = f", alarm: {', '.join(alarm.kind for alarm in self[-1].alarms)}" if self[-1].alarms else ""
        return f"History of {len(self)} evaluation{'s' * (len(self) > 1)}, {steps}{alarms}"

    def _repr_html_(self) -> str:
        """A table of the last ten evaluations, which notebooks show."""
        last = {name: m for record in self for name, m in record.measurements.items()}
        heads = ["step", *(metric_title(name) + ARROWS[m.direction] for name, m in last.items()), "alarms"]
        rows = []
        for record in self[-10:]:
            measured = [record.measurements.get(name) for name in last]
            cells = ["–" if m is None else format_value(m.value, m.standard_error) for m in measured]
            rows.append([f"{record.step:,}", *cells, ", ".join(alarm.kind for alarm in record.alarms) or "none"])
        head = "".join(f"<th>{escape(text)}</th>" for text in heads)
        body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
        return f"<p>{escape(repr(self))}</p><table><tr>{head}</tr>{body}</table>"


_PLOTTED = ("rankme", "odcorr", "view_retrieval_whitened", "linear_probe")


def _figure(count: int) -> Figure:
    """A figure outside of pyplot's state, with axes in rows of two.

    A notebook shows it once. A plain figure is not shown before pyplot has made one, and one of pyplot is shown twice.
    """
    from matplotlib.figure import Figure

    class NotebookFigure(Figure):
        def _repr_png_(self) -> bytes:
            content = BytesIO()
            self.savefig(content, format="png")
            return content.getvalue()

    rows, columns = -(-count // 2), min(count, 2)
    figure = NotebookFigure(figsize=(4.6 * columns, 3.0 * rows), layout="constrained")
    for ax in list(figure.subplots(rows, columns, squeeze=False).flat)[count:]:
        ax.remove()
    return figure


def _plot_metric(ax: Axes, name: str, runs: Mapping[str, History]) -> None:
    drawn: dict[str, Line2D] = {}
    for label, history in runs.items():
        points = [(record.step, m) for record in history if (m := record.measurements.get(name)) is not None]
        points = [(step, m) for step, m in points if not math.isnan(m.value)]
        if not points:
            continue
        steps, values = [step for step, _ in points], [m.value for _, m in points]
        (line,) = ax.plot(steps, values, marker=".")
        drawn[label] = line
        low, high = zip(*(m.interval or (m.value, m.value) for _, m in points), strict=True)
        ax.fill_between(steps, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
        ax.set_title(chart_title(name, points[-1][1]))
    ax.set_xlabel("step")
    if len(runs) > 1:
        numbers = [str(k) for k in range(len(drawn))]
        name_texts(ax.legend(list(drawn.values()), numbers).get_texts(), list(drawn))
