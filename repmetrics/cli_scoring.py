"""What the commands share that score checkpoints: the function that scores a file, where it runs, and the output."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from repmetrics.cli_errors import format_error

if TYPE_CHECKING:  # at run time, it would import torch
    from repmetrics.scoring.score import Score


def make_scorer(
    metrics: str | None, *, data: Path | None, labels: str | None, groups: str | None, arch: str | None,
    arch_kwargs: str | None, prefix: str | None, teacher: bool, pool: str | None, mean: str | None, std: str | None,
    image_size: int | None, batch_size: int, workers: int, device: str | None, views: int, view_set: str | None,
    cache: bool,
) -> Callable[..., Score]:  # fmt: skip
    """Function that scores a file; with ``features_out``, it writes the features of a checkpoint there.

    Usage is checked before anything is imported.
    """
    overrides = encoder_options(arch, arch_kwargs, prefix=prefix, teacher=teacher, pool=pool, mean=mean, std=std)
    requested = None if metrics is None else split_names(metrics, "--metrics")
    from repmetrics.data.open import open_data
    from repmetrics.data.views import find_view_set
    from repmetrics.measurement.blocks import INDEPENDENT_SAMPLES, declared_independent
    from repmetrics.measurement.registry import DEFAULT_METRICS
    from repmetrics.scoring import score
    from repmetrics.scoring.score import check_measurable
    from repmetrics.scoring.settings import EmbedSettings, cache_folder, choose_device

    if declared_independent(groups):
        print(f"warning: {INDEPENDENT_SAMPLES}", file=sys.stderr)
    names = DEFAULT_METRICS if requested is None else requested
    check_measurable(names)
    device = choose_device(device)
    if view_set is not None:
        find_view_set(view_set)
    settings = EmbedSettings(
        image_size, batch_size, workers, device, views, cache_folder() if cache else None, view_set
    )
    if data is None:
        return partial(score.score_embeddings, labels=labels, groups=groups, metrics=names, settings=settings)
    source = open_data(data, labels=labels, groups=groups)
    return partial(
        score.score_checkpoint,
        source=source,
        overrides=overrides,
        metrics=names,
        settings=settings,
        open_source=partial(open_data, data, labels=labels, groups=groups),
    )


def checked_device(
    device: str | None, data: Path | None, processes: int | None, gpus: int | None, dask: str | None
) -> str | None:
    """The device to check: with --gpus that of each process. Usage is checked."""
    if data is None and (processes or gpus or dask):
        raise typer.BadParameter("--processes, --gpus and --dask take checkpoints and --data")
    if sum(option is not None for option in (processes, gpus, dask)) > 1:
        raise typer.BadParameter("--processes, --gpus and --dask exclude each other")
    if gpus is not None and device not in (None, "cuda"):
        raise typer.BadParameter(f"--gpus gives each process a GPU of its own: leave --device {device} out")
    return "cuda" if gpus is not None else device


def executor_of(processes: int | None, gpus: int | None, dask: str | None) -> AbstractContextManager[Executor | None]:
    """The executor that the options name; see `repmetrics.executor.open_executor`."""
    from repmetrics.executor import open_executor

    available = 0
    if gpus is not None:
        import torch

        available = torch.cuda.device_count()
    return open_executor(processes=processes or 0, gpus=gpus, available_gpus=available, dask=dask)


def score_all(
    score_file: Callable[..., Score], files: Sequence[Path], executor: Executor | None, features_out: Path | None = None
) -> list[Score]:
    """Scores of all files that can be scored; exits if none can. An error of a single file is raised."""
    from repmetrics.scoring.file_names import common_folder, export_folder

    tasks: list[tuple[Path, dict[str, Any]]] = [
        (file, {} if features_out is None else {"features_out": export_folder(features_out, file, files=files)})
        for file in files
    ]
    if len(files) == 1:
        file, arguments = tasks[0]
        return [score_file(file, **arguments, **({} if executor is None else {"executor": executor}))]
    scores = list(_score_each(score_file, tasks, base=common_folder(files), executor=executor))
    if not scores:
        raise typer.Exit(1)
    return scores


def _score_each(
    score_file: Callable[..., Score],
    tasks: Sequence[tuple[Path, dict[str, Any]]],
    *,
    base: Path,
    executor: Executor | None = None,
) -> Iterator[Score]:
    """Scores of several files, named relative to `base`. Files that fail are skipped and, at the end, reported."""
    from repmetrics.scoring.score import with_run_name
    from repmetrics.scoring.score_files import score_files

    failed: list[tuple[Path, str]] = []
    try:
        for (file, _), result in zip(tasks, score_files(score_file, tasks, executor), strict=True):
            if isinstance(result, Exception):
                failed.append((file, format_error(result)))
            else:
                yield with_run_name(result, file, base=base)
    finally:
        for line in skipped_lines(failed):
            print(line, file=sys.stderr)


def skipped_lines(failed: Sequence[tuple[Path, str]]) -> list[str]:
    """One line per error, with the files that it concerns. Errors that differ in the file's name alone are one.

    Example:
        >>> skipped_lines([(Path("a.pt"), "a.pt is empty"), (Path("b.pt"), "b.pt is empty"), (Path("c.pt"), "no")])
        ['skipped 2 files (a.pt, b.pt): a.pt is empty', 'skipped c.pt: no']
    """
    from repmetrics.measurement.titles import names_by_text

    texts: dict[str, str] = {}
    pairs = []
    for file, text in failed:
        same = text.replace(str(file), "").replace(file.name, "")
        texts.setdefault(same, text)
        pairs.append((same, str(file)))
    lines = []
    for same, files in names_by_text(pairs).items():
        what = files[0] if len(files) == 1 else f"{len(files)} files ({', '.join(files)})"
        lines.append(f"skipped {what}: {texts[same]}")
    return lines


def watch_folder(score_file: Callable[[Path], Score], folder: Path, *, poll_seconds: float, json: bool) -> None:
    """Score each new checkpoint of a folder, and show it as JSON, in a table, or as lines outside of terminals."""
    from repmetrics.scoring import checkpoints, fitted_table, watch

    new_checkpoints = checkpoints.watch_checkpoints(folder, poll_seconds=poll_seconds, until=lambda: False)
    console = fitted_table.results_console()

    def score_new(file: Path) -> Iterator[Score]:
        return _score_each(score_file, [(file, {})], base=folder)

    if json:
        for file in new_checkpoints:
            for result in score_new(file):
                show_scores([result], json=True)
        return

    if console.is_terminal:
        watch.show_table(new_checkpoints, score_new, console)
    else:
        watch.show_lines(new_checkpoints, score_new, partial(print, flush=True))


def show_scores(scores: Sequence[Score], *, json: bool) -> None:
    """Print the scores as JSON, one as a table of its metrics, several as a table of files."""
    from repmetrics.scoring import export, fitted_table, tables

    if json:
        print(export.write_json(scores), flush=True)
    elif len(scores) == 1:
        fitted_table.results_console().print(tables.score_table(scores[0]))
    else:
        fitted_table.results_console().print(tables.ranking_table(scores))


def encoder_options(
    arch: str | None, arch_kwargs: str | None, *, prefix: str | None, teacher: bool, pool: str | None,
    mean: str | None, std: str | None,
) -> dict[str, Any]:  # fmt: skip
    """Arguments of `repmetrics.encoders.checkpoint.identify` from the options of a command."""
    return {
        "arch": arch,
        "arch_kwargs": _json(arch_kwargs),
        "prefix": prefix,
        "branch": "teacher" if teacher else "student",
        "pool": pool,
        "mean": _channels(mean, "--mean"),
        "std": _channels(std, "--std"),
    }


def _json(text: str | None) -> dict[str, Any] | None:
    import json

    if text is None:
        return None
    try:
        value = json.loads(text)
    except ValueError as error:
        raise typer.BadParameter(f"--arch-kwargs is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise typer.BadParameter(f"""--arch-kwargs must be a JSON object like '{{"depth": 4}}', got {text}""")
    return value


def split_names(text: str, option: str) -> tuple[str, ...]:
    """Names separated by commas, each once."""
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
    if "" in names:
        raise typer.BadParameter(f"{option} must be names separated by commas, got {text!r}")
    return names


def _channels(text: str | None, option: str) -> tuple[float, ...] | None:
    if text is None:
        return None
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = ()
    if len(values) not in (1, 3) or not all(math.isfinite(value) for value in values):
        raise typer.BadParameter(f"{option} must be one number or three like 0.5,0.5,0.5, got {text!r}")
    if option == "--std" and min(values) <= 0:
        raise typer.BadParameter(f"--std must be above 0, got {text!r}")
    return values * 3 if len(values) == 1 else values
