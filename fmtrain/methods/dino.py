"""DINO (arXiv 2104.14294) on a timm ViT as a LightningModule: wiring of the pieces beside it."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import Any, Literal

import numpy as np
import timm
import torch
from lightly.loss import DINOLoss
from lightning.pytorch import LightningModule
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from timm.layers.drop import DropPath
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from fmtrain.methods.heads import ProjectionHead
from fmtrain.methods.losses import SinkhornLoss, in_float32
from fmtrain.methods.multicrop import Crops, MultiCrop
from fmtrain.methods.optim import apply_setting, clip_groups_, parameter_groups, update_teacher_
from fmtrain.methods.pretrained import Init, describe_vit, initialize_, state_dict_diff
from fmtrain.methods.schedules import Schedules, StepValues
from fmtrain.version import code_version
from repmetrics.encoders.preprocessing import normalize

BACKBONE = "student.backbone."


@rank_zero_only
def print_rank_zero(line: str) -> None:
    """A line for the reader, once."""
    print(line, file=sys.stderr)


class Branch(nn.Module):
    """A backbone and the head on its class token."""

    def __init__(self, backbone: nn.Module, head: ProjectionHead) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images (N, 3, H, W) → logits of the prototypes (N, K)."""
        logits: Tensor = self.head(self.backbone(images))
        return logits


def vit(arch: str, **kwargs: Any) -> nn.Module:
    """A timm ViT without a classifier.

    Raises:
        ValueError: timm knows none of that name, with names near it; or what it knows takes no such arguments.
    """
    if ":" not in arch and not timm.is_model(arch):  # with one: a place on the hub
        near = get_close_matches(arch, timm.list_models("vit*"))
        raise ValueError(f"timm has no model {arch}" + (f": did you mean {', '.join(near)}?" if near else ""))
    try:
        return timm.create_model(arch, num_classes=0, **kwargs)
    except (TypeError, AssertionError) as error:
        raise ValueError(f"{arch} cannot be made as a ViT with {kwargs}: {error}") from error


def set_uniform_drop_path_(backbone: nn.Module, rate: float) -> None:
    """Give all blocks of a ViT the same stochastic depth; timm's own rises from block to block."""
    blocks: Any = backbone.blocks
    for block in blocks:
        block.drop_path1, block.drop_path2 = DropPath(rate), DropPath(rate)


def compile_blocks_(backbones: Iterable[nn.Module], *, backend: str = "inductor") -> None:
    """Compile ViTs block by block: once for all of a kind, and for every way into the network; names do not change.

    A block with another drop path is another kind, hence the limit; a block that cannot be compiled is an error.
    """
    blocks: list[Any] = [block for backbone in backbones for block in backbone.blocks]  # type: ignore[union-attr]
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 4 * len(blocks))
    for block in blocks:
        block.compile(fullgraph=True, backend=backend)


