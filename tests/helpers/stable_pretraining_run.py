"""Run by test_examples.py in an environment with stable-pretraining: equal weights with and without a monitor?"""

from __future__ import annotations

import runpy
import sys
import warnings
from pathlib import Path
from typing import Any

import stable_pretraining as spt
import torch
from lightning.pytorch import Trainer, seed_everything
from torch import nn
from torch.utils.data import DataLoader

from repmetrics import RepresentationMonitor

example = runpy.run_path(str(Path(__file__).parents[2] / "docs" / "examples" / "stable_pretraining_simclr.py"))


def trained(*callbacks: Any) -> dict[str, torch.Tensor]:
    """Weights after six epochs of stable-pretraining's Module."""
    seed_everything(0)
    module = spt.Module(
        forward=example["forward"],
        backbone=nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.BatchNorm1d(16), nn.Dropout(0.2)),
        projector=nn.Linear(16, 8),
        simclr_loss=spt.losses.NTXEntLoss(temperature=0.5),
        optim={"optimizer": {"type": "AdamW", "lr": 1e-3}, "scheduler": {"type": "ConstantLR"}},
    )
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    trainer = Trainer(max_epochs=6, callbacks=list(callbacks), **options)
    trainer.fit(module, DataLoader(example["Images"](64, seed=0), 16, shuffle=True))
    return {key: value.clone() for key, value in module.state_dict().items()}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    monitor = RepresentationMonitor(example["Images"](40, seed=1), encoder="backbone", every_n_steps=3)
    watched, alone = trained(monitor), trained()
    assert watched.keys() == alone.keys()
    assert len(monitor.history) > 3
    different = [key for key in alone if not torch.equal(alone[key], watched[key])]
    sys.exit(f"different weights: {different}" if different else 0)
