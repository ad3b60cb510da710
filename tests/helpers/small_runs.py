"""A small self-supervised run for the tests of the monitor, which takes seconds on a CPU."""

from __future__ import annotations

import importlib
import random
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

torch.set_num_threads(1)  # tensors are tiny: more threads would only wait for each other

# Warnings of Lightning and torch on a CPU, and of short runs; every other warning is an error.
LIGHTNING_NOISE = [
    "ignore:.*does not have many workers.*",
    "ignore:.*LeafSpec.*:FutureWarning",
    "ignore:.*treespec, LeafSpec.*",
    "ignore:.*number of training batches.*",
    "ignore:.*Checkpoint directory .* exists and is not empty.*",
    "ignore:.*You defined a `validation_step` but have no.*",
    "ignore:.*in eval mode at the start of training.*",
    "ignore:.*sampler has shuffling enabled.*",
    "ignore:The dirpath has changed.*",
    "ignore:.*litlogger.*",
    "ignore:.* in a run of [0-9]+ steps:",  # tests are shorter than the schedules
]


class Augmented(Dataset[tuple[Tensor, Tensor]]):
    """Images with noise from all three global generators, as real augmentation code draws it."""

    def __init__(self, size: int = 96) -> None:
        generator = torch.Generator().manual_seed(1)
        self.images = torch.randn(size, 3, 4, 4, generator=generator)
        self.labels = (self.images[:, 0].mean((1, 2)) > 0).long()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        noise = torch.randn(3, 4, 4) + float(np.random.standard_normal()) + random.random()  # noqa: NPY002
        return self.images[index] + 0.1 * noise, self.labels[index]


class HeldOutImages(Dataset[dict[str, Any]]):
    """Held-out images with labels and groups of eight."""

    def __init__(self, size: int = 96, *, labels: bool = True, groups: bool = True) -> None:
        generator = torch.Generator().manual_seed(2)
        self.images = torch.randn(size, 3, 4, 4, generator=generator)
        self.labels, self.groups = labels, groups

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item: dict[str, Any] = {"image": self.images[index]}
        if self.labels:
            item["label"] = int(self.images[index, 0].mean() > 0)
        if self.groups:
            item["group"] = f"slide {index // 8}"
        return item


def make_backbone() -> nn.Sequential:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(48, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 8)
    )


def two_views(module: Any, images: Tensor) -> Tensor:
    """SimCLR's loss on two noisy views."""
    views = [module.projector(module.backbone(images + 0.1 * torch.randn_like(images))) for _ in range(2)]
    z = nn.functional.normalize(torch.cat(views), dim=1)
    logits = (z @ z.T / 0.5).masked_fill(torch.eye(len(z), dtype=torch.bool), -torch.inf)
    target = torch.arange(len(z)).roll(len(images))
    return nn.functional.cross_entropy(logits, target)


def simclr(namespace: str = "lightning.pytorch", *, collapse: bool = False, lr: float = 0.05) -> Any:
    """A SimCLR module of either namespace with a frozen teacher in evaluation mode; ``collapse`` breaks its loss."""
    lightning = importlib.import_module(namespace)

    class SimCLR(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.backbone = make_backbone()
            self.projector = nn.Linear(8, 6)
            self.teacher = make_backbone().eval()

        def forward(self, images: Tensor) -> Tensor:
            features: Tensor = self.backbone(images)
            return features

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            images, _ = batch
            if collapse:  # the loss pulls every feature to the first
                features = self.backbone(images)
                return (features - features[:, :1]).square().mean()
            loss = two_views(self, images) + 0.01 * self.teacher(images).square().mean()
            self.log("train/loss", loss)
            return loss

        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            self.log("val/loss", two_views(self, batch[0]), add_dataloader_idx=True)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=lr, momentum=0.9)

    torch.manual_seed(0)
    return SimCLR()


def loader(size: int = 96, *, workers: int = 0, shuffle: bool = True, batch_size: int = 16) -> DataLoader[Any]:
    return DataLoader(Augmented(size), batch_size=batch_size, shuffle=shuffle, num_workers=workers, drop_last=True)


def trainer(root: Any, namespace: str = "lightning.pytorch", **options: Any) -> Any:
    lightning = importlib.import_module(namespace)
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "log_every_n_steps": 1}
    defaults = {"accelerator": "cpu", "devices": 1, "max_epochs": 2, "default_root_dir": root}
    return lightning.Trainer(**quiet | defaults | options)


def fit(
    root: Any,
    module: Any,
    *callbacks: Any,
    val: Any = "default",
    train: Any = None,
    ckpt_path: Any = None,
    **options: Any,
) -> Any:
    """Fit with every generator seeded, and return the trainer."""
    pl.seed_everything(7, verbose=False)
    val = loader(32, shuffle=False) if val == "default" else val
    plain = getattr(module, "_orig_mod", module)
    base = next(cls for cls in type(plain).__mro__ if cls.__name__ == "LightningModule")
    namespace = base.__module__.partition(".core")[0]
    run = trainer(root, namespace, callbacks=list(callbacks), **options)
    run.fit(module, train or loader(), val, ckpt_path=ckpt_path)
    return run
