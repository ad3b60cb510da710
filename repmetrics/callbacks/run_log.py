"""What a monitor logs: values to loggers, summaries and pictures to boards, records to a file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from repmetrics.callbacks.remote_loggers import leaves_machine, write_remote_images, write_remote_summaries
from repmetrics.data.features import Features
from repmetrics.monitoring.pictures import Pictures, is_drawn, pictures_name
from repmetrics.monitoring.record import Record, append_jsonl, write_history
from repmetrics.tensorboard.sheets import contact_sheet, sheets
from repmetrics.tensorboard.writer import write_projector, write_summaries

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


class RunLog:
    """Loggers, boards and files of one run, on rank 0.

    Args:
        prefix: Prefix of the keys.
        jsonl: Whether records are written to a file.
        remote_images: Whether pictures of held-out images may leave the machine.
    """

    def __init__(self, *, prefix: str, jsonl: bool, remote_images: bool) -> None:
        self.prefix = prefix
        self.jsonl = jsonl
        self.remote_images = remote_images
        self._directory: Path | None = None
        self._drawn_step: int | None = None

    def start(self, trainer: Trainer) -> None:
        """Read the log directory, a collective call; nothing is drawn yet."""
        self._directory = Path(trainer.log_dir or trainer.default_root_dir)
        self._drawn_step = None

    @property
    def file(self) -> Path | None:
        """File of records, or None if none is written."""
        if not self.jsonl or self._directory is None:
            return None
        suffix = "" if self.prefix == "repmetrics" else "-" + self.prefix.replace("/", "-")
        return self._directory / f"measurements{suffix}.jsonl"

    @property
    def pictures_file(self) -> Path | None:
        """File of the pictures' data, beside the records."""
        return None if self.file is None else self.file.with_name(pictures_name(self.file.name))

    def resume(self, history: Sequence[Record]) -> None:
        """Put the history of a checkpoint in place of later records."""
        if self.file is not None:
            write_history(self.file, history)

    def write_record(
        self, trainer: Trainer, history: Sequence[Record], *, shares: Mapping[str, float], pictures: Pictures | None
    ) -> None:
        """Log the last record directly: ``self.log`` would wait for ``log_every_n_steps`` and the epoch's end."""
        record = history[-1]
        values = record.scalars(prefix=self.prefix) | {f"{self.prefix}/{name}": x for name, x in shares.items()}
        for logger in trainer.loggers:
            logger.log_metrics(values, step=record.step)
        for board in tensorboard_writers(trainer):
            write_summaries(board, history, prefix=self.prefix)
        for logger in trainer.loggers:
            write_remote_summaries(logger, history, prefix=self.prefix)
        if self.file is not None:
            append_jsonl(self.file, record)
            if pictures is not None and pictures.stages and self.pictures_file is not None:
                pictures.save(self.pictures_file)
        if is_drawn(len(history)):
            self.write_pictures(trainer, pictures)

    def write_pictures(self, trainer: Trainer, pictures: Pictures | None) -> None:
        """Write the pictures of the last evaluation to boards, and to remote loggers if asked for, once."""
        if pictures is None or not pictures.stages or pictures.stages[-1].step == self._drawn_step:
            return
        step = self._drawn_step = pictures.stages[-1].step
        images = sheets(pictures)
        for board in self._boards_for_images(trainer):
            for name, sheet in images.items():
                board.add_image(f"{self.prefix}/{name}", sheet, step)
        for logger in trainer.loggers if self.remote_images else ():
            write_remote_images(logger, images, step=step, prefix=self.prefix)

    def write_samples(self, trainer: Trainer, features: Features, images: Tensor, *, step: int) -> None:
        """Write held-out samples: to files on this machine, and to remote loggers only if asked for."""
        for board in self._boards_for_images(trainer):
            write_projector(board, features, images, step=step, prefix=self.prefix)
        if (sheet := contact_sheet(images)) is not None and self.remote_images:
            for logger in trainer.loggers:
                write_remote_images(logger, {"held_out": sheet}, step=step, prefix=self.prefix)

    def _boards_for_images(self, trainer: Trainer) -> list[Any]:
        """TensorBoard writers whose files stay on this machine, or all if images may leave it."""
        boards = tensorboard_writers(trainer)
        return [board for board in boards if self.remote_images or not leaves_machine(str(board.log_dir))]


def tensorboard_writers(trainer: Any) -> Iterator[Any]:
    """TensorBoard writers of the trainer's loggers, on rank 0."""
    if trainer.is_global_zero:
        for logger in trainer.loggers:
            if hasattr(logger.experiment, "add_custom_scalars"):
                yield logger.experiment
