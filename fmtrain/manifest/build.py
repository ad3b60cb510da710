"""A folder of slides → a manifest: scan, split by patient, frozen held-out patches. No torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Literal

from fmtrain.manifest.held_out_patches import labeled_patches, round_robin, sampled_patches
from fmtrain.manifest.manifest import Manifest, SlideEntry, assets_dir
from fmtrain.manifest.overview import write_collection
from fmtrain.manifest.scan import Job, ScanResult, find_slides, scan_slides
from fmtrain.manifest.split import check_split, select_held_out
from fmtrain.manifest.tables import SlideRow, patient_of, read_labeled_regions, read_table
from fmtrain.slides.info import is_remote
from fmtrain.slides.resolution import is_plausible_mpp, mpp_range
from fmtrain.slides.tissue import MIN_TISSUE

DEFAULT_MPPS = (0.5,)


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
    on_slide: Callable[[int, int, ScanResult], None] | None = None,
) -> Manifest:
    """Scan a folder of slides, split it by patient, freeze the held-out patches, and write the manifest."""
    if is_remote(out):
        raise ValueError(f"{out} is remote: write the manifest to a local disk, and copy it from there")
    if mpp is not None and not is_plausible_mpp(mpp):
        raise ValueError(f"mpp must be micrometers per pixel, 0.05 to 10, got {mpp:g}")
    if not mpps or len(set(mpps)) < len(mpps) or not all(map(is_plausible_mpp, mpps)):
        raise ValueError(f"mpps must be different magnifications, 0.05 to 10 µm per pixel, got {list(mpps)}")
    paths = find_slides(slides)
    slide_rows = read_table(table) if table is not None else {}
    unknown = sorted(set(slide_rows) - {path.name for path in paths})
    if unknown:
        raise ValueError(f"{table} names slides that are not in {slides}: {', '.join(unknown[:3])}")
    manual_split = {name: row.split for name, row in slide_rows.items() if row.split is not None}
    if len(manual_split) == len(paths):  # fail now: scanning thousands of slides takes hours
        check_split({name: _patient_site(name, slide_rows)[0] for name in manual_split}, manual_split)
    if labels is None and (slides / "labels.csv").is_file():
        labels = slides / "labels.csv"
    squares = read_labeled_regions(labels, column=label) if labels is not None else None
    path = out if out.suffix == ".json" else out / "manifest.json"
    masks, thumbnails = assets_dir(path) / "tissue", assets_dir(path) / "thumbnails"
    for folder in (masks, thumbnails):
        folder.mkdir(parents=True, exist_ok=True)
    counter = count(1)

    def report(result: ScanResult) -> None:
        if on_slide is not None:
            on_slide(next(counter), len(paths), result)

    jobs = [Job(slide, slide_rows.get(slide.name, SlideRow()).mpp or mpp, masks, thumbnails) for slide in paths]
    results = [
        _check_mpps(result, size_px=size_px, mpps=mpps)
        for result in scan_slides(jobs, workers=workers, on_slide=report)
    ]
    excluded = {result.path.name: result.problem for result in results if result.problem}
    usable = [result for result in results if not result.problem]
    if not usable:
        name, problem = next(iter(excluded.items()))
        raise ValueError(f"none of the {len(paths)} slides in {slides} can be used; {name}: {problem}")
    entries = _split(usable, slide_rows, fraction=held_out_fraction, by=split_by, seed=seed)
    manifest = Manifest(path, size_px, tuple(mpps), min_tissue, entries, (), excluded)
    streams = []
    for entry in manifest.slides_in("held_out"):
        if squares is not None:
            regions = squares.get(entry.info.name, [])
            streams.append(labeled_patches(entry.info, regions, size_px=size_px, mpps=mpps, seed=seed))
        else:
            streams.append(
                sampled_patches(
                    entry.info, manifest.mask(entry), size_px=size_px, mpps=mpps, min_tissue=min_tissue, seed=seed
                )
            )
    patches = round_robin(streams, count=held_out)
    if len(patches) < 2:
        kind = f"labeled squares in {labels}" if squares is not None else "held-out patches"
        raise ValueError(f"only {len(patches)} {kind} on the held-out slides: a measurement needs at least 2")
    manifest = replace(manifest, held_out=tuple(patches))
    write_collection(assets_dir(path), results, entries, Counter(patch.slide for patch in patches))
    manifest.save(root=slides)  # written last: its presence marks a complete build
    return manifest


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


def _patient_site(name: str, table: Mapping[str, SlideRow]) -> tuple[str, str]:
    """Patient and site of a slide: from the table, else from its name."""
    row, (patient, site) = table.get(name, SlideRow()), patient_of(name)
    return row.patient or patient, row.site or site


def _split(
    usable: Sequence[ScanResult],
    table: Mapping[str, SlideRow],
    *,
    fraction: float,
    by: Literal["patient", "site"],
    seed: int,
) -> tuple[SlideEntry, ...]:
    """Entries with patient, site and side. A manual split applies to all slides or to none."""
    patient_site = {result.path.name: _patient_site(result.path.name, table) for result in usable}
    manual_split = {name: str(table[name].split) for name in patient_site if name in table and table[name].split}
    if manual_split and len(manual_split) < len(patient_site):
        missing = next(name for name in patient_site if name not in manual_split)
        raise ValueError(f"the table gives a split for some slides only: it is missing for {missing}")
    splits = manual_split
    if not splits:
        if by == "site" and not all(site for _, site in patient_site.values()):
            missing = next(name for name, (_, site) in patient_site.items() if not site)
            raise ValueError(
                f"a split by site needs every site: unknown for {missing}; give a table with a column site"
            )
        unit = {name: pair[0 if by == "patient" else 1] for name, pair in patient_site.items()}
        chosen = select_held_out(list(unit.values()), fraction=fraction, seed=seed)
        splits = {name: "held_out" if unit[name] in chosen else "train" for name in unit}
    check_split({name: patient for name, (patient, _) in patient_site.items()}, splits)
    return tuple(
        SlideEntry(
            result.path,
            result.info,
            *patient_site[result.path.name],
            "held_out" if splits[result.path.name] == "held_out" else "train",
            result.tissue_mm2,
        )
        for result in usable
        if result.info is not None
    )


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
        *(f"excluded: {name}: {problem}" for name, problem in manifest.excluded.items()),
    ]
    lines.append(f"ranks of features wider than {n // 10} will be biased low: by up to 4 % at {n // 4}, 20 % at {n}")
    if len(groups) < 8:
        lines.append(f"note: standard errors from {len(groups)} held-out patients are uncertain")
    return lines
