"""Exact resume: the newest good checkpoint, the settings that changed, and logs that end at its step."""

from __future__ import annotations

import json
import pickle
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, Logger

from fmtrain.training import slurm
from fmtrain.training.checkpoints import find_nonfinite, read_checkpoint
from fmtrain.training.output_dir import ResumeMode
from repmetrics.atomic_write import write_text
from repmetrics.data.read_csv import read_csv

CONFIG = "config.yaml"
MEASUREMENTS = "measurements.jsonl"
LOGGERS = "loggers.json"
EVENTS = "events.out.tfevents.*"
# Argument of a logger that names the run it continues; "version" in the others.
RUN_ID = {"MLFlowLogger": "run_id", "CometLogger": "experiment_key"}
# Settings that decide data, views or schedules: a run resumed with another value is another run.
BINDING = ("model", "data", "trainer.accumulate_grad_batches")
# Parts of these that decide neither: reading speed, probes, memory. Other slides are refused by the manifest's hash.
FREE = (
    "model.init_args.init", "model.init_args.init_heads", "model.init_args.init_optimizer",
    "model.init_args.gram_teacher",
    "model.init_args.compile", "model.init_args.grad_checkpointing", "data.manifest", "data.num_workers", "data.cache",
    "data.probe", "data.probe_size_px", "data.open_slides", "data.max_failed_fraction",
)  # fmt: skip


# ── the checkpoint ─────────────────────────────────────────────────────────────────────────────────────────────────


def resume_mode(requested: ResumeMode | None, out: Path) -> ResumeMode | None:
    """How to treat an earlier run in the folder: a job that SLURM started again continues it without being asked."""
    if requested is None and slurm.is_restart(out):
        print(f"SLURM started job {slurm.job_id()} again: continuing as with --resume auto", file=sys.stderr)
        return "auto"
    return requested


def latest_checkpoint(folder: Path, *, on_skipped: Callable[[Path, str], None]) -> tuple[Path, int]:
    """Path and step of the newest good checkpoint: readable, complete, and without NaN or infinity.

    Only the directories of the files are read, and the values of the newest.

    Args:
        folder: Folder of the checkpoints.
        on_skipped: Called with the path of each newer checkpoint that is not good, and the reason.

    Raises:
        ValueError: There is none.
    """
    readable: list[tuple[int, float, Path]] = []
    for path in sorted(folder.glob("*.ckpt")):
        try:
            content = read_checkpoint(path)
            if "optimizer_states" not in content and "loops" in content:
                raise ValueError("it holds the weights alone, without the optimizer's state")
            readable.append((content["global_step"], path.stat().st_mtime, path))
        except (RuntimeError, EOFError, OSError, KeyError, TypeError, ValueError, pickle.UnpicklingError) as error:
            on_skipped(path, (str(error).splitlines() or [type(error).__name__])[0])
    for step, _, path in sorted(readable, reverse=True):
        name = find_nonfinite(read_checkpoint(path))
        if name is None:
            return path, step
        on_skipped(path, f"{name} holds NaN or infinity")
    raise ValueError(f"nothing to resume: no good checkpoint in {folder}")


def report_skipped(path: Path, reason: str) -> None:
    """Print that a checkpoint is not used."""
    print(f"skipped {path.name}, which cannot be used ({reason})", file=sys.stderr)


def find_resume_point(mode: ResumeMode | None, folder: Path) -> tuple[Path, int] | None:
    """The newest good checkpoint; None if the run is to begin.

    Raises:
        ValueError: There is none, and `mode` is "continue" or damaged files would be lost.
    """
    if mode is None or (mode == "auto" and not any(folder.glob("*.ckpt"))):
        return None
    return latest_checkpoint(folder, on_skipped=report_skipped)


# ── the settings ───────────────────────────────────────────────────────────────────────────────────────────────────


class Change(NamedTuple):
    """A setting whose value differs from that in the run's ``config.yaml``."""

    key: str
    old: Any
    new: Any
    binding: bool  # whether it changes the data or the schedules

    def __str__(self) -> str:
        return f"{self.key}: {self.old} → {self.new}"


class Comparison(NamedTuple):
    """Differences of two configurations."""

    changes: list[Change]
    removed: list[str]  # keys that only the earlier one has: of an earlier version of the code
    added: list[str]


def compare_settings(
    old: Mapping[str, Any], new: Mapping[str, Any], *, per_step: tuple[int | None, int | None] = (None, None)
) -> Comparison:
    """Compare two configurations setting by setting.

    Classes are compared by name without module, so that files of earlier versions compare equal.

    Args:
        old: Settings of the run's ``config.yaml``.
        new: Settings of this call.
        per_step: Patches of a step over all ranks and accumulated batches, then and now. Where both are known, they
            decide instead of ``data.batch_size``: two ranks train as one with twice the batch.

    Example:
        >>> result = compare_settings({"data": {"seed": 0, "size_px": 40}}, {"data": {"seed": 7, "size_px": 40}})
        >>> [(str(change), change.binding) for change in result.changes]
        [('data.seed: 0 → 7', True)]
    """
    first, second = dict(_flat(old, "")), dict(_flat(new, ""))
    free = FREE if None in per_step else (*FREE, "data.batch_size")
    changes = [
        Change(key, first[key], second[key], _within(key, BINDING) and not _within(key, free))
        for key in first
        if key in second and first[key] != second[key]
    ]
    if None not in per_step and per_step[0] != per_step[1]:
        changes.append(Change("patches_per_step", *per_step, True))
    return Comparison(
        changes,
        [key for key in first if key not in second],
        [key for key in second if key not in first],
    )


