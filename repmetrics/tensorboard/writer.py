"""Summaries written to TensorBoard: scalars, the spectrum, the card, the projector, HParams."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from repmetrics.data.features import Features
from repmetrics.measurement.result import Measurement, change_error
from repmetrics.monitoring.record import Record


def summary_markdown(history: Sequence[Record]) -> str:
    """The state of a run in words, as Markdown: is it healthy, where is it going, what the numbers can bear.

    Args:
        history: all looks, the last one finite or not; at least one.
    """
    last = history[-1]
    lines = [f"**Step {last.step}.** {_summary(history)}", ""]
    if last.measurements:
        lines += ["| signal | value | ± | since the look before | better |", "|---|---|---|---|---|"]
        before = history[-2].measurements if len(history) > 1 else {}
        lines += [_row(name, m, before.get(name)) for name, m in last.measurements.items()]
        first = next(iter(last.measurements.values()))
        groups = "no groups known, hence no errors" if first.groups is None else f"{first.groups} groups"
        lines += ["", f"{first.n} held-out samples, {groups}, D = {first.d}, {first.dtype}."]
        lines += [f"- {text}" for text in dict.fromkeys(t for m in last.measurements.values() for t in m.warnings)]
    lines += ["", f"This look took {last.seconds:.2g} s."]
    return "\n".join(lines)


def _summary(history: Sequence[Record]) -> str:
    last = history[-1]
    if last.alarms:
        return "**" + "; ".join(f"{alarm.kind}: {alarm.reason}" for alarm in last.alarms) + ".**"
    ranks = [r.measurements["rankme_centered"] for r in history if "rankme_centered" in r.measurements]
    if not ranks:
        return "No alarm."
    now, highest = ranks[-1], min(ranks[-1].n - 1, ranks[-1].d)
    found = f"No alarm. Centred RankMe uses {now.value / highest:.0%} of the {highest} directions possible"
    if len(ranks) < 2:
        return found + "; this is the first look."
    best = max(ranks[:-1], key=lambda m: m.value)
    change, error = now.value - best.value, change_error(best, now)
    if error is not None and abs(change) <= 2 * error:
        return f"{found}, level with its best so far ({best.value:.4g}, within 2 errors)."
    return f"{found}, {'above' if change > 0 else 'below'} its best so far ({best.value:.4g})."


def _row(name: str, m: Measurement, before: Measurement | None) -> str:
    error = "" if m.standard_error is None else f"{m.standard_error:.2g}"
    change = ""
    if before is not None and not math.isnan(m.value - before.value):
        change = f"{m.value - before.value:+.3g}"
        paired = change_error(before, m)
        change += "" if not paired else f" ({abs(m.value - before.value) / paired:.1f} errors)"
    return f"| {name} | {m.value:.4g} | {error} | {change} | {m.direction} |"


FLOOR = -8.0
"""log10 of the smallest singular value shown, relative to the largest."""


def log_spectrum(record: Record) -> NDArray[np.float64]:
    """log10 of a look's singular values over the largest, floored at 1e-8; empty where nothing was measured."""
    values = np.asarray(record.singular_values, dtype=np.float64)
    if not values.size or values[0] <= 0:
        return np.empty(0)
    return np.maximum(np.log10(np.maximum(values / values[0], 10**FLOOR)), FLOOR)


def spectrum_picture(history: Sequence[Record], *, height_px: int = 256, column_px: int = 8) -> NDArray[np.uint8]:
    """The spectrum over time, (3, H, W): a column a look, rank 1 on top, bright is strong, black is 1e-8 and below.

    A healthy run stays bright far down; dimensional collapse is darkness rising from below.
    """
    columns = [log_spectrum(record) for record in history]
    columns = [column for column in columns if column.size]
    if not columns:
        return np.zeros((3, height_px, column_px), dtype=np.uint8)
    rows = np.linspace(0, 1, height_px)
    level = np.stack([np.interp(rows, np.linspace(0, 1, len(c)), c) for c in columns], axis=1) / -FLOOR + 1
    red, green, blue = level**0.6, level**1.5, 0.35 * level + 0.25 * np.sin(np.pi * level)
    picture = (255 * np.stack([red, green, blue])).clip(0, 255).astype(np.uint8)
    return np.repeat(picture, column_px, axis=2)


def write_summaries(writer: Any, history: Sequence[Record], *, prefix: str) -> None:
    """What is not a scalar, for the last look: the card, the spectrum as histogram and as picture over time."""
    last = history[-1]
    writer.add_text(f"{prefix}/card", summary_markdown(history), last.step)
    spectrum = log_spectrum(last)
    if spectrum.size:
        writer.add_histogram(f"{prefix}/log10_singular_values", spectrum, last.step, bins="auto")
        writer.add_image(f"{prefix}/spectrum_over_time", spectrum_picture(history), last.step)


def write_hparams(writer: Any, hparams: Mapping[str, Any], keys: Sequence[str]) -> None:
    """The run's hyperparameters beside its signals, whose latest values TensorBoard takes from the scalars.

    ``SummaryWriter.add_hparams`` would make a run of its own, ``log_hyperparams`` would add a metric that is 0.
    """
    from torch.utils.tensorboard.summary import hparams as summaries

    plain = {key: value for key, value in hparams.items() if isinstance(value, (bool, int, float, str))}
    for summary in summaries(plain, dict.fromkeys(keys, 0.0)):
        writer.file_writer.add_summary(summary)


def write_projector(
    writer: Any, features: Features, images: Tensor, *, step: int, prefix: str, sprite_px: int = 32
) -> None:
    """Held-out samples as points in TensorBoard's projector, each with its picture, label and group.

    Args:
        writer: a SummaryWriter.
        features: (N, D) with what is known of labels and groups.
        images: (N, C, H, W), uint8 or floating; each is stretched to its own range.
        step: of the weights.
        prefix: of the tag.
        sprite_px: side of a picture.
    """
    known = {"label": features.labels.tolist() if features.labels is not None else None, "group": features.groups}
    columns = {name: list(map(str, values)) for name, values in known.items() if values is not None}
    sprites = None
    if images.ndim == 4 and images.shape[1] in (1, 3):
        small = torch.nn.functional.adaptive_avg_pool2d(images.float().cpu(), sprite_px)
        low, high = small.amin((1, 2, 3), keepdim=True), small.amax((1, 2, 3), keepdim=True)
        sprites = ((small - low) / (high - low).clamp_min(1e-12)).expand(-1, 3, -1, -1)
    writer.add_embedding(
        features.values.float(),
        metadata=list(zip(*columns.values(), strict=True)) or None,
        metadata_header=list(columns) or None,
        label_img=sprites,
        global_step=step,
        tag=f"{prefix}/held_out",
    )
