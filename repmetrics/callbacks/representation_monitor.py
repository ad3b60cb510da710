"""RepresentationMonitor: the Lightning callback that measures held-out data during training."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from repmetrics.callbacks.background import BackgroundComputation
from repmetrics.callbacks.base import Callback, LightningModule, Trainer
from repmetrics.callbacks.evaluation_time import EvaluationTime
from repmetrics.callbacks.handover import Handover
from repmetrics.callbacks.key_readers import KeyReader, describe_wrong_modes, find_readers, refuse_unknown_keys
from repmetrics.callbacks.run_log import RunLog, tensorboard_writers
from repmetrics.callbacks.step_counter import StepCounter
from repmetrics.data.features import Encode
from repmetrics.data.interruption import EvaluationInterruptedError
from repmetrics.data.kept_batches import Cache
from repmetrics.data.parse_batch import Keys
from repmetrics.data.views import ViewSet, random_view
from repmetrics.encoders.extractor import EncoderSpec, FeatureExtractor, Pool
from repmetrics.measurement.blocks import Independent
from repmetrics.measurement.registry import DEFAULT_SIGNALS, PROBES
from repmetrics.measurement.titles import chart_title
from repmetrics.monitoring.alarm_response import AlarmResponse, OnAlarm
from repmetrics.monitoring.history import History
from repmetrics.monitoring.input_statistics import InputCheck
from repmetrics.monitoring.interval import Timing, default_interval, infer_batch_size
from repmetrics.monitoring.monitor import Monitor
from repmetrics.monitoring.record import Record, directions, metric_keys
from repmetrics.progress import print_line
from repmetrics.tensorboard.layout import layouts
from repmetrics.tensorboard.writer import write_hparams


class RepresentationMonitor(Callback):
    """Measures the representation on held-out data and logs the values for stopping and checkpointing callbacks.

    It measures before the first step, at validations, and after the last step. Without a validation loop, it measures
    at the end of training epochs. With ``every_n_steps``, it measures at these steps instead. A validation is skipped
    if evaluations at such intervals would take more than 1 % of the time: the first evaluation, and the steps before
    the first validation, are timed (:class:`repmetrics.monitoring.interval.Timing`). In runs of less than 5 s,
    forward passes are counted instead. Where a callback or a learning-rate scheduler reads a key of the monitor, it
    always measures first, also with ``every_n_steps``.

    Values are sent to three places, and between evaluations the last values are kept:

    - every logger of the trainer, immediately, under ``repmetrics/…`` with ``trainer.global_step``;
    - ``trainer.callback_metrics`` on every rank, for ``EarlyStopping`` and ``ModelCheckpoint``; NaN where a metric has
      no value, as for an encoder with NaN features;
    - ``measurements.jsonl`` in ``trainer.log_dir``.

    ``repmetrics/overhead``, in the loggers only, is the share of the time from the first to the last step that was
    spent measuring; the evaluations before and after do not count. ``repmetrics/overhead_total`` is the share of the
    whole fit, with these. Training does not change: the final weights are
    bit for bit those of a run without the monitor.

    A fit that does not resume a checkpoint starts a new history. If Lightning counts no steps (manual optimization with
    an optimizer of the module's own), batches are counted instead, with a warning.

    Args:
        data: Held-out loader or dataset. Batches are tensors, (images, labels), (images, labels, groups), or mappings
            with keys such as image, label, group (:func:`repmetrics.data.parse_batch.parse_batch`).
        encoder: Encoder to measure. None: the LightningModule itself. A dotted path such as "teacher.backbone". A
            module. A function ``(module, images) -> features``.
        layers: Dotted paths of submodules to measure too, captured while the encoder runs and logged as
            ``repmetrics/<path>/…``.
        pool: "cls" or "mean", if an encoder or a layer returns tokens.
        metrics: Label-free metrics, names from :data:`~repmetrics.measurement.registry.METRICS`.
        every_n_steps: Number of optimizer steps between measurements, which replaces those at validations where nothing
            reads a key.
        batch_size: Batch size for a dataset given in place of a loader.
        num_workers: Number of worker processes for a dataset given in place of a loader.
        keys: Where a batch has its parts, such as ``{"image": "pixels", "label": None}``: keys of a mapping, positions
            in a sequence, or None for a part to ignore.
        groups: "independent" declares that no two held-out samples have a common source, see
            :class:`~repmetrics.monitoring.monitor.Monitor`.
        probe_data: Labeled data for the probes, if not ``data`` itself.
        cache: "memory" or "disk" to keep held-out batches after the first evaluation, see
            :class:`~repmetrics.monitoring.monitor.Monitor`.
        prefix: Prefix of the log keys; two monitors in one trainer need two.
        jsonl: Whether to write ``measurements.jsonl``; with another prefix, ``measurements-<prefix>.jsonl``.
        on_measure: Function called with each record, on every rank; an exception (a pruned trial) ends the run.
        on_alarm: Response to a collapse (:func:`repmetrics.decisions.alarms.alarms`). The alarm is always logged as
            ``repmetrics/alarm`` and in the text summary. "warn" warns once per kind, "stop" warns and ends the run. A
            function ``(alarm, record)`` is called on every rank at each measurement with an active alarm.
        warmup_steps: Steps before which no alarm is raised.
        view_set: View set of view retrieval, see :class:`~repmetrics.monitoring.monitor.Monitor`.
        views: Number of views of each image, at least 2, for lidar and alignment. Each view adds a forward pass to an
            evaluation.
        augmentation: Function: a batch of images → one view of each, see
            :class:`~repmetrics.monitoring.monitor.Monitor`.
        transform: Function: a batch of images on the encoder's device → the encoder's input. It takes the place of what
            training does in ``on_after_batch_transfer``, which is not called for held-out images.
        projector: Number of held-out samples to write, with their images, to TensorBoard's projector after the last
            step.
        pictures: Whether to make pictures of some held-out images: neighbors, patch tokens as colors, a map, and the
            images farthest from the rest (:class:`repmetrics.monitoring.pictures.Pictures`). They take no further
            pass, and go to TensorBoard and to ``pictures.npz`` beside ``measurements.jsonl``, for the report.
        remote_images: Whether pictures of held-out images may leave the machine: to W&B, to MLflow, or to a TensorBoard
            directory that is uploaded. They may show patients' tissue.
        background: Whether to compute metrics and probes in a thread while training goes on; the encoder still runs
            between two steps. A record is published at the first step at which it is there; with several processes,
            at the next validation or end of an epoch. A checkpoint, the next evaluation and the end of training wait
            for it. Where a callback or a learning-rate scheduler reads a key, a callback decides at each measurement
            (early stopping, local maxima, pruning), ``on_measure`` is given, or ``on_alarm`` does more than warn,
            the values are needed at once, and are computed at once.

    Attributes:
        history: All records of the last fit, including those before a resume.

    Raises:
        ValueError: At the start of a fit: a path does not exist, there are fewer than two held-out samples, or a
            callback monitors a key that will never be logged.
    """

    def __init__(
        self,
        # jsonargparse makes a bare Dataset of Dataset[Any], whatever class_path says.
        data: DataLoader | Dataset | Iterable[Any],  # type: ignore[type-arg]
        *,
        encoder: EncoderSpec = None,
        layers: Sequence[str] = (),
        pool: Pool | None = None,
        metrics: Sequence[str] = DEFAULT_SIGNALS,
        every_n_steps: int | None = None,
        batch_size: int = 64,
        num_workers: int = 0,
        keys: Keys | None = None,
        groups: Independent | None = None,
        probe_data: DataLoader | Dataset | Iterable[Any] | None = None,  # type: ignore[type-arg]
        cache: Cache | None = None,
        prefix: str = "repmetrics",
        jsonl: bool = True,
        on_measure: Callable[[Record], None] | None = None,
        on_alarm: OnAlarm = "warn",
        warmup_steps: int = 0,
        view_set: str | ViewSet = "geometry",
        views: int = 0,
        augmentation: Callable[[Tensor], Tensor] = random_view,
        transform: Callable[[Tensor], Tensor] | None = None,
        projector: int = 0,
        pictures: bool = True,
        remote_images: bool = False,
        background: bool = False,
    ) -> None:
        if every_n_steps is not None and every_n_steps < 1:
            raise ValueError(f"every_n_steps must be at least 1, got {every_n_steps}")
        self.data = data
        self.encoder = encoder
        self.every_n_steps = every_n_steps
        self.prefix = prefix
        self.on_measure = on_measure
        self._alarm_response = AlarmResponse(on_alarm)
        self.projector = projector
        self._run_log = RunLog(prefix=prefix, jsonl=jsonl, remote_images=remote_images)
        self._monitor = Monitor(
            metrics=metrics,
            probe_data=probe_data,
            layers=layers,
            pool=pool,
            batch_size=batch_size,
            num_workers=num_workers,
            keys=keys,
            groups=groups,
            cache=cache,
            warmup_steps=warmup_steps,
            view_set=view_set,
            views=views,
            augmentation=augmentation,
            transform=transform,
            pictures=pictures,
        )
        self._listeners: list[Callable[[Any, Record, list[Record]], None]] = []
        self._values: dict[str, float] = {}
        self._loss: tuple[Tensor, int] | None = None
        self._batch_size: int | None = None  # of the first training batch
        self._timing: Timing | None = None  # known from the first validation or end of an epoch on
        self._time = EvaluationTime()
        self._handover = Handover()
        self.background = background
        self._computation = BackgroundComputation()
        self._in_background: Trainer | None = None  # that of an evaluation that is not published yet
        self._background_step = 0
        self._steps = StepCounter()
        self._readers: list[KeyReader] = []
        self._input_check: InputCheck | None = None
        self._fitting = False
        self._interrupted = False
        self._fast_dev_run = False
        self._validation_started = False

    @property
    def history(self) -> History:
        """All records so far, also of a fit in processes that Lightning started."""
        if (received := self._handover.receive()) is not None:
            self._monitor.reset(received)
        return self._monitor.history

    @property
    def evaluation_seconds(self) -> float:
        """Seconds of the last fit that evaluations and their logging kept training waiting, on this process."""
        return self._time.seconds

    def interrupt(self) -> None:
        """End an evaluation in progress without a record; for signal handlers of a run that is to stop in order.

        The run stops after its step. The first evaluation of a run has nothing to save, and the error ends the fit.

        Raises:
            EvaluationInterruptedError: An evaluation is in progress.
        """
        self._monitor.interruption.request()

    def add_listener(self, listener: Callable[[Any, Record, list[Record]], None]) -> None:
        """Register ``listener(trainer, record, history)``, called on every rank after each measurement of this fit.

        Register in ``on_fit_start``: the listeners of an earlier fit are removed before.
        """
        if listener not in self._listeners:
            self._listeners.append(listener)

    @property
    def state_key(self) -> str:
        """Key that is unique in a trainer whose monitors have different prefixes."""
        return f"RepresentationMonitor[{self.prefix}]"

    def state_dict(self) -> dict[str, Any]:
        """History and timing in plain types, for the checkpoint; a collective call with ``background``."""
        self._publish(wait=True)
        timing = None if self._timing is None else list(self._timing)
        return {"history": [record.to_state() for record in self.history], "timing": timing}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the history of the checkpoint's run."""
        self._monitor.reset([Record.from_state(state) for state in state_dict["history"]])
        timing = state_dict.get("timing")  # older checkpoints have none
        self._timing = None if timing is None else Timing(*timing)
        self._values = {}
        for record in self.history:
            self._values = record.published(prefix=self.prefix, previous=self._values)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Start anew before a checkpoint is restored, and read the log directory, a collective call."""
        refuse_sharded(trainer.strategy)
        self._run_log.start(trainer)
        self._fitting = stage == "fit"
        self._fast_dev_run = bool(trainer.fast_dev_run)  # type: ignore[attr-defined]  # Lightning sets it by name
        if self._fitting:
            self._monitor.reset()
            self._values, self._readers, self._interrupted = {}, [], False
            self._timing = None
            self._time.start_fit()
            self._alarm_response.reset()
            self._listeners.clear()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write hyperparameters and metric keys before Lightning does: TensorBoard keeps the first entry."""
        monitors = monitors_in(trainer)
        if self._fast_dev_run or monitors[-1] is not self:
            return
        for board in tensorboard_writers(trainer):
            write_hparams(
                board, pl_module.hparams_initial, [key for monitor in monitors for key in monitor._hparam_metrics()]
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the initial weights, so that all keys are known before a callback reads one."""
        self._loss, self._batch_size = None, None
        self._time.start_first_evaluation()
        self._steps.start(trainer, last_step=self.history[-1].step if self.history else 0)
        self._input_check = InputCheck(lambda message: warnings.warn(message, stacklevel=2))
        if self._fast_dev_run:
            self._check(trainer, pl_module)
            return
        if self.history:
            self._resume(trainer, pl_module)
        self._measure(trainer, pl_module)
        keys = [*self._keys(), f"{self.prefix}/loss"]
        self._refuse_unknown_keys(trainer, keys)
        others = [callback for callback in trainer.callbacks if not isinstance(callback, RepresentationMonitor)]  # type: ignore[attr-defined]
        self._readers = find_readers(others, trainer.lr_scheduler_configs, set(keys))
        if trainer.is_global_zero:
            known = directions(self.history[-1].measurements, prefix=self.prefix)
            for sentence in describe_wrong_modes(self._readers, known):
                warnings.warn(sentence, stacklevel=2)
        self._time.start_training(self._steps.step(trainer))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Compare the scale of the first training images with that of held-out images."""
        if self._input_check is not None and trainer.is_global_zero:
            self._input_check.observe_training(
                lambda: self._monitor.make_extractor(pl_module, self.encoder).module, batch
            )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add the loss, write the layout once, and measure where ``every_n_steps`` or a reader of a key asks for it."""
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if isinstance(loss, Tensor) and loss.numel() == 1:
            total, count = self._loss or (torch.zeros((), device=loss.device), 0)
            self._loss = total + loss.detach().reshape(()) * trainer.accumulate_grad_batches, count + 1
        if self._fast_dev_run:
            return
        self._observe_steps(trainer)
        self._publish(wait=False)
        if self._batch_size is None:
            self._batch_size = infer_batch_size(batch) or 0
            self._write_layout(trainer)
        step, n = self._steps.step(trainer), self.every_n_steps
        read = any(reader.after_batch(batch_idx, step=step) for reader in self._readers)
        if read or (n is not None and step // n > self._last_step // n):
            self._measure(trainer, pl_module, at_once=read)
            self._log(pl_module, on_step=True, on_epoch=False)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin a new validation."""
        self._validation_started = False

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Measure at a validation's first batch, when averaged weights are in use whatever the callbacks' order."""
        if self._validation_started:
            return
        self._validation_started = True
        if trainer.sanity_checking or self._fast_dev_run:
            self._check(trainer, pl_module)
            return
        if self._fitting and trainer.is_last_batch:
            self._observe_steps(trainer, epoch_end=True)
        self._publish(wait=True)
        if not self._fitting or self._should_evaluate(trainer):
            self._measure(trainer, pl_module, at_once=any(reader.at_validation() for reader in self._readers))

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the latest values to ``callback_metrics``, which stopping and checkpointing callbacks read."""
        if not trainer.sanity_checking:
            self._log(pl_module, on_step=False, on_epoch=True)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure at the end of an epoch if there is no validation loop, or a reader of a key asks for it."""
        if self._fast_dev_run:
            return
        self._observe_steps(trainer, epoch_end=True)
        self._publish(wait=True)
        read = any(reader.at_epoch_end(trainer.current_epoch) for reader in self._readers)
        if trainer.enable_validation and not (read and self.history[-1].step != self._steps.step(trainer)):
            return
        if self._should_evaluate(trainer) or read:  # all ranks time the run, whoever reads
            self._measure(trainer, pl_module, at_once=read)
        self._log(pl_module, on_step=False, on_epoch=True)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the final weights."""
        self._publish(wait=True)
        self._time.end_training()
        self._steps.stop()
        if self._fast_dev_run:
            return
        self._measure(trainer, pl_module)
        if trainer.is_global_zero:
            self._run_log.write_pictures(trainer, self._monitor.pictures)
            self._handover.send(self.history)
        if self.projector and trainer.is_global_zero:
            features, images = self._monitor.samples(
                *self._make_extractor(trainer, pl_module), self.data, count=self.projector, device=pl_module.device
            )
            self._run_log.write_samples(trainer, features, images, step=self._steps.step(trainer))

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Remove the hook on optimizers, and publish a record in computation; other processes may be gone."""
        self._steps.stop()
        if trainer.world_size == 1:
            self._publish(wait=True)
        self._in_background = None
        self._computation.discard()

    def _resume(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the history of the checkpoint in place of later entries, and restore the features to compare with."""
        if trainer.is_global_zero:
            self._run_log.resume(self.history)
            if self._run_log.pictures_file is not None:
                self._monitor.restore_pictures(self._run_log.pictures_file)
        if self._monitor.delayed_metrics and self.history[-1].step == self._steps.step(trainer):
            self._monitor.restore_previous(
                *self._make_extractor(trainer, pl_module), self.data, device=pl_module.device
            )

    def _observe_steps(self, trainer: Trainer, *, epoch_end: bool = False) -> None:
        if self._steps.observe(trainer, epoch_end=epoch_end) and trainer.is_global_zero:
            warnings.warn(
                f"trainer.global_step stays {trainer.global_step}, as Lightning counts only the steps of optimizers "
                "from self.optimizers(): repmetrics counts batches instead",
                stacklevel=2,
            )

    def _should_evaluate(self, trainer: Trainer) -> bool:
        """Whether to measure at this validation, or at the end of this epoch; all ranks call this together."""
        if self.every_n_steps is None and self._fitting and self._timing is None:
            self._timing = self._measure_timing(trainer)
        if any(reader.at_validation() for reader in self._readers):
            return True
        if self.every_n_steps is not None:
            return False
        if not self.history:
            return True
        return self._steps.step(trainer) - self.history[-1].step >= self._interval(trainer)

    def _measure_timing(self, trainer: Trainer) -> Timing | None:
        """Rank 0's seconds of the first evaluation and of a step so far; None before the first step."""
        step_time = self._time.seconds_per_step(self._steps.step(trainer))
        if step_time is None or not self.history:
            return None
        steps, seconds = step_time
        timing = Timing(self.history[0].seconds, trainer.strategy.broadcast(seconds))
        if trainer.is_global_zero:
            readers = sorted({reader.name for reader in self._readers if reader.at_validation()})
            message = timing.describe(total_steps=trainer.estimated_stepping_batches, readers=readers, every=steps)
            if message is not None:
                warnings.warn(message, stacklevel=2)
        return timing

    def _interval(self, trainer: Trainer) -> int:
        """Steps between evaluations by default."""
        total = trainer.estimated_stepping_batches
        if self._timing is not None and not self._timing.is_short(total):
            return self._timing.interval
        if not self._batch_size:
            return 0
        return default_interval(
            samples=self._monitor.forward_passes,
            batch_size=self._batch_size * trainer.world_size * trainer.accumulate_grad_batches,
            total_steps=total,
        )

    def _make_extractor(self, trainer: Trainer, pl_module: LightningModule) -> tuple[FeatureExtractor, Encode]:
        """The extractor, and its call in the precision plugin's context: hooks run outside autocast."""
        extractor = self._monitor.make_extractor(pl_module, self.encoder)
        precision = trainer.precision_plugin

        def encode(images: Tensor) -> dict[str, Tensor]:
            with precision.forward_context():
                features = extractor(precision.convert_input(images))
            if self._input_check is not None:
                self._input_check.observe_held_out(extractor.first_input)
            return features

        return extractor, encode

    def _check(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._monitor.check(*self._make_extractor(trainer, pl_module), self.data, device=pl_module.device)

    @property
    def _last_step(self) -> int:
        """Step of the last evaluation, published or not."""
        return self._background_step if self._in_background is not None else self.history[-1].step

    def _measure(self, trainer: Trainer, pl_module: LightningModule, *, at_once: bool = True) -> None:
        """Evaluate the current weights once, and publish the record: with ``background`` later, unless ``at_once``."""
        step = self._steps.step(trainer)
        self._publish(wait=True)
        if not self._fitting or not self.history or self.history[-1].step != step:
            if self._interrupted:
                return
            start, record = time.perf_counter(), None
            with self._interruptible(trainer):
                compute = self._begin(trainer, pl_module, step=step)
                if self.background and not (at_once or self._decides()):
                    self._in_background, self._background_step = trainer, step
                    if trainer.is_global_zero:
                        self._computation.start(compute)
                else:
                    record = self._monitor.finish(compute)
            self._time.add(time.perf_counter() - start)
            if record is None:
                return
            self._record(trainer, record)
        self._update_callback_metrics(trainer)

    def _begin(self, trainer: Trainer, pl_module: LightningModule, *, step: int) -> Callable[[], Record]:
        """Run the encoder, and return the computation of the record."""
        self._monitor.progress = None if trainer.progress_bar_callback is None else print_line
        return self._monitor.begin(
            *self._make_extractor(trainer, pl_module),
            self.data,
            step=step,
            epoch=trainer.current_epoch,
            device=pl_module.device,
            loss=self._mean_loss(trainer),
        )

    @contextmanager
    def _interruptible(self, trainer: Trainer) -> Iterator[None]:
        """End an evaluation that a signal interrupts, and the run after its step; the first one raises."""
        try:
            yield
        except EvaluationInterruptedError:
            if not self.history:
                raise
            self._interrupted = trainer.should_stop = True

    def _decides(self) -> bool:
        """Whether something decides at each measurement, and needs it while the weights are those that it measured."""
        responds = callable(self._alarm_response.on_alarm) or self._alarm_response.on_alarm == "stop"
        return not self._fitting or bool(self._listeners) or self.on_measure is not None or responds

    def _publish(self, *, wait: bool) -> None:
        """Publish the record that is computed in the background, if any; without ``wait`` only if it is there.

        Several processes publish together, at a point that all of them reach.
        """
        trainer = self._in_background
        if trainer is None or not (wait or (trainer.world_size == 1 and self._computation.done)):
            return
        self._in_background = None
        start = time.perf_counter()
        record = self._monitor.finish(self._computation.result)
        self._time.add(time.perf_counter() - start)
        self._record(trainer, record)
        self._update_callback_metrics(trainer)

    def _record(self, trainer: Trainer, record: Record) -> None:
        """Add a record to the history, and notify loggers and listeners."""
        self._values = record.published(prefix=self.prefix, previous=self._values if self._fitting else None)
        if self._fitting:
            self.history.append(record)
            start = time.perf_counter()
            if trainer.is_global_zero:
                self._run_log.write_record(
                    trainer, self.history, shares=self._time.shares(), pictures=self._monitor.pictures
                )
            self._time.add(time.perf_counter() - start)
            if self._alarm_response.respond(record):
                trainer.should_stop = True
            for listener in self._listeners:
                listener(trainer, record, self.history)
        if self.on_measure is not None:
            self.on_measure(record)

    def _update_callback_metrics(self, trainer: Trainer) -> None:
        trainer.callback_metrics.update({key: torch.tensor(value) for key, value in self._values.items()})

    def _write_layout(self, trainer: Trainer) -> None:
        """Write TensorBoard's layout after the first step, which shows whether there is a loss.

        TensorBoard reads one layout per run, which the last monitor writes for all.
        """
        if self._loss is None:  # possible with manual optimization
            self._refuse_unknown_keys(trainer, self._keys())
        monitors = monitors_in(trainer)
        if monitors[-1] is self:
            for board in tensorboard_writers(trainer):
                board.add_custom_scalars(
                    layouts(
                        {m.prefix: m._layout_keys() for m in monitors},
                        titles={m.prefix: m._chart_titles() for m in monitors},
                    )
                )

    def _layout_keys(self) -> list[str]:
        """Keys with a chart: TensorBoard has no data of a key without a value."""
        keys = [key for key in self._keys() if not math.isnan(self._values.get(key, 0.0))]
        return [*keys, f"{self.prefix}/overhead", f"{self.prefix}/overhead_total"]

    def _chart_titles(self) -> dict[str, str]:
        return {name: chart_title(name, m) for name, m in self.history[-1].measurements.items()}

    def _keys(self) -> list[str]:
        """Keys logged so far, and later keys: the loss, and metrics that compare two evaluations, with errors."""
        known = metric_keys(self.history[-1].measurements, prefix=self.prefix)
        errors = any(m.standard_error is not None for m in self.history[-1].measurements.values())
        suffixes = ("", "_se", "_lower", "_upper") if errors else ("",)
        delayed = [f"{self.prefix}/{name}{suffix}" for name in self._monitor.delayed_metrics for suffix in suffixes]
        loss = [] if self._loss is None else [f"{self.prefix}/loss"]
        return list(dict.fromkeys([*self._values, *known, *delayed, *loss]))

    def _refuse_unknown_keys(self, trainer: Trainer, keys: Sequence[str]) -> None:
        others = [monitor.prefix for monitor in monitors_in(trainer) if monitor.prefix != self.prefix]
        refuse_unknown_keys(trainer, prefix=self.prefix, others=others, keys=keys)

    def _hparam_metrics(self) -> list[str]:
        """Keys that TensorBoard shows with the hyperparameters."""
        names = [*self._monitor.metrics, *PROBES]
        stems = ["", *(f"{layer}/" for layer in self._monitor.layers)]
        return [f"{self.prefix}/{name}" for name in [*(stem + name for stem in stems for name in names), "loss"]]

    def _mean_loss(self, trainer: Trainer) -> float | None:
        if self._loss is None:
            return None
        total, count = self._loss
        self._loss = None
        return float(trainer.strategy.reduce(total / count, reduce_op="mean"))

    def _log(self, pl_module: LightningModule, *, on_step: bool, on_epoch: bool) -> None:
        """Log to ``callback_metrics``, and in ``trainer.validate`` to the loggers and the returned table too.

        All ranks hold the same numbers. Lightning would warn without ``sync_dist``.
        """
        pl_module.log_dict(
            self._values, logger=not self._fitting, on_step=on_step, on_epoch=on_epoch, batch_size=1, sync_dist=True
        )


def refuse_sharded(strategy: Any) -> None:
    """Raise for a strategy that wraps the module to shard it: a part cannot run alone, and ranks would wait.

    FSDP2 (ModelParallelStrategy) keeps the module, whose forward pass all ranks run together.

    Raises:
        ValueError: The strategy is FSDP or DeepSpeed.
    """
    names = {cls.__name__ for cls in type(strategy).__mro__}
    if sharded := names & {"FSDPStrategy", "DeepSpeedStrategy"}:
        raise ValueError(
            f"RepresentationMonitor does not measure parameters that {sharded.pop()} shards: train with ddp or FSDP2 "
            "(ModelParallelStrategy), or measure checkpoints with repmetrics score"
        )


def monitors_in(trainer: Any) -> list[RepresentationMonitor]:
    """Monitors of a trainer, in its order."""
    return [callback for callback in trainer.callbacks if isinstance(callback, RepresentationMonitor)]


def monitor_of(trainer: Any, *, prefix: str) -> RepresentationMonitor:
    """Monitor of a trainer with the prefix.

    Raises:
        ValueError: There is none.
    """
    monitors = monitors_in(trainer)
    for monitor in monitors:
        if monitor.prefix == prefix:
            return monitor
    prefixes = ", ".join(repr(monitor.prefix) for monitor in monitors) or "none"
    raise ValueError(
        f"no RepresentationMonitor with prefix {prefix!r} among the trainer's callbacks (found: {prefixes})"
    )
