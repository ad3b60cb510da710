"""What a file is: a slide, a part of one, or why it is none; by its name and its first bytes. No torch."""

from __future__ import annotations

import re
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import openslide

from fmtrain.manifest.shown_names import examples
from fmtrain.slides.remote import StorageError, first_bytes, is_file, is_remote
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
KNOWN_SUFFIXES = frozenset([*SUFFIXES, *_OTHER_SCANNERS, *_PICTURES, *_INCOMPLETE, *_NO_SLIDES])
KEY_FILES = (".vms", ".vmu")  # text files that name the files of a slide
_WHOLE_SLIDE = "1.2.840.10008.5.1.4.1.1.77.1.6"  # VL Whole Slide Microscopy Image Storage
SLIDEDAT = "Slidedat.ini"  # of an MRXS slide
_SERIES = 0x0020000E  # tag of SeriesInstanceUID
_DICOM_START = 1 << 18  # bytes that hold the first groups
_TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def not_a_slide(path: Path) -> str:
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
        head = with_retries(partial(_head, path))
        if head[:4] in _TIFF_MAGIC or head[128:] == b"DICM":
            return ""
        if not is_remote(path) and openslide.OpenSlide.detect_format(path):
            return ""
    except StorageError:
        raise
    except PermissionError:
        return "no permission to read the file"
    except (OSError, openslide.OpenSlideError) as error:  # their texts name the file
        return f"cannot be read ({getattr(error, 'strerror', None) or 'by OpenSlide'})"
    return "its content is not that of a slide"


def _head(path: Path) -> bytes:
    return first_bytes(path, 132)


def companions(path: Path) -> tuple[str, ...]:
    """All files of an MRXS, VMS or VMU slide, sorted; empty for a slide of one file.

    Raises:
        ValueError: A file of pixels that the slide names is missing.
    """
    if path.suffix.lower() == ".mrxs":
        folder = path.with_suffix("")
        if not is_file(folder / SLIDEDAT):
            raise ValueError(f"the folder of its data, with {SLIDEDAT}, is missing beside it")
        values, required, prefix = _values(folder / SLIDEDAT), r"INDEXFILE|FILE_\d+", f"{folder.name}/"
        named = {SLIDEDAT}
    elif path.suffix.lower() in KEY_FILES:
        folder, values, required, prefix = path.parent, _values(path), r"MapFile|ImageFile.*", ""
        named = {value for value in values.values() if "/" not in value and is_file(folder / value)}
    else:
        return ()
    needed = {value for key, value in values.items() if re.fullmatch(required, key)}
    missing = sorted(name for name in needed if not is_file(folder / name))
    if missing:  # OpenSlide may open the slide, and show white in their place
        names = examples(missing, "file")
        raise ValueError(f"{len(missing)} of its {len(needed)} files of pixels are missing: {names}")
    return tuple(sorted({path.name, *(prefix + name for name in named | needed)}))


def _values(path: Path) -> dict[str, str]:
    """Values that are not empty, by key, of a text file of sections and lines `key = value`."""
    lines = first_bytes(path, 1 << 20).decode("utf-8-sig", "replace").splitlines()
    pairs = ([part.strip() for part in line.partition("=")] for line in lines)
    return {key: value for key, _, value in pairs if value}


def is_dicom(path: Path) -> bool:
    """Whether a candidate is a DICOM file, by its suffix or else its first bytes."""
    if path.suffix.lower() == ".dcm":
        return True
    if path.suffix.lower() in SUFFIXES:
        return False
    return with_retries(partial(_head, path))[128:] == b"DICM"


class DicomHeader(NamedTuple):
    """What the first groups of a DICOM file say."""

    kind: str | None  # None for an image of a slide
    uid: str
    patient: str


def dicom_header(path: Path) -> DicomHeader:
    """Kind, series and patient of a DICOM file, from the first groups of its data set."""
    try:
        from pydicom.config import disable_value_validation
        from pydicom.filereader import read_partial
    except ImportError:
        raise ValueError("DICOM needs pydicom: `pip install pydicom`") from None
    try:
        start = BytesIO(first_bytes(path, _DICOM_START))
        with disable_value_validation():
            header = read_partial(start, stop_when=lambda tag, vr, length: tag > _SERIES)
        kind = header.get("SOPClassUID") or header.file_meta.MediaStorageSOPClassUID
        uid, patient = str(header.get("SeriesInstanceUID") or ""), str(header.get("PatientID") or "").strip()
    except OSError:
        raise
    except Exception as error:  # a parser of broken files raises any exception
        raise ValueError(f"DICOM that cannot be parsed ({str(error).partition('.')[0]})") from error
    return DicomHeader(None if kind == _WHOLE_SLIDE else getattr(kind, "name", str(kind)), uid, patient)
