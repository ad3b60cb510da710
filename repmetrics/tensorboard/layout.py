"""Layout of TensorBoard's custom-scalars page, from the log keys of a run."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from repmetrics.measurement.registry import DEFAULT_METRICS
from repmetrics.probes.common import PROBES

Layout = dict[str, dict[str, list[Any]]]

QUALITY = (*PROBES, "loss")
ALARMS = ("alarm", "nonfinite")
COST = ("seconds", "overhead", "overhead_total")
AUXILIARY_SUFFIXES = ("_se", "_lower", "_upper", "_null")


def layout(keys: Collection[str], *, prefix: str = "repmetrics") -> Layout:
    """Custom-scalars layout for the log keys of a run.

    The categories are Health, Quality, Alarms and Cost. Each further layer adds its own Health and Quality. A value
    with known bounds is a margin chart (value, lower, upper), a value without is a line. ODCorr and its null floor
    share an extra line chart, because a margin chart takes exactly three tags.

    Example:
        >>> layout(["repmetrics/rankme", "repmetrics/seconds"])
        {'Health': {'rankme': ['Multiline', ['^repmetrics/rankme$']]}, 'Cost': {'seconds': ['Multiline', ...]}}
    """
    by_layer: dict[str, list[str]] = {}
    for key in keys:
        if key.startswith(f"{prefix}/"):
            layer, _, name = key.removeprefix(f"{prefix}/").rpartition("/")
            by_layer.setdefault(layer, []).append(name)
    board: Layout = {}
    for layer, names in by_layer.items():
        values = [name for name in names if not name.endswith(AUXILIARY_SUFFIXES)]
        health = [name for name in values if name not in {*DEFAULT_METRICS, *QUALITY, *ALARMS, *COST}]
        categories = {"Health": (*DEFAULT_METRICS, *health), "Quality": QUALITY, "Alarms": ALARMS, "Cost": COST}
        stem, title = (f"{prefix}/{layer}/", f" of {layer}") if layer else (f"{prefix}/", "")
        for category, candidates in categories.items():
            if charts := _charts((name for name in candidates if name in values), set(names), stem=stem):
                board[category + title] = charts
    return board


def layouts(keys: Mapping[str, Collection[str]]) -> Layout:
    """Joint layout of several monitors in one run, from their keys by prefix.

    With more than one monitor, each category's title includes the prefix.

    Example:
        >>> list(layouts({"student": ["student/rankme"], "teacher": ["teacher/rankme"]}))
        ['Health (student)', 'Health (teacher)']
    """
    if len(keys) == 1:
        return layout(*keys.values(), prefix=next(iter(keys)))
    return {
        f"{category} ({prefix})": charts
        for prefix, names in keys.items()
        for category, charts in layout(names, prefix=prefix).items()
    }


def _charts(names: Iterable[str], logged: set[str], *, stem: str) -> dict[str, list[Any]]:
    charts: dict[str, list[Any]] = {}
    for name in names:
        if {f"{name}_lower", f"{name}_upper"} <= logged:
            charts[name] = ["Margin", [f"{stem}{name}", f"{stem}{name}_lower", f"{stem}{name}_upper"]]
        else:
            charts[name] = ["Multiline", [_exact(f"{stem}{name}")]]
        if f"{name}_null" in logged:
            tags = [_exact(f"{stem}{name}"), _exact(f"{stem}{name}_null")]
            charts[f"{name} above its null floor"] = ["Multiline", tags]
    # TensorBoard shows the lines of a category first, in order, then its margin charts in reverse order.
    lines = {title: chart for title, chart in charts.items() if chart[0] == "Multiline"}
    return lines | dict(reversed(charts.items()))


def _exact(tag: str) -> str:
    """Pattern that matches only this tag: the tags of line charts are regular expressions."""
    return f"^{re.escape(tag)}$"
