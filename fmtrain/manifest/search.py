"""Search of a folder: all its slides, and what became of every other file. No torch."""

from __future__ import annotations

import errno
import os
import stat
from collections import defaultdict
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import NamedTuple

from fmtrain.manifest.file_kinds import SUFFIXES, DicomHeader, companions, dicom_header, is_dicom, not_a_slide
from fmtrain.manifest.shown_names import shown
from fmtrain.slides.remote import StorageError, is_remote, list_files
from fmtrain.slides.retries import with_retries

HIDDEN = "hidden: its name, or that of a folder, begins with a dot"


class FoundSlide(NamedTuple):
    """One slide: the file to open, its unique name, and what is known without opening it."""

    path: Path
    name: str
    relative: str  # path below the folder that was searched
    files: tuple[str, ...] = ()  # all files of a slide that has several, relative to the folder of `path`
    patient: str = ""  # DICOM's PatientID
    uid: str = ""  # DICOM's SeriesInstanceUID
    problem: str = ""  # why it cannot be used


class OtherFile(NamedTuple):
    """A file or folder that is no slide of its own."""

    relative: str
    state: str  # "part of a slide", "not a slide", "not searched" or "excluded"
    reason: str


class SearchResult(NamedTuple):
    """Everything below a folder."""

    slides: list[FoundSlide]
    others: list[OtherFile]


def search(
    folder: Path, *, include: Sequence[str] = (), exclude: Sequence[str] = (), skip: Sequence[Path] = ()
) -> SearchResult:
    """All slides below a folder, sorted by path, and all other files with the reason.

    Links to folders are followed, each folder once. A DICOM series, and an MRXS or VMS file with the files that it
    names, is one slide. Two slides with one file name are named by their path below the folder.

    Args:
        folder: Folder to search.
        include: Patterns of names or paths; a slide must match one, if there are any.
        exclude: Patterns of names or paths that no slide may match.
        skip: Folders and files that are not listed: those that the program writes itself.
    """
    others: list[OtherFile] = []
    candidates = []
    if is_remote(folder):
        paths = _listed(folder, others)
    elif folder.is_dir():
        paths = _walk(folder, others, {_identity(path) for path in skip if path.exists()})
    else:
        raise ValueError(f"{folder} is not a folder" if folder.exists() else f"{folder} does not exist")
    for path in paths:
        relative = path.relative_to(folder).as_posix()
        if (include and not matches(relative, include)) or matches(relative, exclude):
            others.append(OtherFile(relative, "excluded", "by --include or --exclude"))
        elif reason := not_a_slide(path):
            others.append(OtherFile(relative, "not a slide", reason))
        else:
            candidates.append(path)
    slides = _unique_names(_group(candidates, folder, others))
    parts = {
        (slide.path.parent.relative_to(folder) / name).as_posix(): slide.name
        for slide in slides
        for name in slide.files
    }
    slides = [slide for slide in slides if not (slide.relative in parts and not slide.files)]
    others = [other._replace(relative=_printable(other.relative)) for other in others if other.relative not in parts]
    whole = {slide.relative for slide in slides}
    others += [OtherFile(path, "part of a slide", name) for path, name in parts.items() if path not in whole]
    if not slides:
        closed = [f"{shown(path, 'file')}: {reason}" for path, state, reason in others if state != "not a slide"]
        raise ValueError(
            f"{folder} contains no slides: expected files with {' '.join(sorted(SUFFIXES))}"
            + (f"; passed over: {'; '.join(closed[:3])}" if closed else "")
        )
    return SearchResult(slides, sorted(others))


def matches(relative: str, patterns: Sequence[str]) -> bool:
    """Whether a pattern fits the path, its last part, or a folder above it.

    Example:
        >>> matches("a/masks/1.tif", ["masks"]), matches("a/1_mask.tif", ["*_mask*"]), matches("a/1.tif", ["a/2*"])
        (True, True, False)
    """
    parts = relative.split("/")
    names = {relative, *parts, *("/".join(parts[:k]) for k in range(1, len(parts)))}
    return any(fnmatch(name, pattern.rstrip("/")) for name in names for pattern in patterns)


def _listed(folder: Path, others: list[OtherFile]) -> Iterator[Path]:
    """All files of a remote folder; hidden ones join others."""
    for path in list_files(folder):
        relative = path.relative_to(folder)
        if any(part.startswith(".") for part in relative.parts):
            others.append(OtherFile(relative.as_posix(), "not searched", HIDDEN))
        else:
            yield path


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino


