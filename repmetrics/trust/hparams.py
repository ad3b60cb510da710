"""Many runs in TensorBoard's HParams tab: what was set, beside every signal and probe."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from repmetrics.tensorboard.writer import write_hparams
from repmetrics.trust.runs import Evaluation, varying_settings


def write_board(looks: Sequence[Evaluation], folder: Path, *, targets: Sequence[str]) -> None:
    """A TensorBoard run for each run, with its settings and, at each step, all that was measured.

    Args:
        looks: of all runs.
        folder: must be new or empty.
        targets: the probes, named first.

    Raises:
        ValueError: the folder holds something.
    """
    from torch.utils.tensorboard import SummaryWriter

    check_new(folder)
    changed = varying_settings(looks)
    for run in dict.fromkeys(look.run for look in looks):
        mine = [look for look in looks if look.run == run]
        settings = {"method": mine[0].method, **{name: _plain(mine[0].settings.get(name, "")) for name in changed}}
        keys = list(dict.fromkeys([*targets, *(name for look in mine for name in look.values)]))
        with SummaryWriter(str(folder / run)) as writer:
            write_hparams(writer, settings, keys)
            for look in mine:
                for name, value in look.values.items():
                    writer.add_scalar(name, value, look.step)


def check_new(folder: Path) -> None:
    """Refuse a folder that holds something: another board's runs would stand among these.

    Raises:
        ValueError: it does.
    """
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} holds something: name a new folder for the board")


def _plain(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text