def check_changes(comparison: Comparison, *, allowed: Sequence[str]) -> None:
    """Print every changed setting; refuse those that change the data or the schedules and are not allowed.

    Args:
        comparison: Differences from the run's ``config.yaml``.
        allowed: Keys of settings that may change, complete or without their first parts: ``schedules.lr``.

    Raises:
        ValueError: A binding setting changed that is not in `allowed`.
    """
    for change in comparison.changes:
        print(f"resume: {change}", file=sys.stderr)
    for keys, text in ((comparison.removed, "no longer exist"), (comparison.added, "are new")):
        if keys:
            print(f"resume: settings that {text}: {', '.join(keys)}", file=sys.stderr)
    refused = [change for change in comparison.changes if change.binding and not _is_allowed(change.key, allowed)]
    if refused:
        raise ValueError(
            f"the run started with other settings: {'; '.join(map(str, refused))}; resume with its config.yaml, or add "
            + " ".join(f"--allow-change {change.key}" for change in refused)
        )


def _is_allowed(key: str, allowed: Sequence[str]) -> bool:
    short = key.replace(".init_args", "")
    return any(f".{k}".endswith(f".{name}") or k.startswith(f"{name}.") for name in allowed for k in (key, short))


def _within(key: str, prefixes: Sequence[str]) -> bool:
    return any(key == prefix or key.startswith(f"{prefix}.") for prefix in prefixes)


def _flat(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    """Settings of nested sections with dotted keys."""
    if isinstance(value, Mapping) and value:
        for name, item in value.items():
            yield from _flat(item, f"{key}.{name}" if key else str(name))
    else:
        yield key, _comparable(value, key)


def _comparable(value: Any, key: str) -> Any:
    """A value without what does not decide: the module of a class, the type of a sequence."""
    if key.endswith("class_path") and isinstance(value, str):
        return value.rpartition(".")[2]
    return value


def write_config(out: Path, text: str, *, step: int | None) -> None:
    """Write the run's ``config.yaml``; on a resume with other settings, keep the earlier file under its last step."""
    path = out / CONFIG
    if step is not None and path.is_file() and path.read_text(encoding="utf-8") != text:
        kept = out / f"config-until-step-{step:08d}.yaml"
        if not kept.exists():
            path.replace(kept)
    write_text(path, text)


# ── the logs ───────────────────────────────────────────────────────────────────────────────────────────────────────


def remove_logs(out: Path) -> None:
    """Remove what a run without a checkpoint logged: it begins again. Other files in the folder stay."""
    for path in (out / MEASUREMENTS, out / LOGGERS, *out.glob(EVENTS)):
        path.unlink(missing_ok=True)


def continue_loggers(loggers: Any, out: Path, *, step: int) -> None:
    """Put the run ids of the earlier run into the settings of its loggers, unless these name one.

    Args:
        loggers: Parsed setting ``trainer.logger``; changed in place.
        out: Folder of the run.
        step: Step of the checkpoint; TensorBoard shows nothing after it.
    """
    path = out / LOGGERS
    if not path.is_file() or not loggers or loggers is True:
        return
    ids = json.loads(path.read_text(encoding="utf-8"))
    for (name, run_id), logger in zip(ids, loggers if isinstance(loggers, list) else [loggers], strict=False):
        argument = RUN_ID.get(name, "version")
        if logger.class_path.rpartition(".")[2] == name and logger.init_args.get(argument) is None:
            logger.init_args[argument] = run_id
        if name == "TensorBoardLogger":
            logger.dict_kwargs = {"purge_step": step + 1}


def csv_rows_until(file: Path, step: int) -> list[dict[str, str]]:
    """Complete rows of a CSV log up to a step; none if the file does not exist."""
    if not file.is_file():
        return []
    content = file.read_bytes()
    if not content.endswith(b"\n"):  # killed while writing
        write_text(file, content[: content.rfind(b"\n") + 1].decode())
    return [row for row in read_csv(file)[1] if int(row["step"]) <= step]


class ContinueLogs(Callback):
    """Loggers of a resumed run continue theirs: the same run id, and no row after the step of the checkpoint.

    Ids are kept in ``loggers.json``. CSV files, which Lightning would delete, are cut to the step. MLflow and W&B keep
    what they have: the steps that are repeated have equal values.

    Args:
        out: Folder of the run.
        loggers: Loggers before they open their files.
        step: Step of the checkpoint; None for a run that begins.
    """

    def __init__(self, out: Path, loggers: Sequence[Logger], *, step: int | None) -> None:
        self.out = out
        self.rows: dict[int, list[dict[str, str]]] = {}
        for number, logger in enumerate(loggers):
            if step is not None and isinstance(logger, CSVLogger):
                self.rows[number] = csv_rows_until(Path(logger.log_dir) / "metrics.csv", step)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write the ids, and the kept rows into the new CSV files."""
        if not trainer.is_global_zero:
            return
        for number, logger in enumerate(trainer.loggers):
            if not isinstance(logger, CSVLogger):
                continue
            for row in self.rows.get(number, ()):
                values: dict[str, Any] = {key: value for key, value in row.items() if key != "step" and value}
                logger.experiment.log_metrics(values, int(row["step"]))
            if self.rows.get(number):
                logger.save()
        ids = [[type(logger).__name__, logger.version] for logger in trainer.loggers]
        write_text(self.out / LOGGERS, json.dumps(ids) + "\n")
