"""Pseudonyms: keyed hashes in place of the names of patients and slides. No torch.

A hash depends on the name and the key alone: one patient has the same pseudonym in every file made with the key. The
slides are read through links that bear pseudonyms, so that no file holds a name or a path.
"""

from __future__ import annotations

import hashlib
import hmac
import os
from pathlib import Path, PurePosixPath

from fmtrain.manifest.patients import stem
from fmtrain.manifest.search import FoundSlide, OtherFile, SearchResult

SHORTEST_KEY = 16  # bytes


class Pseudonyms:
    """Pseudonyms of one key.

    Args:
        key: Secret of at least `SHORTEST_KEY` bytes.

    Example:
        >>> names = Pseudonyms(b"correct horse battery staple")
        >>> names.patient("TCGA-18-5592"), names.patient("TCGA-18-5592") == names.patient("TCGA-18-5593")
        ('P-1f93a9b843b42e2f', False)
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

    def patient(self, name: str) -> str:
        """Pseudonym of a patient."""
        return f"P-{self._hash(name)}"

    def file(self, relative: str) -> str:
        """Pseudonym of the path of a file; the suffix stays."""
        return f"F-{self._hash(relative)}{PurePosixPath(relative).suffix}"

    def slide(self, slide: FoundSlide) -> str:
        """Pseudonym of a slide, from its name without suffix; the suffix stays."""
        name = stem(slide)
        return f"S-{self._hash(name)}{slide.name[len(name) :]}"

    def link(self, files: SearchResult, folder: Path) -> SearchResult:
        """The slides under their pseudonyms, as links in a folder, and the other files under theirs."""
        folder.mkdir(parents=True, exist_ok=True)
        slides = sorted((self._link(slide, folder) for slide in files.slides), key=lambda slide: slide.path)
        new_names = {old.name: self.slide(old) for old in files.slides}
        others = [
            OtherFile(self.file(other.relative), other.state, new_names.get(other.reason, other.reason))
            for other in files.others
        ]
        return SearchResult(slides, sorted(others))

    def _link(self, slide: FoundSlide, folder: Path) -> FoundSlide:
        name = self.slide(slide)
        files = slide.files
        source = slide.path.parent.resolve()
        if slide.uid and files:  # a DICOM series: OpenSlide finds its files in the folder
            path = folder / name / f"0{slide.path.suffix}"
            files = tuple(f"{number}{PurePosixPath(file).suffix}" for number, file in enumerate(slide.files))
            path = folder / name / files[slide.files.index(slide.path.name)]
            pairs = list(zip(slide.files, files, strict=True))
        elif slide.path.suffix.lower() == ".mrxs" and files:  # its data are in the folder of its name
            path = folder / name
            data = slide.path.with_suffix("").name
            pairs = [(slide.path.name, name), (data, path.with_suffix("").name)]
            files = tuple(
                name if file == slide.path.name else f"{path.with_suffix('').name}/{file.removeprefix(data + '/')}"
                for file in slide.files
            )
        elif files:  # VMS and VMU name their files
            path = folder / name / slide.path.name
            pairs = [(file, file) for file in files]
        else:
            path = folder / name / name if slide.uid else folder / name
            pairs = [(slide.path.name, path.name)]
        path.parent.mkdir(exist_ok=True)
        for old, new in pairs:
            _symlink(source / old, path.parent / new)
        relative = path.relative_to(folder).as_posix()
        return slide._replace(path=path, name=name, relative=relative, files=files, patient="", uid="")


def _symlink(target: Path, link: Path) -> None:
    if link.is_symlink():
        if os.readlink(link) == str(target):
            return
        link.unlink()
    os.symlink(target, link)
