"""A folder of slides → a manifest: scan, split by patient, frozen held-out patches. No torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

from fmtrain.manifest.collection import Collection, SplitBy, content_keys, entry, pseudonymize, survey
from fmtrain.manifest.doubts import mpp_doubts
from fmtrain.manifest.extend import check_same, extended, unscanned
from fmtrain.manifest.held_out_patches import labeled_patches, round_robin, sampled_patches
from fmtrain.manifest.manifest import Manifest, assets_dir
from fmtrain.manifest.overview import write_collection
from fmtrain.manifest.pseudonyms import Pseudonyms
from fmtrain.manifest.scan import Job, ScanResult, scan_slides
from fmtrain.manifest.shown_names import examples, show_names_as
from fmtrain.manifest.split import check_split, copies, select_held_out, unite
from fmtrain.slides.info import is_remote
from fmtrain.slides.resolution import is_plausible_mpp, mpp_range
from fmtrain.slides.tissue import MIN_TISSUE, SAMPLING

DEFAULT_MPPS = (0.5,)
SHOWN = 5  # groups of copies that are named


def build_manifest(
    slides: Path,
    out: Path,
    *,
    mpp: float | None = None,
    mpp_override: Mapping[str, float] | None = None,
    held_out: int = 3840,
    held_out_fraction: float = 0.2,
    split_by: SplitBy = "patient",
    size_px: int = 256,
    mpps: Sequence[float] = DEFAULT_MPPS,
    min_tissue: float = MIN_TISSUE,
    table: Path | None = None,
    labels: Path | None = None,
    label: str | None = None,
    patient: str | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    masks: Path | None = None,
    pseudonyms: Path | None = None,
    overwrite: bool = False,
    seed: int = 0,
    workers: int = 0,
    on_slide: Callable[[int, int, ScanResult], None] | None = None,
) -> Manifest:
    """Scan a folder of slides, split it by patient, freeze the held-out patches, and write the manifest.

    A manifest that exists is extended: slides that are new are scanned and join, all else stays. With `overwrite` it is
    built anew.
    """
    _check_options(out, mpp=mpp, mpps=mpps, held_out=held_out, fraction=held_out_fraction)
    path = out if out.suffix == ".json" else out / "manifest.json"
    names = None if pseudonyms is None else Pseudonyms.from_file(pseudonyms)
    earlier = Manifest.load(path) if path.exists() and not overwrite else None
    options: dict[str, Any] = {
        "held_out": held_out,
        "held_out_fraction": held_out_fraction,
        "split_by": split_by,
        "seed": seed,
        **({} if names is None else {"pseudonyms": names.key_id}),
    }
    draft = Manifest(path, size_px, tuple(mpps), min_tissue, (), (), options=options, sampling=SAMPLING)
    if earlier is not None:
        check_same(earlier, draft)
    with show_names_as(None if names is None else names.of):
        collection = survey(
            slides,
            mpp=mpp,
            mpp_override=mpp_override or {},
            table=table,
            labels=labels,
            label=label,
            patient=patient,
            split_by=split_by,
            include=include,
            exclude=exclude,
            masks=masks,
            skip=[path, assets_dir(path), *([] if pseudonyms is None else [pseudonyms])],
        )
    if names is not None:
        collection = pseudonymize(collection, names, assets_dir(path) / "slides")
    known = {} if earlier is None else unscanned(earlier, collection)
    if overwrite:
        path.unlink(missing_ok=True)  # the masks are rewritten before the manifest: it must not be there meanwhile
    results = [
        _check_mpps(result, size_px=size_px, mpps=mpps)
        for result in _scan(collection, known, assets_dir(path), workers=workers, on_slide=on_slide)
    ]
    manifest = replace(
        draft,
        excluded={result.name: result.problem for result in results if result.problem},
        warnings=(
            *collection.warnings,
            *mpp_doubts(results, filler=mpp, overrides=collection.overrides),
        ),
    )
    if earlier is not None:
        manifest = extended(earlier, manifest, collection, results)
    else:
        manifest = _split_and_freeze(manifest, collection, results, held_out, fraction=held_out_fraction, seed=seed)
    write_collection(manifest, results, collection.files.others)
    manifest.save(root=collection.root)  # written last: its presence marks a complete build
    return manifest


def _check_options(out: Path, *, mpp: float | None, mpps: Sequence[float], held_out: int, fraction: float) -> None:
    """Raise for options that cannot be."""
    if is_remote(out):
        raise ValueError(f"{out} is remote: write the manifest to a local disk, and copy it from there")
    if mpp is not None and not is_plausible_mpp(mpp):
        raise ValueError(f"mpp must be micrometers per pixel, 0.05 to 10, got {mpp:g}")
    if not mpps or len(set(mpps)) < len(mpps) or not all(map(is_plausible_mpp, mpps)):
        raise ValueError(f"mpps must be different magnifications, 0.05 to 10 µm per pixel, got {list(mpps)}")
    if not 0 < fraction < 1:
        raise ValueError(f"the held-out fraction must lie between 0 and 1, got {fraction}")
    if held_out < 2:
        raise ValueError(f"held_out must be 2 or more: a measurement needs at least 2 patches, got {held_out}")


def _scan(
    collection: Collection,
    known: Mapping[str, ScanResult],
    folder: Path,
    *,
    workers: int,
    on_slide: Callable[[int, int, ScanResult], None] | None,
) -> list[ScanResult]:
    """Results of all slides, in their order; those that an earlier manifest knows are not scanned again."""
    masks, thumbnails = folder / "tissue", folder / "thumbnails"
    for assets in (masks, thumbnails):
        assets.mkdir(parents=True, exist_ok=True)
    jobs = [
        Job(
            slide.path,
            collection.given[slide.name],
            masks,
            thumbnails,
            slide.name,
            slide.files,
            slide.problem,
            collection.masks.get(slide.name),
        )
        for slide in collection.files.slides
        if slide.name not in known
    ]
    counter = count(1)

    def report(result: ScanResult) -> None:
        if on_slide is not None:
            on_slide(next(counter), len(jobs), result)

    scanned = {result.name: result for result in scan_slides(jobs, workers=workers, on_slide=report)}
    return [{**known, **scanned}[slide.name] for slide in collection.files.slides]


def _check_mpps(result: ScanResult, *, size_px: int, mpps: Sequence[float]) -> ScanResult:
    """The result, with a problem if the slide serves none of the magnifications."""
    if result.problem or result.info is None:
        return result
    finest, coarsest = mpp_range(result.info, size_px=size_px)
    if any(finest <= mpp <= coarsest for mpp in mpps):
        return result
    w, h = result.info.size
    if max(mpps) < finest:
        problem = f"its mpp {result.info.mpp:.4g} is too coarse for patches of mpp {max(mpps):g}"
    else:
        problem = f"{w}×{h} pixels of mpp {result.info.mpp:.4g} are smaller than a patch ({size_px} of {min(mpps):g})"
    return replace(result, problem=problem)


def _split_and_freeze(
    manifest: Manifest,
    collection: Collection,
    results: Sequence[ScanResult],
    held_out: int,
    *,
    fraction: float,
    seed: int,
) -> Manifest:
    """The manifest with its slides, their sides and the frozen patches."""
    usable = [result for result in results if not result.problem]
    if not usable:
        name, problem = next(iter(manifest.excluded.items()))
        raise ValueError(f"none of the {len(results)} slides can be used; {name}: {problem}")
    splits, warnings = _sides(collection, usable, fraction=fraction, seed=seed)
    check_split({result.name: collection.origins[result.name].patient for result in usable}, splits)
    entries = tuple(entry(result, collection, splits[result.name]) for result in usable)
    manifest = replace(manifest, slides=entries, warnings=(*manifest.warnings, *warnings))
    streams, outside = [], 0
    for slide in manifest.slides_in("held_out"):
        if collection.squares is not None:
            squares = collection.squares.get(slide.info.name, [])
            inside = list(labeled_patches(slide.info, squares, size_px=manifest.size_px, mpps=manifest.mpps, seed=seed))
            outside += len(squares) - len(inside)
            streams.append(iter(inside))
        else:
            mask, mpps = manifest.mask(slide), manifest.mpps
            size_px, min_tissue = manifest.size_px, manifest.min_tissue
            streams.append(
                sampled_patches(slide.info, mask, size_px=size_px, mpps=mpps, min_tissue=min_tissue, seed=seed)
            )
    patches = round_robin(streams, count=held_out)
    if len(patches) < 2:
        kind = "labeled squares" if collection.squares is not None else "held-out patches"
        raise ValueError(f"only {len(patches)} {kind} on the held-out slides: a measurement needs at least 2")
    notes = [f"{outside} labeled squares lie outside of their held-out slides and are not used"] if outside else []
    return replace(manifest, held_out=tuple(patches), warnings=(*manifest.warnings, *notes))


def _sides(
    collection: Collection, usable: Sequence[ScanResult], *, fraction: float, seed: int
) -> tuple[dict[str, str], list[str]]:
    """Side of each slide, and warnings. Copies of one slide are on one side, unless the user's split says otherwise."""
    same = copies(content_keys(collection, usable))
    warnings = [f"the same slide {len(group)} times: {examples(group)}" for group in same[:SHOWN]]
    if len(same) > SHOWN:
        warnings.append(f"{len(same) - SHOWN} other slides are there more than once")
    splits = {result.name: collection.splits[result.name] for result in usable if collection.splits}
    if splits:
        apart = [group for group in same if len({splits[name] for name in group}) > 1]
        warnings += [f"the table's split has copies of one slide on both sides: {examples(group)}" for group in apart]
        return splits, warnings
    units = {result.name: collection.units[result.name] for result in usable}
    united = unite(units, [*same, *copies({name: [collection.origins[name].patient] for name in units})])
    if len(set(united.values())) < 2 <= len(set(units.values())):
        warnings.append("all slides are copies of one, and both sides show the same tissue")
        united = units
    chosen = select_held_out(list(united.values()), fraction=fraction, seed=seed)
    return {name: "held_out" if unit in chosen else "train" for name, unit in united.items()}, warnings


