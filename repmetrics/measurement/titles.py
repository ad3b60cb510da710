"""Names of metrics for people: titles of charts, with the direction and the largest value; names in legends."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from repmetrics.measurement.registry import METRICS
from repmetrics.measurement.result import Measurement

ARROWS = {"higher": " ↑", "lower": " ↓", "neither": ""}

_WORDS = {
    "rankme": "RankMe", "odcorr": "ODCorr", "lidar": "LiDAR", "dse": "DSE", "knn": "kNN", "kde": "KDE", "cka": "CKA",
    "mst": "MST", "w2": "W₂", "infonce": "InfoNCE", "twonn": "TwoNN", "alpha": "α", "req": "ReQ",
}  # fmt: skip


def metric_title(name: str) -> str:
    """A metric's name for people.

    Example:
        >>> metric_title("rankme_centered"), metric_title("linear_probe"), metric_title("blocks.8/odcorr")
        ('RankMe, centered', 'linear probe', 'ODCorr of blocks.8')
    """
    layer, _, name = name.rpartition("/")
    words = [_WORDS.get(word, word) for word in name.split("_")]
    suffix = f", {words.pop()}" if words[-1] in ("centered", "whitened") and len(words) > 1 else ""
    return " ".join(words) + suffix + (f" of {layer}" if layer else "")


def largest_value(m: Measurement) -> int | None:
    """The largest value that a rank can have, from the numbers of rows and of features; None for other metrics."""
    spec = METRICS.get(m.name)
    if spec is None or spec.centered is None or spec.direction != "higher":
        return None
    return min(m.n - 1, m.d) if spec.centered else min(m.n, m.d)


def chart_title(name: str, m: Measurement) -> str:
    """Title of a chart of one metric.

    Example:
        >>> import torch
        >>> from repmetrics.measurement.measure import measure
        >>> values = measure(torch.randn(64, 8))
        >>> chart_title("rankme", values["rankme"]), chart_title("projector/odcorr", values["odcorr"])
        ('RankMe ↑ (of 8)', 'ODCorr of projector ↓')
    """
    largest = largest_value(m)
    return metric_title(name) + ARROWS[m.direction] + ("" if largest is None else f" (of {largest})")


def names_by_text(pairs: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """Names of each distinct text, from pairs (text, name): a text that concerns several metrics is shown once.

    Example:
        >>> names_by_text([("no groups", "rankme"), ("few rows", "odcorr"), ("no groups", "odcorr")])
        {'no groups': ['rankme', 'odcorr'], 'few rows': ['odcorr']}
    """
    names: dict[str, list[str]] = {}
    for text, name in pairs:
        names.setdefault(text, []).append(name)
    return names


def name_texts(texts: Sequence[Any], names: Sequence[str]) -> None:
    """Set texts of a matplotlib figure to names as they are.

    Matplotlib leaves names that begin with "_" out of legends, and reads what is between two "$" as a formula. A legend
    is made with numbers, which this function replaces.
    """
    for text, name in zip(texts, names, strict=True):
        text.set_parse_math(False)
        text.set_text(name)
