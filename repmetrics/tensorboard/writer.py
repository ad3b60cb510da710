"""Summaries written to TensorBoard: text, spectrum, hyperparameters and the embedding projector."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from repmetrics.data.features import Features
from repmetrics.measurement.result import Measurement, change_error, format_value
from repmetrics.measurement.titles import ARROWS, metric_title
from repmetrics.monitoring.record import Record
from repmetrics.tensorboard.sheets import sprite_images

FLOOR = -8.0
"""Smallest log10 of a singular value shown, relative to the largest."""


def summary_markdown(history: Sequence[Record]) -> str:
    """State of a run as Markdown: alarms, trend of the rank, and every value with its error."""
    last = history[-1]
    lines = [f"**Step {last.step}.** {_summary(history)}", ""]
    if last.measurements:
        lines += ["| signal | value ± standard error | since the last evaluation |", "|---|---|---|"]
        previous = history[-2].measurements if len(history) > 1 else {}
        lines += [_row(name, m, previous.get(name)) for name, m in last.measurements.items()]
        first = next(iter(last.measurements.values()))
        groups = "no groups known, hence no errors" if first.groups is None else f"{first.groups} groups"
        lines += ["", f"{first.n} held-out samples, {groups}, D = {first.d}, {first.dtype}."]
        lines += [f"- {text}" for text in dict.fromkeys(t for m in last.measurements.values() for t in m.warnings)]
    lines += ["", f"This evaluation took {last.seconds:.2g} s."]
    return "\n".join(lines)


def _summary(history: Sequence[Record]) -> str:
    last = history[-1]
    if last.alarms:
        return "**" + "; ".join(f"{alarm.kind}: {alarm.reason}" for alarm in last.alarms) + ".**"
    ranks = [rank for record in history if (rank := record.alarm_input().rank) is not None]
    if not ranks:
        return "No alarm."
    rank, highest = ranks[-1], min(ranks[-1].n - 1, ranks[-1].d)
    text = f"No alarm. Centered RankMe is {rank.value / highest:.0%} of its maximum, {highest}"
    if len(ranks) < 2:
        return text + "; this is the first evaluation."
    best = max(ranks[:-1], key=lambda m: m.value)
    change, error = rank.value - best.value, change_error(best, rank)
    if error is not None and abs(change) <= 2 * error:
        return f"{text}, level with its best so far ({best.value:.4g}, within 2 errors)."
    return f"{text}, {'above' if change > 0 else 'below'} its best so far ({best.value:.4g})."


def _row(name: str, m: Measurement, previous: Measurement | None) -> str:
    change = ""
    if previous is not None and not math.isnan(m.value - previous.value):
        change = f"{m.value - previous.value:+.3g}"
        if error := change_error(previous, m):
            change += f" ({abs(m.value - previous.value) / error:.1f} errors)"
    return f"| {metric_title(name)}{ARROWS[m.direction]} | {format_value(m.value, m.standard_error)} | {change} |"


def log_spectrum(record: Record) -> NDArray[np.float64]:
    """log10 of the singular values over the largest, at least `FLOOR`; empty where nothing was measured."""
    values = np.asarray(record.singular_values, dtype=np.float64)
    if not values.size or values[0] <= 0:
        return np.empty(0)
    return np.maximum(np.log10(np.maximum(values / values[0], 10**FLOOR)), FLOOR)


def spectrum_picture(history: Sequence[Record], *, height_px: int = 256, column_px: int = 8) -> NDArray[np.uint8]:
    """Spectrum over time as an RGB image (3, H, W): one column per evaluation, rank 1 on top.

    Large singular values are bright; 1e-8 of the largest and below is black. In a healthy run, most of the column is
    bright. Dimensional collapse appears as dark pixels that rise from the bottom.
    """
    columns = [log_spectrum(record) for record in history]
    columns = [column for column in columns if column.size]
    if not columns:
        return np.zeros((3, height_px, column_px), dtype=np.uint8)
    rows = np.linspace(0, 1, height_px)
    values = np.stack([np.interp(rows, np.linspace(0, 1, len(c)), c) for c in columns], axis=1)
    return np.repeat(_spectrum_colors(values), column_px, axis=2)


def spectrum_chart(history: Sequence[Record], *, width_px: int = 320) -> NDArray[np.uint8]:
    """:func:`spectrum_picture` with axes: the step across, the rank of the singular value down, and a scale of colors.

    Returns:
        An RGB image (3, H, W) of at least this width.
    """
    from PIL import Image, ImageDraw

    shown = [record for record in history if log_spectrum(record).size]
    picture = spectrum_picture(history, column_px=max(8, width_px // max(len(shown), 1)))
    height, width = picture.shape[1:]
    left, top = 44, 24
    canvas = Image.new("RGB", (left + width + 74, top + height + 22), "white")
    draw = ImageDraw.Draw(canvas)
    canvas.paste(Image.fromarray(np.ascontiguousarray(picture.transpose(1, 2, 0))), (left, top))
    draw.text((left, 4), "log10(singular value / largest), by its rank", fill="black")
    if shown:
        last = len(log_spectrum(shown[-1]))
        for rank in (1, last // 2, last):
            draw.text((left - 6, top + (height - 1) * (rank - 1) / max(last - 1, 1)), str(rank), "black", anchor="rm")
        draw.text((left, top + height + 4), f"step {shown[0].step:,}", fill="black")
        draw.text((left + width, top + height + 4), f"{shown[-1].step:,}", fill="black", anchor="ra")
    scale = _spectrum_colors(np.linspace(0, FLOOR, height)[:, None]).repeat(12, axis=2)
    canvas.paste(Image.fromarray(np.ascontiguousarray(scale.transpose(1, 2, 0))), (left + width + 14, top))
    for k in range(5):
        draw.text((left + width + 30, top + k * (height - 1) / 4), f"{k * FLOOR / 4:g}", fill="black", anchor="lm")
    return np.asarray(canvas).transpose(2, 0, 1)


def _spectrum_colors(values: NDArray[np.float64]) -> NDArray[np.uint8]:
    """log10 of values over the largest (H, W) as colors (3, H, W): bright for large ones."""
    level = values / -FLOOR + 1
    red, green, blue = level**0.6, level**1.5, 0.35 * level + 0.25 * np.sin(np.pi * level)
    return (255 * np.stack([red, green, blue])).clip(0, 255).astype(np.uint8)


def write_summaries(writer: Any, history: Sequence[Record], *, prefix: str) -> None:
    """Write the text summary and the spectrum, as a histogram and as an image over time, at the last step."""
    last = history[-1]
    writer.add_text(f"{prefix}/card", summary_markdown(history), last.step)
    spectrum = log_spectrum(last)
    if spectrum.size:
        writer.add_histogram(f"{prefix}/log10_singular_values", spectrum, last.step, bins="auto")
        writer.add_image(f"{prefix}/spectrum_over_time", spectrum_chart(history), last.step)


def write_hparams(writer: Any, hparams: Mapping[str, Any], keys: Sequence[str]) -> None:
    """Write hyperparameters and the metrics to show with them; TensorBoard reads their latest values from the scalars.

    ``SummaryWriter.add_hparams`` would create a run of its own; ``log_hyperparams`` would add a metric that is 0.
    """
    from torch.utils.tensorboard.summary import hparams as summaries

    plain = {key: value for key, value in hparams.items() if isinstance(value, (bool, int, float, str))}
    for summary in summaries(plain, dict.fromkeys(keys, 0.0)):
        writer._get_file_writer().add_summary(summary)  # opens another file if a logger closed the last


def write_projector(writer: Any, features: Features, images: Tensor, *, step: int, prefix: str) -> None:
    """Write held-out samples as points of TensorBoard's projector, with their images, labels and groups."""
    metadata = {"label": features.labels.tolist() if features.labels is not None else None, "group": features.groups}
    columns = {name: list(map(str, values)) for name, values in metadata.items() if values is not None}
    sprites = sprite_images(images)
    writer.add_embedding(
        features.values.float(),
        metadata=list(zip(*columns.values(), strict=True)) or None,
        metadata_header=list(columns) or None,
        label_img=None if sprites is None else torch.from_numpy(sprites) / 255,
        global_step=step,
        tag=f"{prefix}/held_out",
    )
