"""Selection among runs without labels: the default rule, plateaus, and Borda's count with a gate."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

BEYOND_NOISE = 2.0
"""Standard errors of the difference up to which two runs count as equal."""

Domain = Literal["natural", "stained", "custom"]
"""Kind of images: everyday photographs, stained tissue, or others."""

CONSENSUS = "consensus"
"""Name of the default rule: runs without an alarm, by :data:`CONSENSUS_METRIC` over the domain's view set."""

CONSENSUS_METRIC = "view_retrieval_whitened"
"""Metric that chose best among runs on three domains: see docs/trust.md."""

DOMAIN_VIEW_SETS: Mapping[str, str | None] = {"natural": "natural", "stained": "stain", "custom": None}
"""View set of each domain; None: whatever the runs were measured with."""

WORTH_IN_LABELS: Mapping[str, int] = {"natural": 1_000, "stained": 1_000, "custom": 100}
"""Labels with which a probe chose among runs no better than the views of the domain: see docs/trust.md."""


def metric_for_labels(labels: int, domain: Domain) -> str:
    """Metric that chooses among runs where some labels are known: a probe if they are worth more than the views.

    Example:
        >>> metric_for_labels(200, "stained"), metric_for_labels(200, "custom")
        ('view_retrieval_whitened', 'linear_probe')
    """
    return "linear_probe" if labels > WORTH_IN_LABELS[domain] else CONSENSUS_METRIC


def tied_with_best(values: Sequence[float], errors: Sequence[float | None], *, direction: str) -> list[int]:
    """Return the positions within two standard errors of the difference from the best value.

    The errors are treated as independent. Runs on the same held-out slides share part of them, so the plateau is
    rather too wide than too narrow. Without errors, only the best position is returned. NaN is never returned.

    Args:
        values: Values of one metric.
        errors: Their standard errors, None where unknown.
        direction: "higher" or "lower".

    Example:
        >>> tied_with_best([40.0, 44.0, 45.0], [0.5, 0.5, 0.5], direction="higher")
        [1, 2]
    """
    if direction not in ("higher", "lower"):
        raise ValueError(f"a choice needs a direction, higher or lower, got {direction}")
    scores = [(-math.inf if math.isnan(v) else v if direction == "higher" else -v) for v in values]
    if not scores or max(scores) == -math.inf:
        raise ValueError("there is nothing to choose from: no run has a value")
    best = scores.index(max(scores))

    def is_tied(k: int) -> bool:
        error, best_error = errors[k], errors[best]
        if error is None or best_error is None:
            return False
        return scores[best] - scores[k] <= BEYOND_NOISE * math.hypot(error, best_error)

    return [k for k, score in enumerate(scores) if k == best or (score > -math.inf and is_tied(k))]


def select_setting(
    settings: Sequence[float],
    values: Sequence[float],
    errors: Sequence[float | None],
    *,
    direction: str,
    prefer: str = "smallest",
) -> int:
    """Select a setting by RankMe's rule for one hyperparameter: the best value; on a plateau, the first setting.

    Args:
        settings: Values of the hyperparameter, one per run.
        values: Values of the metric, one per run.
        errors: Their standard errors, None where unknown.
        direction: Direction of the metric, "higher" or "lower".
        prefer: Setting to take from the plateau, "smallest" or "largest".

    Returns:
        The position of the run to keep.

    Source:
        Garrido et al. 2023, arXiv 2210.02885, section 4.2.

    Example:
        >>> select_setting([1e-4, 1e-3, 1e-2], [44.0, 45.0, 12.0], [0.6, 0.6, 0.6], direction="higher")
        0
    """
    if prefer not in ("smallest", "largest"):
        raise ValueError(f"prefer must be smallest or largest, got {prefer}")
    tied = tied_with_best(values, errors, direction=direction)
    return (min if prefer == "smallest" else max)(tied, key=lambda k: settings[k])


def borda_count(
    signals: Mapping[str, Sequence[float]], *, direction: Mapping[str, str], alarms: Sequence[int] | None = None
) -> NDArray[np.float64]:
    """Count for each run the runs that it beats, summed over signals; ties count half.

    The signals have equal weights: without labels, weights cannot be fitted. A run with an active alarm is excluded
    before the count and gets −inf. NaN loses to every other value.

    Args:
        signals: Values of each run, by metric.
        direction: Direction of each metric, "higher" or "lower".
        alarms: Number of active alarms of each run, or None to exclude no run.

    Example:
        >>> signals = {"rankme": [9, 12, 40], "odcorr": [0.5, 0.3, 0.4]}
        >>> borda_count(signals, direction={"rankme": "higher", "odcorr": "lower"}, alarms=[0, 0, 1]).tolist()
        [0.0, 2.0, -inf]
    """
    from scipy.stats import rankdata  # takes a second to import

    if not signals:
        raise ValueError("Borda's count needs at least one signal")
    if undirected := [name for name in signals if direction.get(name) not in ("higher", "lower")]:
        raise ValueError(f"{', '.join(undirected)} has no better direction: leave it out of the count")
    count = len(next(iter(signals.values())))
    excluded = np.zeros(count, dtype=bool) if alarms is None else np.asarray(alarms) > 0
    points = np.zeros(count)
    for name, values in signals.items():
        scores = np.asarray(values, dtype=float) * (1 if direction[name] == "higher" else -1)
        points[~excluded] += rankdata(np.nan_to_num(scores, nan=-np.inf)[~excluded]) - 1
    points[excluded] = -np.inf
    return points
