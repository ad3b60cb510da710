"""Search of a folder: which files are slides, which files belong to them, and why any other file is none. No torch."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import NamedTuple

import openslide

from fmtrain.slides.info import is_remote
from fmtrain.slides.retries import with_retries

SUFFIXES = frozenset([
    ".avs", ".bif", ".btf", ".czi", ".dcm", ".mrxs", ".ndpi", ".qptiff", ".scn", ".svs", ".svslide", ".tf8", ".tif",
    ".tiff", ".vms", ".vmu",
])  # fmt: skip  # formats of OpenSlide, and TIFF under other names
_OTHER_SCANNERS = {
    ".isyntax": "Philips",
    ".kfb": "KFBio",
    ".mds": "Motic",
    ".sdpc": "TEKSQRAY",
    ".tmap": "UNIC",
    ".vsi": "Olympus",
    ".ets": "Olympus",
    ".lif": "Leica",
    ".jp2": "JPEG 2000",
    ".zarr": "Zarr",
    ".ndpis": "Hamamatsu",
}
_PICTURES = frozenset([".bmp", ".gif", ".jpeg", ".jpg", ".png", ".webp"])
_INCOMPLETE = frozenset([".aria2", ".crdownload", ".filepart", ".part", ".partial", ".tmp"])
_NO_SLIDES = frozenset([
    ".csv", ".dat", ".db", ".geojson", ".gz", ".h5", ".html", ".ini", ".json", ".log", ".md", ".npy", ".parquet",
    ".pdf", ".pt", ".py", ".tar", ".tsv", ".txt", ".xlsx", ".xml", ".yaml", ".yml", ".zip",
])  # fmt: skip  # not opened
_WHOLE_SLIDE = "1.2.840.10008.5.1.4.1.1.77.1.6"  # VL Whole Slide Microscopy Image Storage
_SERIES = 0x0020000E  # tag of SeriesInstanceUID
_TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


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
    state: str  # "part of a slide", "not a slide" or "not searched"
    reason: str


class SearchResult(NamedTuple):
    """Everything below a folder."""

    slides: list[FoundSlide]
    others: list[OtherFile]


def find_slides(folder: Path) -> list[Path]:
    """Files to open of all slides below a folder, sorted by path."""
    return [slide.path for slide in search(folder).slides]


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
    if is_remote(folder):
        raise ValueError(
            f"{folder} is remote, and slides are read in random order: copy the folder to a local disk "
            f"(for example `aws s3 sync` or `gsutil rsync`) and pass the copy"
        )
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder" if folder.exists() else f"{folder} does not exist")
    others: list[OtherFile] = []
    candidates = []
    for path in _walk(folder, others, {_identity(path) for path in skip if path.exists()}):
        relative = path.relative_to(folder).as_posix()
        if (include and not _matches(relative, include)) or _matches(relative, exclude):
            others.append(OtherFile(relative, "excluded", "by --include or --exclude"))
        elif reason := _not_a_slide(path):
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
        closed = [f"{other.relative}: {other.reason}" for other in others if other.state != "not a slide"]
        raise ValueError(
            f"{folder} contains no slides: expected files with {' '.join(sorted(SUFFIXES))}"
            + (f"; passed over: {'; '.join(closed[:3])}" if closed else "")
        )
    return SearchResult(slides, sorted(others))


def _matches(relative: str, patterns: Sequence[str]) -> bool:
    """Whether a pattern fits the path, its last part, or a folder above it.

    Example:
        >>> _matches("a/masks/1.tif", ["masks"]), _matches("a/1_mask.tif", ["*_mask*"]), _matches("a/1.tif", ["a/2*"])
        (True, True, False)
    """
    parts = relative.split("/")
    names = {relative, *parts, *("/".join(parts[:k]) for k in range(1, len(parts)))}
    return any(fnmatch(name, pattern.rstrip("/")) for name in names for pattern in patterns)


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino


def _walk(root: Path, others: list[OtherFile], seen: set[tuple[int, int]]) -> Iterator[Path]:
    """All regular files, the folders of the root before those that links lead to; what is not searched joins others."""

    def note(path: Path, state: str, reason: str) -> None:
        others.append(OtherFile(path.relative_to(root).as_posix() or ".", state, reason))

    def files_of(folder: Path, *, hidden: bool) -> Iterator[Path]:
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
            if _identity(folder) in seen:
                note(folder, "not searched", "a link to a folder that is searched elsewhere")
                return
        except OSError as error:
            note(folder, "not searched", f"the folder cannot be read ({error.strerror})")
            return
        seen.add(_identity(folder))
        for entry in entries:
            path = Path(entry.path)
            hides = hidden or entry.name.startswith(".")
            if entry.name.lower().endswith(".zarr") and path.is_dir():
                note(path, "not a slide", "a format that OpenSlide does not read (.zarr): convert it to OME-TIFF")
            elif entry.is_dir(follow_symlinks=False):
                yield from files_of(path, hidden=hides)
            elif entry.is_symlink() and path.is_dir():
                links.append((path, hides))
            elif entry.is_symlink() and not path.exists():
                note(path, "not a slide", "a broken link, or one without permission")
            elif not path.is_file():
                note(path, "not a slide", "not a regular file")
            elif hides:
                note(path, "not searched", "hidden: its name, or that of a folder, begins with a dot")
            elif _identity(path) not in seen:
                yield path

    links: list[tuple[Path, bool]] = []
    yield from files_of(root, hidden=False)
    while links:
        path, hides = links.pop(0)
        yield from files_of(path, hidden=hides)


def _not_a_slide(path: Path) -> str:
    """Why a file is no slide, by its name or its first bytes; empty if it may be one."""
    suffix = path.suffix.lower()
    if suffix in SUFFIXES:
        return ""
    if suffix in _PICTURES:
        return f"a picture ({suffix}): if it is a slide, convert it to a tiled TIFF, for example with `vips tiffsave`"
    if suffix in _OTHER_SCANNERS:
        return f"a format that OpenSlide does not read ({suffix}, {_OTHER_SCANNERS[suffix]}): convert it to OME-TIFF"
    if suffix in _INCOMPLETE:
        return f"an incomplete file ({suffix})"
    if suffix in _NO_SLIDES:
        return f"not a format of slides ({suffix})"
    try:
        head = _head(path)
        if head[:4] in _TIFF_MAGIC or head[128:] == b"DICM" or openslide.OpenSlide.detect_format(path):
            return ""
    except PermissionError:
        return "no permission to read the file"
    except (OSError, openslide.OpenSlideError) as error:
        return f"cannot be read ({error})"
    return f"not a format of slides ({suffix or 'no suffix'})"


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(132)


def _group(paths: Sequence[Path], folder: Path, others: list[OtherFile]) -> list[FoundSlide]:
    """Slides of candidate files: one per DICOM series of a folder, and one per other file."""
    slides: list[FoundSlide] = []
    series: dict[tuple[Path, str], list[tuple[Path, str]]] = defaultdict(list)
    for path in paths:
        slide = FoundSlide(path, path.name, path.relative_to(folder).as_posix())
        try:
            if not _encodable(slide.relative):
                printable = _printable(path.name), _printable(slide.relative)
                slides.append(FoundSlide(path, *printable, problem="its path is not text in UTF-8: rename it"))
            elif _is_dicom(path):
                header = with_retries(partial(_dicom_header, path))
                if header.kind is None:
                    series[path.parent, header.uid].append((path, header.patient))
                else:
                    others.append(OtherFile(slide.relative, "not a slide", f"DICOM of another kind: {header.kind}"))
            else:
                slides.append(slide._replace(files=_companions(path)))
        except (OSError, ValueError) as error:
            problem = (error.strerror or "cannot be read") if isinstance(error, OSError) else str(error)
            slides.append(slide._replace(problem=problem))
    for (_, uid), members in series.items():
        first, patient = members[0]
        files = tuple(path.name for path, _ in members) if len(members) > 1 else ()
        slides.append(FoundSlide(first, first.name, first.relative_to(folder).as_posix(), files, patient, uid))
    return slides


def _companions(path: Path) -> tuple[str, ...]:
    """All files of an MRXS, VMS or VMU slide, sorted; empty for a slide of one file."""
    suffix = path.suffix.lower()
    if suffix == ".mrxs" and (data := path.with_suffix("")).is_dir():
        return tuple(sorted([path.name, *(f"{data.name}/{file.name}" for file in data.iterdir() if file.is_file())]))
    if suffix in (".vms", ".vmu"):
        text = path.read_text(encoding="latin-1")[: 1 << 20]
        values = {line.partition("=")[2].strip() for line in text.splitlines()}
        named = {value for value in values if value and "/" not in value and (path.parent / value).is_file()}
        return tuple(sorted({path.name, *named}))
    return ()


def _is_dicom(path: Path) -> bool:
    if path.suffix.lower() == ".dcm":
        return True
    if path.suffix.lower() in SUFFIXES:
        return False
    return with_retries(partial(_head, path))[128:] == b"DICM"


class _DicomHeader(NamedTuple):
    kind: str | None  # None for an image of a slide
    uid: str
    patient: str


def _dicom_header(path: Path) -> _DicomHeader:
    """Kind, series and patient of a DICOM file, from the first groups of its data set."""
    try:
        from pydicom.config import disable_value_validation
        from pydicom.filereader import read_partial
    except ImportError:
        raise ValueError("DICOM needs pydicom: `pip install pydicom`") from None
    try:
        with path.open("rb") as file, disable_value_validation():
            header = read_partial(file, stop_when=lambda tag, vr, length: tag > _SERIES)
        kind = header.get("SOPClassUID") or header.file_meta.MediaStorageSOPClassUID
        uid, patient = str(header.get("SeriesInstanceUID") or path.name), str(header.get("PatientID") or "").strip()
    except OSError:
        raise
    except Exception as error:  # a parser of broken files raises any exception
        raise ValueError(f"DICOM that cannot be parsed ({str(error).partition('.')[0]})") from error
    return _DicomHeader(None if kind == _WHOLE_SLIDE else getattr(kind, "name", str(kind)), uid, patient)


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
