"""The table of finished runs, for `repmetrics select RUNS/` and `fmtrain sweep`: rows, conclusions, CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from repmetrics.decisions.run_ranking import STATES, Ranking, RunSummary
from repmetrics.measurement.result import format_value

MOST_SETTINGS = 6
"""Largest number of settings that the table shows."""

LONGEST_SETTING = 24
"""Largest length of a setting's values in the table, in characters."""


def format_setting(value: object) -> str:
    """A value of a setting as messages and tables show it.

    Example:
        >>> format_setting(0.00123456), format_setting("kde"), format_setting(None)
        ('0.00123', 'kde', 'None')
    """
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def ordered(runs: Sequence[RunSummary], metrics: Sequence[str], *, direction: str) -> list[RunSummary]:
    """Runs as the table shows them: complete ones first, those with an alarm last among them, then by the metric."""
    sign = -1 if direction == "higher" else 1

    def key(run: RunSummary) -> tuple[int, bool, float, str]:
        known = metrics[0] in run.signals
        return STATES.index(run.state), bool(run.alarms), sign * run.signals[metrics[0]][0] if known else 0.0, run.name

    return sorted(runs, key=key)


def runs_table(
    runs: Sequence[RunSummary],
    metrics: Sequence[str],
    lines: Sequence[str],
    *,
    heading: str = "run",
    ranking: Ranking | None = None,
    extra: Mapping[str, Mapping[str, str]] | None = None,
) -> RenderableType:
    """One row per run in the given order, and sentences below.

    Args:
        runs: Runs.
        metrics: Metrics to show.
        lines: Sentences below.
        heading: Heading of the names.
        ranking: Ranking by the first metric, for the mean and spread over seeds.
        extra: Further columns: heading → text by name of the run.
    """
    differing = list(dict.fromkeys(name for run in runs for name in run.settings))
    short = [name for name in differing if all(_is_short(run.settings.get(name)) for run in runs)]
    settings = short[:MOST_SETTINGS]
    if more := len(differing) - len(settings):
        lines = [*lines, f"{more} more settings differ: --csv shows them"]
    repeated = {s.name: s for s in ranking.settings if len(s.runs) > 1} if ranking is not None else {}
    extra = dict(extra or {})
    if repeated:
        extra["over seeds"] = {name: format_value(s.value, s.spread) for name, s in repeated.items()}
    table = Table()
    for title in (heading, "state", *short_names(settings), "step", *metrics, *extra):
        table.add_column(title, justify="left" if title == "state" else "right", overflow="fold")
    for run in runs:
        state = f"{run.state}, alarm" if run.alarms and run.state == "complete" else run.state
        table.add_row(
            run.name,
            state if run.repeats is None else f"{state}, seed of {run.repeats}",
            *(format_setting(run.settings.get(name)) for name in settings),
            "–" if run.step is None else str(run.step),
            *(format_value(*run.signals[name]) if name in run.signals else "–" for name in metrics),
            *(column.get(run.name, "–") for column in extra.values()),
        )
    return Group(table, *(Text(line) for line in lines))


def short_names(names: Sequence[str]) -> list[str]:
    """The last parts of dotted names; a name whole where another has the same last part.

    Example:
        >>> short_names(["model.init_args.lr", "data.seed", "model.seed"])
        ['lr', 'data.seed', 'model.seed']
    """
    last = [name.rpartition(".")[2] for name in names]
    return [part if last.count(part) == 1 else name for name, part in zip(names, last, strict=True)]


def _is_short(value: object) -> bool:
    return len(format_setting(value)) <= LONGEST_SETTING


def runs_csv(runs: Sequence[RunSummary]) -> str:
    """All runs with their settings and all signals as CSV."""
    rows: list[dict[str, Any]] = []
    for run in runs:
        row: dict[str, Any] = {"run": run.name, "state": run.state, "step": run.step, "alarms": "; ".join(run.alarms)}
        row |= {f"param.{name}": value for name, value in run.settings.items()}
        for name, (value, error) in run.signals.items():
            row |= {name: value} | ({} if error is None else {f"{name}_se": error})
        rows.append(row)
    stream = io.StringIO()
    writer = csv.DictWriter(stream, list(dict.fromkeys(key for row in rows for key in row)), restval="")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()
