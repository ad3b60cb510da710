"""Curves → plain data → TensorBoard: what the board shows, decided here; the drawing is TensorBoard's."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

Layout = dict[str, dict[str, list[Any]]]

HEALTH = ("rankme", "rankme_centered", "effective_rank", "odcorr")
QUALITY = ("linear_probe", "knn", "loss")
COST = ("seconds", "overhead")
ALARM = ("alarm", "nonfinite")
SUFFIXES = ("_se", "_lower", "_upper", "_null")


def layout(keys: Collection[str], *, prefix: str = "repmetrics") -> Layout:
    """The custom-scalars layout for the log keys of a run: Health, Quality, Alarms, Cost; two categories more a layer.

    A value with known bounds becomes a margin chart (value, lower, upper); one without becomes a line. ODCorr's
    null floor is a line beside ODCorr, in a chart of its own, since a margin chart takes three tags and no more.

    Args:
        keys: all keys that are or will be logged.
        prefix: of the keys.

    Returns:
        ``{category: {chart: [kind, tags]}}`` as ``SummaryWriter.add_custom_scalars`` takes it. A chart whose keys
        are not logged is left out, so none is empty.

    Example:
        >>> layout(["repmetrics/rankme", "repmetrics/seconds"])
        {'Health': {'rankme': ['Multiline', ['^repmetrics/rankme$']]}, 'Cost': {'seconds': ['Multiline', ...]}}
    """
    names = [key.removeprefix(f"{prefix}/") for key in keys if key.startswith(f"{prefix}/")]
    layers = list(dict.fromkeys(name.rpartition("/")[0] for name in names))
    board: Layout = {}
    for layer in layers:
        own = [name.rpartition("/")[2] for name in names if name.rpartition("/")[0] == layer]
        shown = [name for name in own if not name.endswith(SUFFIXES)]
        health = [name for name in HEALTH if name in shown]
        health += [name for name in shown if name not in {*HEALTH, *QUALITY, *COST, *ALARM}]
        stem = f"{prefix}/{layer}/" if layer else f"{prefix}/"
        title = f" of {layer}" if layer else ""
        for category, wanted in (("Health", health), ("Quality", QUALITY), ("Alarms", ALARM), ("Cost", COST)):
            charts = _charts((name for name in wanted if name in shown), set(own), stem=stem)
            if charts:
                board[category + title] = charts
    return board


def layouts(keys: Mapping[str, Collection[str]]) -> Layout:
    """The one layout of a run with a monitor for each prefix; where there are several, categories name their own.

    Example:
        >>> list(layouts({"student": ["student/rankme"], "teacher": ["teacher/rankme"]}))
        ['Health (student)', 'Health (teacher)']
    """
    if len(keys) == 1:
        return layout(*keys.values(), prefix=next(iter(keys)))
    return {
        f"{category} ({prefix})": charts
        for prefix, own in keys.items()
        for category, charts in layout(own, prefix=prefix).items()
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
    # TensorBoard shows a category's lines first, in order, then its margin charts, last first.
    lines = {title: chart for title, chart in charts.items() if chart[0] == "Multiline"}
    return lines | dict(reversed(charts.items()))


def _exact(tag: str) -> str:
    """Multiline tags are regular expressions."""
    return f"^{re.escape(tag)}$"


# ── the card ────────────────────────────────────────────────────────────────────────────────────────────────────────


# ── the spectrum ────────────────────────────────────────────────────────────────────────────────────────────────────


# ── TensorBoard ─────────────────────────────────────────────────────────────────────────────────────────────────────
