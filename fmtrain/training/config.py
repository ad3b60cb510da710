"""Configuration of `fmtrain fit`: LightningCLI, parsing, error messages."""

from __future__ import annotations

import inspect
import re
from argparse import ArgumentError
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger

from fmtrain.methods.dino import DINO
from fmtrain.methods.multicrop import MultiCrop
from fmtrain.methods.schedules import Schedules
from fmtrain.patches.dataset import TrainingPatches
from fmtrain.training.checkpoints import AtomicCheckpointIO
from fmtrain.training.datamodule import SlideDataModule
from fmtrain.training.progress import ProgressLine
from repmetrics.callbacks.representation_monitor import RepresentationMonitor

SECTIONS = {"trainer", "model", "data", "monitor", "checkpoint", "progress"}


PARTS = (Trainer, DINO, MultiCrop, Schedules, SlideDataModule, TrainingPatches, RepresentationMonitor, ModelCheckpoint)


# What jsonargparse says where a part cannot be made, around the reason.
PARTS_FAIL = re.compile(
    r"(?:Problem with given class_path [^\n]*\n|any of the Union subtypes\n.*?Errors:\n *- )(.*?)(?:\n *- Expected|$)",
    re.DOTALL,
)


class FitCLI(LightningCLI):
    """The sections of a configuration: trainer, model, data, and the callbacks monitor, checkpoint, progress.

    Args:
        out: The run's folder. It is no part of the configuration: a run's config.yaml serves another folder too.
        step: Where a resumed run goes on: what was logged after it will be logged again.
        options: Of LightningCLI.
    """

    def __init__(self, *args: Any, out: Path, step: int | None = None, **options: Any) -> None:
        self.out, self.step = out, step
        super().__init__(*args, **options)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the callbacks that every run has, with the held-out data linked in."""
        parser.add_lightning_class_args(RepresentationMonitor, "monitor")
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        parser.add_lightning_class_args(ProgressLine, "progress")
        parser.set_defaults(
            {
                "checkpoint.save_last": True,
                "checkpoint.enable_version_counter": False,  # last.ckpt is always the latest, after a resume too
                "checkpoint.monitor": "step",  # with mode and save_top_k: the latest two are kept
                "checkpoint.mode": "max",
                "checkpoint.save_top_k": 2,
                "checkpoint.filename": "step-{step:08d}",
                "checkpoint.auto_insert_metric_name": False,
                "checkpoint.every_n_train_steps": 1000,
            }
        )
        parser.link_arguments("data.held_out", "monitor.data", apply_on="instantiate")
        parser.link_arguments("data.labelled", "monitor.labelled", apply_on="instantiate")

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Add what no configuration may leave out: all of a run in its folder, and checkpoints that are whole."""
        plugins = self._get(self.config_init, "trainer.plugins", default=None) or []
        plugins = plugins if isinstance(plugins, list) else [plugins]
        if self._get(self.config_init, "trainer.logger", default=None) in (None, True):
            purge = None if self.step is None else self.step + 1
            kwargs["logger"] = TensorBoardLogger(str(self.out), name="", version="", purge_step=purge)
        checkpoint = self._get(self.config_init, "checkpoint")
        checkpoint.dirpath = checkpoint.dirpath or str(self.out / "checkpoints")  # whatever logger there is
        return super().instantiate_trainer(
            plugins=[*plugins, AtomicCheckpointIO()], default_root_dir=str(self.out), **kwargs
        )


class ParseOnlyCLI(FitCLI):
    """The configuration read and checked, with nothing made of it: no model, no device asked for, no seed set."""

    def _set_seed(self) -> None: ...

    def instantiate_classes(self) -> None:
        """Nothing."""


def parse_config(args: Sequence[str], *, configs: Sequence[str], out: Path) -> Any:
    """The whole configuration that these configurations and arguments describe, with nothing made of it.

    Raises:
        ValueError: As :func:`build_cli`.
    """
    return build_cli(args, configs=configs, out=out, cli_class=ParseOnlyCLI).config


def build_cli(
    args: Sequence[str], *, configs: Sequence[str], out: Path, step: int | None = None, cli_class: type[FitCLI] = FitCLI
) -> FitCLI:
    """The trainer, model and data that the configurations and arguments describe, with nothing written yet.

    Args:
        args: As on the command line.
        configs: Files, or names of those that ship; later ones win.
        out: The run's folder.
        step: Where a resumed run goes on.
        made: What reads them.

    Raises:
        ValueError: If they do not describe any; names near a misspelt one are given.
    """
    try:
        return cli_class(
            LightningModule,
            SlideDataModule,
            out=out,
            step=step,
            subclass_mode_model=True,
            run=False,
            auto_configure_optimizers=False,
            seed_everything_default=0,
            save_config_kwargs={"overwrite": True},
            parser_kwargs={"exit_on_error": False, "allow_abbrev": False},
            trainer_defaults={
                "max_epochs": -1,
                "use_distributed_sampler": False,
                "enable_model_summary": False,
                "log_every_n_steps": 10,
            },
            args=[*(part for name in configs for part in ("--config", str(config_file(name)))), *args],
        )
    except MisconfigurationException as error:
        raise ValueError(f"this machine cannot run the trainer as configured: {error}") from error
    except (ArgumentError, ValueError, TypeError) as error:
        if not isinstance(error, ArgumentError) and not PARTS_FAIL.search(str(error)):
            raise
        known = {name for part in PARTS for name in inspect.signature(part).parameters}
        raise ValueError(format_config_error(str(error), known=known | SECTIONS)) from error


def format_config_error(complaint: str, *, known: Iterable[str]) -> str:
    """What jsonargparse says over many lines, as one sentence.

    Example:
        >>> format_config_error("Group 'data' does not accept option 'batchsize'", known=["batch_size", "seed"])
        "the configuration has no 'batchsize': did you mean batch_size?"
    """
    misspelt = re.search(
        r"Option '([^']+)' is not accepted|does not accept option '([^']+)'|unrecognized arguments: --([^=\s]+)",
        complaint,
    )
    if misspelt:
        key = next(group for group in misspelt.groups() if group)
        words = key.split(".")
        near = [name for word in words if word not in known for name in get_close_matches(word, list(known))]
        return f"the configuration has no '{key}'" + (f": did you mean {', '.join(near)}?" if near else "")
    inner = PARTS_FAIL.search(complaint)
    lines = (inner[1] if inner else complaint).splitlines()
    return "the configuration is wrong: " + " ".join(line.strip() for line in lines[:3])


def config_file(name: str) -> Path:
    """A path as it is, or the configuration of that name that ships with the package.

    Raises:
        ValueError: If it is neither.
    """
    if Path(name).is_file():
        return Path(name)
    folder = Path(str(files("fmtrain") / "configs"))
    if (folder / f"{name}.yaml").is_file():
        return folder / f"{name}.yaml"
    known = ", ".join(sorted(path.stem for path in folder.glob("*.yaml")))
    raise ValueError(f"no configuration {name}: neither a file nor one of {known}")
