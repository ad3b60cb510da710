"""The manifest: slides, their split, and the frozen held-out patches. No torch."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from fmtrain.manifest.held_out_patches import HeldOutPatch
from fmtrain.slides.info import SlideInfo, fingerprint
from fmtrain.slides.tiles import SlideError
from fmtrain.slides.tissue import Mask, load_mask
from repmetrics.atomic_write import write_text

FORMAT, VERSION = "fmtrain manifest", 1
REBUILD = "run `fmtrain manifest` again"
READERS = 16  # threads that compare slides concurrently


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
        path: JSON file. Masks, thumbnails and tables are in the folder of the same name.
        size_px: Side of a patch.
        mpps: Magnifications of the held-out patches, and the default ones for training.
        min_tissue: Minimum share of tissue in a patch.
        slides: Usable slides, sorted by path.
        held_out: Frozen patches.
        excluded: Problem of each excluded slide, by name.
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
        """Tissue mask of a slide."""
        return load_mask(assets_dir(self.path) / "tissue" / f"{slide.info.name}.png")[0]

    def slides_in(self, split: str) -> list[SlideEntry]:
        """Slides of one side of the split."""
        return [slide for slide in self.slides if slide.split == split]

    def content_hash(self) -> str:
        """Hash of everything that decides which patches are read: fingerprints, split, coordinates."""
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
        """Write the JSON, one line per slide and per patch. Paths are relative to `root`, `root` to the manifest."""
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
        write_text(self.path, "{\n " + ",\n ".join(lines) + "\n}\n")

    @classmethod
    def load(cls, path: Path) -> Manifest:
        """Read a manifest."""
        if path.is_dir():
            path = path / "manifest.json"
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is not a manifest: not JSON ({error})") from error
        if not isinstance(document, dict) or document.get("format") != FORMAT:
            raise ValueError(f'{path} is not a manifest: it lacks "format": "{FORMAT}"')
        if document["version"] != VERSION:
            raise ValueError(f"{path} has version {document['version']}, this program reads {VERSION}: {REBUILD}")
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
            raise ValueError(f"{path} is damaged ({error!r}): {REBUILD}") from error
        if manifest.content_hash() != document["hash"]:
            raise ValueError(f"{path} was edited since it was written: its hash differs; {REBUILD}")
        return manifest

    def check_held_out(self) -> None:
        """Compare the slides of the held-out patches with their fingerprints."""
        used = {patch.slide for patch in self.held_out}
        check_all_unchanged([slide for slide in self.slides if slide.info.name in used])


def check_all_unchanged(slides: Sequence[SlideEntry]) -> None:
    """`check_unchanged` of many slides concurrently: on remote storage nearly all the time is latency."""
    with ThreadPoolExecutor(READERS) as pool:
        for _ in pool.map(check_unchanged, slides):
            pass


def check_unchanged(slide: SlideEntry) -> None:
    """Compare a slide with the fingerprint in the manifest."""
    try:
        same = fingerprint(slide.path) == slide.info.fingerprint
    except OSError as error:
        raise SlideError(f"{slide.info.name}: cannot be read at {slide.path} ({error.strerror})") from error
    if not same:
        raise SlideError(f"{slide.info.name} has changed since the manifest was written: {REBUILD}")


def assets_dir(manifest: Path) -> Path:
    """Folder of masks, thumbnails and tables of a manifest file."""
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
    info = {key: line[key] for key in SlideInfo.__dataclass_fields__}
    info |= {key: tuple((w, h) for w, h in info[key]) for key in ("levels", "tiles")}
    return SlideEntry(
        root / line["path"], SlideInfo(**info), line["patient"], line["site"], line["split"], line["tissue_mm2"]
    )
