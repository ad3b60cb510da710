"""Configuration of `fmtrain fit`: LightningCLI, parsing, error messages."""

from __future__ import annotations

import inspect
import re
from argparse import ArgumentError
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger

from fmtrain.methods.dino import DINO
from fmtrain.methods.dinov2 import DINOv2
from fmtrain.methods.multicrop import MultiCrop
from fmtrain.methods.schedules import Schedules
from fmtrain.patches.options import PatchOptions
from fmtrain.training.checkpoints import AtomicCheckpointIO
from fmtrain.training.datamodule import SlideDataModule
from fmtrain.training.output_dir import ResumeMode
from fmtrain.training.progress import ProgressLine
from fmtrain.training.resume import continue_loggers, find_resume_point
from fmtrain.training.shipped import config_file
from fmtrain.training.snapshots import TeacherSnapshots
from repmetrics.callbacks.representation_monitor import RepresentationMonitor

SECTIONS = {"trainer", "model", "data", "monitor", "checkpoint", "snapshots", "progress"}
# Their arguments are the settings that a misspelled setting is compared with.
PARTS = (
    Trainer, DINO, DINOv2, MultiCrop, Schedules, SlideDataModule, PatchOptions, RepresentationMonitor, ModelCheckpoint,
    TeacherSnapshots,
)  # fmt: skip
# Text of jsonargparse around the reason why a part cannot be created.
PARTS_FAIL = re.compile(
    r"(?:Problem with given class_path [^\n]*\n|any of the Union subtypes\n.*?Errors:\n *- )(.*?)(?:\n *- Expected|$)",
    re.DOTALL,
)


class FitCLI(LightningCLI):
    """LightningCLI with the sections trainer, model, data, monitor, checkpoint, snapshots and progress.

    Args:
        args: Positional arguments of LightningCLI.
        out: Folder of the run. It is not in the configuration: a run's config.yaml can be used for another folder.
        resume: Whether to continue the run in the folder.
        options: Keyword arguments of LightningCLI.

    Attributes:
        resume_point: Path and step of the checkpoint that the run continues from; None if it begins.
    """

    def __init__(self, *args: Any, out: Path, resume: ResumeMode | None = None, **options: Any) -> None:
        self.out, self.resume = out, resume
        self.resume_point: tuple[Path, int] | None = None
        super().__init__(*args, **options)

    @property
    def step(self) -> int | None:
        """Step at which a resumed run starts; logs of later steps are written again."""
        return None if self.resume_point is None else self.resume_point[1]

    @property
    def checkpoints(self) -> Path:
        """Folder of the run's checkpoints."""
        return Path(self.config.checkpoint.dirpath or self.out / "checkpoints")

    def config_text(self) -> str:
        """All settings as YAML."""
        text: str = self.parser.dump(self.config, skip_none=False)
        return text

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the callbacks of every run, and link the held-out data to the monitor."""
        parser.add_lightning_class_args(RepresentationMonitor, "monitor")
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        parser.add_lightning_class_args(TeacherSnapshots, "snapshots")
        parser.add_lightning_class_args(ProgressLine, "progress")
        parser.set_defaults(
            {
                "monitor.view_set": "stain",
                "checkpoint.save_last": True,
                "checkpoint.enable_version_counter": False,  # a resumed run overwrites last.ckpt
                "checkpoint.monitor": "step",  # with mode and save_top_k: keep the latest two
                "checkpoint.mode": "max",
                "checkpoint.save_top_k": 2,
                "checkpoint.filename": "step-{step:08d}",
                "checkpoint.auto_insert_metric_name": False,
                "checkpoint.every_n_train_steps": 1000,
            }
        )
        parser.link_arguments("data.held_out", "monitor.data", apply_on="instantiate")
        parser.link_arguments("data.probe_data", "monitor.probe_data", apply_on="instantiate")

    def instantiate_classes(self) -> None:
        """Find the checkpoint to continue from, and create everything; loggers continue their runs."""
        self.resume_point = find_resume_point(self.resume, self.checkpoints)
        recorded = self.config
        if self.resume_point is not None:
            self.config = recorded.clone()
            continue_loggers(self.config.trainer.logger, self.out, step=self.resume_point[1])
        super().instantiate_classes()
        self.config = recorded  # without the ids: a run's config.yaml can be used for another run
        self.model.save_hyperparameters(plain_settings(recorded))  # loggers show them with the values

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Add what no configuration can change: all files in the run's folder, and atomic checkpoints."""
        config: Any = self.config_init
        plugins = config.get("trainer.plugins") or []
        plugins = plugins if isinstance(plugins, list) else [plugins]
        if config.get("trainer.logger") in (None, True):
            purge = None if self.step is None else self.step + 1
            kwargs["logger"] = TensorBoardLogger(str(self.out), name="", version="", purge_step=purge)
        config.checkpoint.dirpath = str(self.checkpoints)  # for any logger
        if config.get("trainer.enable_progress_bar") is False:  # Lightning refuses it beside a progress bar
            config.progress.disable()
            kwargs["enable_progress_bar"] = True
        return super().instantiate_trainer(
            plugins=[*plugins, AtomicCheckpointIO()], default_root_dir=str(self.out), **kwargs
        )


