"""The manifest: slides, their split, and the frozen held-out patches. No torch."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from fmtrain.manifest.held_out_patches import HeldOutPatch
from fmtrain.slides.info import SlideInfo, fingerprint
from fmtrain.slides.remote import StorageError, is_remote, url
from fmtrain.slides.retries import with_retries
from fmtrain.slides.tiles import SlideError
from fmtrain.slides.tissue import Mask, load_mask
from repmetrics.atomic_write import write_text

FORMAT, VERSION = "fmtrain manifest", 1
_OPTIONAL = ("files", "warnings")  # of SlideInfo: not in the file where they are empty
REBUILD = "build it again with `fmtrain manifest --overwrite`"
LONGEST_NAME = 200  # bytes, with room for suffixes
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
    added: int = 0  # number of the extension that added it; 0 for the first build


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
        warnings: What the user should know about the collection.
        options: Options of the split and of the held-out patches; an extension must have the same.
        sampling: Version of the rule that draws patches. Version 1 drew those at the border of a slide too often, and
            slides that do not serve all magnifications too rarely; a manifest keeps its version.
    """

    path: Path
    size_px: int
    mpps: tuple[float, ...]
    min_tissue: float
    slides: tuple[SlideEntry, ...]
    held_out: tuple[HeldOutPatch, ...]
    excluded: dict[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    sampling: int = 1

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the labels, sorted."""
        return tuple(sorted({patch.label for patch in self.held_out if patch.label is not None}))

    def mask(self, slide: SlideEntry) -> Mask:
        """Tissue mask of a slide."""
        return load_mask(asset(assets_dir(self.path) / "tissue", slide.info.name, ".png"))[0]

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
            **({} if self.sampling == 1 else {"sampling": self.sampling}),
        }

    def before_extension(self, content_hash: str) -> Manifest | None:
        """The manifest as it was when it had a hash, without slides added since. None if it never had it."""
        for last in range(max(slide.added for slide in self.slides) + 1):
            earlier = replace(self, slides=tuple(slide for slide in self.slides if slide.added <= last))
            if earlier.content_hash() == content_hash:
                return earlier
        return None

    def save(self, *, root: Path) -> None:
        """Write the JSON, one line per slide and per patch. Paths are relative to `root`, `root` to the manifest."""
        content = self._content()
        for line, slide in zip(content["slides"], self.slides, strict=True):
            line["path"] = slide.path.relative_to(root).as_posix()
        document = {
            "format": FORMAT,
            "version": VERSION,
            "hash": self.content_hash(),
            "root": url(root) if is_remote(root) else Path(os.path.relpath(root, self.path.parent)).as_posix(),
            **content,
            "options": self.options,
            "warnings": list(self.warnings),
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
        root = Path(document["root"]) if is_remote(document["root"]) else path.parent / document["root"]
        try:
            manifest = cls(
                path=path,
                size_px=document["size_px"],
                mpps=tuple(document["mpps"]),
                min_tissue=document["min_tissue"],
                slides=tuple(_entry_from_json(line, root) for line in document["slides"]),
                held_out=tuple(HeldOutPatch(*row) for row in document["held_out"]),
                excluded=document["problems"],
                warnings=tuple(document.get("warnings", ())),
                options=document.get("options", {}),
                sampling=document.get("sampling", 1),
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
    """`check_unchanged` of many slides concurrently: on remote storage nearly all the time is latency.

    Errors of the storage that may pass are retried.
    """
    with ThreadPoolExecutor(READERS) as pool:
        for _ in pool.map(lambda slide: with_retries(partial(check_unchanged, slide)), slides):
            pass


def check_unchanged(slide: SlideEntry) -> None:
    """Compare a slide with the fingerprint in the manifest."""
    try:
        same = fingerprint(slide.path, slide.info.files) == slide.info.fingerprint
    except StorageError:
        raise
    except OSError as error:
        place = error.filename or slide.path
        raise SlideError(f"{slide.info.name}: cannot be read at {place} ({error.strerror})") from error
    if not same:
        raise SlideError(f"{slide.info.name} has changed since the manifest was written: {REBUILD}")


def assets_dir(manifest: Path) -> Path:
    """Folder of masks, thumbnails and tables of a manifest file."""
    return manifest.with_suffix("")


def asset(folder: Path, name: str, suffix: str) -> Path:
    """File of a slide in a folder of masks or thumbnails. A long name is shortened: file systems allow 255 bytes.

    Example:
        >>> asset(Path("tissue"), "a.svs", ".png").as_posix(), len(asset(Path(), 300 * "a", ".png").name)
        ('tissue/a.svs.png', 117)
    """
    parts = name.split("/")
    if len(parts[-1].encode()) > LONGEST_NAME:
        parts[-1] = parts[-1][:80] + "-" + hashlib.sha256(name.encode()).hexdigest()[:32]
    return folder.joinpath(*parts[:-1], parts[-1] + suffix)


def _entry_to_json(slide: SlideEntry) -> dict[str, Any]:
    info = dict(vars(slide.info))  # not `asdict`, which copies every tuple: a third of the time of loading
    for name in _OPTIONAL:
        if not info[name]:
            del info[name]  # as in earlier manifests, whose hash must not change
    return {
        **info,
        "patient": slide.patient,
        "site": slide.site,
        "split": slide.split,
        "tissue_mm2": round(slide.tissue_mm2, 6),
        **({"added": slide.added} if slide.added else {}),
    }


def _entry_from_json(line: dict[str, Any], root: Path) -> SlideEntry:
    return SlideEntry(
        root / line["path"],
        info_from_json(line),
        line["patient"],
        line["site"],
        line["split"],
        line["tissue_mm2"],
        line.get("added", 0),
    )


def info_from_json(line: dict[str, Any]) -> SlideInfo:
    """Facts about a slide from JSON, which has lists instead of tuples; other keys are passed over."""
    info = {key: line[key] for key in SlideInfo.__dataclass_fields__ if key in line or key not in _OPTIONAL}
    info |= {key: tuple((w, h) for w, h in info[key]) for key in ("levels", "tiles")}
    info |= {key: tuple(info[key]) for key in _OPTIONAL if key in info}
    return SlideInfo(**info)
