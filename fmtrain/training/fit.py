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
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import Trainer

from fmtrain.domains import check_domain
from fmtrain.methods.dino import DINO, NonFiniteGradientError
from fmtrain.methods.dinov2 import DINOv2
from fmtrain.patches.loader import StepSampler
from fmtrain.training import slurm
from fmtrain.training.check_run import check_run
from fmtrain.training.checkpoints import DATA, LAST, NonFiniteWeightsError, read_checkpoint
from fmtrain.training.config import FitCLI, build_cli
from fmtrain.training.datamodule import PER_STEP
from fmtrain.training.output_dir import ResumeMode, prepare_output_dir
from fmtrain.training.resume import (
    CONFIG,
    ContinueLogs,
    check_changes,
    compare_settings,
    latest_checkpoint,
    remove_logs,
    report_skipped,
    resume_mode,
    write_config,
)
from fmtrain.training.sharded import check_strategy
from fmtrain.training.signals import SaveAtEnd, StopOnSignal
from repmetrics.data.interruption import EvaluationInterruptedError

FLAGS = "--resume continues the run in it, --overwrite deletes it"
DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
LOST_RANK = re.compile("gloo|NCCL|Connection reset|Connection closed|ProcessGroup")  # torch has no error type
KILLED_WORKER = re.compile(
    r"DataLoader worker \(pid\(?s?\)? ([\d, ]+)\) (?:is killed by signal: (.*?)\.|exited unexpectedly)"
)
IGNORED_WARNINGS = (
    ".*args parameter is intended to run from within Python",  # as here
    ".*LeafSpec.*",  # between Lightning and torch
    ".*in eval mode at the start of training.*",  # the teacher
    ".*Checkpoint directory .* exists and is not empty.*",  # a resumed run's
    ".*The .grad attribute of a Tensor that is not a leaf.*",  # from torch.compile
    ".*returned a view tensor.*",  # from FSDP2: no operation is in place
)


def fit(
    args: Sequence[str],
    *,
    configs: Sequence[str],
    out: Path,
    resume: ResumeMode | None,
    overwrite: bool,
    allow_change: Sequence[str] = (),
    check_only: bool = False,
) -> Path:
    """Train as configured; all files of the run are in `out`.

    Args:
        args: Arguments as on the command line.
        configs: Configuration files, or names of shipped ones; later ones win.
        out: Folder of the run.
        resume: Whether to continue the run in `out`; "auto" begins one if there is none.
        overwrite: Whether to delete an earlier run in `out`.
        allow_change: Settings that may differ from those of the run to continue.
        check_only: Whether to read and step for a minute and report, instead of training. Nothing is written.

    Returns:
        Path of the last checkpoint.
    """
    if resume and overwrite:
        raise ValueError("--resume keeps the run in the folder, --overwrite deletes it: choose one")
    silence_lightning()
    resume = resume_mode(resume, out)
    cli = build_cli(args, configs=configs, out=out, resume=resume)
    trainer, last = cli.trainer, cli.checkpoints / LAST
    check(cli)
    if cli.resume_point is not None:
        path, step = cli.resume_point
        check_resume(cli, allow_change=allow_change)
        if 0 <= trainer.max_steps <= step:
            if trainer.is_global_zero:
                print(f"nothing left to do: {path} is of step {step} of {trainer.max_steps}", file=sys.stderr)
            return path
    if check_only:
        text, problems = check_run(cli)
        print(text, end="\n" if text else "")
        if problems:
            raise ValueError(f"{len(problems)} problems found, listed above" if problems[1:] else "a problem was found")
        return last
    if trainer.is_global_zero:
        if resume is None:
            prepare_output_dir(out, overwrite=overwrite, marker=CONFIG, flags=FLAGS)
        elif cli.step is None:
            remove_logs(out)
        write_config(out, cli.config_text(), step=cli.step)
    stopper, logs = StopOnSignal(), ContinueLogs(out, trainer.loggers, step=cli.step)
    trainer.callbacks[:] = [stopper, logs, *trainer.callbacks, SaveAtEnd(last)]  # type: ignore[attr-defined]
    try:
        with stopper.handlers_installed(), suppress_duplicate_error(), remove_failed_run(cli):
            train(cli)
    except EvaluationInterruptedError:  # the first evaluation: there is nothing to save
        raise KeyboardInterrupt from None
    if stopper.requested and not 0 <= trainer.max_steps <= trainer.global_step:
        if stopper.requeue and trainer.is_global_zero and slurm.job_id() is not None:
            print(slurm.requeue(out), file=sys.stderr)
        raise KeyboardInterrupt
    return last