def summary(manifest: Manifest) -> list[str]:
    """Lines that describe a manifest, warnings last."""
    n = len(manifest.held_out)
    train, held_out = manifest.slides_in("train"), manifest.slides_in("held_out")
    used = {patch.slide for patch in manifest.held_out}
    groups = {slide.patient for slide in held_out if slide.info.name in used}
    mpps = ", ".join(f"{mpp:g}" for mpp in manifest.mpps)
    readers = Counter(slide.info.reader for slide in manifest.slides)
    lines = [
        f"{len(manifest.slides)} slides ({', '.join(f'{n} read by {name}' for name, n in sorted(readers.items()))})"
        + (f", {len(manifest.excluded)} excluded" if manifest.excluded else ""),
        (
            f"train: {len(train)} slides of {len({s.patient for s in train})} patients, "
            f"{sum(s.tissue_mm2 for s in train):.3g} mm² of tissue"
        ),
        f"held out: {n} patches ({manifest.size_px} px, mpp {mpps}) on {len(used)} slides of {len(groups)} patients",
        *([f"{len(manifest.classes)} classes: {'; '.join(manifest.classes)}"] if manifest.classes else []),
        f"hash {manifest.content_hash()[:16]}  {manifest.path}",
        f"overview {assets_dir(manifest.path) / 'index.html'}",
        *(f"excluded: {name}: {problem}" for name, problem in manifest.excluded.items()),
    ]
    lines.append(f"ranks of features wider than {n // 10} will be biased low: by up to 4 % at {n // 4}, 20 % at {n}")
    if len(groups) < 8:
        lines.append(f"note: standard errors from {len(groups)} held-out patients are uncertain")
    return lines