def _kind(entry: os.DirEntry[str]) -> str:
    """What an entry of a folder is: "file", "folder", "link to a folder", or why it is none of these."""
    if entry.is_dir(follow_symlinks=False):
        return "folder"
    try:
        mode = os.stat(entry.path).st_mode
    except FileNotFoundError:
        return "a broken link"
    except OSError as error:
        if error.errno == errno.ELOOP:
            return "a broken link"
        raise
    if stat.S_ISDIR(mode):
        return "link to a folder"
    return "file" if stat.S_ISREG(mode) else "not a regular file"


def _walk(root: Path, others: list[OtherFile], seen: set[tuple[int, int]]) -> Iterator[Path]:
    """All regular files, the folders of the root before those that links lead to; what is not searched joins others."""

    def note(path: Path, state: str, reason: str) -> None:
        others.append(OtherFile(path.relative_to(root).as_posix() or ".", state, reason))

    def files_of(folder: Path, *, hidden: bool) -> Iterator[Path]:
        try:
            entries = with_retries(lambda: sorted(os.scandir(folder), key=lambda entry: entry.name))
            if _identity(folder) in seen:
                note(folder, "not searched", "a link to a folder that is searched elsewhere")
                return
        except OSError as error:
            note(folder, "not searched", f"the folder cannot be read ({error.strerror})")
            return
        seen.add(_identity(folder))
        for entry in entries:
            path, hides = Path(entry.path), hidden or entry.name.startswith(".")
            try:
                kind = with_retries(partial(_kind, entry))
                known = kind == "file" and _identity(path) in seen
            except OSError as error:  # the names in the folder can be read, the files cannot
                note(path, "not searched", f"cannot be read ({error.strerror})")
                continue
            if kind in ("folder", "link to a folder") and entry.name.lower().endswith(".zarr"):
                note(path, "not a slide", "a format that OpenSlide does not read (.zarr): convert it to OME-TIFF")
            elif kind == "folder":
                yield from files_of(path, hidden=hides)
            elif kind == "link to a folder":
                links.append((path, hides))
            elif kind != "file":
                note(path, "not a slide", kind)
            elif hides:
                note(path, "not searched", HIDDEN)
            elif not known:
                yield path

    links: list[tuple[Path, bool]] = []
    yield from files_of(root, hidden=False)
    while links:
        path, hides = links.pop(0)
        yield from files_of(path, hidden=hides)


def _group(paths: Sequence[Path], folder: Path, others: list[OtherFile]) -> list[FoundSlide]:
    """Slides of candidate files: one per DICOM series of a folder, and one per other file."""
    slides: list[FoundSlide] = []
    series: dict[tuple[Path, str], list[tuple[Path, DicomHeader]]] = defaultdict(list)
    for path in paths:
        slide = FoundSlide(path, path.name, path.relative_to(folder).as_posix())
        try:
            if not _encodable(slide.relative):
                printable = _printable(path.name), _printable(slide.relative)
                slides.append(FoundSlide(path, *printable, problem="its path is not text in UTF-8: rename it"))
            elif is_dicom(path):
                header = with_retries(partial(dicom_header, path))
                if header.kind is None:
                    series[path.parent, header.uid or path.name].append((path, header))
                else:
                    others.append(OtherFile(slide.relative, "not a slide", f"DICOM of another kind: {header.kind}"))
            else:
                slides.append(slide._replace(files=with_retries(partial(companions, path))))
        except StorageError:
            raise
        except (OSError, ValueError) as error:
            problem = (error.strerror or "cannot be read") if isinstance(error, OSError) else str(error)
            slides.append(slide._replace(problem=problem))
    for members in series.values():
        first, header = members[0]
        files = tuple(path.name for path, _ in members) if len(members) > 1 else ()
        patient = next((header.patient for _, header in members if header.patient), "")
        slides.append(FoundSlide(first, first.name, first.relative_to(folder).as_posix(), files, patient, header.uid))
    return slides


def _unique_names(slides: Sequence[FoundSlide]) -> list[FoundSlide]:
    """The slides, sorted by path; those that share a file name are named by their path."""
    count: dict[str, int] = defaultdict(int)
    for slide in slides:
        count[slide.name] += 1
    named = [slide._replace(name=slide.relative) if count[slide.name] > 1 else slide for slide in slides]
    return sorted(named, key=lambda slide: slide.path)


def _encodable(text: str) -> bool:
    """Whether a file name is text in the encoding of the file system."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _printable(text: str) -> str:
    r"""A file name with bytes that are no text written as escapes.

    Example:
        >>> _printable("a" + chr(0xDCFF) + ".svs")
        'a\\xff.svs'
    """
    return os.fsencode(text).decode("utf-8", "backslashreplace")
