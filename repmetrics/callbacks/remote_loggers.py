"""Summary and spectrum for the loggers of Weights & Biases and MLflow; pictures of held-out images only on request."""

from __future__ import annotations

import html
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from repmetrics.monitoring.record import Record
from repmetrics.tensorboard.writer import log_spectrum, spectrum_chart, summary_markdown


def write_remote_summaries(logger: Any, history: Sequence[Record], *, prefix: str) -> None:
    """Send the text summary and the spectrum to a W&B or MLflow logger; other loggers are left alone."""
    last, kind = history[-1], _kind(logger)
    if not kind:
        return
    text, spectrum = summary_markdown(history), log_spectrum(last)
    pictures = {f"{prefix}/spectrum_over_time": spectrum_chart(history)} if spectrum.size else {}
    if kind == "WandbLogger":
        import wandb

        media: dict[str, Any] = {f"{prefix}/card": wandb.Html(f"<pre>{html.escape(text)}</pre>")}
        if spectrum.size:
            media[f"{prefix}/log10_singular_values"] = wandb.Histogram(spectrum.tolist())
        logger.log_metrics(media | {key: wandb.Image(_rows(p)) for key, p in pictures.items()}, step=last.step)
    elif kind == "MLFlowLogger":
        logger.experiment.log_text(logger.run_id, text, f"{prefix}/card.md")
        for key, picture in pictures.items():
            logger.experiment.log_image(logger.run_id, _rows(picture), f"{key}.png")


def write_remote_images(logger: Any, sheets: Mapping[str, NDArray[np.uint8]], *, step: int, prefix: str) -> None:
    """Send pictures of held-out images to a W&B or MLflow logger. They may show a patient's tissue."""
    kind = _kind(logger)
    if kind == "WandbLogger":
        import wandb

        logger.log_metrics({f"{prefix}/{key}": wandb.Image(_rows(sheet)) for key, sheet in sheets.items()}, step=step)
    elif kind == "MLFlowLogger":
        for key, sheet in sheets.items():
            logger.experiment.log_image(logger.run_id, _rows(sheet), f"{prefix}/{key}.png")


def leaves_machine(log_dir: str) -> bool:
    """Whether event files in a directory are uploaded: it is a URL, or W&B uploads what TensorBoard writes."""
    run = getattr(sys.modules.get("wandb"), "run", None)
    return "://" in log_dir or bool(getattr(getattr(run, "settings", None), "sync_tensorboard", False))


def _kind(logger: Any) -> str:
    """Name of the first known class among a logger's, of either namespace of Lightning."""
    names = [cls.__name__ for cls in type(logger).__mro__]
    return next((name for name in ("WandbLogger", "MLFlowLogger") if name in names), "")


def _rows(picture: Any) -> Any:
    """A picture (3, H, W) as (H, W, 3)."""
    return np.ascontiguousarray(picture.transpose(1, 2, 0))
