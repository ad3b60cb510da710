"""Ray Tune over runs that report RankMe at each evaluation. Needs `pip install 'ray[tune]'`.

python docs/examples/ray_tune.py runs/ray
repmetrics select runs/ray
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer, seed_everything
from ray import tune
from ray.tune.schedulers import ASHAScheduler
from sweep_script import SimCLR
from torch.utils.data import DataLoader, TensorDataset

from repmetrics import RepresentationMonitor
from repmetrics.monitoring.record import Record


def objective(config: dict[str, Any]) -> None:
    def report(record: Record) -> None:
        if record.step:  # before the first step no setting has had an effect
            tune.report({"rankme": record.measurements["rankme"].value, "step": record.step})

    seed_everything(0, verbose=False)
    images = torch.randn(384, 3, 8, 8, generator=torch.Generator().manual_seed(0))  # replace by your data
    monitor = RepresentationMonitor(
        DataLoader(images[256:], 64), encoder="backbone", every_n_steps=8, on_measure=report
    )  # type: ignore[arg-type]
    out = tune.get_context().get_trial_dir()  # holds params.json, which repmetrics select reads
    trainer = Trainer(default_root_dir=out, logger=False, callbacks=[monitor], max_epochs=4)
    trainer.fit(SimCLR(config["lr"]), DataLoader(TensorDataset(images[:256]), 64, shuffle=True))


def main(root: Path, samples: int = 4) -> Any:
    scheduler = ASHAScheduler(time_attr="step", max_t=16, grace_period=8, reduction_factor=2)
    tuner = tune.Tuner(
        tune.with_resources(objective, {"cpu": 1}),
        param_space={"lr": tune.loguniform(1e-3, 1.0)},
        tune_config=tune.TuneConfig(metric="rankme", mode="max", num_samples=samples, scheduler=scheduler),
        run_config=tune.RunConfig(name="rankme", storage_path=str(root.resolve())),
    )
    return tuner.fit()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
