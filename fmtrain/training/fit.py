"""`fmtrain fit`: checks before a run, the run, and messages about its failures."""

from __future__ import annotations

import errno
import logging
import re
import shutil
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer

from fmtrain.methods.dino import DINO
from fmtrain.patches.loader import StepSampler
from fmtrain.training.checkpoints import DATA, LAST, latest_checkpoint
from fmtrain.training.config import FitCLI, build_cli
from fmtrain.training.output_dir import prepare_output_dir
from fmtrain.training.signals import StopOnSignal

FLAGS = "--resume continues the run in it, --overwrite deletes it"
DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
LOST_RANK = re.compile("gloo|NCCL|Connection reset|Connection closed|ProcessGroup")  # torch has no error type
IGNORED_WARNINGS = (
    ".*args parameter is intended to run from within Python",  # as here
    ".*LeafSpec.*",  # between Lightning and torch
    ".*in eval mode at the start of training.*",  # the teacher
    ".*Checkpoint directory .* exists and is not empty.*",  # a resumed run's
    ".*The .grad attribute of a Tensor that is not a leaf.*",  # from torch.compile
)


def fit(args: Sequence[str], *, configs: Sequence[str], out: Path, resume: bool, overwrite: bool) -> Path:
    """Train as configured; all files of the run are in `out`.

    Args:
        args: Arguments as on the command line.
        configs: Configuration files, or names of shipped ones; later ones win.
        out: Folder of the run.
        resume: Whether to continue the run in `out`.
        overwrite: Whether to delete an earlier run in `out`.

    Returns:
        Path of the last checkpoint.
    """
    if resume and overwrite:
        raise ValueError("--resume keeps the run in the folder, --overwrite deletes it: choose one")
    silence_lightning()
    ckpt, step = latest_checkpoint(out / "checkpoints", on_skipped=report_skipped) if resume else (None, None)
    cli = build_cli(args, configs=configs, out=out, step=step)
    stopper = StopOnSignal(out / "checkpoints" / LAST)
    cli.trainer.callbacks.append(stopper)  # type: ignore[attr-defined]
    check(cli, ckpt)
    if cli.trainer.is_global_zero and step is None:
        prepare_output_dir(out, overwrite=overwrite, marker="config.yaml", flags=FLAGS)
    with stopper.handlers_installed(), suppress_duplicate_error(), remove_failed_run(out, cli.trainer, resume=resume):
        try:
            cli.trainer.fit(cli.model, datamodule=cli.datamodule, ckpt_path=ckpt, weights_only=True)
        except FloatingPointError as error:
            raise ValueError(f"{error}; {batch_slides_message(cli)}; {last_checkpoint_message(out)}") from error
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise
            step, place = cli.trainer.global_step, error.filename or f"in {out}"
            raise ValueError(
                f"writing {place} failed at step {step}: {error.strerror}; {last_checkpoint_message(out)}"
            ) from error
        except RuntimeError as error:
            if cli.trainer.world_size == 1 or not LOST_RANK.search(str(error)):
                raise
            rank, step = cli.trainer.global_rank, cli.trainer.global_step
            raise ValueError(
                f"rank {rank} lost the connection to another rank at step {step}; {last_checkpoint_message(out)}"
            ) from error
    if stopper.requested:
        raise KeyboardInterrupt
    return out / "checkpoints" / LAST


def check(cli: FitCLI, ckpt: Path | None) -> None:
    """Check data and weights before the run's folder is changed; without `ckpt`, load the initial weights."""
    cli.datamodule.check(world_size=cli.trainer.world_size)
    if ckpt is None and cli.trainer.local_rank == 0:  # during training, failing slides are quarantined instead
        cli.datamodule.patches.check_unchanged()
    if not isinstance(cli.model, DINO):
        return
    check_image_sizes(cli.model, held_out_px=cli.datamodule.held_out.manifest.size_px)
    if ckpt is None:
        cli.model.initialize()
        return
    try:
        content = torch.load(ckpt, weights_only=True, map_location="cpu", mmap=True)
        cli.model.on_load_checkpoint(content)
        if DATA in content:
            cli.datamodule.load_state_dict(content[DATA])
    except ValueError as error:
        raise ValueError(f"{ckpt}: {error}") from error


def check_image_sizes(model: DINO, *, held_out_px: int) -> None:
    """Check that the tokens of the model fill its images."""
    backbone: Any = model.student.backbone
    token, crops = max(backbone.patch_embed.patch_size), model.augment
    sides = {"the held-out patches": held_out_px, "model.augment.global_crops_size": crops.global_crops_size}
    if crops.local_crops_number:
        sides["model.augment.local_crops_size"] = crops.local_crops_size
    for name, side in sides.items():
        if side % token and not model.arch_kwargs.get("dynamic_img_pad"):
            remedy = "set it to" if name.startswith("model") else "create the manifest with --size-px"
            raise ValueError(
                f"{name}: {side} px cannot be cut into tokens of {token} px: {remedy} {max(side // token, 1) * token}"
            )


def silence_lightning() -> None:
    """Hide Lightning's messages for developers; its warnings about the run stay."""
    for package in ("lightning.pytorch", "pytorch_lightning", "lightning.fabric", "lightning_fabric"):
        logging.getLogger(package).setLevel(logging.WARNING)
    for message in IGNORED_WARNINGS:
        warnings.filterwarnings("ignore", message=message)


@contextmanager
def remove_failed_run(out: Path, trainer: Trainer, *, resume: bool) -> Iterator[None]:
    """Delete the folder of a run that failed before its first step, so that the command can be repeated."""
    try:
        yield
    except Exception:
        if trainer.is_global_zero and trainer.global_step == 0 and not resume:
            shutil.rmtree(out, ignore_errors=True)
        raise


@contextmanager
def suppress_duplicate_error() -> Iterator[None]:
    """Suppress the traceback of TensorBoard's thread on a full disk; the error is raised again in the main thread."""
    previous = threading.excepthook

    def hook(args: threading.ExceptHookArgs) -> None:
        if not (isinstance(args.exc_value, OSError) and args.exc_value.errno in DISK_FULL):
            previous(args)

    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = previous


def last_checkpoint_message(out: Path) -> str:
    """Message about the last readable checkpoint."""
    try:
        path = latest_checkpoint(out / "checkpoints", on_skipped=report_skipped)[0]
    except ValueError:
        return "no checkpoint was written before"
    return f"the last good checkpoint is {path}: --resume continues from there"


def batch_slides_message(cli: FitCLI) -> str:
    """Message about the slides of the last batch."""
    trainer, data = cli.trainer, cli.datamodule
    rank, world = trainer.global_rank, trainer.world_size
    accumulate = trainer.accumulate_grad_batches
    number = trainer.global_step * accumulate + trainer.fit_loop.batch_idx % accumulate
    sampler = StepSampler(
        rank=rank, world=world, batch_size=data.batch_size, crops_per_block=data.patches.crops_per_block
    )
    plans = [data.patches.plan(index) for index in sampler.batch(number)]
    names = sorted({data.patches.slides[plan.slide].info.name for plan in plans if plan is not None})
    listed = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    return f"its patches are from {listed}"


def report_skipped(path: Path, reason: str) -> None:
    """Print that a checkpoint cannot be read."""
    print(f"skipped {path.name}, which cannot be read ({reason})", file=sys.stderr)
