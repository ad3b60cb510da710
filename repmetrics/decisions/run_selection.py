"""Which of many runs to keep, without labels: plateaus, gates, Borda's count, and what makes a comparison unfair."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from repmetrics.decisions.checkpoint_selection import BEYOND_NOISE

RANK_INFLATING = (
    "regularizer",
    "spread",
    "koleo",
    "kde",
    "vicreg",
    "variance_weight",
    "covariance_weight",
    "barlow",
)
"""Parts of names of settings that push the rank up (or correlation down) directly, whatever is learnt."""

CHANGES_WIDTH = ("arch", "embed_dim", "depth", "patch_size", "img_size", "manifest", "held_out")
"""Parts of names of settings after which ranks are of another space, or of other samples."""


def tied_with_best(values: Sequence[float], errors: Sequence[float | None], *, direction: str) -> list[int]:
    """Places that the best is not better than by more than two standard errors of the difference.

    The errors are taken as independent. Runs that saw the same held-out slides share part of them, so the plateau is
    rather too wide than too narrow. Without errors the best stands alone. NaN never stands on it.

    Args:
        values: of one metric.
        errors: standard errors, None where unknown.
        better: "higher" or "lower".

    Raises:
        ValueError: no direction, or nothing but NaN.

    Example:
        >>> tied_with_best([40.0, 44.0, 45.0], [0.5, 0.5, 0.5], direction="higher")
        [1, 2]
    """
    if direction not in ("higher", "lower"):
        raise ValueError(f"a choice needs a direction, higher or lower, got {direction}")
    scored = [(-math.inf if math.isnan(v) else v if direction == "higher" else -v) for v in values]
    if not scored or max(scored) == -math.inf:
        raise ValueError("there is nothing to choose from: no run has a value")
    best = scored.index(max(scored))

    def level(k: int) -> bool:
        own, its = errors[k], errors[best]
        known = own is not None and its is not None
        return k == best or (known and scored[best] - scored[k] <= BEYOND_NOISE * math.hypot(own or 0, its or 0))

    return [k for k in range(len(scored)) if scored[k] > -math.inf and level(k)]


def select_setting(
    settings: Sequence[float],
    values: Sequence[float],
    errors: Sequence[float | None],
    *,
    direction: str,
    prefer: str = "smallest",
) -> int:
    """RankMe's rule for one axis: the best value; on a plateau, the first setting that reaches it.

    Args:
        settings: the swept hyperparameter.
        values: the metric of each run.
        errors: its standard errors.
        better: the metric's direction.
        prefer: the "smallest" or the "largest" setting of the plateau.

    Returns:
        The place of the run to keep.

    Raises:
        ValueError: as :func:`tied_with_best`; or an unknown preference.

    Source:
        Garrido et al. 2023, arXiv 2210.02885, section 4.2.

    Example:
        >>> select_setting([1e-4, 1e-3, 1e-2], [44.0, 45.0, 12.0], [0.6, 0.6, 0.6], direction="higher")
        0
    """
    if prefer not in ("smallest", "largest"):
        raise ValueError(f"prefer must be smallest or largest, got {prefer}")
    level = tied_with_best(values, errors, direction=direction)
    return (min if prefer == "smallest" else max)(level, key=lambda k: settings[k])


def borda_count(
    signals: Mapping[str, Sequence[float]], *, direction: Mapping[str, str], alarms: Sequence[int] | None = None
) -> NDArray[np.float64]:
    """Points of each run: how many runs it beats, summed over signals; ties count half. −inf for a gated run.

    No weights: without labels there is nothing to fit them to. A run with a standing alarm is shut out before the
    count; a value that is NaN loses to every other.

    Args:
        signals: values of each run, by metric.
        better: their directions.
        alarms: how many stand for each run; None: no gate.

    Raises:
        ValueError: no signal, or one without a direction.

    Example:
        >>> borda_count({"rankme": [9, 12, 40], "odcorr": [0.5, 0.3, 0.4]}, direction={"rankme": "higher", "odcorr": "lower"},
        ...       alarms=[0, 0, 1]).tolist()
        [0.0, 2.0, -inf]
    """
    if not signals:
        raise ValueError("Borda's count needs at least one signal")
    if undirected := [name for name in signals if direction.get(name) not in ("higher", "lower")]:
        raise ValueError(f"{', '.join(undirected)} has no better direction: leave it out of the count")
    count = len(next(iter(signals.values())))
    shut = np.zeros(count, dtype=bool) if alarms is None else np.asarray(alarms) > 0
    points = np.zeros(count)
    for name, values in signals.items():
        scored = np.asarray(values, dtype=float) * (1 if direction[name] == "higher" else -1)
        points[~shut] += rankdata(np.nan_to_num(scored, nan=-np.inf)[~shut]) - 1
    points[shut] = -np.inf
    return points


def comparison_warnings(
    axes: Sequence[str], *, methods: Sequence[str] = (), widths: Sequence[int | None] = (), metrics: Sequence[str] = ()
) -> list[str]:
    """Reasons to distrust a comparison of runs by label-free metrics, in sentences.

    Args:
        axes: settings that differ between the runs.
        methods: of each run.
        widths: of each run's features.
        metrics: that are to choose.

    Example:
        >>> comparison_warnings(["model.init_args.regularizer_weight"], methods=["DINOv2", "DINOv2"])
        ['regularizer_weight presses features apart: a higher rank is its doing, not evidence of better features']
    """
    found = []
    last = list(dict.fromkeys(axis.rpartition(".")[2] for axis in axes))
    for name in last:
        if any(part in name.lower() for part in RANK_INFLATING):
            found.append(f"{name} presses features apart: a higher rank is its doing, not evidence of better features")
        elif any(part == name.lower() for part in CHANGES_WIDTH):
            found.append(f"{name} changes the space or the samples that are measured: values do not compare")
    if len(kinds := sorted({method for method in methods if method})) > 1:
        found.append(f"methods are mixed ({', '.join(kinds)}): ranks and correlations compare within one method only")
    if len(sizes := sorted({width for width in widths if width is not None})) > 1:
        found.append(f"features are {', '.join(map(str, sizes))} wide: ranks of different widths do not compare")
    if "loss" in metrics:
        found.append("losses compare only where nothing that defines them differs")
    return found
