"""Five self-supervised methods as plain LightningModules, with lightly's losses and heads, on small networks.

`encoder` is the part of each module that is measured: the backbone, or the teacher's backbone for DINO and DINOv2.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import timm
import torch
from lightly.loss import DINOLoss, IBOTPatchLoss, KoLeoLoss, NegativeCosineSimilarity, NTXentLoss, VICRegLoss
from lightly.models.modules import MaskedVisionTransformerTIMM
from lightly.models.modules.heads import (
    BYOLPredictionHead,
    BYOLProjectionHead,
    DINOProjectionHead,
    SimCLRProjectionHead,
    VICRegProjectionHead,
)
from lightly.models.utils import update_momentum
from lightning.pytorch import LightningModule
from random_views import ViewSettings, random_views
from torch import Tensor, nn
from torch.nn import functional as F

SIZE_PX, LOCAL_PX = 32, 16
WIDTH = 128
N_PROTOTYPES = 512
MASK_RATIO = 0.4

Settings = Mapping[str, Any]


class Block(nn.Module):
    """Residual block of two 3 × 3 convolutions."""

    def __init__(self, width: int, out: int, stride: int) -> None:
        super().__init__()
        self.first, self.first_norm = nn.Conv2d(width, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out)
        self.second, self.second_norm = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)
        self.skip = nn.Conv2d(width, out, 1, stride, bias=False) if (width, stride) != (out, 1) else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        inner = F.relu(self.first_norm(self.first(x)), inplace=True)
        return F.relu(self.second_norm(self.second(inner)) + self.skip(x), inplace=True)


class ResNet(nn.Module):
    """Small residual network: images (B, 3, H, W) in 0 … 1 → features (B, 128); 0.3 M parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU(inplace=True))
        self.blocks = nn.Sequential(Block(32, 32, 1), Block(32, 64, 2), Block(64, WIDTH, 2))

    def tokens(self, images: Tensor) -> Tensor:
        """Last feature map as tokens (B, 16, 128) at 32 px."""
        return self.blocks(self.stem((images - 0.5) * 4)).flatten(2).transpose(1, 2)

    def forward(self, images: Tensor) -> Tensor:
        return self.tokens(images).mean(1)


class ViT(nn.Module):
    """Small vision transformer, patches of 4 px: images (B, 3, H, W) in 0 … 1 → class token (B, 128)."""

    def __init__(self) -> None:
        super().__init__()
        vit = timm.models.VisionTransformer(
            img_size=SIZE_PX, patch_size=4, embed_dim=WIDTH, depth=3, num_heads=4, num_classes=0, dynamic_img_size=True
        )
        self.vit = MaskedVisionTransformerTIMM(vit, antialias=False)

    def encode(self, images: Tensor, mask: Tensor | None = None) -> Tensor:
        """Class token and patch tokens (B, 1 + T, 128); patches with a True in the mask (B, 1 + T) are hidden."""
        return self.vit.encode((images - 0.5) * 4, mask=mask)

    def tokens(self, images: Tensor) -> Tensor:
        """Patch tokens (B, T, 128)."""
        return self.encode(images)[:, 1:]

    def forward(self, images: Tensor) -> Tensor:
        return self.encode(images)[:, 0]


class Batches:
    """Random batches of rows, in one epoch of a given length."""

    def __init__(self, rows: Tensor, *, batch_size: int, steps: int) -> None:
        self.rows, self.batch_size, self.steps = rows, batch_size, steps

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[Tensor]:
        for _ in range(self.steps):
            yield self.rows[torch.randint(len(self.rows), (self.batch_size,), device=self.rows.device)]