class DINO(LightningModule):
    """Self-distillation with no labels; the defaults are the published ViT-S/16 recipe.

    A batch is a uint8 tensor of patches (B, 3, S, S), as the workers send it; views are cut on the device. Called as a
    module, it is the frozen encoder that `repmetrics score` rebuilds from a checkpoint: images (B, 3, H, W), uint8 or
    float in 0…1 → the teacher's class token (B, D).

    Args:
        arch: A timm ViT.
        arch_kwargs: More arguments for ``timm.create_model``: ``img_size``, ``patch_size``, ``depth``, …
        init: Where the backbone's weights begin: "random"; "timm", what timm publishes under `arch`; or the path of any
            checkpoint that `repmetrics score` reads. A resumed run does not begin again.
        mean: Per channel, on the scale 0…1.
        std: Per channel.
        augment: How patches become views.
        schedules: Learning rate, weight decay, momentum, teacher temperature over the run.
        n_prototypes: Outputs of the head.
        hidden_dim: Width of the head's MLP.
        bottleneck_dim: Width before the prototypes.
        head_layers: Linear layers of the head's MLP.
        student_temp: Temperature of the student's softmax.
        centering: How the teacher's softmax is kept from collapsing: its moving centre taken off, as published, or
            Sinkhorn-Knopp, which small batches bear better.
        center_momentum: Of the moving average that centres the teacher's logits.
        drop_path_rate: Stochastic depth of the student's last block, falling to 0 at its first.
        drop_path_uniform: The same in all blocks, as DINOv2 has it.
        clip_grad: Each parameter's gradient is shortened to this norm; None: never.
        layerwise_decay: Factor on the learning rate from each block to the one before.
        patch_embed_lr_mult: Factor on the patch embedding's learning rate.
        grad_checkpointing: Keep the student's activations of each block's end only, and compute the others again for
            the gradient: less memory, about a third more time.
        compile: Compile the blocks of student and teacher with ``torch.compile``, at the first step.
    """

    def __init__(
        self,
        *,
        arch: str = "vit_small_patch16_224",
        arch_kwargs: dict[str, Any] | None = None,
        init: Init = "random",
        mean: Sequence[float] = (0.5, 0.5, 0.5),
        std: Sequence[float] = (0.5, 0.5, 0.5),
        augment: MultiCrop = MultiCrop(),  # noqa: B008 - frozen
        schedules: Schedules = Schedules(),  # noqa: B008 - frozen
        n_prototypes: int = 65536,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        head_layers: int = 3,
        student_temp: float = 0.1,
        centering: Literal["centering", "sinkhorn_knopp"] = "centering",
        center_momentum: float = 0.9,
        drop_path_rate: float = 0.1,
        drop_path_uniform: bool = False,
        clip_grad: float | None = 3.0,
        layerwise_decay: float = 1.0,
        patch_embed_lr_mult: float = 1.0,
        grad_checkpointing: bool = False,
        compile: bool = False,  # noqa: A002 - as torch calls it
    ) -> None:
        super().__init__()
        # Local crops are smaller than the grid of positions, hence a dynamic size.
        self.arch, self.arch_kwargs = arch, {"dynamic_img_size": True, **(arch_kwargs or {})}
        self.init, self.initialised = init, False
        self.mean, self.std = tuple(mean), tuple(std)
        self.augment = augment
        self.schedules = schedules
        self.clip_grad = clip_grad
        self.student_temp, self.centering, self.center_momentum = student_temp, centering, center_momentum
        self.layerwise_decay, self.patch_embed_lr_mult = layerwise_decay, patch_embed_lr_mult
        self.student = self._network(
            n_prototypes, hidden_dim, bottleneck_dim, head_layers, drop_path_rate=drop_path_rate
        )
        if drop_path_uniform:
            set_uniform_drop_path_(self.student.backbone, drop_path_rate)
        self.teacher = self._network(n_prototypes, hidden_dim, bottleneck_dim, head_layers)
        self.teacher.load_state_dict(self.student.state_dict())
        self.teacher.requires_grad_(False).eval()
        self.student.backbone.set_grad_checkpointing(grad_checkpointing)  # type: ignore[operator]
        if compile:
            compile_blocks_([self.student.backbone, self.teacher.backbone])
        self.criterion: nn.Module = (
            SinkhornLoss(student_temp=student_temp)
            if centering == "sinkhorn_knopp"
            else DINOLoss(n_prototypes, student_temp=student_temp, center_momentum=center_momentum)
        )

    def _network(self, n_prototypes: int, hidden_dim: int, bottleneck_dim: int, layers: int, **more: Any) -> Branch:
        backbone: Any = vit(self.arch, **{**self.arch_kwargs, **more})
        head = ProjectionHead(
            backbone.num_features,
            n_prototypes=n_prototypes,
            hidden_dim=hidden_dim,
            bottleneck_dim=bottleneck_dim,
            layers=layers,
        )
        return Branch(backbone, head)

    def initialize(self) -> None:
        """Load the weights that `init` names, once, into student and teacher, and say what was and was not loaded.

        `fmtrain fit` calls it before it touches the run's folder; otherwise it happens when training begins.

        Raises:
            OSError: The file cannot be read.
            ValueError: The weights cannot be had, or are of another architecture.
        """
        if self.initialised:
            return
        messages = initialize_(self.student.backbone, self.init, arch=self.arch, mean=self.mean, std=self.std)
        self.teacher.backbone.load_state_dict(self.student.backbone.state_dict())
        self.initialised = True
        for line in messages:
            print_rank_zero(f"init: {line}")

    def on_fit_start(self) -> None:
        """Begin with the weights asked for, unless a checkpoint brings them."""
        if self.trainer.ckpt_path is None:
            self.initialize()

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) → the teacher's representations (B, D)."""
        features: Tensor = self.teacher.backbone(self._normalised(images))
        return features

    def _normalised(self, images: Tensor) -> Tensor:
        return normalize(images, mean=self.mean, std=self.std).to(self.dtype)

    def setting(self, *, batch_size: int) -> StepValues:
        """What the schedules say now, for `batch_size` patches on each rank."""
        total = batch_size * self.trainer.world_size * self.trainer.accumulate_grad_batches
        return self.schedules.at(self.global_step, steps=self.run_steps, batch_size=total)

    @property
    def run_steps(self) -> int:
        """Optimizer steps of the whole run."""
        steps = self.trainer.estimated_stepping_batches
        if steps == float("inf"):
            raise ValueError("the length of the run is unknown and the schedules need it: set trainer.max_steps")
        return int(steps)

    def on_train_batch_start(self, batch: Tensor, batch_idx: int) -> None:
        """Set this step's learning rate and weight decay."""
        self.step_values = self.setting(batch_size=len(batch))
        apply_setting(self.trainer.optimizers[0].param_groups, self.step_values)
        # Stochastic depth too is a function of the step, so that a resumed run repeats it.
        name = np.random.SeedSequence([self.augment.seed, self.batches_before(batch_idx), self.global_rank])
        torch.manual_seed(int(name.generate_state(1, np.uint64)[0] >> np.uint64(1)))

    def batches_before(self, batch_idx: int) -> int:
        """Batches this run has seen on each rank before this one, earlier legs included."""
        accumulate = self.trainer.accumulate_grad_batches
        return self.global_step * accumulate + batch_idx % accumulate

    def views(self, batch: Tensor, batch_idx: int) -> Crops:
        """The batch's crops, a function of the seed and of how many batches came before."""
        return self.augment(
            batch,
            step=self.batches_before(batch_idx),
            rank=self.global_rank,
            world_size=self.trainer.world_size,
        )

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """The loss of one batch of patches."""
        parts = self.losses(self.views(batch, batch_idx), batch_idx)
        loss = torch.stack(list(parts.values())).sum()
        if not torch.isfinite(loss):
            shown = ", ".join(f"{name} {float(value.detach()):g}" for name, value in parts.items())
            raise FloatingPointError(f"the loss is not finite at step {self.global_step}: {shown}")
        self.log("train/loss", loss.detach(), prog_bar=True, logger=False)
        self.logged = {"train/loss": loss.detach(), **{f"train/{k}_loss": v.detach() for k, v in parts.items()}}
        return loss

    def losses(self, views: Crops, batch_idx: int) -> dict[str, Tensor]:
        """The terms of the loss, weighted, by name."""
        crops = [self._normalised(view.flatten(0, 1)) for view in views if len(view)]
        with torch.no_grad():
            targets = self.teacher(crops[0])
        return {"dino": self.dino_loss(targets, [self.student(crop) for crop in crops], views=views)}

    def dino_loss(self, targets: Tensor, outputs: Sequence[Tensor], *, views: Crops) -> Tensor:
        """The class tokens' loss: logits of the teacher's (2·B, K) and of the student's views (V·B, K)."""
        batch = views.global_crops.shape[1]
        return in_float32(
            self.criterion,
            list(targets.unflatten(0, (-1, batch))),
            [view for output in outputs for view in output.unflatten(0, (-1, batch))],
            device=targets.device,
            teacher_temp=self.step_values.teacher_temp,
        )

    def heads(self) -> list[ProjectionHead]:
        """The student's heads."""
        return [self.student.head]

    def grad_clip_groups(self) -> Iterable[Iterable[nn.Parameter]]:
        """Which parameters' gradients share a norm when clipped: each stands alone, as published."""
        return ([parameter] for parameter in self.student.parameters())

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip, measure, and hold the prototypes still while they are frozen."""
        if gradient_clip_val is not None:
            raise ValueError("set model.clip_grad instead of trainer.gradient_clip_val: DINO clips part by part")
        self.logged["train/grad_norm"] = clip_groups_(self.grad_clip_groups(), max_norm=self.clip_grad)
        if self.global_step < self.schedules.freeze_last_layer_steps:
            for head in self.heads():
                for parameter in head.last_layer.parameters():
                    parameter.grad = None  # not zero: AdamW would still decay and move it

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step, then move the teacher and log; here, so that whatever runs at the batch's end sees all that.

        Lightning writes logs after checkpoints: a run killed in between would resume with a gap.
        """
        super().optimizer_step(*args, **kwargs)
        update_teacher_(self.teacher, self.student, momentum=self.step_values.momentum)
        taken, every = self.global_step + 1, self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if taken % every == 0 and self.trainer.is_global_zero:  # Lightning counts this step later
            self.logged |= {f"schedule/{name}": value for name, value in self.step_values._asdict().items()}
            for logger in self.loggers:
                logger.log_metrics({name: float(value) for name, value in self.logged.items()}, step=taken)

    def configure_optimizers(self) -> Optimizer:
        """AdamW; rates and decays are set at every step from the schedules."""
        groups = parameter_groups(
            self.student, layerwise_decay=self.layerwise_decay, patch_embed_lr_mult=self.patch_embed_lr_mult
        )
        return AdamW(groups, lr=0.0, weight_decay=0.0, fused=True)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a run of another architecture.

        Raises:
            ValueError: Any weight differs in name or shape.
        """
        own, found = self.state_dict(), checkpoint["state_dict"]
        differs = state_dict_diff(own, found)
        if differs is not None:
            theirs, ours = (
                describe_vit(
                    {name.removeprefix(BACKBONE): value for name, value in state.items() if name.startswith(BACKBONE)}
                )
                for state in (found, own)
            )
            raise ValueError(
                f"the checkpoint is of another model: its encoder is {theirs}, the configuration's {ours}; "
                f"of its weights {differs}; resume with its run's config.yaml, or begin anew with model.init"
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """State the encoder in plain types, for whoever loads the file without this class; write out the logs."""
        for logger in self.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.flush()
        checkpoint["hyper_parameters"] = {
            "arch": self.arch,
            "arch_kwargs": dict(self.arch_kwargs),
            "mean": list(self.mean),
            "std": list(self.std),
            "code": code_version(),
        }
