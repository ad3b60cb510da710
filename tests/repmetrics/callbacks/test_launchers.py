"""Runs that others assemble or start: LightningCLI from YAML, and processes that Lightning forks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LightningCLI
from processes import Program
from small_runs import LIGHTNING_NOISE, HeldOutImages, fit, loader, simclr

from repmetrics.callbacks.representation_monitor import RepresentationMonitor

pytestmark = [
    *(pytest.mark.filterwarnings(line) for line in LIGHTNING_NOISE),
    pytest.mark.filterwarnings("ignore:.*args parameter is intended to run.*"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # fork of a process with threads
]

CONFIG = """
seed_everything: 1
trainer:
  accelerator: cpu
  max_steps: 4
  enable_progress_bar: false
  enable_model_summary: false
  default_root_dir: {root}
  callbacks:
  - class_path: repmetrics.RepresentationMonitor
    init_args:
      data:
        class_path: small_runs.HeldOutImages
        init_args: {{size: 48, groups: false}}
      probe_data:
        class_path: small_runs.HeldOutImages
        init_args: {{size: 40}}
      encoder: backbone
      metrics: [rankme]
      every_n_steps: 2
  - class_path: lightning.pytorch.callbacks.ModelCheckpoint
    init_args: {{monitor: repmetrics/rankme, mode: max, every_n_train_steps: 2}}
"""


def make_module(width: int = 8) -> LightningModule:
    module: LightningModule = simclr()
    return module


def test_lightning_cli_makes_the_monitor_with_its_data_from_yaml(tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(CONFIG.format(root=tmp_path))
    for _ in range(2):  # the second time from the file that the first run saved
        cli = LightningCLI(make_module, run=False, args=["--config", str(config)])
        (monitor,) = (c for c in cli.trainer.callbacks if isinstance(c, RepresentationMonitor))
        cli.trainer.fit(cli.model, loader())
        assert [record.step for record in monitor.history] == [0, 2, 4]
        assert {name: m.n for name, m in monitor.history[-1].measurements.items()} == {
            "rankme": 48,
            "linear_probe": 40,
            "knn": 40,
        }
        config = Path(cli.trainer.log_dir or "") / "config.yaml"


def test_a_fit_in_forked_processes_brings_the_history_back(tmp_path: Path) -> None:
    """The monitor that measured is a copy in a child process.

    Lightning forks a process in which autograd has not run: threads of autograd, which some tests start, end a fork.
    """
    program = Program(fit_in_forks, tmp_path / "run", folder=tmp_path)
    assert program.wait() == 0, program.stderr.read_text()


def fit_in_forks(root: Path) -> None:
    monitor = RepresentationMonitor(HeldOutImages(), metrics=["rankme"])
    strategy = "ddp_fork_find_unused_parameters_true"
    for _ in range(2):  # also for a second fit with the same callback
        run = fit(root, simclr(), monitor, strategy=strategy, val=None, max_epochs=1)
        assert [record.step for record in monitor.history] == [0, 6]
        last = monitor.history[-1].measurements["rankme"]
        assert torch.tensor(last.value) == run.callback_metrics["repmetrics/rankme"]
        assert last.replicates is not None
