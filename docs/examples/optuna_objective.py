"""An Optuna objective: one SimCLR run per trial, in this process, pruned by RankMe at each evaluation.

python docs/examples/optuna_objective.py runs/optuna
"""

from __future__ import annotations

import sys
from pathlib import Path

import optuna
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from repmetrics import RepresentationMonitor
from repmetrics.decisions.run_selection import tied_with_best
from repmetrics.monitoring.record import Record


class SimCLR(LightningModule):
    def __init__(self, lr: float) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Flatten(), nn.Linear(192, 64), nn.ReLU(), nn.Linear(64, 32))
        self.projector = nn.Linear(32, 16)
        self.lr = lr

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        (images,) = batch
        views = torch.cat([images + 0.3 * torch.randn_like(images) for _ in range(2)])
        z = F.normalize(self.projector(self.backbone(views)), dim=1)
        logits = (z @ z.T / 0.5).fill_diagonal_(-torch.inf)
        return F.cross_entropy(logits, torch.arange(len(z), device=z.device).roll(len(images)))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def main(root: Path, trials: int = 6) -> optuna.Study:
    images = torch.randn(384, 3, 8, 8, generator=torch.Generator().manual_seed(0))  # replace by your data
    samples = [{"image": image, "group": f"slide {i // 8}"} for i, image in enumerate(images[256:])]
    held_out = DataLoader(samples, 64)  # type: ignore[arg-type]  # a list is a dataset

    def objective(trial: optuna.Trial) -> float:
        def report(record: Record) -> None:
            rankme = record.measurements["rankme"]
            trial.set_user_attr("error", rankme.standard_error)
            if record.step:  # before the first step no setting has had an effect
                trial.report(rankme.value, record.step)
                if trial.should_prune():
                    raise optuna.TrialPruned

        seed_everything(0, verbose=False)
        monitor = RepresentationMonitor(held_out, encoder="backbone", every_n_steps=8, on_measure=report)
        trainer = Trainer(
            default_root_dir=root / f"{trial.number}",
            max_epochs=6,
            callbacks=[monitor],
            log_every_n_steps=1,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        module = SimCLR(lr=trial.suggest_float("lr", 1e-3, 1e2, log=True))
        trainer.fit(module, DataLoader(TensorDataset(images[:256]), 64, shuffle=True))
        return monitor.history[-1].measurements["rankme"].value

    study = optuna.create_study(
        direction="maximize",
        sampler=optuna.samplers.TPESampler(seed=0),
        pruner=optuna.pruners.MedianPruner(n_startup_trials=2),
    )
    study.optimize(objective, n_trials=trials)
    done = [trial for trial in study.trials if trial.state == optuna.trial.TrialState.COMPLETE]
    tied = tied_with_best(
        [float(t.value or 0) for t in done], [t.user_attrs["error"] for t in done], direction="higher"
    )
    print("not worse than the best beyond noise:", *(f"lr {done[k].params['lr']:.2g}" for k in tied))
    return study


if __name__ == "__main__":
    main(Path(sys.argv[1]))
