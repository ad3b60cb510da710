"""A collection before its slides are opened: what was found, and what the user says of each slide. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Literal

from fmtrain.manifest.doubts import passed_over
from fmtrain.manifest.manifest import SlideEntry
from fmtrain.manifest.options import ManifestOptions, SplitBy
from fmtrain.manifest.patients import Origin, check_rule, one_slide_each, patient_of
from fmtrain.manifest.pseudonyms import Pseudonyms
from fmtrain.manifest.scan import ScanResult
from fmtrain.manifest.search import FoundSlide, SearchResult, matches, search
from fmtrain.manifest.shown_names import examples, shown
from fmtrain.manifest.split import check_split
from fmtrain.manifest.tables import LabeledRegion, SlideNames, SlideRow, not_squares, read_labeled_regions, read_table
from fmtrain.slides.given_masks import SUFFIXES
from fmtrain.slides.remote import is_remote
from fmtrain.slides.resolution import NO_MPP, GivenMpp, is_plausible_mpp
from fmtrain.slides.staging import describe


@dataclass
class Collection:
    """Slides that were found, by name, and what is known of each without opening it.

    Attributes:
        root: Folder to which paths are relative.
        files: Slides and other files.
        origins: Patient and site.
        units: Patient or site by which the collection is split, under its real name.
        splits: The user's split; empty if there is none.
        given: The user's mpp.
        overrides: Number of slides that each --mpp-override fits.
        squares: Labeled squares; None without labels.
        warnings: What the user should know.
        masks: The user's tissue masks.
    """

    root: Path
    files: SearchResult
    origins: dict[str, Origin]
    units: dict[str, str]
    splits: dict[str, str]
    given: dict[str, GivenMpp]
    overrides: dict[str, int]
    squares: dict[str, list[LabeledRegion]] | None
    warnings: list[str] = field(default_factory=list)
    masks: dict[str, Path] = field(default_factory=dict)


def survey(slides: Path, options: ManifestOptions, *, skip: Sequence[Path]) -> Collection:
    """Find all slides below a folder, and check the user's tables and options against them.

    Everything that can be wrong with the call is raised here, before the first slide is opened.
    """
    files = search(slides, include=options.include, exclude=options.exclude, skip=skip)
    warnings = [*passed_over(files.others), *_unused(files, [*options.include, *options.exclude])]
    names = SlideNames(files.slides)
    rows: dict[str, SlideRow] = {}
    if options.table is not None:
        rows, absent = names.keyed(read_table(options.table), table=options.table)
        warnings += _table_warnings(options.table, rows, absent, files.slides)
    if is_remote(slides):
        warnings.append(describe(slides))
        if options.labels is None and any(other.relative == "labels.csv" for other in files.others):
            warnings.append("labels.csv of a remote folder is not read: copy it, and give it with --labels")
    squares, notes = _squares(slides, options.labels, options.label, names)
    warnings += notes + check_rule(options.patient, files.slides)
    origins = {slide.name: patient_of(slide, rule=options.patient) for slide in files.slides}
    for name, row in rows.items():
        old = origins[name]
        origins[name] = Origin(row.patient or old.patient, row.site or old.site, old.known or row.patient is not None)
    candidates = {slide.name for slide in files.slides if not slide.problem}
    warnings += one_slide_each(
        {name: origin for name, origin in origins.items() if name in candidates or not candidates}
    )
    units = {name: origin.patient if options.split_by == "patient" else origin.site for name, origin in origins.items()}
    splits = {name: row.split for name, row in rows.items() if row.split is not None}
    _check_units(candidates, origins, units, splits, options.split_by)
    override = options.mpp_override
    given = {
        slide.name: _given(slide, rows.get(slide.name, SlideRow()), options.mpp, override) for slide in files.slides
    }
    overrides = {p: sum(_fits(slide, p) for slide in files.slides) for p in override}
    user_masks, notes = _masks(options.masks, names)
    warnings += notes
    return Collection(slides, files, origins, units, splits, given, overrides, squares, warnings, user_masks)


def _unused(files: SearchResult, patterns: Sequence[str]) -> list[str]:
    """Warnings on patterns of --include and --exclude that fit no file."""
    paths = [slide.relative for slide in files.slides] + [other.relative for other in files.others]
    return [
        f"--include or --exclude {shown(pattern, 'file')} fits no file"
        for pattern in patterns
        if not any(matches(path, [pattern]) for path in paths)
    ]


def _masks(folder: Path | None, names: SlideNames) -> tuple[dict[str, Path], list[str]]:
    """The user's masks by slide, and warnings."""
    if folder is None:
        return {}, []
    if not folder.is_dir():
        raise ValueError(f"--masks must be a folder of PNG or GeoJSON files, named as the slides, got {folder}")
    files = {path.stem: path for path in sorted(folder.iterdir()) if path.suffix.lower() in SUFFIXES}
    masks, absent = names.keyed(files, table=folder)
    if not masks:
        raise ValueError(f"{folder} has no mask of any slide: expected the name of a slide with {', '.join(SUFFIXES)}")
    return masks, _absent(f"{folder.name} has masks", absent)


def _table_warnings(
    table: Path, rows: Mapping[str, SlideRow], absent: Sequence[str], slides: Sequence[FoundSlide]
) -> list[str]:
    """Warnings on rows without slides, and slides without rows; raises if no row fits a slide."""
    if not rows:
        raise ValueError(f"{table} names no slide of the folder, for example {examples(absent) or 'none'}")
    missing = [slide.name for slide in slides if slide.name not in rows]
    notes = _absent(f"{table.name} has rows", absent)
    return notes + ([f"{table.name} has no row of {len(missing)} slides: {examples(missing)}"] if missing else [])


