"""Extension of a manifest by the slides that are new in its folder: what it has stays as it is. No torch."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TypeVar

from fmtrain.manifest.collection import Collection, content_keys, entry
from fmtrain.manifest.manifest import Manifest, SlideEntry, asset, assets_dir, check_all_unchanged
from fmtrain.manifest.scan import ScanResult
from fmtrain.manifest.search import FoundSlide
from fmtrain.manifest.shown_names import examples
from fmtrain.manifest.split import copies
from fmtrain.slides.info import fingerprint

T = TypeVar("T")
OVERWRITE = "give the same, another --out, or --overwrite to build it anew"


def check_same(earlier: Manifest, draft: Manifest) -> None:
    """Raise if a manifest that exists was built with other options than those of the call."""
    before, now = ({"size_px": m.size_px, "mpps": m.mpps, "min_tissue": m.min_tissue} for m in (earlier, draft))
    if earlier.options:  # manifests of earlier versions have none
        before |= earlier.options
        now |= draft.options
    for name in sorted({*before, *now}):
        if before.get(name) != now.get(name):
            raise ValueError(
                f"{earlier.path} exists and was built with {name} = {before.get(name)}, "
                f"the call has {now.get(name)}: {OVERWRITE}"
            )


def unscanned(earlier: Manifest, collection: Collection) -> dict[str, ScanResult]:
    """Results of the slides that a manifest has, by name. The collection gets the names of the manifest.

    Raises:
        ValueError: A slide of the manifest is missing, or has changed.
    """
    by_path = {os.path.abspath(slide.path): slide for slide in collection.files.slides}
    by_name = {slide.name: slide for slide in collection.files.slides}
    matches: dict[str, FoundSlide] = {}
    for old in earlier.slides:
        slide = by_path.get(os.path.abspath(old.path)) or by_name.get(old.info.name)
        if slide is not None:
            matches[old.info.name] = slide
    missing = [old for old in earlier.slides if old.info.name not in matches]
    if missing:
        names = examples([old.info.name for old in missing])
        raise ValueError(
            f"{earlier.path} exists, and {len(missing)} of its slides are not in the folder: {names}; "
            f"{_renamed(missing, collection)}put them back, name another --out, or build it anew with --overwrite"
        )
    _rename(collection, {slide.name: name for name, slide in matches.items() if slide.name != name})
    check_all_unchanged([replace(old, path=matches[old.info.name].path) for old in earlier.slides])
    for old in earlier.slides:
        if not asset(assets_dir(earlier.path) / "tissue", old.info.name, ".png").exists():
            raise ValueError(f"the tissue mask of {old.info.name} is missing: restore it, or use --overwrite")
        given = collection.given[old.info.name]
        if given.replaces and given.value != old.info.mpp:
            raise ValueError(
                f"{old.info.name} has mpp {old.info.mpp:g} in {earlier.path}, not {given.value:g}: {OVERWRITE}"
            )
        side = collection.splits.get(old.info.name, old.split)
        if side != old.split:
            raise ValueError(f"{old.info.name} is in {old.split} in {earlier.path}, the table says {side}: {OVERWRITE}")
    return {
        old.info.name: ScanResult(matches[old.info.name].path, old.info, old.tissue_mm2, "", old.info.name)
        for old in earlier.slides
    }


def _renamed(missing: Sequence[SlideEntry], collection: Collection) -> str:
    """Text on missing slides whose content is in the folder under other names."""
    contents = {}
    for slide in collection.files.slides:
        if not slide.problem:
            with suppress(OSError):
                contents[fingerprint(slide.path, slide.files)] = slide.name
    pairs = [(old.info.name, contents.get(old.info.fingerprint)) for old in missing]
    texts = [f"{old} is now {new}" for old, new in pairs if new is not None]
    return f"{examples(texts)}; " if texts else ""


def _rename(collection: Collection, names: dict[str, str]) -> None:
    """Give slides the names that they have in the manifest: a new slide of the same name has its path as name."""
    taken = set(names.values())
    slides = []
    for slide in collection.files.slides:
        if slide.name in names:
            slides.append(slide._replace(name=names[slide.name]))
        elif slide.name in taken:
            problem = "its name is that of another slide of the manifest: rename it"
            slides.append(slide._replace(name=f"{slide.name} (new)", problem=problem))
            names = names | {slide.name: f"{slide.name} (new)"}
        else:
            slides.append(slide)
    collection.files.slides[:] = slides
    _rename_keys(collection.origins, names)
    _rename_keys(collection.units, names)
    _rename_keys(collection.splits, names)
    _rename_keys(collection.given, names)
    _rename_keys(collection.masks, names)
    if collection.squares is not None:
        _rename_keys(collection.squares, names)


def _rename_keys(table: dict[str, T], names: Mapping[str, str]) -> None:
    values = {names.get(name, name): value for name, value in table.items()}
    table.clear()
    table.update(values)


def extended(earlier: Manifest, draft: Manifest, collection: Collection, results: Sequence[ScanResult]) -> Manifest:
    """The manifest with all new slides. Held-out patients and patches stay; new patients are for training.

    Args:
        earlier: Manifest that exists.
        draft: Problems and warnings of this call.
        collection: All slides, under the names of the manifest.
        results: Results of all slides.
    """
    old = {slide.info.name: slide for slide in earlier.slides}
    usable = [result for result in results if not result.problem]
    new = [result for result in usable if result.name not in old]
    sides, excluded = _sides_of_new(old, collection, usable)
    number = max(slide.added for slide in earlier.slides) + 1
    paths = {result.name: result.path for result in usable}
    entries = [
        *(replace(slide, path=paths[name]) for name, slide in old.items()),
        *(entry(r, collection, sides[r.name], added=number) for r in new if r.name in sides),
    ]
    train = sum(side == "train" for side in sides.values())
    news = [f"{train} slides are added to train, {len(sides) - train} to the held-out patients, without frozen patches"]
    return replace(
        earlier,
        slides=tuple(sorted(entries, key=lambda slide: slide.path)),
        excluded=draft.excluded | excluded,
        warnings=(*draft.warnings, *(news if sides else ())),
        options=earlier.options or draft.options,
    )


def _sides_of_new(
    old: dict[str, SlideEntry], collection: Collection, usable: Sequence[ScanResult]
) -> tuple[dict[str, str], dict[str, str]]:
    """Side of each new slide, and the problem of those that belong to both sides."""
    same_patient = {
        result.name: [
            f"patient {collection.origins[result.name].patient}",
            f"unit {collection.units[result.name]}",
            *([f"patient {old[result.name].patient}"] if result.name in old else []),
        ]
        for result in usable
    }
    by_patient, by_content = ({n: group for group in copies(keys) for n in group} for keys in (
        same_patient, content_keys(collection, usable)
    ))  # fmt: skip
    sides: dict[str, str] = {}
    excluded: dict[str, str] = {}
    for name in (result.name for result in usable if result.name not in old):
        patient, content = ({old[n].split for n in g.get(name, ()) if n in old} for g in (by_patient, by_content))
        required = patient or (content if len(content) == 1 else set())
        chosen = collection.splits.get(name) or next(iter(required), "train")
        if len(required | {chosen}) > 1 or (patient and len(content) == 1 and content != patient):
            excluded[name] = "its patient or a copy of it is on the other side of the manifest's split"
        else:
            sides[name] = chosen
    return sides, excluded
