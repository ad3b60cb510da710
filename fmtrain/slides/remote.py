"""Files on object storage or on a web server, read through fsspec as local ones are. No torch."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote, unquote

from fmtrain.slides.retries import with_retries
from repmetrics.progress import format_duration

T = TypeVar("T")
log = logging.getLogger(__name__)

FEW_WAITS = (0.5, 2.0)  # seconds before each retry, at the start of a command; libraries have retries of their own
WAITS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0, 60.0, 60.0)  # later: an outage of five minutes is bridged
_FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, ValueError, TypeError, ImportError)


class StorageError(OSError):
    """Storage that does not answer for long, or cannot be asked. It says nothing of the slide, which stays."""


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether a path is not on this machine: `s3://…`, `https://…`, `gs:/…`."""
    head, colon, _ = os.fspath(path).partition(":/")
    return bool(colon) and len(head) > 1 and head.replace("+", "").replace("-", "").isalnum()


def url(path: Path) -> str:
    """Address of a remote path, of which pathlib keeps one slash. Those of web servers are encoded.

    Example:
        >>> url(Path("s3://bucket/a 1.svs")), url(Path("https://host/a 1.svs"))
        ('s3://bucket/a 1.svs', 'https://host/a%201.svs')
    """
    scheme, _, rest = path.as_posix().partition(":/")
    rest = rest.lstrip("/")
    return f"{scheme}://{quote(rest, safe='/:@') if _is_web(path) else rest}"


def decoded(path: Path) -> Path:
    """A path as a person reads it: `%20` in the address of a web server is a space.

    Example:
        >>> decoded(Path("https://host/my%20slides")).as_posix()
        'https:/host/my slides'
    """
    return Path(unquote(path.as_posix())) if _is_web(path) else path


def _is_web(path: Path) -> bool:
    return path.as_posix().startswith(("http:/", "https:/"))


def list_files(folder: Path) -> list[Path]:
    """All files below a remote folder, sorted.

    Raises:
        ValueError: There is no such folder, a package is missing, or the storage does not answer.
    """
    try:
        system, root = _file_system(folder)
        paths = with_patience(lambda: _find(system, root), folder, waits=FEW_WAITS)
    except (FileNotFoundError, PermissionError, StorageError) as error:
        raise ValueError(str(error) if isinstance(error, StorageError) else f"{url(folder)}: {error}") from error
    base = root.rstrip("/") + "/"
    names = {name.removeprefix(base) for name in paths if name.startswith(base)} - {""}
    if _is_web(folder):  # links; those with a query sort the listing
        names = {unquote(name) for name in names if "?" not in name}
    return sorted(folder / name for name in names)


def _find(system: Any, root: str) -> list[str]:
    if "http" not in system.protocol:
        return list(system.find(root))
    # `find` of a web server passes over folders that cannot be read
    walk = system.walk(root, detail=True, on_error="raise")
    return [entry["name"] for _, _, files in walk for entry in files.values()]


def is_file(path: Path) -> bool:
    """Whether a file exists, here or on remote storage."""
    if not is_remote(path):
        return path.is_file()
    system, name = _file_system(path)
    try:
        return bool(with_patience(lambda: system.info(name), path)["type"] == "file")
    except FileNotFoundError:
        return False


def version(path: Path) -> list[Any]:
    """What changes when a file changes, without reading it: its size, and its time or its tag on the server."""
    if not is_remote(path):
        status = os.stat(path)
        return [status.st_size, status.st_mtime_ns]
    system, name = _file_system(path)
    facts = with_patience(lambda: system.info(name), path)
    tag = next((facts[key] for key in ("ETag", "etag", "md5Hash", "LastModified", "mtime") if facts.get(key)), "")
    return [facts["size"], str(tag)]


def size(path: Path) -> int:
    """Size of a file in bytes."""
    bytes_: int = version(path)[0]
    return bytes_


def first_bytes(path: Path, count: int) -> bytes:
    """The first bytes of a file, here or on remote storage: `count`, or fewer if the file is shorter."""
    if is_remote(path):
        return read_range(path, 0, min(count, size(path)))
    with path.open("rb") as file:
        return file.read(count)


@contextmanager
def range_reader(path: Path) -> Iterator[Callable[[int, int], bytes]]:
    """Function that returns the bytes of a file from a start to a stop, here or on remote storage."""
    if is_remote(path):
        yield partial(read_range, path)
        return
    with path.open("rb") as file:

        def read(start: int, stop: int) -> bytes:
            file.seek(start)
            return file.read(stop - start)

        yield read


def read_range(path: Path, start: int, stop: int) -> bytes:
    """Bytes of a remote file. A read that fails is retried for five minutes."""
    if start >= stop:
        return b""
    system, name = _file_system(path)
    data: bytes = with_patience(lambda: system.cat_file(name, start=start, end=stop), path)
    if len(data) != stop - start:
        raise ValueError(f"{url(path)}: asked for {stop - start} bytes, got {len(data)}: the server serves no ranges")
    return data


def with_patience(action: Callable[[], T], path: Path, *, waits: Sequence[float] | None = None) -> T:
    """Result of an action on a remote path, retried as long as the storage does not answer.

    Raises:
        FileNotFoundError: The file does not exist; like other errors that stay, it is raised immediately.
        StorageError: The last attempt failed, or access is refused.
    """
    if not is_remote(path):
        return action()
    waits, start = WAITS if waits is None else waits, time.monotonic()

    def say_and_wait(seconds: float) -> None:
        if seconds == waits[0] and len(waits) > len(FEW_WAITS):
            log.warning("%s does not answer: retrying for %s and more", url(path), format_duration(sum(waits)))
        time.sleep(seconds)

    try:
        return with_retries(action, waits=waits, passes=_may_pass, wait=say_and_wait)
    except Exception as error:  # each library raises its own
        passes = _may_pass(error)
        if isinstance(error, _FINAL) and not passes:
            raise
        text = f"{url(path)} cannot be read ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
        waited = format_duration(time.monotonic() - start)
        raise StorageError(f"{text}: the storage has not answered for {waited}" if passes else text) from None


def _may_pass(error: Exception) -> bool:
    """Whether an error may be one of the storage at this moment."""
    status = getattr(error, "status", None) or _s3_status(error)  # of an HTTP answer
    if isinstance(status, int):
        return status in (408, 425, 429) or status >= 500
    if isinstance(error, FileNotFoundError) and isinstance(cause := error.__cause__, Exception):
        return _may_pass(cause)  # fsspec calls a web server that does not answer a missing file
    return not isinstance(error, _FINAL) and "Credentials" not in type(error).__name__


def _s3_status(error: Exception) -> int | None:
    response = getattr(error, "response", None)
    return response.get("ResponseMetadata", {}).get("HTTPStatusCode") if isinstance(response, dict) else None


def _file_system(path: Path) -> tuple[Any, str]:
    """File system of a remote path, one per process and address, and the path on it.

    Raises:
        StorageError: A package is missing on this machine.
    """
    try:
        from fsspec.core import url_to_fs
    except ImportError:
        raise StorageError(_missing(path, "fsspec")) from None
    try:
        system, name = url_to_fs(url(path), use_listings_cache=False)  # a file may be replaced meanwhile
    except ImportError as error:
        raise StorageError(_missing(path, str(error).partition(".")[0])) from None
    return system, name


def _missing(path: Path, what: str) -> str:
    return (
        f"{url(path)} is remote, and a package is missing to read it ({what}): pip install 'repmetrics[remote]', or "
        "copy the folder to a local disk (for example `aws s3 sync` or `gsutil rsync`)"
    )
