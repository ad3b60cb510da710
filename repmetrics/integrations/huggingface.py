"""RepresentationCallback: the callback that measures held-out data during training by Hugging Face's Trainer."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from repmetrics.encoders.extractor import EncoderSpec
from repmetrics.monitoring.alarm_response import AlarmResponse, OnAlarm
from repmetrics.monitoring.history import History
from repmetrics.monitoring.monitor import Monitor
from repmetrics.monitoring.record import Record, append_jsonl, read_jsonl, write_history


class RepresentationCallback(TrainerCallback):
    """Measures the representation before the first step, at evaluations, and after the last step.

    Without evaluations it measures at the ends of epochs; with ``every_n_steps``, at these steps instead. Training does
    not change: the final weights are bit for bit those of a run without the callback.

    The values go, under ``repmetrics/…``:

    - through ``trainer.log`` to every reporter and to ``state.log_history``, after :meth:`attach`;
    - to the metrics of an evaluation, as ``eval_repmetrics/…``, for ``metric_for_best_model`` and early stopping;
    - to ``measurements.jsonl`` in ``output_dir``, and to the sink of the monitor.

    Args:
        data: Held-out dataset, loader or batches, as for :class:`~repmetrics.monitoring.monitor.Monitor`.
        encoder: Part of the model to run, such as a function ``(model, images) -> features``.
        monitor: Monitor with metrics, layers and further options; default: ``Monitor()``.
        every_n_steps: Number of optimizer steps between measurements, which replaces those at evaluations.
        jsonl: Whether to write ``measurements.jsonl``.
        on_alarm: "log" only logs, "warn" warns once per kind of alarm, "stop" warns and ends the run. A function is
            called with ``(alarm, record)``.

    Example:
        >>> from transformers import Trainer
        >>> def train(model, args, images, held_out):
        ...     trainer = Trainer(model, args, train_dataset=images)
        ...     RepresentationCallback(held_out, encoder=lambda m, x: m.vit(x).last_hidden_state[:, 0]).attach(trainer)
        ...     trainer.train()
    """

    def __init__(
        self,
        data: Iterable[Any] | Dataset[Any],
        *,
        encoder: EncoderSpec = None,
        monitor: Monitor | None = None,
        every_n_steps: int | None = None,
        jsonl: bool = True,
        on_alarm: OnAlarm = "warn",
    ) -> None:
        if every_n_steps is not None and every_n_steps < 1:
            raise ValueError(f"every_n_steps must be at least 1, got {every_n_steps}")
        self.data = data
        self.encoder = encoder
        self.monitor = Monitor() if monitor is None else monitor
        self.every_n_steps = every_n_steps
        self.jsonl = jsonl
        self._alarm_response = AlarmResponse(on_alarm)
        self._log: Callable[[dict[str, float]], None] | None = None

    @property
    def history(self) -> History:
        """All records of the run, including those before a resume."""
        return self.monitor.history

    def attach(self, trainer: Trainer) -> Self:
        """Add the callback to a trainer, and log through ``trainer.log``, which a callback alone cannot reach."""
        trainer.add_callback(self)
        self._log = trainer.log
        return self

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start a new history, or continue that of the checkpoint, and measure the initial weights."""
        if self._log is None and state.is_world_process_zero and args.report_to:
            warnings.warn(
                f"values of repmetrics do not reach {', '.join(args.report_to)}: add the callback with "
                "RepresentationCallback(…).attach(trainer)",
                stacklevel=2,
            )
        self._alarm_response.reset()
        path = _jsonl_path(args)
        self.monitor.reset(_earlier_records(path, step=state.global_step))
        if self.jsonl and self.history and state.is_world_process_zero:
            write_history(path, self.history)
        self._measure(args, state, control, kwargs["model"])

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Measure if a multiple of ``every_n_steps`` was reached."""
        if self.every_n_steps is not None and state.global_step % self.every_n_steps == 0:
            self._measure(args, state, control, kwargs["model"])

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Measure, and add the values to the metrics by which the trainer chooses and stops."""
        if self.every_n_steps is None:
            self._measure(args, state, control, kwargs["model"])
        if metrics is not None and self.history:
            values = self.history[-1].scalars(prefix=self.monitor.prefix)
            metrics.update({f"eval_{key}": value for key, value in values.items()})

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure at the end of an epoch if there are no evaluations."""
        if self.every_n_steps is None and args.eval_strategy == "no":
            self._measure(args, state, control, kwargs["model"])

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure the final weights."""
        self._measure(args, state, control, kwargs["model"])

    def _measure(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module) -> None:
        step = state.global_step
        if self.history and self.history[-1].step == step:
            return
        dtype = torch.bfloat16 if args.bf16 else torch.float16
        with torch.autocast(args.device.type, dtype, enabled=args.bf16 or args.fp16):
            record = self.monitor.measure(model, self.data, step=step, epoch=int(state.epoch or 0), path=self.encoder)
        if self._alarm_response.respond(record):
            control.should_training_stop = True
        if self.jsonl and state.is_world_process_zero:
            append_jsonl(_jsonl_path(args), record)
        if self._log is not None:
            should_log = control.should_log  # trainer.log takes it for done
            self._log(record.scalars(prefix=self.monitor.prefix))
            control.should_log = should_log


def _jsonl_path(args: TrainingArguments) -> Path:
    return Path(args.output_dir or ".") / "measurements.jsonl"


def _earlier_records(path: Path, *, step: int) -> list[Record]:
    """Records of the run that this one resumes; empty at step 0."""
    if step == 0 or not path.exists():
        return []
    return [Record.from_state(entry) for entry in read_jsonl(path) if entry["step"] <= step]
