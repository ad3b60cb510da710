"""DINO (arXiv 2104.14294) on a timm ViT, as a LightningModule."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from fmtrain.domains import check_domain
from fmtrain.methods.backbone import (
    Branch,
    Resampling,
    compile_blocks_,
    set_uniform_drop_path_,
    skip_dropped_samples_,
    vit,
)
from fmtrain.methods.diagnostics import Throughput, gradient_norms, speed_signals, target_signals
from fmtrain.methods.heads import ProjectionHead
from fmtrain.methods.losses import Centering, dino_loss, in_float32
from fmtrain.methods.multicrop import Crops, MultiCrop
from fmtrain.methods.optim import apply_step_values, clip_groups_, parameter_groups, update_teacher_
from fmtrain.methods.pretrained import Init, describe_vit, differing_names, initialize_, state_dict_diff
from fmtrain.methods.schedules import EPOCH, Schedules
from fmtrain.methods.sharding import shard_
from fmtrain.methods.stages import load_averages_, load_centers_, load_heads_, read_averages, read_heads
from fmtrain.rng import derive_seed
from fmtrain.version import code_version
from repmetrics.encoders.preprocessing import normalize

BACKBONE = "student.backbone."
HALF = ("bf16-true", "16-true")
# Parts of the state dict, and the settings that decide their shapes.
SETTINGS_OF_PARTS = {
    "criterion.": "model.centering and n_prototypes",
    "ibot.": "model.centering and ibot_prototypes",
    "student.head.": "model.n_prototypes, hidden_dim, bottleneck_dim and head_layers",
    "student.ibot_head.": "model.ibot_prototypes and ibot_bottleneck_dim",
    "student.mask_token": "the class of model",
    "anchor.": "model.gram_weight",
}


@rank_zero_only
def print_rank_zero(line: str) -> None:
    """Print a line to stderr on rank 0 only."""
    print(line, file=sys.stderr)


class NonFiniteGradientError(FloatingPointError):
    """The gradient of a step, summed over all ranks and accumulated batches, holds NaN or infinity."""


def run_steps(trainer: Trainer) -> int:
    """Optimizer steps of the whole run.

    Raises:
        ValueError: The trainer does not know them: the data have no end and only ``max_epochs`` is set.
    """
    steps = trainer.estimated_stepping_batches
    if not 0 < steps < float("inf"):  # Lightning has -1 and infinity for unknown
        raise ValueError(
            "the length of the run is unknown and the schedules need it: set trainer.max_steps; trainer.max_epochs and "
            "max_time do not define it, because an epoch of the training patches has no end"
        )
    return int(steps)


class DINO(LightningModule):
    """Self-distillation with no labels; the defaults are the published ViT-S/16 recipe.

    A batch is a uint8 tensor of patches (B, 3, S, S); views are cut on the device. Called as a module, it is the frozen
    encoder that `repmetrics score` rebuilds from a checkpoint: images (B, 3, H, W), uint8 or float in 0…1 → the
    teacher's class token (B, D).

    Args:
        arch: Name of a timm ViT.
        arch_kwargs: Further arguments of ``timm.create_model``: ``img_size``, ``patch_size``, ``depth``, …
        ffn_layer: Layer after attention: "mlp", or "swiglu" as in DINOv2's recipes of ViT-L and ViT-g.
        interpolate_offset: Number of tokens added to a side before positions are resampled for crops of another size.
        interpolate_antialias: Antialiasing of that resampling; DINOv2 uses it, without offset, with registers.
        init: Initial weights of the backbone: "random"; "timm", timm's published weights of `arch`; or the path of any
            checkpoint that `repmetrics score` reads. Ignored when a run is resumed.
        init_heads: Checkpoint whose heads, mask token and centers begin the run: of fmtrain, or of the published code.
            With the same file as `init`, student and teacher each begin with their own backbone.
        init_optimizer: Checkpoint of fmtrain whose averages of AdamW begin the run.
        mean: Mean of each channel for normalization, on the scale 0…1.
        std: Standard deviation of each channel for normalization, on the scale 0…1.
        augment: Augmentation that cuts views from patches.
        schedules: Schedules of learning rate, weight decay, teacher momentum and teacher temperature.
        teacher_temp_per_epoch: Changes of the teacher temperature at each 1250th step, a published epoch, as in DINO;
            otherwise at each step, as in DINOv2.
        n_prototypes: Number of outputs of the head.
        hidden_dim: Width of the head's MLP.
        bottleneck_dim: Width of the head's layer before the prototypes.
        head_layers: Number of linear layers of the head's MLP.
        student_temp: Temperature of the student's softmax.
        centering: Method that keeps the teacher's softmax from collapsing. "centering" subtracts a moving center, as
            published; "sinkhorn_knopp" is more robust with small batches.
        center_momentum: Momentum of the moving center of the teacher's logits.
        drop_path_rate: Stochastic depth of the student's last block; it decreases linearly to 0 at the first block.
        drop_path_uniform: Equal stochastic depth in all blocks, as in DINOv2.
        drop_path_subset: Stochastic depth that computes only the samples it keeps, an exact share of the batch, as in
            DINOv2 for rates above 0.1. It saves that share of the student's time. Otherwise each sample is dropped on
            its own after it was computed, as in DINO.
        norm_last_layer: Prototypes of unit length, as in DINO. Otherwise their lengths learn, as in DINOv2.
        freeze_last_layer_by: How the prototypes are frozen at the start: without a "gradient" as in DINO, or by a
            learning rate "lr" of 0 as in DINOv2, where the optimizer's averages already follow the gradient.
        clip_grad: Maximum gradient norm: of each parameter in DINO, of the backbone and each head in DINOv2. None
            disables clipping.
        layerwise_decay: Factor on the learning rate from each block to the previous one.
        patch_embed_lr_mult: Factor on the learning rate of the patch embedding.
        grad_checkpointing: Gradient checkpointing: only the activations at the end of each student block are stored. It
            saves memory and takes about a third more time.
        compile: Compilation of the blocks of student and teacher with ``torch.compile``, at the first step.
    """

    def __init__(
        self,
        *,
        arch: str = "vit_small_patch16_224",
        arch_kwargs: dict[str, Any] | None = None,
        ffn_layer: Literal["mlp", "swiglu"] = "mlp",
        interpolate_offset: float = 0.1,
        interpolate_antialias: bool = False,
        init: Init = "random",
        init_heads: Path | None = None,
        init_optimizer: Path | None = None,
        mean: Sequence[float] = (0.5, 0.5, 0.5),
        std: Sequence[float] = (0.5, 0.5, 0.5),
        augment: MultiCrop = MultiCrop(),  # noqa: B008 - frozen
        schedules: Schedules = Schedules(),  # noqa: B008 - frozen
        teacher_temp_per_epoch: bool = True,
        n_prototypes: int = 65536,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        head_layers: int = 3,
        student_temp: float = 0.1,
        centering: Centering = "centering",
        center_momentum: float = 0.9,
        drop_path_rate: float = 0.1,
        drop_path_uniform: bool = False,
        drop_path_subset: bool = False,
        norm_last_layer: bool = True,
        freeze_last_layer_by: Literal["gradient", "lr"] = "gradient",
        clip_grad: float | None = 3.0,
        layerwise_decay: float = 1.0,
        patch_embed_lr_mult: float = 1.0,
        grad_checkpointing: bool = False,
        compile: bool = False,  # noqa: A002 - as torch calls it
    ) -> None:
        super().__init__()
        for name, value in (("n_prototypes", n_prototypes), ("hidden_dim", hidden_dim), ("head_layers", head_layers)):
            check_domain(name, value, minimum=1)
        check_domain("bottleneck_dim", bottleneck_dim, minimum=1)
        check_domain("std", tuple(std), above=0)
        check_domain("mean", tuple(mean))
        if len(mean) != 3 or len(std) != 3:
            raise ValueError(f"mean and std must have 3 values, got {len(mean)} and {len(std)}")
        check_domain("student_temp", student_temp, above=0)
        check_domain("center_momentum", center_momentum, minimum=0, maximum=1)
        check_domain("drop_path_rate", drop_path_rate, minimum=0, below=1)
        check_domain("clip_grad", clip_grad, above=0)
        check_domain("interpolate_offset", interpolate_offset, minimum=0, below=1)
        check_domain("layerwise_decay", layerwise_decay, above=0, maximum=1)
        check_domain("patch_embed_lr_mult", patch_embed_lr_mult, minimum=0)
        # Local crops have fewer tokens than the position embedding: the size must be dynamic.
        self.arch, self.arch_kwargs = arch, {"dynamic_img_size": True, **(arch_kwargs or {})}
        self.ffn_layer, self.resampling = ffn_layer, Resampling(interpolate_offset, interpolate_antialias)
        self.teacher_temp_interval = EPOCH if teacher_temp_per_epoch else 1
        self._signals: dict[str, Tensor] = {}
        self.logged: dict[str, Tensor] = {}  # values of the last step
        self.init, self.init_heads, self.init_optimizer = init, init_heads, init_optimizer
        self.initialized = self.sharded = False
        self._averages: dict[str, dict[str, Tensor]] = {}  # of an earlier stage, until training starts
        self.mean, self.std = tuple(mean), tuple(std)
        self.augment = augment
        self.schedules = schedules
        self.clip_grad = clip_grad
        self.student_temp, self.centering, self.center_momentum = student_temp, centering, center_momentum
        self.layerwise_decay, self.patch_embed_lr_mult = layerwise_decay, patch_embed_lr_mult
        self.freeze_last_layer_by = freeze_last_layer_by
        head: dict[str, Any] = {
            "n_prototypes": n_prototypes,
            "hidden_dim": hidden_dim,
            "bottleneck_dim": bottleneck_dim,
        }
        head |= {"layers": head_layers, "norm_last_layer": norm_last_layer}
        self.student = self._branch(head, drop_path_rate=drop_path_rate)
        if drop_path_uniform:
            set_uniform_drop_path_(self.student.backbone, drop_path_rate)
        if drop_path_subset:
            skip_dropped_samples_(self.student.backbone)
        self.teacher = self._branch(head)
        self.teacher.load_state_dict(self.student.state_dict())
        self.teacher.requires_grad_(False).eval()
        # torch types attributes of modules as Tensor | Module.
        self.student.backbone.set_grad_checkpointing(grad_checkpointing)  # type: ignore[operator]
        if compile:
            compile_blocks_([self.student.backbone, self.teacher.backbone])
        self.criterion = dino_loss(
            centering, n_prototypes=n_prototypes, student_temp=student_temp, center_momentum=center_momentum
        )

    def _branch(self, head: dict[str, Any], **kwargs: Any) -> Branch:
        backbone: Any = vit(self.arch, ffn_layer=self.ffn_layer, **{**self.arch_kwargs, **kwargs})
        return Branch(backbone, ProjectionHead(backbone.num_features, **head), self.resampling)

    def initialize(self) -> None:
        """Load the weights of `init` into student and teacher once, and print what was and was not loaded.

        `fmtrain fit` calls it before it changes the run's folder; otherwise it runs when training starts.

        Raises:
            OSError: The file cannot be read.
            ValueError: The weights are not available, or belong to another architecture.
        """
        if self.initialized:
            return
        network: dict[str, Any] = {"arch": self.arch, "mean": self.mean, "std": self.std}
        messages = initialize_(self.student.backbone, self.init, **network)
        self.teacher.backbone.load_state_dict(self.student.backbone.state_dict())
        if self.init_heads is not None:
            heads = read_heads(self.init_heads)
            if "student" in heads and Path(self.init) == Path(self.init_heads):
                messages += initialize_(self.student.backbone, self.init, branch="student", **network)[:1]
            messages += load_heads_(self.student, self.teacher, heads, source=self.init_heads.name)
            messages += load_centers_(self, self.init_heads)
        if self.init_optimizer is not None:
            self._averages = read_averages(self.init_optimizer)
        self.initialized = True
        for line in messages:
            print_rank_zero(f"init: {line}")

    def configure_model(self) -> None:
        """Shard student and teacher where the strategy does so, after the initial weights are loaded."""
        if self.device_mesh is None or self.sharded:
            return
        if self.init_optimizer is not None:
            raise ValueError("model.init_optimizer cannot be read into a sharded model: leave it out")
        if self.trainer.ckpt_path is None:
            self.initialize()
        for branch in self.children():
            if isinstance(branch, Branch):
                shard_(branch, self.device_mesh["data_parallel"])
        self.sharded = True

    def check_trainer(self, trainer: Trainer) -> None:
        """Check the trainer's settings, before anything is read or written.

        Raises:
            ValueError: The precision keeps the weights in half precision, or the trainer clips gradients.
        """
        if trainer.precision in HALF:
            mixed = trainer.precision.replace("true", "mixed")
            raise ValueError(
                f"trainer.precision {trainer.precision} keeps the weights in half precision, where most steps of the "
                f"teacher's moving average round to zero: set {mixed}, which keeps weights and optimizer in float32"
            )
        if trainer.gradient_clip_val is not None:
            raise ValueError("set model.clip_grad instead of trainer.gradient_clip_val: DINO clips by parameter groups")

    def on_fit_start(self) -> None:
        """Check the trainer, and load the initial weights unless the run is resumed from a checkpoint."""
        self.check_trainer(self.trainer)
        if self.trainer.ckpt_path is None:
            self.initialize()

    def on_train_start(self) -> None:
        """Load the optimizer's averages of an earlier stage; warn of schedules that are longer than the run."""
        self._throughput, self._images = Throughput(self.trainer), 0
        if self._averages and self.trainer.ckpt_path is None:
            for line in load_averages_(self.trainer.optimizers[0], self._averages):
                print_rank_zero(f"init: {line}")
        self._averages = {}
        if self.trainer.is_global_zero:
            for message in self.schedules.longer_than(run_steps(self.trainer)):
                warnings.warn(message, stacklevel=2)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) → representations of the teacher (B, D)."""
        return self.teacher.features(self._normalize(images))

    def _normalize(self, images: Tensor) -> Tensor:
        return normalize(images, mean=self.mean, std=self.std).to(self.dtype)

    def on_train_batch_start(self, batch: Tensor, batch_idx: int) -> None:
        """Set the learning rate and weight decay of this step, and seed stochastic depth."""
        self._images += len(batch)
        total = len(batch) * self.trainer.world_size * self.trainer.accumulate_grad_batches
        self.step_values = self.schedules.at(
            self.global_step,
            steps=run_steps(self.trainer),
            batch_size=total,
            teacher_temp_interval=self.teacher_temp_interval,
        )
        apply_step_values(self.trainer.optimizers[0].param_groups, self.step_values, freeze=self._frozen())
        # A function of the step, so that a resumed run repeats it.
        torch.manual_seed(derive_seed(self.augment.seed, self.batches_before(batch_idx), self.global_rank) >> 1)

    def batches_before(self, batch_idx: int) -> int:
        """Number of batches on each rank before this one, over all starts of the run."""
        accumulate = self.trainer.accumulate_grad_batches
        return self.global_step * accumulate + batch_idx % accumulate

    def views(self, batch: Tensor, batch_idx: int) -> Crops:
        """Crops of the batch, a function of the seed and the number of previous batches."""
        return self.augment(batch, **self.stream(batch_idx))

    def stream(self, batch_idx: int) -> dict[str, int]:
        """Batch and rank, which select the random numbers of the augmentation."""
        return {
            "step": self.batches_before(batch_idx),
            "rank": self.global_rank,
            "world_size": self.trainer.world_size,
        }

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Loss of one batch of patches."""
        terms = self.losses(batch, self.views(batch, batch_idx), batch_idx)
        loss = torch.stack(list(terms.values())).sum()
        if not torch.isfinite(loss):
            listed = ", ".join(f"{name} {float(value.detach()):g}" for name, value in terms.items())
            raise FloatingPointError(f"the loss is not finite at step {self.global_step}: {listed}")
        self.log("train/loss", loss.detach(), prog_bar=True, logger=False)
        values = {"loss": loss.detach(), **{f"{k}_loss": v.detach() for k, v in terms.items()}, **self._signals}
        self._signals = {}
        before = batch_idx % self.trainer.accumulate_grad_batches
        means = {name: self.logged[f"train/{name}"] for name in values} if before else values
        self.logged = {f"train/{k}": m + (values[k] - m) / (before + 1) for k, m in means.items()}
        return loss

    def losses(self, batch: Tensor, views: Crops, batch_idx: int) -> dict[str, Tensor]:
        """Weighted terms of the loss of the patches and their views, by name."""
        crops = [self._normalize(view.flatten(0, 1)) for view in views if len(view)]
        with torch.no_grad():
            targets = self.teacher(crops[0])
        return {"dino": self.dino_loss(targets, [self.student(crop) for crop in crops], views=views)}

    def dino_loss(self, targets: Tensor, outputs: Sequence[Tensor], *, views: Crops) -> Tensor:
        """Class-token loss from logits of the teacher (2·B, K) and of the student's views (V·B, K)."""
        batch = views.global_crops.shape[1]
        if self._logs_this_step():
            center = getattr(self.criterion, "center", None)
            self._signals = target_signals(
                targets,
                outputs[0],
                temperature=self.step_values.teacher_temp,
                center=None if center is None else center.reshape(1, -1),
            )
        return in_float32(
            self.criterion,
            list(targets.unflatten(0, (-1, batch))),
            [view for output in outputs for view in output.unflatten(0, (-1, batch))],
            device=targets.device,
            teacher_temp=self.step_values.teacher_temp,
        )

    def heads(self) -> list[ProjectionHead]:
        """Heads of the student."""
        return [self.student.head]

    def summed_parameters(self) -> Sequence[nn.Parameter]:
        """Parameters of the student that learn as the sum of two: none in DINO."""
        return ()

    def grad_clip_groups(self) -> Iterable[Iterable[nn.Parameter]]:
        """Groups of parameters that are clipped by one norm: one group per parameter, as published."""
        return ([parameter] for parameter in self.student.parameters())

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the gradient, record its norm, and remove the prototypes' gradient while they are frozen.

        Raises:
            NonFiniteGradientError: The gradient is not finite. With the loss scaling of float16 this is an ordinary
                event, and the scaler skips the step; it is an error once the scale has fallen below 1.
        """
        if self._logs_this_step():
            groups = {name: module.parameters() for name, module in self.student.named_children()}
            self.logged |= {f"train/{name}": value for name, value in gradient_norms(groups).items()}
        norm = clip_groups_(self.grad_clip_groups(), max_norm=self.clip_grad)
        scaler = self._loss_scaler()
        if not torch.isfinite(norm) and (scaler is None or scaler.get_scale() < 1):
            raise NonFiniteGradientError(f"the gradient is not finite at step {self.global_step}; no step was taken")
        self.logged["train/grad_norm"] = norm
        if self._frozen() and self.freeze_last_layer_by == "gradient":
            for head in self.heads():
                for parameter in head.last_layer.parameters():
                    parameter.grad = None  # with a zero gradient, AdamW would still decay and move it

    def _frozen(self) -> bool:
        """Whether the prototypes do not learn in this step."""
        return self.schedules.is_frozen(self.global_step, steps=run_steps(self.trainer))

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Take the step, update the teacher and log, before any callback at the end of the batch runs.

        Lightning writes logs after checkpoints: a run killed between the two would resume with a gap in its logs.
        Values are means over the ranks and over accumulated batches.
        """
        super().optimizer_step(*args, **kwargs)
        update_teacher_(self.teacher, self.student, momentum=self.step_values.momentum)
        if self._logs_this_step():
            self._write_logs()

    def _logs_this_step(self) -> bool:
        """Whether the values of this step are logged; Lightning counts a step after `optimizer_step`."""
        interval = self.trainer.log_every_n_steps  # type: ignore[attr-defined]  # Lightning does not declare it
        return bool(interval) and (self.global_step + 1) % interval == 0

    def _write_logs(self) -> None:
        step, trainer = self.global_step + 1, self.trainer
        images = self._images * trainer.world_size
        speed = speed_signals(self._throughput, images=images)
        self._images = 0
        values = self.logged | {f"speed/{name}": torch.tensor(value) for name, value in speed.items()}
        means = torch.stack([value.detach().float().to(self.device) for value in values.values()])
        means = trainer.strategy.reduce(means, reduce_op="mean")
        if not trainer.is_global_zero:
            return
        logged = dict(zip(values, means.tolist(), strict=True))
        logged |= {f"schedule/{name}": float(value) for name, value in self.step_values._asdict().items()}
        for logger in self.loggers:
            logger.log_metrics(logged, step=step)

    def configure_optimizers(self) -> Optimizer:
        """AdamW; the schedules set learning rates and weight decays at every step."""
        groups = parameter_groups(
            self.student,
            layerwise_decay=self.layerwise_decay,
            patch_embed_lr_mult=self.patch_embed_lr_mult,
            separate_last_layer=self.freeze_last_layer_by == "lr",
            sums=self.summed_parameters(),
        )
        # A fused optimizer unscales float16's gradients inside its step, which is after clipping.
        return AdamW(groups, lr=0.0, weight_decay=0.0, fused=self._loss_scaler() is None)

    def _loss_scaler(self) -> torch.amp.GradScaler | None:
        """Loss scaler of ``precision: 16-mixed``."""
        return getattr(self.trainer.precision_plugin, "scaler", None)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Raise if the checkpoint is of another architecture.

        Raises:
            ValueError: Any weight differs in name or shape.
        """
        if "state_dict" not in checkpoint:  # of a sharded run; `fmtrain fit` has compared the shapes before
            return
        states = checkpoint["state_dict"], self.state_dict()
        difference = state_dict_diff(*states)
        if difference is None:
            return
        encoder, expected = (
            describe_vit(
                {name.removeprefix(BACKBONE): value for name, value in state.items() if name.startswith(BACKBONE)}
            )
            for state in states
        )
        if encoder != expected:
            reason = f"its encoder is {encoder}, the configuration's {expected}"
        else:
            changed = differing_names(*states)
            parts = [text for part, text in SETTINGS_OF_PARTS.items() if any(name.startswith(part) for name in changed)]
            reason = f"the encoder is the same, but not {', nor '.join(parts) or 'model.arch_kwargs'}"
        raise ValueError(
            f"the checkpoint is of another model: {reason}; of its weights {difference}; resume with its run's "
            "config.yaml, or start a new run with model.init"
        )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the encoder's description in plain types, for readers without this class, and write the logs so far."""
        for logger in self.loggers:
            logger.save()
        checkpoint["hyper_parameters"] = self.describe()

    def describe(self) -> dict[str, Any]:
        """Description of the encoder in plain types: architecture, normalization, version of the code."""
        return {
            "arch": self.arch,
            "arch_kwargs": dict(self.arch_kwargs),
            "mean": list(self.mean),
            "std": list(self.std),
            "code": code_version(),
        }
