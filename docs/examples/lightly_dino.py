"""DINO from lightly's parts; the monitor measures the EMA teacher's backbone every two steps.

python docs/examples/lightly_dino.py runs/dino
"""

from __future__ import annotations

import sys
from pathlib import Path

import timm
import torch
from lightly.loss import DINOLoss
from lightly.models.modules import DINOProjectionHead
from lightly.models.utils import update_momentum
from lightly.transforms import DINOTransform
from lightly.utils.scheduler import cosine_schedule
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.datasets import FakeData
from torchvision.transforms import v2

from repmetrics import RepresentationEarlyStopping, RepresentationMonitor


class DINO(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        # Built twice, not copied: the weight norm in lightly's head does not survive deepcopy.
        self.student_backbone, self.teacher_backbone = (
            timm.create_model("vit_tiny_patch16_224", num_classes=0, depth=2, img_size=32, dynamic_img_size=True)
            for _ in range(2)
        )
        self.student_head, self.teacher_head = (
            DINOProjectionHead(192, 128, 64, 256, freeze_last_layer=freeze) for freeze in (1, -1)
        )
        self.teacher_backbone.load_state_dict(self.student_backbone.state_dict())
        self.teacher_head.load_state_dict(self.student_head.state_dict())
        for teacher in (self.teacher_backbone, self.teacher_head):
            teacher.requires_grad_(False).eval()
        self.criterion = DINOLoss(output_dim=256, warmup_teacher_temp_epochs=1)

    def training_step(self, batch: list[list[Tensor]], batch_idx: int) -> Tensor:
        views, _ = batch
        momentum = cosine_schedule(self.current_epoch, 10, 0.996, 1)
        update_momentum(self.student_backbone, self.teacher_backbone, m=momentum)
        update_momentum(self.student_head, self.teacher_head, m=momentum)
        with torch.no_grad():
            targets = [self.teacher_head(self.teacher_backbone(view)) for view in views[:2]]
        outputs = [self.student_head(self.student_backbone(view)) for view in views]
        loss: Tensor = self.criterion(targets, outputs, epoch=self.current_epoch)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=5e-4)


def main(root: Path, epochs: int = 1) -> RepresentationMonitor:
    to_tensor = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
    views = DINOTransform(global_crop_size=32, local_crop_size=16, n_local_views=2)
    train = FakeData(96, (3, 48, 48), transform=views)  # replace by your data
    held_out = FakeData(128, (3, 32, 32), transform=to_tensor, random_offset=1000)
    monitor = RepresentationMonitor(held_out, encoder="teacher_backbone", every_n_steps=2)
    trainer = Trainer(
        default_root_dir=root,
        max_epochs=epochs,
        accelerator="auto",
        log_every_n_steps=1,
        callbacks=[monitor, RepresentationEarlyStopping("rankme_centered")],
    )
    trainer.fit(DINO(), DataLoader(train, 16, shuffle=True, drop_last=True))
    return monitor


if __name__ == "__main__":
    main(Path(sys.argv[1]))