class Method(LightningModule):
    """What the methods share: data on the device, views, AdamW with warm-up and cosine decay.

    Args:
        settings: Settings of the run, see ``settings.py``.
        images: All images of the domain (N, 3, 32, 32), uint8, on the device of the training.
        rows: Rows to train on.
        epochs: Number of steps of each epoch; the monitor measures after each.
        batch_size: Number of images of a step.
        quarter_turns: Whether views are turned, for images without orientation.
    """

    encoder = "backbone"
    network: type[nn.Module] = ResNet

    def __init__(
        self,
        settings: Settings,
        *,
        images: Tensor,
        rows: Tensor,
        epochs: Sequence[int],
        batch_size: int,
        quarter_turns: bool,
    ) -> None:
        super().__init__()
        self.settings, self.rows, self.epochs, self.batch_size = settings, rows, epochs, batch_size
        self.pixels = [images]  # in a list: not part of the module
        self.views = ViewSettings(settings["min_area"], settings["jitter"], settings["grayscale"], quarter_turns)
        self.backbone = self.network()

    def global_views(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        """Two views of each image."""
        images = self.pixels[0][batch]
        both = random_views(images.repeat(2, 1, 1, 1), self.views, size=SIZE_PX)
        return both[: len(images)], both[len(images) :]

    def train_dataloader(self) -> Batches:
        """Batches of the current epoch; the trainer asks for them before each."""
        return Batches(self.rows, batch_size=self.batch_size, steps=self.epochs[self.current_epoch])

    def configure_optimizers(self) -> dict[str, Any]:
        parameters = [p for p in self.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(
            parameters, lr=self.settings["lr"], weight_decay=self.settings["weight_decay"], fused=True
        )
        total = sum(self.epochs)
        warmup = max(1, total // 20)

        def factor(step: int) -> float:
            progress = min(1.0, max(0, step - warmup) / max(1, total - warmup))
            return min(1.0, (step + 1) / warmup) * (1 + math.cos(math.pi * progress)) / 2

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def momentum(self) -> float:
        """Momentum of the teacher, from the setting to 1 by a cosine."""
        progress = self.global_step / max(1, sum(self.epochs))
        return 1 - (1 - self.settings["momentum"]) * (1 + math.cos(math.pi * progress)) / 2


class SimCLR(Method):
    """SimCLR (arXiv 2002.05709)."""

    def __init__(self, settings: Settings, **kwargs: Any) -> None:
        super().__init__(settings, **kwargs)
        self.head = SimCLRProjectionHead(WIDTH, WIDTH, 64)
        self.criterion = NTXentLoss(temperature=settings["temperature"])

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        first, second = self.head(self.backbone(torch.cat(self.global_views(batch)))).chunk(2)
        return self.criterion(first, second)


class VICReg(Method):
    """VICReg (arXiv 2105.04906)."""

    def __init__(self, settings: Settings, **kwargs: Any) -> None:
        super().__init__(settings, **kwargs)
        self.head = VICRegProjectionHead(WIDTH, 256, 256, num_layers=2)
        self.criterion = VICRegLoss(mu_param=settings["variance_weight"], nu_param=settings["covariance_weight"])

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        first, second = self.head(self.backbone(torch.cat(self.global_views(batch)))).chunk(2)
        return self.criterion(first, second)


class BYOL(Method):
    """BYOL (arXiv 2006.07733)."""

    def __init__(self, settings: Settings, **kwargs: Any) -> None:
        super().__init__(settings, **kwargs)
        self.head, self.predictor = BYOLProjectionHead(WIDTH, 256, 64), BYOLPredictionHead(64, 256, 64)
        self.teacher = copy.deepcopy(nn.Sequential(self.backbone, self.head)).requires_grad_(False)
        self.criterion = NegativeCosineSimilarity()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        views = torch.cat(self.global_views(batch))
        student = self.head(self.backbone(views))
        predicted = self.predictor(student) if self.settings["predictor"] else student
        with torch.no_grad():
            first, second = self.teacher(views).chunk(2)
        loss = self.criterion(predicted, torch.cat([second, first]))
        update_momentum(self.backbone, self.teacher[0], m=self.momentum())
        update_momentum(self.head, self.teacher[1], m=self.momentum())
        return loss


class DINO(Method):
    """DINO (arXiv 2104.14294) with two global and two local views."""

    encoder = "teacher_backbone"

    def __init__(self, settings: Settings, **kwargs: Any) -> None:
        super().__init__(settings, **kwargs)
        # Built twice: the weight norm in the heads cannot be copied.
        sizes = {"input_dim": WIDTH, "hidden_dim": 256, "bottleneck_dim": 64, "output_dim": N_PROTOTYPES}
        self.head, self.teacher_head = DINOProjectionHead(**sizes), DINOProjectionHead(**sizes).requires_grad_(False)
        self.teacher_head.load_state_dict(self.head.state_dict())
        self.teacher_backbone = copy.deepcopy(self.backbone).requires_grad_(False)
        self.criterion = DINOLoss(
            N_PROTOTYPES, teacher_temp=settings["teacher_temp"], center_momentum=settings["center_momentum"]
        )

    def local_views(self, batch: Tensor) -> Tensor:
        """Two small views of each image, of a smaller area."""
        area = (self.settings["min_area"] / 2, max(0.3, self.settings["min_area"]))
        return random_views(self.pixels[0][batch].repeat(2, 1, 1, 1), self.views, size=LOCAL_PX, area=area)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        views = torch.cat(self.global_views(batch))
        with torch.no_grad():
            targets = self.teacher_head(self.teacher_backbone(views)).chunk(2)
        local = self.backbone(self.local_views(batch))
        outputs = self.head(torch.cat([self.backbone(views), local])).chunk(4)
        loss = self.criterion(list(targets), list(outputs), teacher_temp=self.settings["teacher_temp"])
        self.update_teacher()
        return loss

    def update_teacher(self) -> None:
        """Move the teacher towards the student."""
        update_momentum(self.backbone, self.teacher_backbone, m=self.momentum())
        update_momentum(self.head, self.teacher_head, m=self.momentum())


class DINOv2(DINO):
    """DINOv2 (arXiv 2304.07193): DINO with iBOT's loss on hidden patches and KoLeo's regularizer, on a ViT."""

    network = ViT

    def __init__(self, settings: Settings, **kwargs: Any) -> None:
        super().__init__(settings, **kwargs)
        self.patch_criterion = IBOTPatchLoss(
            N_PROTOTYPES, teacher_temp=settings["teacher_temp"], center_momentum=settings["center_momentum"]
        )
        self.koleo = KoLeoLoss()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        views = torch.cat(self.global_views(batch))
        mask = self.random_mask(len(views))
        with torch.no_grad():
            taught = self.teacher_backbone.encode(views)
            targets = self.teacher_head(taught[:, 0]).chunk(2)
            patch_targets = self.teacher_head(taught[:, 1:][mask])
        student = self.backbone.encode(views, mask=F.pad(mask, (1, 0)))
        local = self.backbone(self.local_views(batch))
        outputs = self.head(torch.cat([student[:, 0], local])).chunk(4)
        loss = self.criterion(list(targets), list(outputs), teacher_temp=self.settings["teacher_temp"])
        if self.settings["patch_weight"]:
            patches = self.head(student[:, 1:][mask])
            side = math.isqrt(mask.shape[1])
            patch_loss = self.patch_criterion(patch_targets, patches, mask.view(-1, side, side))
            loss = loss + self.settings["patch_weight"] * patch_loss
        if self.settings["koleo_weight"]:
            loss = loss + self.settings["koleo_weight"] * sum(map(self.koleo, student[:, 0].chunk(2))) / 2
        self.update_teacher()
        return loss

    def random_mask(self, count: int) -> Tensor:
        """Hidden patches (count, T): the same number in each image."""
        patches = (SIZE_PX // 4) ** 2
        order = torch.rand(count, patches, device=self.device).argsort(1)
        return order < round(MASK_RATIO * patches)


METHODS: Mapping[str, type[Method]] = {m.__name__: m for m in (SimCLR, VICReg, BYOL, DINO, DINOv2)}
