"""Runs in TensorBoard's HParams tab: settings with every metric and probe."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from repmetrics.report.settings import varying_settings
from repmetrics.tensorboard.writer import write_hparams
from repmetrics.trust.runs import Evaluation


def write_board(evaluations: Sequence[Evaluation], folder: Path, *, targets: Sequence[str]) -> None:
    """Write one TensorBoard run per run, with its settings and all values at each step."""
    from torch.utils.tensorboard import SummaryWriter

    check_new(folder)
    varying = varying_settings([item.settings for item in evaluations])
    for run in dict.fromkeys(item.run for item in evaluations):
        items = [item for item in evaluations if item.run == run]
        settings = {"method": items[0].method, **{name: _plain(items[0].settings.get(name, "")) for name in varying}}
        keys = list(dict.fromkeys([*targets, *(name for item in items for name in item.values)]))
        with SummaryWriter(str(folder / run)) as writer:
            write_hparams(writer, settings, keys)
            for item in items:
                for name, value in item.values.items():
                    writer.add_scalar(name, value, item.step)


def check_new(folder: Path) -> None:
    """Refuse a folder that is not empty: the board would mix its runs with these."""
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty: name a new folder for the board")


def _plain(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text
