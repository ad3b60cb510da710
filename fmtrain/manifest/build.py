"""A folder of slides → a manifest: scan, split by patient, frozen held-out patches. No torch."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

from fmtrain.manifest import shards
from fmtrain.manifest.collection import Collection, content_keys, entry
from fmtrain.manifest.doubts import mpp_doubts
from fmtrain.manifest.extend import extended
from fmtrain.manifest.held_out_patches import labeled_patches, round_robin, sampled_patches
from fmtrain.manifest.manifest import Manifest, assets_dir
from fmtrain.manifest.options import ManifestOptions
from fmtrain.manifest.overview import write_collection
from fmtrain.manifest.preparation import prepare
from fmtrain.manifest.scan import Job, ScanResult, scan_slides
from fmtrain.manifest.shards import Shard
from fmtrain.manifest.shown_names import examples
from fmtrain.manifest.split import check_split, copies, select_held_out, unite
from fmtrain.slides.resolution import mpp_range
from repmetrics.progress import print_line

OnSlide = Callable[[int, int, ScanResult], None]
SHOWN = 5  # groups of copies that are named


def build_manifest(
    slides: Path,
    out: Path,
    *,
    executor: Executor | None = None,
    on_slide: OnSlide | None = None,
    merge: bool = False,
    **options: Any,
) -> Manifest:
    """Scan a folder of slides, split it by patient, freeze the held-out patches, and write the manifest.

    A manifest that exists is extended: slides that are new are scanned and join, all else stays. With `overwrite` it is
    built anew.

    Args:
        slides: Folder of slides.
        out: Manifest file, or folder for it.
        executor: Where slides are scanned; None: in this process.
        on_slide: Function called with the number of scanned slides, of all slides to scan, and the result of each.
        merge: Whether the slides were scanned before, by `scan_shard`.
        **options: Options of `ManifestOptions`.

    Raises:
        ValueError: Options, slides and tables do not fit, or another call is writing the same manifest.
    """
    chosen = ManifestOptions(**options)
    with prepare(slides, out, chosen) as (draft, earlier, collection, known, jobs):
        path = draft.path
        if merge:
            known = known | shards.merged(shards.read_records(path), jobs)
            jobs = [job for job in jobs if job.name not in known]
            if jobs:
                print_line(f"{len(jobs)} slides are scanned now: no shard has them as they are")
        scanned = {result.name: result for result in _scan(jobs, executor, on_slide)}
        results = [
            _check_mpps({**known, **scanned}[slide.name], size_px=chosen.size_px, mpps=chosen.mpps)
            for slide in collection.files.slides
        ]
        manifest = replace(
            draft,
            excluded={result.name: result.problem for result in results if result.problem},
            warnings=(
                *collection.warnings,
                *mpp_doubts(results, filler=chosen.mpp, overrides=collection.overrides),
            ),
        )
        if earlier is not None:
            manifest = extended(earlier, manifest, collection, results)
        else:
            manifest = _split_and_freeze(
                manifest, collection, results, chosen.held_out, fraction=chosen.held_out_fraction, seed=chosen.seed
            )
        write_collection(manifest, results, collection.files.others)
        manifest.save(root=collection.root)  # written last: its presence marks a complete build
        if merge:
            shutil.rmtree(shards.folder(path))
    return manifest


def scan_shard(
    slides: Path,
    out: Path,
    shard: Shard,
    *,
    executor: Executor | None = None,
    on_slide: OnSlide | None = None,
    **options: Any,
) -> list[ScanResult]:
    """Scan one share of the slides, for `build_manifest` with `merge` and the same options.

    Calls for other shards of the same manifest may run at the same time.
    """
    with prepare(slides, out, ManifestOptions(**options), shard=shard) as (draft, _, _, _, jobs):
        selected = shard.of(jobs)
        record = shard.record(draft.path)
        record.unlink(missing_ok=True)  # of an earlier call
        results = _scan(selected, executor, on_slide)
        shards.write_record(record, selected, results)
    return results


def _scan(jobs: Sequence[Job], executor: Executor | None, on_slide: OnSlide | None) -> list[ScanResult]:
    counter = count(1)

    def report(result: ScanResult) -> None:
        if on_slide is not None:
            on_slide(next(counter), len(jobs), result)

    return scan_slides(jobs, executor=executor, on_slide=report)


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
