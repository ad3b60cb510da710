"""What is known of a manifest before the scan, and the right to write it. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

from fmtrain.manifest.collection import Collection, pseudonymize, survey
from fmtrain.manifest.extend import check_same, unscanned
from fmtrain.manifest.manifest import Manifest, assets_dir
from fmtrain.manifest.options import ManifestOptions
from fmtrain.manifest.pseudonyms import Pseudonyms
from fmtrain.manifest.scan import Job, ScanResult
from fmtrain.manifest.shards import Shard
from fmtrain.manifest.shown_names import show_names_as
from fmtrain.slides.remote import decoded, is_remote
from fmtrain.slides.tissue import SAMPLING
from repmetrics.file_lock import file_lock


class Preparation(NamedTuple):
    """What is known before the scan.

    Attributes:
        draft: The manifest without slides.
        earlier: The manifest that exists and is extended.
        collection: Slides of the folder, and what the user says of them.
        known: Results of the slides that the earlier manifest has, by name.
        jobs: Slides to scan.
    """

    draft: Manifest
    earlier: Manifest | None
    collection: Collection
    known: dict[str, ScanResult]
    jobs: list[Job]


@contextmanager
def prepare(slides: Path, out: Path, options: ManifestOptions, *, shard: Shard | None = None) -> Iterator[Preparation]:
    """What is known before the scan, and within the block the right to write."""
    if is_remote(out):
        raise ValueError(f"{out} is remote: write the manifest to a local disk, and copy it from there")
    slides = decoded(slides)
    if is_remote(slides) and options.pseudonyms is not None:
        raise ValueError(f"{slides} is remote, and --pseudonyms links local files: copy the folder to a local disk")
    path = out if out.suffix == ".json" else out / "manifest.json"
    if not is_remote(slides) and slides.is_dir() and assets_dir(path).is_dir() and slides.samefile(assets_dir(path)):
        raise ValueError(
            f"--out {path} writes masks and thumbnails into {assets_dir(path)}, the folder of the slides: give the "
            "manifest another name, such as manifest.json"
        )
    names = None if options.pseudonyms is None else Pseudonyms.from_file(options.pseudonyms)
    draft = Manifest(
        path,
        options.size_px,
        tuple(options.mpps),
        options.min_tissue,
        (),
        (),
        options={
            "held_out": options.held_out,
            "held_out_fraction": options.held_out_fraction,
            "split_by": options.split_by,
            "seed": options.seed,
            **({} if names is None else {"pseudonyms": names.key_id}),
        },
        sampling=SAMPLING,
    )
    if path.exists() and not options.overwrite:
        check_same(Manifest.load(path), draft)
    with show_names_as(None if names is None else names.of):
        skip = [path, assets_dir(path), *([] if options.pseudonyms is None else [options.pseudonyms])]
        collection = survey(slides, options, skip=skip)
    with _writing(path, shard):
        if names is not None:
            collection = pseudonymize(collection, names, assets_dir(path) / "slides")
        earlier = Manifest.load(path) if path.exists() and not options.overwrite else None
        known = {} if earlier is None else unscanned(earlier, collection)
        if options.overwrite:
            path.unlink(missing_ok=True)  # the masks are rewritten before the manifest: it must not be there meanwhile
        yield Preparation(draft, earlier, collection, known, _jobs(collection, known, assets_dir(path)))


@contextmanager
def _writing(path: Path, shard: Shard | None) -> Iterator[None]:
    """The right to write a manifest's files within the block: of one call, or of one call for each shard."""
    with ExitStack() as locks:
        try:
            locks.enter_context(file_lock(assets_dir(path) / ".lock", shared=shard is not None))
            if shard is not None:
                locks.enter_context(file_lock(shard.record(path).with_suffix(".lock")))
        except BlockingIOError:
            raise ValueError(
                f"another `fmtrain manifest` is writing {path}: wait until it ends, or give another --out"
            ) from None
        yield


def _jobs(collection: Collection, known: Mapping[str, ScanResult], folder: Path) -> list[Job]:
    """The slides to scan: those that an earlier manifest knows are not scanned again."""
    masks, thumbnails = folder / "tissue", folder / "thumbnails"
    for assets in (masks, thumbnails):
        assets.mkdir(parents=True, exist_ok=True)
    return [
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
