"""The manifest: which slides there are, who is held out, and the frozen held-out patches. No torch."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from fmtrain.manifest.held_out import HeldOutPatch
from fmtrain.slides.info import SlideInfo, fingerprint
from fmtrain.slides.slide import SlideError
from fmtrain.slides.tissue import Mask, load_mask

FORMAT, VERSION = "fmtrain manifest", 1
READERS = 16  # threads that look at slides at once


@dataclass(frozen=True)
class SlideEntry:
    """One slide of a manifest."""

    path: Path
    info: SlideInfo
    patient: str
    site: str
    split: Literal["train", "held_out"]
    tissue_mm2: float


@dataclass(frozen=True)
class Manifest:
    """Slides, their split, and the frozen held-out patches.

    Attributes:
        path: of the JSON file; masks, thumbnails and tables lie in the folder beside it that has its name.
        size_px: side of a patch.
        mpps: magnifications of the held-out patches, and the default ones for training.
        min_tissue: share of a patch that is tissue.
        slides: the good ones, sorted by path.
        held_out: the frozen patches.
        problems: what is wrong with the slides that were left out, by name.
    """

    path: Path
    size_px: int
    mpps: tuple[float, ...]
    min_tissue: float
    slides: tuple[SlideEntry, ...]
    held_out: tuple[HeldOutPatch, ...]
    excluded: dict[str, str] = field(default_factory=dict)

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the labels, sorted."""
        return tuple(sorted({patch.label for patch in self.held_out if patch.label is not None}))

    def mask(self, slide: SlideEntry) -> Mask:
        """The tissue of a slide."""
        return load_mask(assets_dir(self.path) / "tissue" / f"{slide.info.name}.png")[0]

    def slides_in(self, split: str) -> list[SlideEntry]:
        """The slides of one side of the split."""
        return [slide for slide in self.slides if slide.split == split]

    def content_hash(self) -> str:
        """A hash of all that decides which patches are read: the slides' own hashes, the split, the coordinates."""
        return hashlib.sha256(json.dumps(self._content(), sort_keys=True).encode()).hexdigest()

    def _content(self) -> dict[str, Any]:
        return {
            "size_px": self.size_px,
            "mpps": list(self.mpps),
            "min_tissue": self.min_tissue,
            "slides": [_entry_to_json(slide) for slide in self.slides],
            "held_out": [list(patch) for patch in self.held_out],
        }

    def save(self, *, root: Path) -> None:
        """Write the JSON: one line a slide and a patch, paths relative to the folder of slides, that to the file."""
        content = self._content()
        for line, slide in zip(content["slides"], self.slides, strict=True):
            line["path"] = slide.path.relative_to(root).as_posix()
        document = {
            "format": FORMAT,
            "version": VERSION,
            "hash": self.content_hash(),
            "root": Path(os.path.relpath(root, self.path.parent)).as_posix(),
            **content,
            "problems": self.excluded,
        }
        lines = []
        for key, value in document.items():
            if key in ("slides", "held_out"):
                rows = ",\n  ".join(json.dumps(row, ensure_ascii=False) for row in value)
                lines.append(f'"{key}": [\n  {rows}\n ]')
            else:
                lines.append(f"{json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}")
        temporary = self.path.with_name(self.path.name + ".part")
        temporary.write_text("{\n " + ",\n ".join(lines) + "\n}\n", encoding="utf-8")
        temporary.replace(self.path)

    @classmethod
    def load(cls, path: Path) -> Manifest:
        """Read a manifest.

        Raises:
            ValueError: not a manifest, of another version, or edited by hand since it was written.
        """
        if path.is_dir():
            path = path / "manifest.json"
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is no manifest: not JSON ({error})") from error
        if not is_manifest(document):
            raise ValueError(f'{path} is no manifest: it lacks "format": "{FORMAT}"')
        if document["version"] != VERSION:
            raise ValueError(f"{path} has version {document['version']}, this program reads {VERSION}: write it anew")
        root = path.parent / document["root"]
        try:
            manifest = cls(
                path=path,
                size_px=document["size_px"],
                mpps=tuple(document["mpps"]),
                min_tissue=document["min_tissue"],
                slides=tuple(_entry_from_json(line, root) for line in document["slides"]),
                held_out=tuple(HeldOutPatch(*row) for row in document["held_out"]),
                excluded=document["problems"],
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path} is damaged ({error!r}): write it anew with `fmtrain manifest`") from error
        if manifest.content_hash() != document["hash"]:
            raise ValueError(f"{path} was edited since it was written: its hash differs; write it anew")
        return manifest

    def check_held_out(self) -> None:
        """Compare the slides of the held-out patches with what they were.

        Raises:
            SlideError: one has changed, is gone, or cannot be read.
        """
        used = {patch.slide for patch in self.held_out}
        check_all_unchanged([slide for slide in self.slides if slide.info.name in used])


def check_all_unchanged(slides: Sequence[SlideEntry]) -> None:
    """`check_unchanged` of many slides at once: on remote storage nearly all of it is waiting."""
    with ThreadPoolExecutor(READERS) as pool:
        for _ in pool.map(check_unchanged, slides):
            pass


def check_unchanged(slide: SlideEntry) -> None:
    """Compare a slide with what it was when the manifest was written.

    Raises:
        SlideError: it has changed, is gone, or cannot be read.
    """
    try:
        same = fingerprint(slide.path) == slide.info.fingerprint
    except OSError as error:
        raise SlideError(f"{slide.info.name}: cannot be read at {slide.path} ({error.strerror})") from error
    if not same:
        raise SlideError(f"{slide.info.name} has changed since the manifest was written: run `fmtrain manifest` again")


def is_manifest(document: object) -> bool:
    """Whether a parsed JSON document is a manifest of ours."""
    return isinstance(document, dict) and document.get("format") == FORMAT


def assets_dir(manifest: Path) -> Path:
    """The folder of masks, thumbnails and tables that belongs to a manifest file."""
    return manifest.with_suffix("")


def _entry_to_json(slide: SlideEntry) -> dict[str, Any]:
    return {
        **asdict(slide.info),
        "patient": slide.patient,
        "site": slide.site,
        "split": slide.split,
        "tissue_mm2": round(slide.tissue_mm2, 6),
    }


def _entry_from_json(line: dict[str, Any], root: Path) -> SlideEntry:
    known = {key: line[key] for key in SlideInfo.__dataclass_fields__}
    known |= {key: tuple((w, h) for w, h in known[key]) for key in ("levels", "tiles")}
    return SlideEntry(
        root / line["path"], SlideInfo(**known), line["patient"], line["site"], line["split"], line["tissue_mm2"]
    )
