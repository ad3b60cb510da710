"""The manifest: which slides there are, who is held out, and the frozen held-out patches. No torch."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from fmtrain.collection import write_collection
from fmtrain.scan import Examined, Job, examine_all, find_slides
from fmtrain.slides import SlideError, SlideInfo, believable, fingerprint, is_remote
from fmtrain.split import (
    HeldOutPatch,
    Row,
    check_split,
    hold_out,
    in_turns,
    labelled_patches,
    patient_of,
    read_squares,
    read_table,
    sampled_patches,
    servable,
)
from fmtrain.tissue import MIN_TISSUE, Mask, load_mask

FORMAT, VERSION = "fmtrain manifest", 1
DEFAULT_MPPS = (0.5,)
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
    problems: dict[str, str] = field(default_factory=dict)

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the labels, sorted."""
        return tuple(sorted({patch.label for patch in self.held_out if patch.label is not None}))

    def mask(self, slide: SlideEntry) -> Mask:
        """The tissue of a slide."""
        return load_mask(beside(self.path) / "tissue" / f"{slide.info.name}.png")[0]

    def of(self, split: str) -> list[SlideEntry]:
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
            "problems": self.problems,
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
                problems=document["problems"],
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


def beside(manifest: Path) -> Path:
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


def build_manifest(
    slides: Path,
    out: Path,
    *,
    mpp: float | None = None,
    held_out: int = 3840,
    held_out_fraction: float = 0.2,
    split_by: Literal["patient", "site"] = "patient",
    size_px: int = 256,
    mpps: Sequence[float] = DEFAULT_MPPS,
    min_tissue: float = MIN_TISSUE,
    table: Path | None = None,
    labels: Path | None = None,
    label: str | None = None,
    seed: int = 0,
    workers: int = 0,
    on_slide: Callable[[int, int, Examined], None] | None = None,
) -> Manifest:
    """Examine a folder of slides, split it by patient, freeze the held-out patches, and write all that down.

    Args:
        slides: the folder; searched with everything below it.
        out: the manifest's file, or a folder to hold `manifest.json`. Masks are taken from an earlier call.
        mpp: micrometres per pixel of the slides that do not say it believably themselves.
        held_out: number of held-out patches; ten times the width of the features, to keep rank unbiased.
        held_out_fraction: of the patients (or sites); at least a quarter, where that is up to 32.
        split_by: keep patients, or whole sites, on one side.
        size_px: side of the patches.
        mpps: their magnifications; a slide serves those it can.
        min_tissue: share of a patch that is tissue.
        table: CSV about the slides: `file` and any of `patient`, `site`, `mpp`, `split`.
        labels: CSV of labelled squares; the held-out patches are then these. Default: `labels.csv` in `slides`.
        label: the column that holds the label.
        seed: of the split and of the patches.
        workers: processes that examine slides; 0: this one.
        on_slide: called with (done, total, result) after each slide.

    Raises:
        ValueError: no slides, none readable, a split that leaks, fewer than two held-out patches, …
    """
    if is_remote(out):
        raise ValueError(f"{out} is remote: write the manifest to a local disk, and copy it from there")
    if mpp is not None and not believable(mpp):
        raise ValueError(f"mpp must be micrometres per pixel, 0.05 to 10, got {mpp:g}")
    if not mpps or len(set(mpps)) < len(mpps) or not all(map(believable, mpps)):
        raise ValueError(f"mpps must be different magnifications, 0.05 to 10 µm a pixel, got {list(mpps)}")
    paths = find_slides(slides)
    said = read_table(table) if table is not None else {}
    unknown = sorted(set(said) - {path.name for path in paths})
    if unknown:
        raise ValueError(f"{table} names slides that are not in {slides}: {', '.join(unknown[:3])}")
    if labels is None and (slides / "labels.csv").is_file():
        labels = slides / "labels.csv"
    squares = read_squares(labels, column=label) if labels is not None else None
    path = out if out.suffix == ".json" else out / "manifest.json"
    for folder in ("tissue", "thumbnails"):
        (beside(path) / folder).mkdir(parents=True, exist_ok=True)

    count = 0

    def tell(result: Examined) -> None:
        nonlocal count
        count += 1
        if on_slide is not None:
            on_slide(count, len(paths), result)

    masks, thumbnails = beside(path) / "tissue", beside(path) / "thumbnails"
    jobs = [Job(slide, said.get(slide.name, Row()).mpp or mpp, masks, thumbnails) for slide in paths]
    examined = [
        _usable(result, size_px=size_px, mpps=mpps) for result in examine_all(jobs, workers=workers, on_slide=tell)
    ]
    problems = {result.path.name: result.problem for result in examined if result.problem}
    good = [result for result in examined if not result.problem]
    if not good:
        first, why = next(iter(problems.items()))
        raise ValueError(f"none of the {len(paths)} slides in {slides} can be used; {first}: {why}")
    entries = _split(good, said, fraction=held_out_fraction, by=split_by, seed=seed)
    manifest = Manifest(path, size_px, tuple(mpps), min_tissue, entries, (), problems)
    streams = []
    for entry in manifest.of("held_out"):
        if squares is not None:
            found = squares.get(entry.info.name, [])
            streams.append(labelled_patches(entry.info, found, size_px=size_px, mpps=mpps, seed=seed))
        else:
            streams.append(
                sampled_patches(
                    entry.info, manifest.mask(entry), size_px=size_px, mpps=mpps, min_tissue=min_tissue, seed=seed
                )
            )
    patches = in_turns(streams, count=held_out)
    if len(patches) < 2:
        of = f"labelled squares in {labels}" if squares is not None else "held-out patches"
        raise ValueError(f"only {len(patches)} {of} on the held-out slides: a measurement needs at least 2")
    manifest = replace(manifest, held_out=tuple(patches))
    write_collection(beside(path), examined, entries, Counter(patch.slide for patch in patches))
    manifest.save(root=slides)  # last: where it is, all is
    return manifest


