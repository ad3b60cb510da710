"""Scores of several files, in this process or by the workers of an executor."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from functools import partial
from pathlib import Path
from typing import Any

import torch

from repmetrics.executor import in_order
from repmetrics.progress import progress
from repmetrics.scoring.score import Score

Task = tuple[Path, Mapping[str, Any]]
"""File, and further arguments of the function that scores it."""


def score_files(
    score_file: Callable[..., Score], tasks: Sequence[Task], executor: Executor | None
) -> Iterator[Score | Exception]:
    """Score of each file, or the error of a file that cannot be scored, in the order of the files.

    Args:
        score_file: Function that scores a file; importable, with arguments that pickle, if there is an executor.
        tasks: Files.
        executor: Where the files are scored; None: in this process, with progress for each file.
    """
    if executor is None:
        for file, arguments in tasks:
            try:
                yield score_file(file, **arguments)
            except (ValueError, OSError) as error:
                yield error
        return
    with progress("scoring", total=len(tasks), unit="checkpoints") as meter:
        score_one = partial(_score, partial(score_file, quiet=True), torch.get_num_threads())
        for result in in_order(executor, score_one, tasks, died=_died):
            meter.advance(1)
            yield result


def score_both(
    score_file: Callable[..., Score], first: Path, second: Path, executor: Executor | None
) -> tuple[Score, Score]:
    """Scores of two files; the error of one is raised."""
    if executor is None:
        return score_file(first), score_file(second)
    results = list(score_files(score_file, [(first, {}), (second, {})], executor))
    for result in results:
        if isinstance(result, Exception):
            raise result
    a, b = (result for result in results if isinstance(result, Score))
    return a, b


def _score(score_file: Callable[..., Score], threads: int, task: Task) -> Score | Exception:
    """Score of a file, with as many threads of torch as the caller: their number decides the last bit."""
    torch.set_num_threads(threads)
    file, arguments = task
    try:
        return score_file(file, **arguments)
    except (ValueError, OSError) as error:
        return _portable(error)


def _portable(error: Exception) -> Exception:
    """The error, or its text if it cannot be sent to another process."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # whatever a constructor with other arguments raises
        return ValueError(str(error))
    return error


def _died(task: Task) -> Score | Exception:
    return OSError("the process that scored it died twice, as for lack of memory")
