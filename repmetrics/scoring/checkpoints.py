"""Find checkpoint files, and watch a folder for new ones."""

from __future__ import annotations

import glob
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from repmetrics.encoders.files import is_other_state, shards, weights_in
from repmetrics.encoders.hub import is_hub_id
from repmetrics.scoring.file_names import SUFFIXES, in_natural_order, natural_key


def find_checkpoints(names: Sequence[Path]) -> list[Path]:
    """Checkpoints in their order, each once.

    A folder is one checkpoint if timm, Hugging Face, torch.distributed.checkpoint or DeepSpeed wrote it as such; else
    its checkpoints count, at any depth and in natural order. So do the matches of a glob, expanded by the shell or
    here. Names of models on the hub stay as they are.
    """
    paths: list[Path] = []
    for name in in_natural_order(names):
        if name.is_dir():
            files = _in_folder(name)
            if not files:
                raise ValueError(f"{name} holds no checkpoint: expected {' '.join(SUFFIXES)}")
        elif not name.exists() and not is_hub_id(str(name)) and glob.has_magic(str(name)):
            files = list(dict.fromkeys(_whole(Path(match)) for match in glob.glob(str(name), recursive=True)))
            if not files:
                raise ValueError(f"nothing matches {name}")
        else:
            files = [name]
        paths.extend(sorted(files, key=natural_key))
    first = {path.resolve(): path for path in reversed(paths)}  # "last.ckpt" may link to another
    return [path for path in paths if first[path.resolve()] is path]


def _in_folder(folder: Path) -> list[Path]:
    """The weights of the folder if it is one checkpoint, else the checkpoints in it."""
    weights = {place: path for place, _, _ in os.walk(folder) if (path := weights_in(Path(place))) is not None}
    folders = [Path(place) for place in weights]
    whole = [path for place, path in weights.items() if not any(other in Path(place).parents for other in folders)]
    files = [file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file()]
    single = [_whole(file) for file in files if not any(place in file.parents for place in folders)]
    return [*whole, *dict.fromkeys(file for file in single if not is_other_state(file))]


def _whole(file: Path) -> Path:
    """The first shard in the place of any shard, and a folder's checkpoint in the place of its parts."""
    try:
        return shards(file)[0]
    except ValueError:  # an absent shard: reading the file says so
        return file


def watch_checkpoints(
    folder: Path, *, poll_seconds: float, sleep: Callable[[float], object] = time.sleep, until: Callable[[], bool]
) -> Iterator[Path]:
    """Checkpoints of a folder, each as soon as it is complete, until `until()` is true.

    A file is complete when its size and modification time are the same in two successive polls.
    """
    if not folder.is_dir():
        raise ValueError(f"--watch needs a folder, got {folder}: pass the one that the checkpoints are written to")
    states: dict[Path, tuple[int, int]] = {}
    done: set[Path] = set()
    while True:
        last = until()
        candidates = (f for f in folder.rglob("*") if f.suffix.lower() in SUFFIXES and not is_other_state(f))
        for file in sorted(candidates, key=natural_key):
            try:
                stat = file.stat()
            except FileNotFoundError:  # a callback that keeps the best checkpoints removed it
                continue
            state = (stat.st_size, stat.st_mtime_ns)
            if states.get(file) == state and file not in done:
                done.add(file)
                yield file
            elif states.get(file) != state:
                done.discard(file)
            states[file] = state
        if last:
            return
        sleep(poll_seconds)
