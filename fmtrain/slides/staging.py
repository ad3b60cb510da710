"""Remote slides as local files: a cache of bounded size that all processes of a machine share. No torch.

A slide is stored under its fingerprint. A process that has it open holds a shared lock, and it is not removed. A
process that fetches it holds another lock, for which the others wait: each slide is fetched once.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from hashlib import sha256
from pathlib import Path

from fmtrain.slides.info import fingerprint
from fmtrain.slides.remote import StorageError, is_remote, read_range, size, url
from fmtrain.slides.tiles import SlideError
from repmetrics.file_lock import file_lock

FOLDER, LIMIT_GB = "FMTRAIN_SLIDE_CACHE", "FMTRAIN_SLIDE_CACHE_GB"  # environment variables: machines differ
DEFAULT_GB = 50.0
CHUNK = 16 << 20  # bytes of one request
PATIENCE_SECONDS = 10.0  # for slides in use, before the limit is exceeded
log = logging.getLogger(__name__)


class StagedSlide:
    """A slide as a local file, which stays until `close`.

    Attributes:
        path: Local file to open.
    """

    def __init__(self, path: Path, lock: ExitStack | None = None) -> None:
        self.path, self._lock = path, lock

    def __enter__(self) -> Path:
        return self.path

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Allow that the file is removed. A second call has no effect."""
        if self._lock is not None:
            self._lock.close()


