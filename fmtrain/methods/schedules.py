"""Schedules of DINO and DINOv2 as pure functions of the step, equal to the published code at every step."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from fmtrain.domains import check_domain

LENGTHS = ("lr_warmup_steps", "teacher_temp_warmup_steps", "freeze_last_layer_steps")
EPOCH = 1_250  # steps of a published epoch


def linear(step: int, *, steps: int, start: float, end: float) -> float:
    """Point `step` of ``np.linspace(start, end, steps)``, and `end` from `steps` on.

    Example:
        >>> [linear(s, steps=3, start=0.0, end=1.0) for s in range(5)]
        [0.0, 0.5, 1.0, 1.0, 1.0]
    """
    if step >= steps:
        return end
    return start + (end - start) * step / max(steps - 1, 1)


def cosine(step: int, *, steps: int, start: float, end: float) -> float:
    """Half a cosine: end + (start − end)·(1 + cos(π·step/steps))/2; `end` from `steps` on.

    Example:
        >>> cosine(0, steps=10, start=1.0, end=0.0), cosine(5, steps=10, start=1.0, end=0.0)
        (1.0, 0.5)
    """
    if step >= steps:
        return end
    return end + (start - end) * (1 + math.cos(math.pi * step / steps)) / 2


def warmup_cosine(step: int, *, steps: int, warmup_steps: int, peak: float, end: float, start: float = 0.0) -> float:
    """Linear from `start` to `peak` over `warmup_steps`, then a cosine to `end` over the rest of `steps`."""
    if step < warmup_steps:
        return linear(step, steps=warmup_steps, start=start, end=peak)
    return cosine(step - warmup_steps, steps=steps - warmup_steps, start=peak, end=end)


def scaled_lr(lr: float, *, batch_size: int, reference: int, rule: Literal["linear", "sqrt", "none"]) -> float:
    """Learning rate for a batch size, from that for the reference batch size.

    Example:
        >>> scaled_lr(5e-4, batch_size=1024, reference=256, rule="linear")
        0.002
        >>> scaled_lr(4e-3, batch_size=256, reference=1024, rule="sqrt")
        0.002
    """
    ratio = batch_size / reference
    return lr * {"linear": ratio, "sqrt": math.sqrt(ratio), "none": 1.0}[rule]


class StepValues(NamedTuple):
    """Values of the schedules at one step."""

    lr: float
    weight_decay: float
    momentum: float
    teacher_temp: float


@dataclass(frozen=True)
class Schedules:
    """Schedules of learning rate, weight decay, teacher momentum and teacher temperature; the defaults are DINO's.

    The three lengths are whole numbers of steps, or shares of the run: 0.1 is a tenth of its steps.

    Args:
        lr: Peak learning rate for a batch of `lr_batch_size` patches, over all ranks and accumulated batches.
        scaling_rule: Scaling of `lr` with the batch size: "linear" as in DINO, "sqrt" as in DINOv2, or "none".
        lr_batch_size: Batch size that `lr` is meant for.
        lr_warmup_steps: Steps of the linear rise of the learning rate from 0.
        min_lr: Learning rate at the end of the cosine; not scaled with the batch size.
        weight_decay: Weight decay at the start.
        weight_decay_end: Weight decay at the end of the cosine.
        momentum_teacher: Momentum of the teacher's exponential moving average at the start.
        momentum_end: Momentum of the teacher at the end of the cosine.
        teacher_temp: Temperature of the teacher's softmax after the warm-up.
        warmup_teacher_temp: Temperature of the teacher's softmax at the start.
        teacher_temp_warmup_steps: Steps of the linear change from `warmup_teacher_temp` to `teacher_temp`.
        freeze_last_layer_steps: Steps at the start in which the prototypes do not learn (one epoch in the paper).
        start_step: Steps of earlier stages. The schedules span them and this run, and begin at this step.

    Example:
        >>> Schedules(lr_warmup_steps=10).at(9, steps=100, batch_size=512)
        StepValues(lr=0.001, weight_decay=0.0471..., momentum=0.9960..., teacher_temp=0.04)
    """

    lr: float = 5e-4
    scaling_rule: Literal["linear", "sqrt", "none"] = "linear"
    lr_batch_size: int = 256
    lr_warmup_steps: int | float = 12_500
    min_lr: float = 1e-6
    weight_decay: float = 0.04
    weight_decay_end: float = 0.4
    momentum_teacher: float = 0.996
    momentum_end: float = 1.0
    teacher_temp: float = 0.04
    warmup_teacher_temp: float = 0.04
    teacher_temp_warmup_steps: int | float = 0
    freeze_last_layer_steps: int | float = 1_250
    start_step: int = 0

    def __post_init__(self) -> None:
        for name in ("lr", "min_lr", "weight_decay", "weight_decay_end", "start_step", *LENGTHS):
            check_domain(name, getattr(self, name), minimum=0)
        for name in ("lr_batch_size", "teacher_temp", "warmup_teacher_temp"):
            check_domain(name, getattr(self, name), above=0)
        for name in ("momentum_teacher", "momentum_end"):
            check_domain(name, getattr(self, name), minimum=0, maximum=1)
        for name in LENGTHS:
            if (value := getattr(self, name)) != int(value) and value > 1:
                raise ValueError(f"{name} must be a whole number of steps, or a share of the run below 1, got {value}")

    def is_frozen(self, step: int, *, steps: int) -> bool:
        """Whether the prototypes do not learn at `step` of a run of `steps`."""
        return step + self.start_step < self.resolved(steps).freeze_last_layer_steps

    def resolved(self, steps: int) -> Schedules:
        """These schedules for a run of `steps`, with all lengths in steps.

        Example:
            >>> Schedules(lr_warmup_steps=0.1).resolved(2000).lr_warmup_steps
            200
        """
        lengths = {name: getattr(self, name) for name in LENGTHS}
        shares = {name: round(value * (steps + self.start_step)) for name, value in lengths.items() if 0 < value < 1}
        return replace(self, **shares) if shares else self

    def longer_than(self, steps: int) -> list[str]:
        """Messages on the schedules that a run of `steps` does not complete.

        Example:
            >>> Schedules(lr_warmup_steps=200, freeze_last_layer_steps=0).longer_than(100)
            ['lr_warmup_steps is 200 in a run of 100 steps: the learning rate ends at 50 % of its peak']
        """
        if (resolved := self.resolved(steps)) is not self:
            return resolved.longer_than(steps)
        steps += self.start_step
        peak = steps / max(self.lr_warmup_steps, 1)
        changes = self.warmup_teacher_temp != self.teacher_temp
        effects = {
            "lr_warmup_steps": (
                self.lr_warmup_steps > steps,
                f"the learning rate ends at {100 * peak:.0f} % of its peak",
            ),
            "teacher_temp_warmup_steps": (
                self.teacher_temp_warmup_steps > steps and changes,
                f"the teacher temperature does not reach {self.teacher_temp:g}",
            ),
            "freeze_last_layer_steps": (self.freeze_last_layer_steps >= steps, "the prototypes never learn"),
        }
        return [
            f"{name} is {getattr(self, name)} in a run of {steps} steps: {effect}"
            for name, (incomplete, effect) in effects.items()
            if incomplete
        ]

    def at(self, step: int, *, steps: int, batch_size: int, teacher_temp_interval: int = 1) -> StepValues:
        """Values at `step` (from 0) of a run of `steps`.

        Args:
            step: Number of the step.
            steps: Steps of the run.
            batch_size: Patches of a step over all ranks and accumulated batches.
            teacher_temp_interval: Steps between changes of the teacher temperature: 1 in DINOv2, an epoch in DINO.
        """
        if (resolved := self.resolved(steps)) is not self:
            return resolved.at(step, steps=steps, batch_size=batch_size, teacher_temp_interval=teacher_temp_interval)
        step, steps = step + self.start_step, steps + self.start_step
        temp_steps = int(self.teacher_temp_warmup_steps)
        interval = min(teacher_temp_interval, max(temp_steps, 1))  # a warm-up below an epoch is one epoch
        peak = scaled_lr(self.lr, batch_size=batch_size, reference=self.lr_batch_size, rule=self.scaling_rule)
        return StepValues(
            lr=warmup_cosine(step, steps=steps, warmup_steps=int(self.lr_warmup_steps), peak=peak, end=self.min_lr),
            weight_decay=cosine(step, steps=steps, start=self.weight_decay, end=self.weight_decay_end),
            momentum=cosine(step, steps=steps, start=self.momentum_teacher, end=self.momentum_end),
            teacher_temp=linear(
                step // interval,
                steps=math.ceil(temp_steps / interval),
                start=self.warmup_teacher_temp,
                end=self.teacher_temp,
            ),
        )