def _usable(result: Examined, *, size_px: int, mpps: Sequence[float]) -> Examined:
    """A good slide that can serve none of the magnifications is a problem too."""
    if result.problem or result.info is None:
        return result
    finest, coarsest = servable(result.info, size_px=size_px)
    if any(finest <= mpp <= coarsest for mpp in mpps):
        return result
    w, h = result.info.size
    if max(mpps) < finest:
        problem = f"its mpp {result.info.mpp:.4g} is too coarse for patches of mpp {max(mpps):g}"
    else:
        problem = f"{w}×{h} pixels of mpp {result.info.mpp:.4g} are smaller than a patch ({size_px} of {min(mpps):g})"
    return replace(result, problem=problem)


def _split(
    good: Sequence[Examined], said: dict[str, Row], *, fraction: float, by: Literal["patient", "site"], seed: int
) -> tuple[SlideEntry, ...]:
    """Entries with patient, site and side. A hand-made split is taken whole, or not at all."""
    rows = {result.path.name: said.get(result.path.name, Row()) for result in good}
    who = {name: (row.patient or patient_of(name)[0], row.site or patient_of(name)[1]) for name, row in rows.items()}
    by_hand = {name: row.split for name, row in rows.items() if row.split is not None}
    if by_hand and len(by_hand) < len(rows):
        missing = next(name for name in rows if name not in by_hand)
        raise ValueError(f"the table gives a split for some slides only: it is missing for {missing}")
    if by_hand:
        splits = {name: str(side) for name, side in by_hand.items()}
    else:
        if by == "site" and not all(site for _, site in who.values()):
            missing = next(name for name, (_, site) in who.items() if not site)
            raise ValueError(
                f"a split by site needs every site: unknown for {missing}; give a table with a column site"
            )
        unit = {name: pair[0 if by == "patient" else 1] for name, pair in who.items()}
        chosen = hold_out(list(unit.values()), fraction=fraction, seed=seed)
        splits = {name: "held_out" if unit[name] in chosen else "train" for name in rows}
    check_split({name: patient for name, (patient, _) in who.items()}, splits)
    return tuple(
        SlideEntry(
            result.path,
            result.info,
            *who[result.path.name],
            "held_out" if splits[result.path.name] == "held_out" else "train",
            result.tissue_mm2,
        )
        for result in good
        if result.info is not None
    )


def summary(manifest: Manifest) -> list[str]:
    """What was made, in a few lines for the reader; the last ones are warnings, if there is need.

    Args:
        manifest: as `build_manifest` returned it.
    """
    n = len(manifest.held_out)
    train, held = manifest.of("train"), manifest.of("held_out")
    used = {patch.slide for patch in manifest.held_out}
    groups = {slide.patient for slide in held if slide.info.name in used}
    mpps = ", ".join(f"{mpp:g}" for mpp in manifest.mpps)
    readers = Counter(slide.info.reader for slide in manifest.slides)
    lines = [
        f"{len(manifest.slides)} slides ({', '.join(f'{n} read by {name}' for name, n in sorted(readers.items()))})"
        + (f", {len(manifest.problems)} left out" if manifest.problems else ""),
        (
            f"train: {len(train)} slides of {len({s.patient for s in train})} patients, "
            f"{sum(s.tissue_mm2 for s in train):.3g} mm² of tissue"
        ),
        f"held out: {n} patches ({manifest.size_px} px, mpp {mpps}) on {len(used)} slides of {len(groups)} patients",
        *([f"{len(manifest.classes)} classes: {'; '.join(manifest.classes)}"] if manifest.classes else []),
        f"hash {manifest.content_hash()[:16]}  {manifest.path}",
        *(f"left out: {name}: {why}" for name, why in manifest.problems.items()),
    ]
    lines.append(f"ranks of features wider than {n // 10} will be biased low: by up to 4 % at {n // 4}, 20 % at {n}")
    if len(groups) < 8:
        lines.append(f"note: {len(groups)} held-out patients make standard errors that are themselves uncertain")
    return lines
