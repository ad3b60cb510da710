"""Scan of a folder of slides: each slide inspected, its tissue detected, its problem named. No torch.

The scan runs in separate processes. A slide on which a library crashes or hangs ends one process, and is reported like
any other problem.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from fmtrain.manifest.manifest import asset
from fmtrain.slides.given_masks import given_mask, mask_errors
from fmtrain.slides.info import SlideInfo, fingerprint
from fmtrain.slides.ink import not_bright_field
from fmtrain.slides.inspection import inspect_slide
from fmtrain.slides.resolution import NO_MPP, GivenMpp
from fmtrain.slides.retries import WAITS_SECONDS, may_pass
from fmtrain.slides.slide import Slide
from fmtrain.slides.staging import stage
from fmtrain.slides.tiles import WHITE, SlideError
from fmtrain.slides.tissue import CELL_UM, Mask, Pixels, load_mask, save_mask, separability, tissue_mask
from repmetrics.atomic_write import atomic_path
from repmetrics.executor import as_completed

MASK_VERSION = f"mask 2, cells of {CELL_UM:g} µm"  # a new version invalidates cached masks
THUMBNAIL_PX = 320
# A process is ended if it makes no progress for so long. Wall time is the limit of storage that hangs: a healthy slide
# on a busy machine, or on slow storage, takes hours.
HANGING_CPU_SECONDS = 300
HANGING_SECONDS = 3600


class Job(NamedTuple):
    """One slide to scan, and the folders of its mask and thumbnail."""

    path: Path
    given: GivenMpp | None
    masks: Path
    thumbnails: Path
    name: str = ""  # default: that of the file
    files: tuple[str, ...] = ()  # of a slide that has several
    problem: str = ""  # known without opening it
    given_mask: Path | None = None


@dataclass(frozen=True)
class ScanResult:
    """One slide: its facts and tissue area, or its problem."""

    path: Path
    info: SlideInfo | None
    tissue_mm2: float
    problem: str  # empty for a usable slide
    name: str = ""
    mask_quality: float = float("nan")  # separability; NaN if it is not known
    may_pass: bool = False  # whether the problem may be one of the storage at this moment


def scan_slide(job: Job, on_progress: Callable[[], None] = lambda: None) -> ScanResult:
    """Inspect one slide and detect its tissue. The mask is stored, and reused by the next scan."""
    name = job.name or job.path.name
    if job.problem:
        return ScanResult(job.path, None, 0.0, job.problem, name)
    try:
        with stage(job.path, job.files, on_progress=on_progress) as path:
            info, mask, quality = _inspect(job, path, name, on_progress)
    except SlideError as error:
        problem = str(error).removeprefix(f"{name}: ")
        return ScanResult(job.path, None, 0.0, problem, name, may_pass=may_pass(error))
    except MemoryError:
        return ScanResult(job.path, None, 0.0, "not enough memory", name)
    area = float(mask.mean()) * info.size[0] * info.size[1] * info.mpp**2 * 1e-6
    return ScanResult(job.path, info, area, "" if mask.any() else "no tissue found on it", name, quality)


def _inspect(job: Job, path: Path, name: str, on_progress: Callable[[], None]) -> tuple[SlideInfo, Mask, float]:
    """Facts about a slide whose file is at a local path, its mask, and how well this separates the colors."""
    info = inspect_slide(path, given=job.given or NO_MPP, name=name, files=job.files)
    on_progress()
    mask_path, thumbnail_path = asset(job.masks, name, ".png"), asset(job.thumbnails, name, ".jpg")
    with mask_errors(name):
        given = f", given {fingerprint(job.given_mask)}" if job.given_mask else ""
    note = f"{MASK_VERSION}, slide {info.fingerprint}, mpp {info.mpp:.6g}{given}, quality "
    cached = _cached(mask_path, note) if thumbnail_path.exists() else None
    if cached is not None:
        return info, *cached
    with Slide(path, info) as slide:
        picture = slide.thumbnail(mpp=CELL_UM / 2, on_progress=on_progress)
    if job.given_mask is not None:
        with mask_errors(name):
            mask = given_mask(job.given_mask, size=info.size, mpp=info.mpp)
    elif reason := not_bright_field(picture):
        raise SlideError(f"{name}: {reason}")
    else:
        mask = tissue_mask(picture)
    quality = separability(picture, mask)
    save_mask(mask_path, mask, note=f"{note}{quality:.3f}")
    _save_thumbnail(thumbnail_path, picture, mask)
    return info, mask, round(quality, 3)


def scan_slides(
    jobs: Sequence[Job], *, executor: Executor | None = None, on_slide: Callable[[ScanResult], None] | None = None
) -> list[ScanResult]:
    """Scan slides; results are in the order of the jobs.

    Slides whose problem may pass are scanned again after all others, together: each pause is made once for all of them.

    Args:
        jobs: Slides.
        executor: Where the slides are scanned; None: in this process, which a slide may crash or hang.
        on_slide: Function called with each result.
    """
    results: dict[int, ScanResult] = {}
    numbers = list(range(len(jobs)))
    scan = scan_slide if executor is None else _scan_with_timeout
    for pause in (*WAITS_SECONDS, None):
        selected = [jobs[number] for number in numbers]
        for position, result in as_completed(executor, scan, selected, died=_died):
            results[numbers[position]] = result
            if on_slide is not None and (pause is None or not result.may_pass):
                on_slide(result)
        numbers = [number for number in numbers if results[number].may_pass]
        if pause is None or not numbers:
            break
        time.sleep(pause)
    return [results[number] for number in range(len(jobs))]


def _died(job: Job) -> ScanResult:
    return ScanResult(job.path, None, 0.0, "it crashed or hung the reader", job.name or job.path.name)


def _scan_with_timeout(job: Job) -> ScanResult:
    """`scan_slide` with a timeout: the default action of both signals ends the process even if native code hangs."""

    def restart() -> None:
        signal.setitimer(signal.ITIMER_PROF, HANGING_CPU_SECONDS)
        signal.setitimer(signal.ITIMER_REAL, HANGING_SECONDS)

    try:
        restart()
        return scan_slide(job, restart)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)


def _cached(path: Path, note: str) -> tuple[Mask, float] | None:
    try:
        mask, written = load_mask(path)
    except (OSError, ValueError, SyntaxError):  # missing, or truncated by an earlier crash; Pillow raises any of these
        return None
    return (mask, float(written.removeprefix(note))) if written.startswith(note) else None


def _save_thumbnail(path: Path, picture: Pixels, mask: Mask) -> None:
    """Write a JPEG: the slide, and right of it a copy in which everything but tissue is gray."""
    h, w = picture.shape[:2]
    fine = np.asarray(Image.fromarray(mask).resize((w, h), Image.Resampling.NEAREST))[..., None]
    gray = picture.mean(-1, keepdims=True) * 0.5 + 70
    gap = np.full((h, max(2, w // 40), 3), WHITE, np.uint8)
    image = Image.fromarray(np.concatenate([picture, gap, np.where(fine, picture, gray).astype(np.uint8)], axis=1))
    image.thumbnail((2 * THUMBNAIL_PX, THUMBNAIL_PX))
    with atomic_path(path) as temporary:
        image.save(temporary, format="JPEG", quality=80)
