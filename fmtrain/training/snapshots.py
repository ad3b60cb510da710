"""Snapshots of the teacher's backbone at evaluations, so that `repmetrics select` has checkpoints to select from."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from fmtrain.domains import check_domain
from fmtrain.training.checkpoints import DATA, NonFiniteWeightsError, find_nonfinite
from repmetrics.atomic_write import atomic_path
from repmetrics.callbacks.metric_history import check_measured, metric_history
from repmetrics.callbacks.representation_monitor import monitor_of
from repmetrics.decisions.early_stopping import KEEP, best_local_maxima
from repmetrics.monitoring.record import Record

FOLDER = "teachers"
PREFIX = "teacher.backbone."
Rule = Literal["none", "all", "local_maxima"] | int


def steps_to_keep(
    history: Sequence[Record], rule: Rule, *, every_n_evaluations: int = 1, metric: str = "rankme"
) -> set[int]:
    """Steps whose snapshots are kept after the last evaluation of a history. The start of the run is never kept.

    Args:
        history: Evaluations so far.
        rule: "all"; the number of newest ones; "local_maxima" of the metric, best first, and the newest.
        every_n_evaluations: Evaluations per snapshot.
        metric: Metric of the local maxima.
    """
    steps = [record.step for record in history if record.step > 0]
    chosen = steps[every_n_evaluations - 1 :: every_n_evaluations]
    if rule == "all":
        return set(chosen)
    if rule == "local_maxima":
        values = [(step, m) for step, m in metric_history(list(history), metric, after_step=0) if step in chosen]
        return {values[i][0] for i in best_local_maxima([m for _, m in values], k=KEEP)}
    return set() if rule == "none" else set(chosen[-int(rule) :])


class TeacherSnapshots(Callback):
    """Writes the teacher's backbone alone, without optimizer and heads, at evaluations of the monitor.

    A file has a sixth to a tenth of a checkpoint's size. Files are in the folder "teachers" of the run. A resumed run
    replaces those after its step.

    Args:
        keep_teacher: Snapshots to keep: "none", "all", a number of newest ones, or "local_maxima" of a metric with the
            newest one.
        every_n_evaluations: Number of evaluations per snapshot.
        metric: Metric of the local maxima, in its own direction.
    """

    def __init__(self, *, keep_teacher: Rule = "none", every_n_evaluations: int = 1, metric: str = "rankme") -> None:
        super().__init__()
        if isinstance(keep_teacher, int):
            check_domain("keep_teacher", keep_teacher, minimum=1)
        check_domain("every_n_evaluations", every_n_evaluations, minimum=1)
        self.keep_teacher, self.every_n_evaluations, self.metric = keep_teacher, every_n_evaluations, metric

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Register with the monitor, and state the disk use."""
        if self.keep_teacher == "none":
            return
        if not teacher_state(pl_module):
            raise ValueError("snapshots.keep_teacher needs a model with a teacher: DINO or DINOv2")
        if getattr(pl_module, "sharded", False):
            raise ValueError("snapshots.keep_teacher is not available for a sharded model: its checkpoints are scored")
        monitor = monitor_of(trainer, prefix="repmetrics")
        monitor.add_listener(self._evaluated)
        if trainer.is_global_zero:
            print(
                disk_use(self.keep_teacher, pl_module, steps=trainer.max_steps, every=monitor.every_n_steps,
                         every_n_evaluations=self.every_n_evaluations), file=sys.stderr,
            )  # fmt: skip

    def _evaluated(self, trainer: Trainer, record: Record, history: list[Record]) -> None:
        if self.keep_teacher == "local_maxima":
            check_measured(record, self.metric, callback="TeacherSnapshots")
        if not trainer.is_global_zero:
            return
        keep = steps_to_keep(
            history, self.keep_teacher, every_n_evaluations=self.every_n_evaluations, metric=self.metric
        )
        folder = Path(trainer.default_root_dir) / FOLDER
        if record.step in keep:
            write_snapshot(trainer, snapshot_path(folder, record.step), step=record.step)
        kept = {snapshot_path(folder, step) for step in keep}
        for path in folder.glob("step-*.ckpt"):
            if path not in kept:
                path.unlink(missing_ok=True)


def snapshot_path(folder: Path, step: int) -> Path:
    """Path of a step's snapshot."""
    return folder / f"step-{step:08d}.ckpt"


def teacher_state(module: LightningModule) -> dict[str, Tensor]:
    """Weights of the teacher's backbone, under their names in a checkpoint."""
    return {name: value for name, value in module.state_dict().items() if name.startswith(PREFIX)}


def write_snapshot(trainer: Trainer, path: Path, *, step: int) -> None:
    """Write the teacher's backbone with what readers need: architecture, normalization, step and data.

    Raises:
        NonFiniteWeightsError: A weight is NaN or infinite; nothing is written.
    """
    module: Any = trainer.lightning_module
    data = getattr(trainer, "datamodule", None)
    content: dict[str, Any] = {"state_dict": teacher_state(module), "global_step": step}
    if (name := find_nonfinite(content)) is not None:
        raise NonFiniteWeightsError(f"the teacher is not finite at step {step} ({name})")
    content["hyper_parameters"] = module.describe()
    if data is not None:
        content[DATA] = data.state_dict()
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path, sync=True) as temporary, temporary.open("wb") as file:
        torch.save(content, file)


def disk_use(rule: Rule, module: LightningModule, *, steps: int, every: int | None, every_n_evaluations: int) -> str:
    """Sentence on the disk that the snapshots of a run take."""
    size = sum(value.numel() * value.element_size() for value in teacher_state(module).values()) / 1e6
    most: int | None = None
    if rule == "all":
        most = None if every is None else steps // every // every_n_evaluations
    else:
        most = KEEP + 1 if rule == "local_maxima" else int(rule)
    total = "" if most is None else f", at most {most} at a time, {most * size / 1e3:.3g} GB"
    return f"snapshots of the teacher: {size:.3g} MB each{total}, in {FOLDER}/"
