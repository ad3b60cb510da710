"""One evaluation of a run: all label-free signals, and the probes of the domain's labels, as two separate rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from domains import Domain
from lightning.pytorch import Callback, LightningModule, Trainer
from probes import BUDGETS, balanced_accuracy, few_label_accuracies, knn_predictions, ridge_predictions
from signals import Views, embed, signals_of_images
from torch import nn

from repmetrics.callbacks.representation_monitor import monitor_of
from repmetrics.monitoring.isolation import isolated
from repmetrics.monitoring.record import Record

Row = dict[str, Any]


class Evaluator(Callback):
    """Callback that listens to the monitor: completes its record to a row of signals, and measures the probes.

    Args:
        domain: Domain on the device of the training.
        views: Fixed views of the held-out images.
        total_steps: Number of steps of the run.
        probe_rows: Largest number of training and of test rows of the probes.
        few_label_draws: Number of draws of few labels.
        few_label_shares: Shares of training at which probes on few labels are measured.
        write: Function that receives "signals" or "probes", and a row.
    """

    def __init__(
        self,
        domain: Domain,
        views: Views,
        *,
        total_steps: int,
        probe_rows: int,
        few_label_draws: int,
        few_label_shares: tuple[float, ...],
        write: Callable[[str, Row], None],
    ) -> None:
        self.domain, self.views, self.total_steps, self.write = domain, views, total_steps, write
        self.few_label_draws, self.few_label_shares = few_label_draws, few_label_shares
        generator = torch.Generator().manual_seed(0)
        self.train, self.test = (
            rows[torch.randperm(len(rows), generator=generator)[:probe_rows].to(rows.device)]
            for rows in (domain.train, domain.test)
        )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen to the monitor."""
        monitor_of(trainer, prefix="repmetrics").add_listener(self.evaluate)

    def evaluate(self, trainer: Trainer, record: Record, history: list[Record]) -> None:
        """Measure the encoder at the record's step."""
        module = trainer.lightning_module
        row: Row = {"step": record.step, "share": round(record.step / self.total_steps, 3), "loss": record.loss}
        row |= {"alarms": " ".join(alarm.kind for alarm in record.alarms), "nonfinite": record.nonfinite}
        signals = {name: m.value for name, m in record.measurements.items()}
        signals |= {f"{name}_se": m.standard_error for name, m in record.measurements.items() if m.standard_error}
        encoder = module.get_submodule(module.encoder)
        with isolated([encoder]), torch.no_grad():
            if not record.nonfinite:
                signals |= signals_of_images(encoder, self.domain, self.views)
                self.write("probes", {"step": row["step"], "share": row["share"]} | self.probe(encoder, row["share"]))
        self.write("signals", row | signals)

    def probe(self, encoder: nn.Module, share: float) -> Mapping[str, Any]:
        """Probes of the labels."""
        images, labels = self.domain.images, self.domain.labels
        x, test = embed(encoder, images[self.train]), embed(encoder, images[self.test])
        y, truth, groups = labels[self.train], labels[self.test], self.domain.groups[self.test]
        row: Row = {}
        row["probe"], row["probe_se"] = balanced_accuracy(ridge_predictions(x, y, test) == truth, truth, groups)
        row["knn"], row["knn_se"] = balanced_accuracy(knn_predictions(x, y, test) == truth, truth, groups)
        if any(abs(share - at) < 0.01 for at in self.few_label_shares):
            for n in BUDGETS:
                values = few_label_accuracies(x, y, labels=n, draws=self.few_label_draws)
                row[f"labels_{n}"] = " ".join(f"{value:.4f}" for value in values)
        return row
