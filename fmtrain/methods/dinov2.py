"""DINOv2 (arXiv 2304.07193): DINO, iBOT's loss on masked tokens, and a regularizer that spreads representations."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightly.loss import KoLeoLoss
from torch import Tensor, nn

from fmtrain.domains import check_domain, check_range
from fmtrain.methods.backbone import Branch, lacks_class_token_position, vit
from fmtrain.methods.dino import DINO, print_rank_zero
from fmtrain.methods.heads import ProjectionHead
from fmtrain.methods.losses import Centering, GramLoss, KDELoss, ibot_loss, in_float32
from fmtrain.methods.masking import batch_masks
from fmtrain.methods.multicrop import Crops, MultiCrop
from fmtrain.methods.pretrained import initialize_
from fmtrain.methods.schedules import Schedules

CROPS = MultiCrop(global_crops_scale=(0.32, 1.0), local_crops_scale=(0.05, 0.32))
SCHEDULES = Schedules(
    lr=4e-3,
    scaling_rule="sqrt",
    lr_batch_size=1024,
    momentum_teacher=0.992,
    teacher_temp=0.07,
    teacher_temp_warmup_steps=37_500,
)


class DINOv2(DINO):
    """DINO's loss on class tokens, iBOT's on masked tokens, and KoLeo (or KDE) on the student's representations.

    The defaults are those of the published recipe for 100 epochs, also where DINO's differ.

    Args:
        n_prototypes: Number of outputs of the head.
        centering: Method that keeps the teacher's softmax from collapsing: "centering" or "sinkhorn_knopp".
        ibot_weight: Weight of iBOT's loss.
        ibot_prototypes: Number of outputs of a separate iBOT head; None shares DINO's head, as in the default recipe.
        ibot_bottleneck_dim: Width of the separate iBOT head's layer before the prototypes.
        mask_sample_probability: Share of the global crops that are masked for the student.
        mask_ratio_min_max: Range of the share of masked tokens in a masked crop.
        masks_per_rank: Masks drawn for each rank on its own, as published: the shares hold exactly on every rank. If
            they are drawn over the batch of all ranks, two ranks train as one with twice the batch.
        regularizer: Loss that spreads representations: "koleo" as published, or "kde" as in pathology models.
        regularizer_weight: Weight of the regularizer, for each of the global crops.
        kde_concentration: Concentration κ of KDE's kernel.
        gram_weight: Weight of Gram anchoring (DINOv3 has 1 or 2); 0 leaves it out.
        gram_teacher: Checkpoint whose encoder is the anchor; None takes the run's own teacher at `gram_start_step`.
        gram_start_step: Step from which the anchor acts. DINOv3 has 1,000,000.
        gram_update_steps: Steps after which the anchor becomes the current teacher again; None keeps it.
        gram_crops_size: Side in pixels of the anchor's global crops, twice `global_crops_size` in DINOv3. Its
            tokens are resized to those of the student. None takes the student's crops.
        augment: Augmentation that cuts views from patches.
        schedules: Schedules of learning rate, weight decay, teacher momentum and teacher temperature.
        teacher_temp_per_epoch: Changes of the teacher temperature at each 1250th step; otherwise at each step.
        class_token_position: Position of the class token where timm's network has none, as in those with registers. It
            is part of the class token, which then learns as the sum of two parameters.
        drop_path_rate: Stochastic depth of the student.
        drop_path_uniform: Equal stochastic depth in all blocks.
        drop_path_subset: Stochastic depth that computes only the samples it keeps.
        layer_scale: Initial layer scale of all blocks; None creates them without, or as `arch` has it.
        norm_last_layer: Prototypes of unit length; otherwise their lengths learn.
        freeze_last_layer_by: How the prototypes are frozen at the start: without a "gradient", or by an "lr" of 0.
        layerwise_decay: Factor on the learning rate from each block to the previous one.
        patch_embed_lr_mult: Factor on the learning rate of the patch embedding.
        arch_kwargs: Further arguments of ``timm.create_model``.
        options: Further arguments of :class:`~fmtrain.methods.DINO`.
    """

    def __init__(
        self,
        *,
        n_prototypes: int = 65536,
        centering: Centering = "centering",
        ibot_weight: float = 1.0,
        ibot_prototypes: int | None = None,
        ibot_bottleneck_dim: int = 256,
        mask_sample_probability: float = 0.5,
        mask_ratio_min_max: tuple[float, float] = (0.1, 0.5),
        masks_per_rank: bool = True,
        regularizer: Literal["koleo", "kde"] = "koleo",
        regularizer_weight: float = 0.1,
        kde_concentration: float = 5.0,
        gram_weight: float = 0.0,
        gram_teacher: Path | None = None,
        gram_start_step: int = 0,
        gram_update_steps: int | None = None,
        gram_crops_size: int | None = None,
        augment: MultiCrop = CROPS,
        schedules: Schedules = SCHEDULES,
        teacher_temp_per_epoch: bool = False,
        class_token_position: bool = True,
        drop_path_rate: float = 0.3,
        drop_path_uniform: bool = True,
        drop_path_subset: bool = True,
        layer_scale: float | None = 1e-5,
        norm_last_layer: bool = False,
        freeze_last_layer_by: Literal["gradient", "lr"] = "lr",
        layerwise_decay: float = 0.9,
        patch_embed_lr_mult: float = 0.2,
        arch_kwargs: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        check_domain("layer_scale", layer_scale, above=0)
        scale = {} if layer_scale is None else {"init_values": layer_scale}
        super().__init__(
            arch_kwargs={**scale, **(arch_kwargs or {})},
            augment=augment,
            schedules=schedules,
            teacher_temp_per_epoch=teacher_temp_per_epoch,
            n_prototypes=n_prototypes,
            centering=centering,
            drop_path_rate=drop_path_rate,
            drop_path_uniform=drop_path_uniform,
            drop_path_subset=drop_path_subset,
            norm_last_layer=norm_last_layer,
            freeze_last_layer_by=freeze_last_layer_by,
            layerwise_decay=layerwise_decay,
            patch_embed_lr_mult=patch_embed_lr_mult,
            **options,
        )
        check_domain("ibot_weight", ibot_weight, minimum=0)
        check_domain("ibot_prototypes", ibot_prototypes, minimum=1)
        check_domain("ibot_bottleneck_dim", ibot_bottleneck_dim, minimum=1)
        check_domain("mask_sample_probability", mask_sample_probability, minimum=0, maximum=1)
        check_range("mask_ratio_min_max", mask_ratio_min_max, minimum=0, maximum=1)
        check_domain("regularizer_weight", regularizer_weight, minimum=0)
        check_domain("kde_concentration", kde_concentration, above=0)
        check_domain("gram_weight", gram_weight, minimum=0)
        check_domain("gram_start_step", gram_start_step, minimum=0)
        check_domain("gram_update_steps", gram_update_steps, minimum=1)
        check_domain("gram_crops_size", gram_crops_size, minimum=1)
        self.gram_weight, self.gram_teacher = gram_weight, gram_teacher
        self.gram_start_step, self.gram_update_steps = gram_start_step, gram_update_steps
        self.gram_crops_size = gram_crops_size
        self.ibot_weight, self.regularizer_weight = ibot_weight, regularizer_weight
        self.mask_sample_probability, self.mask_ratio_min_max = mask_sample_probability, mask_ratio_min_max
        self.masks_per_rank = masks_per_rank
        backbone: Any = self.student.backbone
        self.class_token_is_sum = class_token_position and lacks_class_token_position(backbone)
        if self.class_token_is_sum:
            nn.init.trunc_normal_(backbone.cls_token, std=0.02)  # as positions start
        head, width = self.student.head, int(backbone.num_features)
        self.separate_head = ibot_prototypes is not None
        for branch in (self.student, self.teacher):
            branch.mask_token = nn.Parameter(torch.zeros(1, width))
            if ibot_prototypes is not None:
                changes = {"n_prototypes": ibot_prototypes, "bottleneck_dim": ibot_bottleneck_dim}
                branch.ibot_head = ProjectionHead(width, **{**head.spec, **changes})
        self.teacher.load_state_dict(self.student.state_dict())
        self.teacher.requires_grad_(False).eval()
        self.ibot = ibot_loss(
            centering,
            n_prototypes=ibot_prototypes or n_prototypes,
            student_temp=self.student_temp,
            center_momentum=self.center_momentum,
        )
        self.regularizer: nn.Module = (
            KoLeoLoss() if regularizer == "koleo" else KDELoss(concentration=kde_concentration)
        )

        self.gram = GramLoss()
        if gram_weight:
            anchor: Any = vit(self.arch, ffn_layer=self.ffn_layer, **self.arch_kwargs)
            self.anchor = Branch(anchor, nn.Identity(), self.resampling).requires_grad_(False).eval()
            self.anchor.backbone.load_state_dict(self.teacher.backbone.state_dict())

    def initialize(self) -> None:
        """Load the initial weights, and those of the anchor."""
        if not self.initialized and self.gram_weight and self.gram_teacher is not None:
            network: dict[str, Any] = {"arch": self.arch, "mean": self.mean, "std": self.std}
            for line in initialize_(self.anchor.backbone, self.gram_teacher, **network):
                print_rank_zero(f"gram_teacher: {line}")
        super().initialize()

    def on_train_batch_start(self, batch: Tensor, batch_idx: int) -> None:
        """Set the values of this step, and let the anchor follow the teacher at its steps."""
        super().on_train_batch_start(batch, batch_idx)
        first = batch_idx % self.trainer.accumulate_grad_batches == 0
        if self.gram_weight and first and self._anchor_follows(self.global_step - self.gram_start_step):
            self.anchor.backbone.load_state_dict(self.teacher.backbone.state_dict())

    def _anchor_follows(self, steps: int) -> bool:
        """Whether the anchor becomes the teacher, `steps` after it begins to act."""
        if steps == 0:
            return self.gram_teacher is None
        return self.gram_update_steps is not None and steps > 0 and steps % self.gram_update_steps == 0

    def losses(self, batch: Tensor, views: Crops, batch_idx: int) -> dict[str, Tensor]:
        """Weighted terms of the loss of the patches and their views, by name.

        Raises:
            ValueError: The batch has one patch; the regularizer needs distances between patches.
        """
        if views.global_crops.shape[1] < 2:
            raise ValueError("KoLeo and KDE compare the patches of a rank's batch: data.batch_size must be 2 or more")
        crops = self._normalize(views.global_crops.flatten(0, 1))
        mask = self.masks(crops, batch_idx)
        with torch.no_grad():
            class_tokens, tokens = self.teacher.tokens(crops, None)
            targets, patch_targets = self.teacher.head(class_tokens), self._patch_head(self.teacher)(tokens[mask])
        class_tokens, tokens = self.student.tokens(crops, mask)
        outputs = [self.student.head(class_tokens)]
        if len(views.local_crops):
            outputs.append(self.student(self._normalize(views.local_crops.flatten(0, 1))))
        ibot = in_float32(
            self.ibot,
            patch_targets,
            self._patch_head(self.student)(tokens[mask]),
            mask,
            device=crops.device,
            teacher_temp=self.step_values.teacher_temp,
        )
        spread = [in_float32(self.regularizer, view, device=crops.device) for view in class_tokens.chunk(2)]
        terms = {
            "dino": self.dino_loss(targets, outputs, views=views),
            "ibot": self.ibot_weight * ibot,
            "spread": self.regularizer_weight * torch.stack(spread).sum(),
        }
        if self.gram_weight and self.global_step >= self.gram_start_step:
            anchors = self.anchor_tokens(batch, crops, batch_idx)
            gram = in_float32(self.gram, tokens.flatten(1, 2), anchors.flatten(1, 2), device=crops.device)
            terms["gram"] = self.gram_weight * gram
        return terms

    @torch.no_grad()
    def anchor_tokens(self, batch: Tensor, crops: Tensor, batch_idx: int) -> Tensor:
        """Patch tokens of the anchor (2·B, H, W, D) on the student's grid.

        Args:
            batch: Patches (B, 3, S, S).
            crops: The student's global crops of them, normalized (2·B, 3, G, G).
            batch_idx: Number of the batch, which selects the crops.
        """
        if self.gram_crops_size is None:
            return self.anchor.tokens(crops, None)[1]
        large = self.augment.global_crops(batch, size=self.gram_crops_size, **self.stream(batch_idx))
        tokens = self.anchor.tokens(self._normalize(large.flatten(0, 1)), None)[1]
        # Bicubic without antialiasing, as published.
        return F.interpolate(tokens.movedim(-1, 1), size=self.student.grid(crops), mode="bicubic").movedim(1, -1)

    def masks(self, crops: Tensor, batch_idx: int) -> Tensor:
        """Masks of the student (2·B, H, W), a function of the seed, the batch, and the rank or the sample."""
        rank, world_size = self.global_rank, self.trainer.world_size
        count, total = len(crops), len(crops) * world_size
        shared: dict[str, Any] = {"samples": range(rank, total, world_size), "total": total}
        separate: dict[str, Any] = {"samples": range(count), "total": count, "rank": rank}
        masks = batch_masks(
            **(separate if self.masks_per_rank else shared),
            grid=self.student.grid(crops),
            probability=self.mask_sample_probability,
            ratio=self.mask_ratio_min_max,
            seed=self.augment.seed,
            step=self.batches_before(batch_idx),
        )
        return torch.from_numpy(masks).to(crops.device, non_blocking=True)

    def heads(self) -> list[ProjectionHead]:
        """Heads of the student."""
        # torch types attributes of modules as Tensor | Module.
        return [self.student.head, self.student.ibot_head] if self.separate_head else [self.student.head]  # type: ignore[list-item]

    def _patch_head(self, branch: nn.Module) -> Any:
        return branch.ibot_head if self.separate_head else branch.head

    def summed_parameters(self) -> Sequence[nn.Parameter]:
        """Class token with its position, where timm's network has none for it."""
        # torch types attributes of modules as Tensor | Module.
        return [self.student.backbone.cls_token] if self.class_token_is_sum else []  # type: ignore[list-item]

    def grad_clip_groups(self) -> Iterable[Iterable[nn.Parameter]]:
        """Groups of parameters that are clipped by one norm: backbone with mask token, and each head, as published."""
        backbone = [*self.student.backbone.parameters(), self.student.mask_token, *self.summed_parameters()]
        # torch types attributes of modules as Tensor | Module.
        return [backbone, *(head.parameters() for head in self.heads())]  # type: ignore[list-item]