def _absent(text: str, names: Sequence[str]) -> list[str]:
    """Warning on slides that the user names and the folder lacks."""
    return [f"{text} of {len(names)} slides that are not there: {examples(names)}"] if names else []


def _squares(
    folder: Path, labels: Path | None, label: str | None, names: SlideNames
) -> tuple[dict[str, list[LabeledRegion]] | None, list[str]]:
    """Labeled squares by slide, and warnings. `labels.csv` of the folder is taken only if it holds squares."""
    default = folder / "labels.csv"
    if labels is None and default.is_file():
        if reason := not_squares(default):
            if label is not None:
                raise ValueError(f"{default} has no labeled squares ({reason}): give --labels, not --label")
            return None, [f"{default.name} is not used as labels: {reason}"]
        labels = default
    if labels is None:
        if label is not None:
            raise ValueError("--label names a column of --labels, which is missing")
        return None, []
    squares, absent = names.keyed(read_labeled_regions(labels, column=label), table=labels)
    if not squares:
        raise ValueError(f"{labels} names no slide of the folder, for example {examples(absent) or 'none'}")
    return squares, _absent(f"{labels.name} has squares", absent)


def _check_units(
    candidates: set[str],
    origins: Mapping[str, Origin],
    units: Mapping[str, str],
    splits: Mapping[str, str],
    split_by: SplitBy,
) -> None:
    """Raise if the slides cannot be split, whatever will be found on them."""
    if splits:
        missing = sorted(candidates - set(splits))
        if missing:
            raise ValueError(f"the table gives a split for some slides only: it is missing for {examples(missing)}")
        check_split({name: origins[name].patient for name in splits}, splits)
        return
    unknown = sorted(name for name in candidates if not units[name])
    if unknown:
        raise ValueError(
            f"a split by {split_by} needs every {split_by}: unknown for {examples(unknown)}; "
            f"give a table with a column {split_by}"
        )
    several = {units[name] for name in candidates}
    if len(several) == 1:
        only = shown(min(several), "patient")
        raise ValueError(f"only one patient or site ({only}): a split needs at least two")


def _fits(slide: FoundSlide, pattern: str) -> bool:
    return fnmatch(slide.relative, pattern) or fnmatch(slide.path.name, pattern)


def _given(slide: FoundSlide, row: SlideRow, mpp: float | None, override: Mapping[str, float]) -> GivenMpp:
    """The user's mpp of a slide: the table wins over --mpp-override, and both over the file; --mpp fills gaps."""
    if row.mpp is not None:
        return GivenMpp(row.mpp, "table", replaces=True)
    values = {value for pattern, value in override.items() if _fits(slide, pattern)}
    if len(values) > 1:
        raise ValueError(f"--mpp-override gives {shown(slide.name)} several values: {sorted(values)}")
    if values:
        return GivenMpp(values.pop(), "--mpp-override", replaces=True)
    return GivenMpp(mpp) if mpp is not None else NO_MPP


def parse_overrides(texts: Sequence[str]) -> dict[str, float]:
    """Values of --mpp-override, by pattern.

    Example:
        >>> parse_overrides(["lab2/*=0.25", "*.ndpi=0.46"])
        {'lab2/*': 0.25, '*.ndpi': 0.46}
    """
    overrides = {}
    for text in texts:
        pattern, sign, number = text.rpartition("=")
        try:
            value = float(number)
        except ValueError:
            value = math.nan
        if not pattern or not sign or not is_plausible_mpp(value):
            raise ValueError(f"--mpp-override must be like '*.svs=0.25', 0.05 to 10 µm per pixel, got {text!r}")
        overrides[pattern] = value
    return overrides


def pseudonymize(collection: Collection, names: Pseudonyms, links: Path) -> Collection:
    """The collection under pseudonyms; slides are read through links in a folder."""
    new = {slide.name: names.of(slide.name, "slide") for slide in collection.files.slides}
    if len(set(new.values())) < len(new):
        raise ValueError("two slides have the same pseudonym: rename one")
    return Collection(
        links,
        names.link(collection.files, links),
        {new[k]: o._replace(patient=names.of(o.patient, "patient")) for k, o in collection.origins.items()},
        {new[k]: unit for k, unit in collection.units.items()},
        {new[k]: split for k, split in collection.splits.items()},
        {new[k]: given for k, given in collection.given.items()},
        {f"number {k}": count for k, count in enumerate(collection.overrides.values(), 1)},
        None if collection.squares is None else {new[k]: squares for k, squares in collection.squares.items()},
        collection.warnings,
        {new[k]: path for k, path in collection.masks.items()},
    )


def content_keys(collection: Collection, usable: Sequence[ScanResult]) -> dict[str, list[str]]:
    """What identifies the content of each slide: its fingerprint, and the UID of a DICOM series."""
    uids = {slide.name: slide.uid for slide in collection.files.slides}
    return {
        result.name: [result.info.fingerprint, *([uids[result.name]] if uids[result.name] else [])]
        for result in usable
        if result.info is not None
    }


def entry(result: ScanResult, collection: Collection, side: str, *, added: int = 0) -> SlideEntry:
    """One slide of the manifest."""
    assert result.info is not None
    origin = collection.origins[result.name]
    split: Literal["train", "held_out"] = "held_out" if side == "held_out" else "train"
    return SlideEntry(result.path, result.info, origin.patient, origin.site, split, result.tissue_mm2, added)