def train(cli: FitCLI) -> None:
    """Run the trainer; failures are described by one sentence."""
    trainer, last = cli.trainer, partial(last_checkpoint_message, cli.checkpoints)
    ckpt = None if cli.resume_point is None else cli.resume_point[0]
    try:
        trainer.fit(cli.model, datamodule=cli.datamodule, ckpt_path=ckpt, weights_only=True)
    except NonFiniteWeightsError as error:
        raise ValueError(f"{error}; {last()}") from error
    except FloatingPointError as error:
        slides = batch_slides_message(cli, whole_step=isinstance(error, NonFiniteGradientError))
        raise ValueError(f"{error}; {slides}; {last()}") from error
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        step, place = trainer.global_step, error.filename or f"in {cli.out}"
        raise ValueError(f"writing {place} failed at step {step}: {error.strerror}; {last()}") from error
    except RuntimeError as error:
        if killed := killed_worker_message(error):
            raise ValueError(f"{killed}, at step {trainer.global_step}; {last()}") from error
        if trainer.world_size == 1 or not LOST_RANK.search(str(error)):
            raise
        rank, step = trainer.global_rank, trainer.global_step
        raise ValueError(f"rank {rank} lost the connection to another rank at step {step}; {last()}") from error


def killed_worker_message(error: BaseException) -> str | None:
    """Message about a worker that the system ended; None for other errors.

    Example:
        >>> killed_worker_message(RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. Details"))
        'the reading process 7 was killed (Killed), probably because memory ran out: lower data.num_workers or ...'
    """
    chain = [error, *(e for e in (error.__cause__, error.__context__) if e is not None)]
    match = next((m for e in chain if (m := KILLED_WORKER.search(str(e)))), None)
    if match is None:
        return None
    cause = "probably because memory ran out: lower data.num_workers or data.open_slides"
    if "bus" in (match[2] or "").lower():
        cause = "because /dev/shm is full: lower data.num_workers, or give the container more shared memory"
    return f"the reading process {match[1]} was killed ({match[2] or 'no signal'}), {cause}"


def check(cli: FitCLI) -> None:
    """Check trainer, data and sizes before the run's folder is changed; load the initial weights of a new run."""
    check_length(cli.trainer)
    cli.datamodule.check(world_size=cli.trainer.world_size)
    if cli.resume_point is None and cli.trainer.local_rank == 0:  # later, failing slides are quarantined instead
        cli.datamodule.patches.check_unchanged()
    if not isinstance(cli.model, DINO):
        return
    cli.model.check_trainer(cli.trainer)
    check_image_sizes(cli.model, held_out_px=cli.datamodule.held_out.manifest.size_px)
    if cli.resume_point is None:
        cli.model.initialize()


def check_length(trainer: Trainer) -> None:
    """Refuse a run whose length no setting defines, or whose steps have no batch."""
    check_domain("trainer.accumulate_grad_batches", trainer.accumulate_grad_batches, minimum=1)
    if trainer.max_steps < 0 and not isinstance(trainer.limit_train_batches, int):
        given = "trainer.max_epochs" if (trainer.max_epochs or 0) > 0 else "no other setting"
        raise ValueError(
            "the length of the run is unknown: set trainer.max_steps; every patch is new, so an epoch has no end, and "
            f"{given} defines no length"
        )