def plain_settings(config: Any) -> dict[str, bool | float | str]:
    """Numbers and texts of the model, the data and the trainer, by names with dots."""
    return {
        f"{section}.{name.removeprefix('init_args.')}": value
        for section in ("model", "data", "trainer")
        for name, value in vars(config[section].as_flat()).items()
        if isinstance(value, bool | int | float | str)
    }


class ParseOnlyCLI(FitCLI):
    """Parse and validate the configuration without creating a model, requesting a device or setting a seed."""

    def _set_seed(self) -> None: ...

    def instantiate_classes(self) -> None:
        """Create nothing."""


def parse_config(args: Sequence[str], *, configs: Sequence[str], out: Path) -> Any:
    """Complete configuration from files and arguments; nothing is created.

    Args:
        args: Arguments as on the command line.
        configs: Configuration files, or names of shipped ones; later ones win.
        out: Folder of the run.
    """
    return build_cli(args, configs=configs, out=out, cli_class=ParseOnlyCLI).config


def build_cli(
    args: Sequence[str],
    *,
    configs: Sequence[str],
    out: Path,
    resume: ResumeMode | None = None,
    cli_class: type[FitCLI] = FitCLI,
) -> FitCLI:
    """Create trainer, model and data from configuration files and arguments; nothing is written.

    Args:
        args: Arguments as on the command line.
        configs: Configuration files, or names of shipped ones; later ones win.
        out: Folder of the run.
        resume: Whether to continue the run in the folder.
        cli_class: Class that parses them.
    """
    try:
        return cli_class(
            LightningModule,
            SlideDataModule,
            out=out,
            resume=resume,
            subclass_mode_model=True,
            run=False,
            auto_configure_optimizers=False,
            seed_everything_default=0,
            save_config_callback=None,  # it writes into the folder of the logger
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
        raise ValueError(f"the trainer cannot run as configured: {error}") from error
    except (ArgumentError, ValueError, TypeError) as error:
        if not isinstance(error, ArgumentError) and not PARTS_FAIL.search(str(error)):
            raise
        known = {name for part in PARTS for name in inspect.signature(part).parameters}
        raise ValueError(format_config_error(str(error), known=known | SECTIONS)) from error


def format_config_error(message: str, *, known: Iterable[str]) -> str:
    """Shorten a message of jsonargparse to one sentence.

    Args:
        message: Message of several lines.
        known: Names of the existing settings.

    Example:
        >>> format_config_error("Group 'data' does not accept option 'batchsize'", known=["batch_size", "seed"])
        "the configuration has no 'batchsize': did you mean batch_size?"
    """
    unknown = re.search(
        r"Option '([^']+)' is not accepted|does not accept option '([^']+)'|unrecognized arguments: --([^=\s]+)",
        message,
    )
    if unknown:
        key = next(group for group in unknown.groups() if group)
        words = key.split(".")
        close = [name for word in words if word not in known for name in get_close_matches(word, list(known))]
        return f"the configuration has no '{key}'" + (f": did you mean {', '.join(close)}?" if close else "")
    reason = PARTS_FAIL.search(message)
    lines = (reason[1] if reason else message).splitlines()
    return "the configuration is invalid: " + " ".join(line.strip() for line in lines[:3])
