"""`fmtrain fit`: LightningCLI with the monitor, checkpoints and a progress line already in place."""

from __future__ import annotations

import errno
import inspect
import logging
import re
import shutil
import sys
import threading
import warnings
from argparse import ArgumentError
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger

from fmtrain.augment import MultiCrop
from fmtrain.checkpoints import DATA, LAST, AtomicCheckpointIO, newest
from fmtrain.data import SlidePatches
from fmtrain.dino import DINO
from fmtrain.folders import clear
from fmtrain.patches import StepSampler, TrainingPatches
from fmtrain.progress import ProgressLine
from fmtrain.schedules import Schedules
from fmtrain.stopping import StopOnSignal
from repmetrics.monitor import RepresentationMonitor
from repmetrics.record import forget_after

FLAGS = "--resume continues the run in it, --overwrite deletes it"
SECTIONS = {"trainer", "model", "data", "monitor", "checkpoint", "progress"}
PARTS = (Trainer, DINO, MultiCrop, Schedules, SlidePatches, TrainingPatches, RepresentationMonitor, ModelCheckpoint)
NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
LOST_RANK = re.compile("gloo|NCCL|Connection reset|Connection closed|ProcessGroup")  # torch has no type for it
# What jsonargparse says where a part cannot be made, around the reason.
PARTS_FAIL = re.compile(
    r"(?:Problem with given class_path [^\n]*\n|any of the Union subtypes\n.*?Errors:\n *- )(.*?)(?:\n *- Expected|$)",
    re.DOTALL,
)
NOISE = (
    ".*args parameter is intended to run from within Python",  # it is
    ".*LeafSpec.*",  # between Lightning and torch
    ".*in eval mode at the start of training.*",  # the teacher
    ".*Checkpoint directory .* exists and is not empty.*",  # a resumed run's
    ".*The .grad attribute of a Tensor that is not a leaf.*",  # torch.compile's own look at it
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


class ReadCLI(FitCLI):
    """The configuration read and checked, with nothing made of it: no model, no device asked for, no seed set."""

    def _set_seed(self) -> None: ...

    def instantiate_classes(self) -> None:
        """Nothing."""


def fit(args: Sequence[str], *, configs: Sequence[str], out: Path, resume: bool, overwrite: bool) -> Path:
    """Train as the configurations and arguments say; everything a run leaves behind is in `out`.

    Returns:
        The last checkpoint.
    """
    if resume and overwrite:
        raise ValueError("--resume keeps the run in the folder, --overwrite deletes it: choose one")
    quiet()
    ckpt, step = newest(out / "checkpoints", on_skipped=tell_skipped) if resume else (None, None)
    cli = configured(args, configs=configs, out=out, step=step)
    stopper = StopOnSignal(out / "checkpoints" / LAST)
    cli.trainer.callbacks.append(stopper)  # type: ignore[attr-defined]
    check(cli, ckpt)
    if cli.trainer.is_global_zero:
        if step is None:
            clear(out, overwrite=overwrite, ours="config.yaml", flags=FLAGS)
        else:
            forget_after(out / "measurements.jsonl", step)
    with stopper.listening(), told_once(), nothing_left(out, cli.trainer, resume=resume):
        try:
            cli.trainer.fit(cli.model, datamodule=cli.datamodule, ckpt_path=ckpt, weights_only=True)
        except FloatingPointError as error:
            raise ValueError(f"{error}; {origins(cli)}; {last_good(out)}") from error
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
            step, where = cli.trainer.global_step, error.filename or f"in {out}"
            raise ValueError(f"writing {where} failed at step {step}: {error.strerror}; {last_good(out)}") from error
        except RuntimeError as error:
            if cli.trainer.world_size == 1 or not LOST_RANK.search(str(error)):
                raise
            rank, step = cli.trainer.global_rank, cli.trainer.global_step
            raise ValueError(f"rank {rank} lost another at step {step}; {last_good(out)}") from error
    if stopper.asked:
        raise KeyboardInterrupt
    return out / "checkpoints" / LAST


def understood(args: Sequence[str], *, configs: Sequence[str], out: Path) -> Any:
    """The whole configuration that these configurations and arguments describe, with nothing made of it.

    Raises:
        ValueError: As :func:`configured`.
    """
    return configured(args, configs=configs, out=out, made=ReadCLI).config


def configured(
    args: Sequence[str], *, configs: Sequence[str], out: Path, step: int | None = None, made: type[FitCLI] = FitCLI
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
        return made(
            LightningModule,
            SlidePatches,
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
        raise ValueError(explain(str(error), known=known | SECTIONS)) from error


def check(cli: FitCLI, ckpt: Path | None) -> None:
    """Find out before the run's folder is touched whether data and weights fit; without `ckpt`, begin as `init` says.

    Raises:
        ValueError: They do not.
    """
    cli.datamodule.check(world_size=cli.trainer.world_size)
    if ckpt is None and cli.trainer.local_rank == 0:  # once begun, a run bears slides that fail
        cli.datamodule.patches.check_unchanged()
    if not isinstance(cli.model, DINO):
        return
    check_sides(cli.model, held_out_px=cli.datamodule.held_out.manifest.size_px)
    if ckpt is None:
        cli.model.initialise()
        return
    try:
        content = torch.load(ckpt, weights_only=True, map_location="cpu", mmap=True)
        cli.model.on_load_checkpoint(content)
        if DATA in content:
            cli.datamodule.load_state_dict(content[DATA])
    except ValueError as error:
        raise ValueError(f"{ckpt}: {error}") from error


def check_sides(model: DINO, *, held_out_px: int) -> None:
    """Find out whether tokens fill the images that the model will see.

    Raises:
        ValueError: They do not.
    """
    backbone: Any = model.student.backbone
    token, crops = max(backbone.patch_embed.patch_size), model.augment
    sides = {"the held-out patches": held_out_px, "model.augment.global_size": crops.global_size}
    if crops.local_crops:
        sides["model.augment.local_size"] = crops.local_size
    for what, side in sides.items():
        if side % token and not model.arch_kwargs.get("dynamic_img_pad"):
            remedy = "set it to" if what.startswith("model") else "make the manifest with --size-px"
            raise ValueError(
                f"{what}: {side} px cannot be cut into tokens of {token} px: {remedy} {max(side // token, 1) * token}"
            )


def explain(complaint: str, *, known: Iterable[str]) -> str:
    """What jsonargparse says over many lines, as one sentence.

    Example:
        >>> explain("Group 'data' does not accept option 'batchsize'", known=["batch_size", "seed"])
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


def quiet() -> None:
    """Keep what Lightning says to developers from the reader; its warnings about the run stay."""
    for package in ("lightning.pytorch", "pytorch_lightning", "lightning.fabric", "lightning_fabric"):
        logging.getLogger(package).setLevel(logging.WARNING)
    for message in NOISE:
        warnings.filterwarnings("ignore", message=message)


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


@contextmanager
def nothing_left(out: Path, trainer: Trainer, *, resume: bool) -> Iterator[None]:
    """Delete the folder of a run that failed before its first step: the same command, corrected, finds it free."""
    try:
        yield
    except Exception:
        if trainer.is_global_zero and trainer.global_step == 0 and not resume:
            shutil.rmtree(out, ignore_errors=True)
        raise


@contextmanager
def told_once() -> Iterator[None]:
    """TensorBoard's thread prints that the disk is full, and raises it again in ours: leave out the first."""
    before = threading.excepthook

    def hook(args: threading.ExceptHookArgs) -> None:
        if not (isinstance(args.exc_value, OSError) and args.exc_value.errno in NO_ROOM):
            before(args)

    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = before


def last_good(out: Path) -> str:
    """Which checkpoint is left, in words."""
    try:
        path = newest(out / "checkpoints", on_skipped=tell_skipped)[0]
    except ValueError:
        return "no checkpoint was written before"
    return f"the last good checkpoint is {path}: --resume goes on from there"


def origins(cli: FitCLI) -> str:
    """Which slides the last batch was read from, in words."""
    trainer, data = cli.trainer, cli.datamodule
    rank, world = trainer.global_rank, trainer.world_size
    accumulate = trainer.accumulate_grad_batches
    number = trainer.global_step * accumulate + trainer.fit_loop.batch_idx % accumulate
    sampler = StepSampler(
        rank=rank, world=world, batch_size=data.batch_size, crops_per_block=data.patches.crops_per_block
    )
    plans = [data.patches.plan(index) for index in sampler.batch(number)]
    names = sorted({data.patches.slides[plan.slide].info.name for plan in plans if plan is not None})
    shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    return f"its patches are of {shown}"


def tell_skipped(path: Path, why: str) -> None:
    """Say that a checkpoint cannot be read."""
    print(f"skipped {path.name}, which cannot be read ({why})", file=sys.stderr)
