"""Write scores, comparisons and choices as JSON, CSV and TensorBoard events."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from io import StringIO
from pathlib import Path

from repmetrics.decisions.checkpoint_selection import Choice, Comparison
from repmetrics.monitoring.record import scalars
from repmetrics.scoring.score import Score

CSV_COLUMNS = ("name", "step", "encoder", "data", "metric", "value", "standard_error", "better", "n", "d", "groups")


def write_json(scores: Sequence[Score]) -> str:
    """All scores as one JSON document: values in full precision, NaN as null."""
    return json.dumps({"scores": [score.to_json() for score in scores]}, indent=2, allow_nan=False)


def write_csv(scores: Sequence[Score]) -> str:
    """All scores as CSV, one line per measurement: values in full precision, empty if there is none."""
    out = StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow((*CSV_COLUMNS, "dtype", "convention", "reason"))
    for score in scores:
        for m in score.measurements.values():
            value = None if math.isnan(m.value) else m.value
            numbers = (value, m.standard_error, m.direction, m.n, m.d, m.groups)
            provenance = (score.name, score.step, score.encoder, score.data)
            writer.writerow((*provenance, m.name, *numbers, m.dtype, m.convention, m.reason))
    return out.getvalue()


def write_events(scores: Sequence[Score], folder: Path) -> None:
    """Write checkpoints as steps of TensorBoard runs, with the monitor's tags and layout.

    Each folder of checkpoints becomes a run, in a sub-folder of the same name.
    """
    from torch.utils.tensorboard import SummaryWriter

    from repmetrics.tensorboard.layout import layout

    for run, steps in _by_step(scores).items():
        curves = {step: scalars(score.measurements, prefix="repmetrics") for step, score in sorted(steps.items())}
        with SummaryWriter(str(folder / run)) as writer:
            writer.add_custom_scalars(layout({tag for tags in curves.values() for tag in tags}))
            for step, tags in curves.items():
                for tag, value in tags.items():
                    writer.add_scalar(tag, value, step)


def _by_step(scores: Sequence[Score]) -> dict[str, dict[int, Score]]:
    runs: dict[str, dict[int, Score]] = {}
    for score in scores:
        if score.step is None:
            raise ValueError(f"TensorBoard needs a step for each checkpoint, and {score.name} has none")
        first = runs.setdefault(score.run, {}).setdefault(score.step, score)
        if first is not score:
            raise ValueError(
                f"TensorBoard needs one checkpoint per step: {first.name} and {score.name} both have step {score.step}"
            )
    return runs


def comparison_json(first: Score, second: Score, verdicts: Sequence[Comparison]) -> str:
    """Both scores, and B compared with A, as one JSON document."""
    compared = [
        {
            "name": c.name,
            "change": _finite(c.change),
            "standard_error": c.standard_error,
            "outcome": c.outcome,
            "why": c.reason,
            "z": _finite(c.z),
            "margin": c.margin,
            "degrees_of_freedom": c.degrees_of_freedom,
        }
        for c in verdicts
    ]
    content = {"a": first.to_json(), "b": second.to_json(), "b_against_a": compared}
    return json.dumps(content, indent=2, allow_nan=False)


def choice_json(scores: Sequence[Score], choice: Choice) -> str:
    """All scores and the checkpoint to keep, with the reason and the confidence, as one JSON document."""
    best = scores[choice.position]
    content = {
        "keep": best.name,
        "run": best.run,
        "kept": choice.position,
        "by": choice.by,
        "peak": choice.peak,
        "tied": choice.tied,
        "reason": choice.reason,
        "sure": choice.confidence,
        "share": choice.share,
    }
    return json.dumps({"choice": content, "scores": [score.to_json() for score in scores]}, indent=2, allow_nan=False)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
