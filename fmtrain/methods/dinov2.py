"""DINOv2 (arXiv 2304.07193): DINO, with masked tokens to predict and representations kept apart."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from lightly.loss import IBOTPatchLoss, KoLeoLoss
from torch import Tensor, nn

from fmtrain.methods.dino import DINO
from fmtrain.methods.heads import ProjectionHead
from fmtrain.methods.losses import KDELoss, SinkhornPatchLoss, TokenCenter, in_float32
from fmtrain.methods.masking import batch_masks
from fmtrain.methods.multicrop import Crops, MultiCrop
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

    The defaults are those of the published recipe for 100 epochs, where they differ from DINO's too.

    Args:
        ibot_weight: Of iBOT's loss.
        ibot_prototypes: Outputs of iBOT's own head; None: it shares DINO's, as the default recipe does.
        ibot_bottleneck_dim: Of iBOT's own head.
        mask_sample_probability: Share of the global crops that are masked for the student.
        mask_ratio_min_max: Range of the share of their tokens.
        spread: What keeps representations apart: "koleo" as published, or "kde" as in pathology models.
        regularizer_weight: Its weight, for each of the global crops.
        kde_concentration: Of the kernel.
        augment: How patches become views.
        schedules: Learning rate, weight decay, momentum, teacher temperature over the run.
        drop_path_rate: Stochastic depth of the student.
        drop_path_uniform: The same in all blocks.
        layerwise_decay: Factor on the learning rate from each block to the one before.
        patch_embed_lr_mult: Factor on the patch embedding's learning rate.
        options: Of :class:`~fmtrain.methods.DINO`.
    """

    def __init__(
        self,
        *,
        ibot_weight: float = 1.0,
        ibot_prototypes: int | None = None,
        ibot_bottleneck_dim: int = 256,
        mask_sample_probability: float = 0.5,
        mask_ratio_min_max: tuple[float, float] = (0.1, 0.5),
        regularizer: Literal["koleo", "kde"] = "koleo",
        regularizer_weight: float = 0.1,
        kde_concentration: float = 5.0,
        augment: MultiCrop = CROPS,
        schedules: Schedules = SCHEDULES,
        drop_path_rate: float = 0.3,
        drop_path_uniform: bool = True,
        layerwise_decay: float = 0.9,
        patch_embed_lr_mult: float = 0.2,
        **options: Any,
    ) -> None:
        super().__init__(
            augment=augment,
            schedules=schedules,
            drop_path_rate=drop_path_rate,
            drop_path_uniform=drop_path_uniform,
            layerwise_decay=layerwise_decay,
            patch_embed_lr_mult=patch_embed_lr_mult,
            **options,
        )
        self.ibot_weight, self.regularizer_weight = ibot_weight, regularizer_weight
        self.mask_sample_probability, self.mask_ratio_min_max = mask_sample_probability, mask_ratio_min_max
        backbone: Any = self.student.backbone
        head, width = self.student.head, int(backbone.num_features)
        self.separate = ibot_prototypes is not None
        for network in (self.student, self.teacher):
            network.mask_token = nn.Parameter(torch.zeros(1, width))
            if ibot_prototypes is not None:
                own = {"n_prototypes": ibot_prototypes, "bottleneck_dim": ibot_bottleneck_dim}
                network.ibot_head = ProjectionHead(width, **{**head.spec, **own})
        token: Any = self.student.mask_token
        nn.init.normal_(token, std=0.02)
        self.teacher.load_state_dict(self.student.state_dict())
        self.teacher.requires_grad_(False).eval()
        n_prototypes = ibot_prototypes or head.spec["n_prototypes"]
        self.ibot: nn.Module
        if self.centering == "centering":
            self.ibot = IBOTPatchLoss(n_prototypes, student_temp=self.student_temp)
            self.ibot.center = TokenCenter(n_prototypes, momentum=self.center_momentum)
        else:
            self.ibot = SinkhornPatchLoss(student_temp=self.student_temp)
        self.regularizer: nn.Module = (
            KoLeoLoss() if regularizer == "koleo" else KDELoss(concentration=kde_concentration)
        )

    def losses(self, views: Crops, batch_idx: int) -> dict[str, Tensor]:
        """The terms of the loss, weighted, by name.

        Raises:
            ValueError: A batch of one patch: there is nothing to keep it apart from.
        """
        if views.global_crops.shape[1] < 2:
            raise ValueError(
                "KoLeo and KDE keep the patches of a rank's batch apart: data.batch_size must be 2 or more"
            )
        crops = self._normalised(views.global_crops.flatten(0, 1))
        mask = self.masks(crops, batch_idx)
        with torch.no_grad():
            class_tokens, tokens = self.tokens(self.teacher, crops, None)
            targets, patch_targets = self.teacher.head(class_tokens), self._patch_head(self.teacher)(tokens[mask])
        class_tokens, tokens = self.tokens(self.student, crops, mask)
        outputs = [self.student.head(class_tokens)]
        if len(views.local_crops):
            outputs.append(self.student(self._normalised(views.local_crops.flatten(0, 1))))
        ibot = in_float32(
            self.ibot,
            patch_targets,
            self._patch_head(self.student)(tokens[mask]),
            mask,
            device=crops.device,
            teacher_temp=self.step_values.teacher_temp,
        )
        spread = [in_float32(self.regularizer, view, device=crops.device) for view in class_tokens.chunk(2)]
        return {
            "dino": self.dino_loss(targets, outputs, views=views),
            "ibot": self.ibot_weight * ibot,
            "spread": self.regularizer_weight * torch.stack(spread).sum(),
        }

    def tokens(self, network: nn.Module, images: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Class tokens (N, D) and patch tokens (N, H, W, D) after the last norm; where masked, the mask token goes in.

        Args:
            network: Student or teacher.
            images: Normalised, (N, 3, …).
            mask: (N, H, W), or None.
        """
        backbone: Any = network.backbone
        token: Any = network.mask_token

        def hide(module: nn.Module, inputs: Any, embedded: Tensor) -> Tensor:
            assert mask is not None
            return torch.where(mask.reshape(*embedded.shape[:-1], 1), token.to(embedded.dtype), embedded)

        handle = None if mask is None else backbone.patch_embed.register_forward_hook(hide)
        try:
            features = backbone.forward_features(images)
        finally:
            if handle is not None:
                handle.remove()
        grid = self.grid(images)
        return features[:, 0], features[:, backbone.num_prefix_tokens :].unflatten(1, grid)

    def grid(self, images: Tensor) -> tuple[int, int]:
        """Height and width of images in tokens."""
        backbone: Any = self.student.backbone
        high, wide = backbone.patch_embed.patch_size
        return images.shape[-2] // high, images.shape[-1] // wide

    def masks(self, crops: Tensor, batch_idx: int) -> Tensor:
        """The student's masks (2·B, H, W), a function of the seed, the batch and the sample."""
        world, own = self.trainer.world_size, len(crops)
        masks = batch_masks(
            range(self.global_rank, own * world, world),
            total=own * world,
            grid=self.grid(crops),
            probability=self.mask_sample_probability,
            ratio=self.mask_ratio_min_max,
            seed=self.augment.seed,
            step=self.batches_before(batch_idx),
        )
        return torch.from_numpy(masks).to(crops.device, non_blocking=True)

    def heads(self) -> list[ProjectionHead]:
        """The student's heads."""
        return [self.student.head, self.student.ibot_head] if self.separate else [self.student.head]  # type: ignore[list-item]

    def _patch_head(self, network: nn.Module) -> Any:
        return network.ibot_head if self.separate else network.head

    def grad_clip_groups(self) -> Iterable[Iterable[nn.Parameter]]:
        """Backbone (with the mask token) and heads, each as a whole, as published."""
        backbone = [*self.student.backbone.parameters(), self.student.mask_token]
        return [backbone, *(head.parameters() for head in self.heads())]  # type: ignore[list-item]
