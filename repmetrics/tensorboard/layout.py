"""Layout of TensorBoard's custom-scalars page, from the log keys of a run."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from repmetrics.measurement.registry import DEFAULT_METRICS, PROBES
from repmetrics.measurement.titles import metric_title

Layout = dict[str, dict[str, list[Any]]]

CATEGORIES = {
    "Status": ("alarm", "nonfinite"),
    "Rank and probe": ("rankme", *PROBES, "view_retrieval_whitened", "loss"),
    "Further metrics": DEFAULT_METRICS,
    "Cost": ("seconds", "overhead", "overhead_total"),
}
"""Charts of each category in their order. Further metrics has all that is in no other."""
TITLES = {
    "alarm": "active alarms (0: none)",
    "nonfinite": "held-out samples with NaN or Inf",
    "loss": "training loss ↓",
    "seconds": "seconds per evaluation",
    "overhead": "share of the time between first and last step",
    "overhead_total": "share of the whole time",
}
AUXILIARY_SUFFIXES = ("_se", "_lower", "_upper", "_null")


def layout(keys: Collection[str], *, prefix: str = "repmetrics", titles: Mapping[str, str] | None = None) -> Layout:
    """Custom-scalars layout for the log keys of a run.

    Alarms come first, then the rank next to the probe. Each further layer adds its own categories. A value with known
    bounds is a margin chart (value, lower, upper), a value without is a line. ODCorr and the probe share a further line
    chart with the value to compare with, because a margin chart takes exactly three tags.

    Args:
        keys: Log keys.
        prefix: Prefix of the log keys.
        titles: Title of the chart of each metric, by name with its layer; default: the metric's name for people.

    Example:
        >>> layout(["repmetrics/rankme", "repmetrics/seconds"])
        {'Rank and probe': {'RankMe': ['Multiline', ['^repmetrics/rankme$']]}, 'Cost': {'seconds per evaluation': ...}}
    """
    by_layer: dict[str, list[str]] = {}
    for key in keys:
        if key.startswith(f"{prefix}/"):
            layer, _, name = key.removeprefix(f"{prefix}/").rpartition("/")
            by_layer.setdefault(layer, []).append(name)
    board: Layout = {}
    placed = {name for names in CATEGORIES.values() for name in names}
    for layer, names in by_layer.items():
        values = [name for name in names if not name.endswith(AUXILIARY_SUFFIXES)]
        for category, candidates in CATEGORIES.items():
            others = [name for name in values if name not in placed] if category == "Further metrics" else []
            chosen = [name for name in (*candidates, *others) if name in values]
            if category == "Further metrics":
                chosen = [name for name in chosen if name not in CATEGORIES["Rank and probe"]]
            if charts := _charts(chosen, set(names), prefix=prefix, layer=layer, titles=titles or {}):
                board[category + (f" of {layer}" if layer else "")] = charts
    return board


def layouts(keys: Mapping[str, Collection[str]], *, titles: Mapping[str, Mapping[str, str]] | None = None) -> Layout:
    """Joint layout of several monitors in one run, from their keys and titles by prefix.

    With more than one monitor, a first category has what all measure in one chart each, such as student and teacher.
    Each further category's title includes the prefix.

    Example:
        >>> list(layouts({"student": ["student/rankme"], "teacher": ["teacher/rankme"]}))
        ['student and teacher', 'Rank and probe (student)', 'Rank and probe (teacher)']
    """
    titles = titles or {}
    if len(keys) == 1:
        prefix = next(iter(keys))
        return layout(*keys.values(), prefix=prefix, titles=titles.get(prefix))
    names = {prefix: [key.removeprefix(f"{prefix}/") for key in every] for prefix, every in keys.items()}
    first, *others = names.values()
    ordered = [name for category in ("Rank and probe", "Further metrics") for name in CATEGORIES[category]]
    shared = [name for name in dict.fromkeys(ordered) if name in first and all(name in each for each in others)]
    charts = {
        _title(name, titles.get(next(iter(names)), {})): ["Multiline", [_exact(f"{prefix}/{name}") for prefix in names]]
        for name in shared
    }
    together = {" and ".join(names): charts} if charts else {}
    return together | {
        f"{category} ({prefix})": charts
        for prefix, every in keys.items()
        for category, charts in layout(every, prefix=prefix, titles=titles.get(prefix)).items()
    }


def _charts(
    names: Iterable[str], logged: set[str], *, prefix: str, layer: str, titles: Mapping[str, str]
) -> dict[str, list[Any]]:
    stem = f"{prefix}/{layer}/" if layer else f"{prefix}/"
    charts: dict[str, list[Any]] = {}
    for name in names:
        title = _title(f"{layer}/{name}" if layer else name, titles)
        if {f"{name}_lower", f"{name}_upper"} <= logged:
            charts[title] = ["Margin", [f"{stem}{name}", f"{stem}{name}_lower", f"{stem}{name}_upper"]]
        else:
            charts[title] = ["Multiline", [_exact(f"{stem}{name}")]]
        if f"{name}_null" in logged:
            what = "color alone" if name in PROBES else "independent features"
            charts[f"{title}, next to {what}"] = [
                "Multiline", [_exact(f"{stem}{name}"), _exact(f"{stem}{name}_null")]
            ]  # fmt: skip
    # TensorBoard shows the lines of a category first, in order, then its margin charts in reverse order.
    lines = {title: chart for title, chart in charts.items() if chart[0] == "Multiline"}
    return lines | dict(reversed(charts.items()))


def _title(name: str, titles: Mapping[str, str]) -> str:
    return TITLES.get(name) or titles.get(name) or metric_title(name)


def _exact(tag: str) -> str:
    """Pattern that matches only this tag: the tags of line charts are regular expressions."""
    return f"^{re.escape(tag)}$"