def check_resume(cli: FitCLI, *, allow_change: Sequence[str]) -> None:
    """Check that the checkpoint belongs to this model, these slides and these settings."""
    assert cli.resume_point is not None
    path, config = cli.resume_point[0], cli.out / CONFIG
    check_strategy(path, cli.trainer.strategy)
    content = read_checkpoint(path)
    try:
        if isinstance(cli.model, DINO):
            cli.model.on_load_checkpoint(content)
        if DATA in content:
            cli.datamodule.load_state_dict(content[DATA])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if not config.is_file():
        print(f"resume: {config} does not exist, so that the settings cannot be compared", file=sys.stderr)
        return
    old, new = (yaml.safe_load(text) for text in (config.read_text(encoding="utf-8"), cli.config_text()))
    per_step = content.get(DATA, {}).get(PER_STEP), cli.datamodule.patches_per_step(cli.trainer)
    check_changes(compare_settings(old, new, per_step=per_step), allowed=allow_change)


def check_image_sizes(model: DINO, *, held_out_px: int) -> None:
    """Check that the tokens of the model fill its images."""
    backbone: Any = model.student.backbone
    token, crops = max(backbone.patch_embed.patch_size), model.augment
    sides = {"the held-out patches": held_out_px, "model.augment.global_crops_size": crops.global_crops_size}
    if crops.local_crops_number:
        sides["model.augment.local_crops_size"] = crops.local_crops_size
    if isinstance(model, DINOv2) and model.gram_crops_size is not None:
        sides["model.gram_crops_size"] = model.gram_crops_size
    for name, side in sides.items():
        if side % token and not model.arch_kwargs.get("dynamic_img_pad"):
            remedy = "set it to" if name.startswith("model") else "create the manifest with --size-px"
            raise ValueError(
                f"{name}: {side} px cannot be cut into tokens of {token} px: {remedy} {max(side // token, 1) * token}"
            )


def silence_lightning() -> None:
    """Hide Lightning's messages for developers; warnings about the run stay, one line each."""
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    for package in ("lightning.pytorch", "pytorch_lightning", "lightning.fabric", "lightning_fabric"):
        logging.getLogger(package).setLevel(logging.WARNING)
    for message in IGNORED_WARNINGS:
        warnings.filterwarnings("ignore", message=message)


@contextmanager
def remove_failed_run(cli: FitCLI) -> Iterator[None]:
    """Delete the folder of a run that failed before its first step, so that the command can be repeated."""
    try:
        yield
    except Exception:
        if cli.trainer.is_global_zero and cli.trainer.global_step == 0 and cli.resume is None:
            shutil.rmtree(cli.out, ignore_errors=True)
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


def last_checkpoint_message(folder: Path) -> str:
    """Message about the newest good checkpoint."""
    try:
        path = latest_checkpoint(folder, on_skipped=report_skipped)[0]
    except ValueError:
        return "no checkpoint was written before"
    return f"the last good checkpoint is {path}: --resume continues from there"


def batch_slides_message(cli: FitCLI, *, whole_step: bool) -> str:
    """Message about the slides of the last batch of this rank, or of the whole step on all ranks."""
    trainer, data = cli.trainer, cli.datamodule
    world, accumulate = trainer.world_size, trainer.accumulate_grad_batches
    first = trainer.global_step * accumulate
    batch = first + trainer.fit_loop.batch_idx % accumulate
    patches_from: set[str | None] = set()
    for rank in range(world) if whole_step else [trainer.global_rank]:
        sampler = StepSampler(
            rank=rank, world=world, batch_size=data.batch_size, crops_per_block=data.patches.crops_per_block
        )
        for number in range(first, batch + 1) if whole_step else [batch]:
            patches_from |= {data.patches.name_of(index) for index in sampler.batch(number)}
    names = sorted(name for name in patches_from if name is not None)
    listed = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    return f"its patches are from {listed}"
