"""What the user names → the files to score; a folder still being written to, file by file."""

from __future__ import annotations

import glob
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from repmetrics.cache import digest, file_digest
from repmetrics.checkpoint import SIDECARS, load_encoder
from repmetrics.scoring import Score, Settings, progress, score
from repmetrics.sources import Source, open_source

SUFFIXES = (".ckpt", ".pt", ".pth", ".safetensors", ".bin")


def find_checkpoints(names: Sequence[Path]) -> list[Path]:
    """Files as named, globs filled in, and in a folder every checkpoint at any depth; each once, numbers in order.

    Raises:
        ValueError: a folder or a glob with no checkpoint in it.
    """
    found: list[Path] = []
    for name in names:
        if name.is_dir():
            files = [file for file in name.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file()]
            if not files:
                raise ValueError(f"{name} holds no checkpoint: expected {' '.join(SUFFIXES)}")
        elif not name.exists() and glob.has_magic(str(name)):
            files = [Path(match) for match in glob.glob(str(name), recursive=True)]
            if not files:
                raise ValueError(f"nothing matches {name}")
        else:
            files = [name]
        found.extend(sorted(files, key=natural))
    once = {file.resolve(): file for file in reversed(found)}  # "last.ckpt" may link to another
    return [file for file in found if once[file.resolve()] is file]


def common_folder(files: Sequence[Path]) -> Path:
    """The deepest folder that holds all the files.

    Example:
        >>> common_folder([Path("/runs/a/last.ckpt"), Path("/runs/b/last.ckpt")]).as_posix()
        '/runs'
    """
    return Path(os.path.commonpath([os.path.abspath(file.parent) for file in files]))


def placed(score: Score, file: Path, *, base: Path) -> Score:
    """The score under the name that its file has from `base`, so that equal file names stay apart."""
    run = Path(os.path.relpath(file.parent, base)).as_posix()
    return score if run == "." else replace(score, name=f"{run}/{score.name}", run=run)


def without_copies(scores: Sequence[Score]) -> list[Score]:
    """The first of those in one run that state the same step and measure the same: "last.ckpt" copies another."""
    kept: list[Score] = []
    for one in scores:
        if one.step is None or not any(_same(one, other) for other in kept):
            kept.append(one)
    return kept


def _same(first: Score, second: Score) -> bool:
    def told(score: Score) -> tuple[Any, ...]:
        return score.run, score.step, {name: m.to_json() for name, m in score.measurements.items()}

    return told(first) == told(second)


def natural(path: Path) -> list[tuple[int, str]]:
    """A key that sorts step=9 before step=10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", str(path))]


def follow(
    folder: Path, *, poll_seconds: float, sleep: Callable[[float], object] = time.sleep, until: Callable[[], bool]
) -> Iterator[Path]:
    """Checkpoints of a folder, each as soon as it is whole, until `until()`.

    A file is taken for whole when its size and time have not changed from one look to the next.

    Raises:
        ValueError: it is no folder.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder to follow: name the one that the checkpoints are written to")
    seen: dict[Path, tuple[int, int]] = {}
    done: set[Path] = set()
    while True:
        last = until()
        for file in sorted((f for f in folder.rglob("*") if f.suffix.lower() in SUFFIXES), key=natural):
            try:
                stat = file.stat()
            except FileNotFoundError:  # a callback that keeps the best removes others
                continue
            state = (stat.st_size, stat.st_mtime_ns)
            if seen.get(file) == state and file not in done:
                done.add(file)
                yield file
            elif seen.get(file) != state:
                done.discard(file)
            seen[file] = state
        if last:
            return
        sleep(poll_seconds)


def content_digests(file: Path) -> list[str]:
    """Digests of a checkpoint and of the JSON beside it, on which its encoder depends as well."""
    beside = (file.with_name(name) for name in SIDECARS)
    return [file_digest(file), *(file_digest(side) for side in beside if side.is_file())]


def score_checkpoint(
    file: Path,
    source: Source,
    *,
    overrides: Mapping[str, Any],
    channels: Mapping[str, Sequence[float] | None],
    metrics: Sequence[str],
    settings: Settings,
) -> Score:
    """Score one checkpoint, with progress on stderr.

    Args:
        file: the checkpoint.
        source: what to embed.
        overrides: arguments of `load_encoder`.
        channels: "mean" and "std" in place of those found with the checkpoint.
        metrics: names.
        settings: how to embed.
    """
    if source.images is None:
        raise ValueError(f"{source.path.name} holds features already: leave the checkpoint out")
    encoder = load_encoder(file, **overrides)
    for name, values in channels.items():
        if values is not None:
            setattr(encoder, name, tuple(values))
    key = None
    if settings.cache is not None:
        stated = json.dumps([dict(overrides), encoder.mean, encoder.std], sort_keys=True)
        key = digest([*content_digests(file), stated])
    total = len(source.images)  # type: ignore[arg-type]  # map-style datasets have a length
    with progress(f"embedding {source.path.name} with {encoder.source}", total=total) as on_batch:
        return score(source, encoder=encoder, metrics=metrics, settings=settings, key=key, on_batch=on_batch)


def score_embeddings(
    file: Path, *, labels: str | None, groups: str | None, metrics: Sequence[str], settings: Settings
) -> Score:
    """Score a file (or a folder, one file a slide) of embeddings."""
    try:
        source = open_source(file, labels=labels, groups=groups)
    except ValueError as error:
        if file.suffix.lower() not in SUFFIXES:
            raise
        raise ValueError(f"{error}; a checkpoint is scored on images: name them with --data") from error
    if source.features is None:
        raise ValueError(f"{file.name} holds images: pass it as --data, and a checkpoint to embed them with")
    return score(source, metrics=metrics, settings=settings)
