"""Eva's head, metrics and trainer on given embeddings; compare.py calls it in eva's environment."""

from __future__ import annotations

import json
import sys
import tempfile

import torch
from eva.core.data import dataloaders, datamodules
from eva.core.data.datasets import base
from eva.core.metrics.defaults import BinaryClassificationMetrics, MulticlassClassificationMetrics
from eva.core.metrics.structs import MetricsSchema
from eva.core.models.modules import HeadModule
from eva.core.trainers import Trainer
from eva.core.trainers.functional import run_evaluation
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import nn


class Rows(base.MapDataset):
    """Embeddings in memory, with the items of eva's data set of embedding files."""

    def __init__(self, features: torch.Tensor, targets: torch.Tensor) -> None:
        super().__init__()
        self.features, self.targets = features, targets

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.features[index], self.targets[index]


def main() -> None:
    """Read the splits and the protocol, train one head per seed, print the balanced accuracies as JSON."""
    torch.set_num_threads(1)
    job = torch.load(sys.argv[1], weights_only=True)
    binary = job["classes"] == 2
    label = torch.float32 if binary else torch.int64
    train, val = (Rows(*(job[split][0].float(), job[split][1].to(label))) for split in ("train", "val"))
    batch = job["batch_size"]
    data = datamodules.DataModule(
        datasets=datamodules.DatasetsSchema(train=train, val=val),
        dataloaders=datamodules.DataloadersSchema(
            train=dataloaders.DataLoader(batch_size=batch, shuffle=True, num_workers=0, persistent_workers=False,
                                         prefetch_factor=None),
            val=dataloaders.DataLoader(batch_size=4096, num_workers=0, persistent_workers=False, prefetch_factor=None),
        ),
    )  # fmt: skip
    metric = "BinaryBalancedAccuracy" if binary else "MulticlassAccuracy"
    schedule = {}  # "v0.4": eva's configurations name none, so its module uses the default
    if job["protocol"] == "paper":
        schedule["lr_scheduler"] = lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=job["max_steps"])
    accuracies = []
    for seed in range(job["runs"]):
        torch.manual_seed(seed)
        head = HeadModule(
            head=nn.Linear(train.features.shape[1], 1 if binary else job["classes"]),
            criterion=nn.BCEWithLogitsLoss() if binary else nn.CrossEntropyLoss(),
            optimizer=lambda p: (
                torch.optim.AdamW(p, lr=job["lr"])
                if job["protocol"] == "v0.4"
                else torch.optim.SGD(p, lr=job["lr"], momentum=0.9)
            ),
            metrics=MetricsSchema(
                common=BinaryClassificationMetrics() if binary else MulticlassClassificationMetrics(job["classes"])
            ),
            **schedule,
        )
        with tempfile.TemporaryDirectory() as folder:
            trainer = Trainer(
                max_steps=job["max_steps"],
                default_root_dir=folder,
                accelerator="cpu",
                logger=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                callbacks=[
                    ModelCheckpoint(monitor=f"val/{metric}", mode="max", filename="best", save_top_k=1),
                    EarlyStopping(monitor=f"val/{metric}", mode="max", min_delta=0.0, patience=job["patience"]),
                ],
            )
            (scores,), _ = run_evaluation(trainer, head, data, stages=["fit", "validate"], verbose=False)
        accuracies.append(scores[f"val/{metric}"])
        print(f"seed {seed}: {accuracies[-1]:.4f}", file=sys.stderr)
    print(json.dumps(accuracies))


if __name__ == "__main__":
    main()