def cache_folder() -> Path:
    """Folder of the cache: that of `FMTRAIN_SLIDE_CACHE`, or one in the user's cache."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fmtrain" / "slides"
    return Path(os.environ.get(FOLDER) or default)


def cache_limit() -> int:
    """Size of the cache in bytes: that of `FMTRAIN_SLIDE_CACHE_GB`, or 50 GB."""
    text = os.environ.get(LIMIT_GB) or str(DEFAULT_GB)
    try:
        limit = float(text)
    except ValueError:
        limit = float("nan")
    if not 0 < limit < float("inf"):
        raise ValueError(f"{LIMIT_GB} must be a size in GB above 0, got {text!r}")
    return int(limit * 1e9)


def describe(slides: Path) -> str:
    """What is assumed of a remote folder, as a sentence."""
    return (
        f"slides of {url(slides)} are kept in {cache_folder()}, at most {cache_limit() / 1e9:g} GB "
        f"({FOLDER}, {LIMIT_GB})"
    )


def stage(
    path: Path, files: Sequence[str] = (), *, digest: str = "", on_progress: Callable[[], None] = lambda: None
) -> StagedSlide:
    """A slide as a local file. A local slide is used where it is; a remote one is fetched unless the cache has it.

    Args:
        path: Slide file.
        files: All files of a slide that has several, relative to the folder of `path`.
        digest: Fingerprint that the slide must have; default that which it has now.
        on_progress: Called after each piece of the slide that was fetched.

    Raises:
        SlideError: The slide is missing, or has another fingerprint.
        StorageError: The storage does not answer, or the cache has no space.
    """
    if not is_remote(path):
        return StagedSlide(path)
    names = tuple(files) or (path.name,)
    with _errors_of_slide(path):
        digest = digest or fingerprint(path, files)
    key = sha256("\n".join([digest, *names]).encode()).hexdigest()[:32]
    folder, locks, held = cache_folder() / key, cache_folder() / "locks", ExitStack()
    try:
        with ExitStack() as undo:
            undo.push(held.__exit__)
            held.enter_context(file_lock(locks / f"{key}.use", shared=True, wait=True))
            if not folder.is_dir():
                with file_lock(locks / f"{key}.fetch", wait=True):
                    if not folder.is_dir():  # no other process fetched it meanwhile
                        _fetch(path, files, names, folder, digest, on_progress)
            os.utime(folder)
            undo.pop_all()
    except (StorageError, SlideError):
        raise
    except OSError as error:  # of the cache, not of the slide
        raise StorageError(
            f"the slide cache {cache_folder()} cannot be used ({error.strerror or error}): set {FOLDER} to a folder "
            f"with space, or lower {LIMIT_GB}"
        ) from None
    return StagedSlide(folder / path.name, held)


@contextmanager
def _errors_of_slide(path: Path) -> Iterator[None]:
    """Errors of the storage that stay are errors of the slide."""
    try:
        yield
    except StorageError:
        raise
    except (OSError, ValueError) as error:
        raise SlideError(f"{path.name}: cannot be read at {url(path)} ({error})") from error


def _fetch(
    path: Path, files: Sequence[str], names: Sequence[str], folder: Path, digest: str, on_progress: Callable[[], None]
) -> None:
    """Fetch all files of a slide into a folder, which appears when it is complete and has the right fingerprint."""
    with _errors_of_slide(path):
        sizes = {name: size(path.parent / name) for name in names}
    part = folder.with_name(folder.name + ".part")
    try:
        _reserve(part, sizes)
        for name, length in sizes.items():
            with (part / name).open("r+b") as file:
                for start in range(0, length, CHUNK):
                    with _errors_of_slide(path):
                        piece = read_range(path.parent / name, start, min(start + CHUNK, length))
                    file.write(piece)
                    on_progress()
        if fingerprint(part / path.name, files) != digest:
            raise SlideError(f"{path.name} at {url(path)} has changed since its fingerprint was taken")
        part.rename(folder)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def _reserve(part: Path, sizes: dict[str, int]) -> None:
    """Make room for a slide and take it: files of the right size. Slides in use stay, at worst beyond the limit."""
    needed, limit, start = sum(sizes.values()), cache_limit(), time.monotonic()
    if needed > limit:
        raise StorageError(
            f"{next(iter(sizes))} takes {needed / 1e9:.3g} GB, more than the slide cache of {limit / 1e9:.3g} GB: "
            f"raise {LIMIT_GB}"
        )
    while True:
        with file_lock(part.parent / "locks" / "room", wait=True):
            shutil.rmtree(part, ignore_errors=True)  # of a process that died
            fits, late = _evict(part.parent, limit - needed), time.monotonic() > start + PATIENCE_SECONDS
            if fits or late:
                for name, length in sizes.items():
                    (part / name).parent.mkdir(parents=True, exist_ok=True)
                    with (part / name).open("wb") as file:
                        os.posix_fallocate(file.fileno(), 0, max(length, 1))
                        file.truncate(length)
                break
        time.sleep(0.1)
    if not fits:
        log.warning("the slide cache exceeds %.3g GB, because its slides are in use: raise %s", limit / 1e9, LIMIT_GB)


def _evict(cache: Path, limit: int) -> bool:
    """Remove the slides that were not used for longest, until the rest fits; whether it fits.

    Other processes complete and remove their slides meanwhile: what vanishes is passed over.
    """
    slides = sorted(_contents(cache))
    total = sum(size for _, size, _ in slides)
    for _, length, folder in slides:
        stale = folder.suffix == ".part"  # its process died if nobody holds its lock
        if total <= limit and not stale:
            continue
        with (
            suppress(BlockingIOError, FileNotFoundError),
            file_lock(cache / "locks" / f"{folder.stem}.{'fetch' if stale else 'use'}"),
        ):
            part = folder.with_suffix(".part")  # a process that dies here leaves no half of a slide
            folder.rename(part)
            shutil.rmtree(part)
            total -= length
    return total <= limit


def _contents(cache: Path) -> Iterator[tuple[float, int, Path]]:
    """Time of the last use, size, and folder of each slide."""
    for folder in cache.iterdir():
        with suppress(FileNotFoundError):
            if folder.name != "locks":
                paths = [Path(place) / name for place, _, names in os.walk(folder) for name in names]
                yield folder.stat().st_mtime, sum(path.stat().st_size for path in paths), folder
