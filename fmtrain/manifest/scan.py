"""A folder of slides → what is in it: each slide inspected, its tissue found, its faults named. No torch.

In parallel, in processes of their own: a slide on which a library crashes or hangs takes down one of them, and
is named like any other fault.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from fmtrain.slides.info import SlideInfo, is_remote
from fmtrain.slides.slide import Slide, SlideError, inspect_slide
from fmtrain.slides.tiles import WHITE
from fmtrain.slides.tissue import CELL_UM, Mask, Pixels, load_mask, save_mask, tissue_mask

SUFFIXES = frozenset(
    [".bif", ".czi", ".dcm", ".mrxs", ".ndpi", ".scn", ".svs", ".svslide", ".tif", ".tiff", ".vms", ".vmu"]
)  # of the formats OpenSlide opens
MASK_VERSION = f"mask 1, cells of {CELL_UM:g} µm"  # a change of the rules makes cached masks stale
THUMBNAIL_PX = 320
HANGING_SECONDS = 300


class Job(NamedTuple):
    """One slide to examine, and where its mask and thumbnail go."""

    path: Path
    mpp: float | None  # where the slide does not say it itself
    masks: Path
    thumbnails: Path


@dataclass(frozen=True)
class ScanResult:
    """One slide: what it is and how much tissue it holds, or what is wrong with it."""

    path: Path
    info: SlideInfo | None
    tissue_mm2: float
    problem: str  # empty where all is well


def find_slides(folder: Path) -> list[Path]:
    """All slides below a folder, sorted by path. Of a DICOM series the first file stands for the whole.

    Raises:
        ValueError: remote, not a folder, without slides, or with two slides of one name.
    """
    if is_remote(folder):
        raise ValueError(
            f"{folder} is remote, and slides are read in random order: copy the folder to a local disk first "
            f"(for example `aws s3 sync` or `gsutil rsync`), and give that one"
        )
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder" if folder.exists() else f"{folder} does not exist")
    found: list[Path] = []
    series: set[Path] = set()
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() not in SUFFIXES or path.name.startswith(".") or path.is_dir():
            continue
        if path.suffix.lower() == ".dcm":
            if path.parent in series:
                continue
            series.add(path.parent)
        found.append(path)
    if not found:
        raise ValueError(f"{folder} holds no slides: looked for {' '.join(sorted(SUFFIXES))}")
    by_name: dict[str, Path] = {}
    for path in found:
        other = by_name.setdefault(path.name, path)
        if other is not path:
            raise ValueError(
                f"two slides of one name, {other} and {path}: labels and masks go by name, so rename or remove one"
            )
    return found


def scan_slide(job: Job) -> ScanResult:
    """Inspect one slide and find its tissue; the mask is kept, and taken from there the next time."""
    try:
        info = inspect_slide(job.path, mpp=job.mpp)
        mask_path = job.masks / f"{info.name}.png"
        thumbnail_path = job.thumbnails / f"{info.name}.jpg"
        note = f"{MASK_VERSION}, slide {info.fingerprint}, mpp {info.mpp:.6g}"
        mask = _cached(mask_path, note) if thumbnail_path.exists() else None
        if mask is None:
            with Slide(job.path, info) as slide:
                picture = slide.thumbnail(mpp=CELL_UM / 2)
            mask = tissue_mask(picture)
            save_mask(mask_path, mask, note=note)
            _save_thumbnail(thumbnail_path, picture, mask)
    except SlideError as error:
        return ScanResult(job.path, None, 0.0, str(error).removeprefix(f"{job.path.name}: "))
    except MemoryError:
        return ScanResult(job.path, None, 0.0, "it needs more memory than there is")
    area = float(mask.mean()) * info.size[0] * info.size[1] * info.mpp**2 * 1e-6
    return ScanResult(job.path, info, area, "" if mask.any() else "no tissue found on it")


def scan_slides(
    jobs: Sequence[Job], *, workers: int = 0, on_slide: Callable[[ScanResult], None] | None = None
) -> list[ScanResult]:
    """Examine slides; the results in the order of the jobs.

    Args:
        jobs: one a slide.
        workers: processes; 0 works in this one, which a library that crashes then takes down.
        on_slide: called after each slide, in the order they finish, to show progress.
    """
    results: dict[int, ScanResult] = {}
    for number, result in _in_pool(jobs, workers) if workers else enumerate(map(scan_slide, jobs)):
        results[number] = result
        if on_slide is not None:
            on_slide(result)
    return [results[number] for number in range(len(jobs))]


def _in_pool(jobs: Sequence[Job], workers: int) -> Iterator[tuple[int, ScanResult]]:
    """(number, result) as they finish. What was in flight when a process died is tried again, one at a time."""
    waiting = list(range(len(jobs)))[::-1]
    while waiting:
        for number in (yield from _until_crash(jobs, waiting, workers)):
            if (yield from _until_crash(jobs, [number], 1)):
                yield number, ScanResult(jobs[number].path, None, 0.0, "it crashed or hung the reader")


def _until_crash(
    jobs: Sequence[Job], waiting: list[int], workers: int
) -> Generator[tuple[int, ScanResult], None, list[int]]:
    """Work off `waiting` from its end; returns early with the suspects if a process dies."""
    flying: dict[Future[ScanResult], int] = {}
    # Not forked: this process may hold threads (torch's, OpenSlide's), and locks do not survive a fork.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_end_with_parent) as pool:
        try:
            while waiting or flying:
                while waiting and len(flying) < 2 * workers:
                    number = waiting.pop()
                    flying[pool.submit(_scan_with_timeout, jobs[number])] = number
                for future in wait(flying, return_when=FIRST_COMPLETED).done:
                    result = future.result()
                    yield flying.pop(future), result
        except BrokenProcessPool:
            return list(flying.values())
    return []


def _end_with_parent() -> None:
    """A killed parent cannot tell its pool to stop: watch it, and follow."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _scan_with_timeout(job: Job) -> ScanResult:
    """`scan_slide` under an alarm whose default action ends the process: no code of a library can outsit it."""
    signal.alarm(HANGING_SECONDS)
    try:
        return scan_slide(job)
    finally:
        signal.alarm(0)


def _cached(path: Path, note: str) -> Mask | None:
    try:
        mask, written = load_mask(path)
    except (OSError, ValueError, SyntaxError):  # absent, or cut off by an earlier crash: Pillow says it in many ways
        return None
    return mask if written == note else None


def _save_thumbnail(path: Path, picture: Pixels, mask: Mask) -> None:
    """The slide as it looks, beside it with everything that is not tissue greyed out."""
    h, w = picture.shape[:2]
    fine = np.kron(mask, np.ones((2, 2), np.bool_))[:h, :w, None]
    grey = picture.mean(-1, keepdims=True) * 0.5 + 70
    gap = np.full((h, max(2, w // 40), 3), WHITE, np.uint8)
    image = Image.fromarray(np.concatenate([picture, gap, np.where(fine, picture, grey).astype(np.uint8)], axis=1))
    image.thumbnail((2 * THUMBNAIL_PX, THUMBNAIL_PX))
    temporary = path.with_name(path.name + ".part")
    image.save(temporary, format="JPEG", quality=80)
    temporary.replace(path)
