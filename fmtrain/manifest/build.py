"""A folder of slides → a manifest: examined, split by patient, held-out patches frozen, all of it written. No torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from fmtrain.manifest.held_out import labeled_patches, round_robin, sampled_patches
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
    if mpp is not None and not is_plausible_mpp(mpp):
        raise ValueError(f"mpp must be micrometres per pixel, 0.05 to 10, got {mpp:g}")
    if not mpps or len(set(mpps)) < len(mpps) or not all(map(is_plausible_mpp, mpps)):
        raise ValueError(f"mpps must be different magnifications, 0.05 to 10 µm a pixel, got {list(mpps)}")
    paths = find_slides(slides)
    said = read_table(table) if table is not None else {}
    unknown = sorted(set(said) - {path.name for path in paths})
    if unknown:
        raise ValueError(f"{table} names slides that are not in {slides}: {', '.join(unknown[:3])}")
    by_hand = {name: row.split for name, row in said.items() if row.split is not None}
    if len(by_hand) == len(paths):  # not after the hours that looking at thousands of slides takes
        check_split({name: _who(name, said)[0] for name in by_hand}, by_hand)
    if labels is None and (slides / "labels.csv").is_file():
        labels = slides / "labels.csv"
    squares = read_labeled_regions(labels, column=label) if labels is not None else None
    path = out if out.suffix == ".json" else out / "manifest.json"
    for folder in ("tissue", "thumbnails"):
        (assets_dir(path) / folder).mkdir(parents=True, exist_ok=True)

    count = 0

    def tell(result: ScanResult) -> None:
        nonlocal count
        count += 1
        if on_slide is not None:
            on_slide(count, len(paths), result)

    masks, thumbnails = assets_dir(path) / "tissue", assets_dir(path) / "thumbnails"
    jobs = [Job(slide, said.get(slide.name, SlideRow()).mpp or mpp, masks, thumbnails) for slide in paths]
    examined = [
        _usable(result, size_px=size_px, mpps=mpps) for result in scan_slides(jobs, workers=workers, on_slide=tell)
    ]
    problems = {result.path.name: result.problem for result in examined if result.problem}
    good = [result for result in examined if not result.problem]
    if not good:
        first, why = next(iter(problems.items()))
        raise ValueError(f"none of the {len(paths)} slides in {slides} can be used; {first}: {why}")
    entries = _split(good, said, fraction=held_out_fraction, by=split_by, seed=seed)
    manifest = Manifest(path, size_px, tuple(mpps), min_tissue, entries, (), problems)
    streams = []
    for entry in manifest.slides_in("held_out"):
        if squares is not None:
            found = squares.get(entry.info.name, [])
            streams.append(labeled_patches(entry.info, found, size_px=size_px, mpps=mpps, seed=seed))
        else:
            streams.append(
                sampled_patches(
                    entry.info, manifest.mask(entry), size_px=size_px, mpps=mpps, min_tissue=min_tissue, seed=seed
                )
            )
    patches = round_robin(streams, count=held_out)
    if len(patches) < 2:
        of = f"labelled squares in {labels}" if squares is not None else "held-out patches"
        raise ValueError(f"only {len(patches)} {of} on the held-out slides: a measurement needs at least 2")
    manifest = replace(manifest, held_out=tuple(patches))
    write_collection(assets_dir(path), examined, entries, Counter(patch.slide for patch in patches))
    manifest.save(root=slides)  # last: where it is, all is
    return manifest


def _usable(result: ScanResult, *, size_px: int, mpps: Sequence[float]) -> ScanResult:
    """A good slide that can serve none of the magnifications is a problem too."""
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


def _who(name: str, said: Mapping[str, SlideRow]) -> tuple[str, str]:
    """Patient and site of a slide: what the table says, or else its name."""
    row, (patient, site) = said.get(name, SlideRow()), patient_of(name)
    return row.patient or patient, row.site or site


def _split(
    good: Sequence[ScanResult],
    said: Mapping[str, SlideRow],
    *,
    fraction: float,
    by: Literal["patient", "site"],
    seed: int,
) -> tuple[SlideEntry, ...]:
    """Entries with patient, site and side. A hand-made split is taken whole, or not at all."""
    who = {result.path.name: _who(result.path.name, said) for result in good}
    by_hand = {name: said[name].split for name in who if name in said and said[name].split is not None}
    if by_hand and len(by_hand) < len(who):
        missing = next(name for name in who if name not in by_hand)
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
        chosen = select_held_out(list(unit.values()), fraction=fraction, seed=seed)
        splits = {name: "held_out" if unit[name] in chosen else "train" for name in who}
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
    train, held = manifest.slides_in("train"), manifest.slides_in("held_out")
    used = {patch.slide for patch in manifest.held_out}
    groups = {slide.patient for slide in held if slide.info.name in used}
    mpps = ", ".join(f"{mpp:g}" for mpp in manifest.mpps)
    readers = Counter(slide.info.reader for slide in manifest.slides)
    lines = [
        f"{len(manifest.slides)} slides ({', '.join(f'{n} read by {name}' for name, n in sorted(readers.items()))})"
        + (f", {len(manifest.excluded)} left out" if manifest.excluded else ""),
        (
            f"train: {len(train)} slides of {len({s.patient for s in train})} patients, "
            f"{sum(s.tissue_mm2 for s in train):.3g} mm² of tissue"
        ),
        f"held out: {n} patches ({manifest.size_px} px, mpp {mpps}) on {len(used)} slides of {len(groups)} patients",
        *([f"{len(manifest.classes)} classes: {'; '.join(manifest.classes)}"] if manifest.classes else []),
        f"hash {manifest.content_hash()[:16]}  {manifest.path}",
        *(f"left out: {name}: {why}" for name, why in manifest.excluded.items()),
    ]
    lines.append(f"ranks of features wider than {n // 10} will be biased low: by up to 4 % at {n // 4}, 20 % at {n}")
    if len(groups) < 8:
        lines.append(f"note: {len(groups)} held-out patients make standard errors that are themselves uncertain")
    return lines
