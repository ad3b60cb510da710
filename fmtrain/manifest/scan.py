"""Scan of a folder of slides: each slide inspected, its tissue detected, its problem named. No torch.

The scan runs in separate processes. A slide on which a library crashes or hangs ends one process, and is reported like
any other problem.
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
from fmtrain.slides.slide import Slide, inspect_slide
from fmtrain.slides.tiles import WHITE, SlideError
from fmtrain.slides.tissue import CELL_UM, Mask, Pixels, load_mask, save_mask, tissue_mask
from repmetrics.atomic_write import atomic_path

SUFFIXES = frozenset(
    [".bif", ".czi", ".dcm", ".mrxs", ".ndpi", ".scn", ".svs", ".svslide", ".tif", ".tiff", ".vms", ".vmu"]
)  # formats of OpenSlide
MASK_VERSION = f"mask 1, cells of {CELL_UM:g} µm"  # a new version invalidates cached masks
THUMBNAIL_PX = 320
HANGING_SECONDS = 300


class Job(NamedTuple):
    """One slide to scan, and the folders of its mask and thumbnail."""

    path: Path
    mpp: float | None  # for a slide without a plausible value
    masks: Path
    thumbnails: Path


@dataclass(frozen=True)
class ScanResult:
    """One slide: its facts and tissue area, or its problem."""

    path: Path
    info: SlideInfo | None
    tissue_mm2: float
    problem: str  # empty for a usable slide


def find_slides(folder: Path) -> list[Path]:
    """All slides below a folder, sorted by path. A DICOM series is represented by its first file."""
    if is_remote(folder):
        raise ValueError(
            f"{folder} is remote, and slides are read in random order: copy the folder to a local disk "
            f"(for example `aws s3 sync` or `gsutil rsync`) and pass the copy"
        )
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder" if folder.exists() else f"{folder} does not exist")
    slides: list[Path] = []
    series: set[Path] = set()
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() not in SUFFIXES or path.name.startswith(".") or path.is_dir():
            continue
        if path.suffix.lower() == ".dcm":
            if path.parent in series:
                continue
            series.add(path.parent)
        slides.append(path)
    if not slides:
        raise ValueError(f"{folder} contains no slides: expected files with {' '.join(sorted(SUFFIXES))}")
    by_name: dict[str, Path] = {}
    for path in slides:
        other = by_name.setdefault(path.name, path)
        if other is not path:
            raise ValueError(
                f"two slides have the same name, {other} and {path}: rename or remove one, masks and labels go by name"
            )
    return slides


def scan_slide(job: Job) -> ScanResult:
    """Inspect one slide and detect its tissue. The mask is stored, and reused by the next scan."""
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
        return ScanResult(job.path, None, 0.0, "not enough memory")
    area = float(mask.mean()) * info.size[0] * info.size[1] * info.mpp**2 * 1e-6
    return ScanResult(job.path, info, area, "" if mask.any() else "no tissue found on it")


def scan_slides(
    jobs: Sequence[Job], *, workers: int = 0, on_slide: Callable[[ScanResult], None] | None = None
) -> list[ScanResult]:
    """Scan slides; results are in the order of the jobs."""
    results: dict[int, ScanResult] = {}
    for number, result in _in_pool(jobs, workers) if workers else enumerate(map(scan_slide, jobs)):
        results[number] = result
        if on_slide is not None:
            on_slide(result)
    return [results[number] for number in range(len(jobs))]


def _in_pool(jobs: Sequence[Job], workers: int) -> Iterator[tuple[int, ScanResult]]:
    """(number, result) as they finish. Jobs in flight when a process dies are retried one at a time."""
    waiting = list(range(len(jobs)))[::-1]
    while waiting:
        for number in (yield from _until_crash(jobs, waiting, workers)):
            if (yield from _until_crash(jobs, [number], 1)):
                yield number, ScanResult(jobs[number].path, None, 0.0, "it crashed or hung the reader")


def _until_crash(
    jobs: Sequence[Job], waiting: list[int], workers: int
) -> Generator[tuple[int, ScanResult], None, list[int]]:
    """Run the jobs in `waiting` from its end; if a process dies, return the jobs in flight."""
    in_flight: dict[Future[ScanResult], int] = {}
    # Not forked: this process may have threads (of torch, OpenSlide), and locks do not survive a fork.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_end_with_parent) as pool:
        try:
            while waiting or in_flight:
                while waiting and len(in_flight) < 2 * workers:
                    number = waiting.pop()
                    in_flight[pool.submit(_scan_with_timeout, jobs[number])] = number
                for future in wait(in_flight, return_when=FIRST_COMPLETED).done:
                    result = future.result()
                    yield in_flight.pop(future), result
        except BrokenProcessPool:
            return list(in_flight.values())
    return []


def _end_with_parent() -> None:
    """End this process when its parent ends: a killed parent cannot stop its pool."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def cores() -> int:
    """Number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _scan_with_timeout(job: Job) -> ScanResult:
    """`scan_slide` with a timeout: SIGALRM's default action ends the process even if native code hangs."""
    signal.alarm(HANGING_SECONDS)
    try:
        return scan_slide(job)
    finally:
        signal.alarm(0)


def _cached(path: Path, note: str) -> Mask | None:
    try:
        mask, written = load_mask(path)
    except (OSError, ValueError, SyntaxError):  # missing, or truncated by an earlier crash; Pillow raises any of these
        return None
    return mask if written == note else None


def _save_thumbnail(path: Path, picture: Pixels, mask: Mask) -> None:
    """Write a JPEG: the slide, and right of it a copy in which everything but tissue is gray."""
    h, w = picture.shape[:2]
    fine = np.kron(mask, np.ones((2, 2), np.bool_))[:h, :w, None]
    gray = picture.mean(-1, keepdims=True) * 0.5 + 70
    gap = np.full((h, max(2, w // 40), 3), WHITE, np.uint8)
    image = Image.fromarray(np.concatenate([picture, gap, np.where(fine, picture, gray).astype(np.uint8)], axis=1))
    image.thumbnail((2 * THUMBNAIL_PX, THUMBNAIL_PX))
    with atomic_path(path) as temporary:
        image.save(temporary, format="JPEG", quality=80)
