"""Pseudonyms: keyed hashes in place of the names of patients and slides. No torch.

A hash depends on the name and the key alone: one patient has the same pseudonym in every file made with the key. The
slides are read through links that bear pseudonyms, so that no file holds a name or a path.
"""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from fmtrain.manifest.file_kinds import KEY_FILES, KNOWN_SUFFIXES
from fmtrain.manifest.patients import stem
from fmtrain.manifest.search import FoundSlide, OtherFile, SearchResult
from fmtrain.manifest.shown_names import Kind
from repmetrics.atomic_write import write_text

SHORTEST_KEY = 16  # bytes


class Pseudonyms:
    """Pseudonyms of one key.

    Args:
        key: Secret of at least `SHORTEST_KEY` bytes.

    Example:
        >>> names = Pseudonyms(b"correct horse battery staple")
        >>> names.of("TCGA-18-5592", "patient"), names.of("TCGA-18-5593", "patient")
        ('P-1f93a9b843b42e2f', 'P-c8e7e034c2130be5')
    """

    def __init__(self, key: bytes) -> None:
        self._key = key
        self.key_id = self._hash("key")[:8]  # tells keys apart

    @classmethod
    def from_file(cls, path: Path) -> Pseudonyms:
        """Pseudonyms of the key in a file; white space around it is ignored."""
        key = path.read_bytes().strip()
        if len(key) < SHORTEST_KEY:
            raise ValueError(
                f"{path} must hold a secret of at least {SHORTEST_KEY} bytes, got {len(key)}: "
                f"for example `openssl rand -hex 32 > {path}`"
            )
        return cls(key)

    def _hash(self, text: str) -> str:
        return hmac.new(self._key, text.encode("utf-8", "surrogateescape"), hashlib.sha256).hexdigest()[:16]

    def of(self, name: str, kind: Kind) -> str:
        """Pseudonym of the name of a slide, a file or a patient. A suffix stays if it is one of the known formats.

        Example:
            >>> names = Pseudonyms(b"correct horse battery staple")
            >>> names.of("Jane.svs", "slide"), names.of("Jane", "slide"), names.of("Jane.Doe", "file")
            ('S-17985a6befb1c4e0.svs', 'S-17985a6befb1c4e0', 'F-a5cb6cb19f53735c')
        """
        if kind == "patient":
            return f"P-{self._hash(name)}"
        suffix = _known_suffix(name)
        if kind == "file":
            return f"F-{self._hash(name)}{suffix}"
        base = stem(name) if suffix else name
        return f"S-{self._hash(base)}{name[len(base) :]}"

    def link(self, files: SearchResult, folder: Path) -> SearchResult:
        """The slides under their pseudonyms, as links in a folder, and the other files under theirs."""
        folder.mkdir(parents=True, exist_ok=True)
        slides = sorted((self._link(slide, folder) for slide in files.slides), key=lambda slide: slide.path)
        others = [
            OtherFile(
                self.of(other.relative, "file"),
                other.state,
                self.of(other.reason, "slide") if other.state == "part of a slide" else other.reason,
            )
            for other in files.others
        ]
        return SearchResult(slides, sorted(others))

    def _link(self, slide: FoundSlide, folder: Path) -> FoundSlide:
        name = self.of(slide.name, "slide")
        path, links = _links(slide, folder / name)
        copied = slide.files and slide.path.suffix.lower() in KEY_FILES
        path.parent.mkdir(exist_ok=True)
        if path.parent != folder:
            _remove_others(path.parent, set(links.values()))
        for old, new in links.items():
            if not (copied and new == path.name):
                _symlink(slide.path.parent.resolve() / old, path.parent / new)
        if copied:
            write_text(path, _key_file(slide.path, links))
        files = tuple(links.get(file) or f"{path.stem}/{file.rpartition('/')[2]}" for file in slide.files)
        relative = path.relative_to(folder).as_posix()
        return slide._replace(path=path, name=name, relative=relative, files=files, patient="", uid="")


def _links(slide: FoundSlide, place: Path) -> tuple[Path, dict[str, str]]:
    """File to open of a slide whose pseudonym is the last part of `place`, and names of links to its files or folders.

    A slide of several files has a folder: OpenSlide finds those of a DICOM series and of an MRXS slide by their place.
    """
    if not slide.files and not slide.uid:
        return place, {slide.path.name: place.name}
    files = slide.files or (slide.path.name,)
    if slide.path.suffix.lower() == ".mrxs":
        return place / "0.mrxs", {slide.path.name: "0.mrxs", slide.path.stem: "0"}
    links = {file: f"{number}{_known_suffix(file)}" for number, file in enumerate(files)}
    return place / links[slide.path.name], links


def _key_file(path: Path, links: Mapping[str, str]) -> str:
    """Text of a VMS or VMU file with the names of the links, without its texts about the slide."""
    lines = []
    for line in path.read_text(encoding="latin-1").splitlines():
        key, _, value = (part.strip() for part in line.partition("="))
        if value in links:
            lines.append(f"{key}={links[value]}")
        elif key.startswith("[") or key == "PixelOrder" or value.replace(".", "", 1).isdecimal():
            lines.append(line.strip())
    return "\n".join(lines) + "\n"


def _remove_others(folder: Path, kept: set[str]) -> None:
    """Remove links of files that a slide no longer has: OpenSlide would find them."""
    for link in folder.iterdir():
        if link.is_symlink() and link.name not in kept:
            link.unlink()


def _known_suffix(name: str) -> str:
    """Suffix of a name if it is one of the known formats: what follows any other dot may be a part of a name."""
    suffix = PurePosixPath(name).suffix
    return suffix if suffix.lower() in KNOWN_SUFFIXES else ""


def _symlink(target: Path, link: Path) -> None:
    if link.is_symlink():
        if os.readlink(link) == str(target):
            return
        link.unlink()
    try:
        os.symlink(target, link)
    except OSError as error:
        if link.is_symlink() and os.readlink(link) == str(target):
            return  # the call for another shard was faster
        raise OSError(error.errno, f"a link cannot be created: {error.strerror}", str(link)) from None
