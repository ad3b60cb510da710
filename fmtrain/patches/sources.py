"""Several sources of training patches: further manifests, folders of ready tiles, coordinates of TRIDENT and CLAM."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from fmtrain.domains import check_domain
from fmtrain.manifest.manifest import SlideEntry
from fmtrain.manifest.patients import patient_of
from fmtrain.manifest.search import FoundSlide, search
from fmtrain.patches.dataset import MAX_ATTEMPTS, TooManyFailedSlidesError, TrainingPatches, read
from fmtrain.patches.options import PatchOptions
from fmtrain.patches.slide_pool import SlidePool
from fmtrain.rng import choose, derive_seed, uniforms
from fmtrain.slides.info import SlideInfo
from fmtrain.slides.inspection import inspect_slide
from fmtrain.slides.remote import StorageError
from fmtrain.slides.resolution import region
from fmtrain.slides.retries import with_retries
from fmtrain.slides.staging import stage
from fmtrain.slides.tiles import SlideError

Pixels = npt.NDArray[np.uint8]
TILE_SUFFIXES = frozenset([".png", ".jpg", ".jpeg", ".tif", ".tiff", ".webp", ".bmp"])
SOURCE_STREAM, TILE_STREAM = 3, 4  # streams of random numbers
log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class SourceOptions:
    """One further source of training patches.

    Args:
        path: Manifest, folder of tiles, or folder of HDF5 files with coordinates of TRIDENT or CLAM.
        weight: Share of the patches, relative to the weights of the other sources; that of the manifest is 1.
        slides: Folder of the slides that the coordinates belong to.
    """

    path: Path
    weight: float = 1.0
    slides: Path | None = None

    def __post_init__(self) -> None:
        check_domain("weight", self.weight, minimum=0)


class FilePatches:
    """Random patches of ready files: one image per tile, or one slide per file of coordinates.

    A file that cannot be read is named, and its patch is drawn again by the same function of seed and index.

    Args:
        names: Name of each file.
        options: Options of the patches.
        read: Reads a patch of file k into an array, from three uniform numbers.
        kind: Name of the files in messages.
    """

    def __init__(
        self,
        names: Sequence[str],
        options: PatchOptions,
        read: Callable[[int, Sequence[float], Pixels], None],
        kind: str,
    ) -> None:
        self.names, self.options, self.read, self.kind = list(names), options, read, kind
        self.failed: set[int] = set()

    def read_into(self, indices: Sequence[int], out: Pixels) -> None:
        """Read patches into `out` (N, S, S, 3)."""
        for row, index in enumerate(indices):
            for attempt in range(MAX_ATTEMPTS):
                number, place = self._draw(index, attempt)
                try:
                    self.read(number, place, out[row])
                    break
                except StorageError:
                    raise
                except (SlideError, OSError, ValueError) as error:
                    self._fail(number, error)
            else:
                raise TooManyFailedSlidesError(f"patch {index} could not be drawn in {MAX_ATTEMPTS} attempts")

    def name_of(self, index: int) -> str | None:
        """Name of the file of a patch, at the first attempt."""
        return self.names[self._draw(index, 0)[0]]

    def _draw(self, index: int, attempt: int) -> tuple[int, Sequence[float]]:
        first, *place = uniforms(self.options.seed, index, attempt=attempt, stream=TILE_STREAM, n=4)
        return min(int(first * len(self.names)), len(self.names) - 1), place

    def _fail(self, number: int, error: Exception) -> None:
        if number in self.failed:
            return
        self.failed.add(number)
        log.warning("%s left out (%d of %d): %s", self.kind, len(self.failed), len(self.names), error)
        limit = self.options.max_failed_fraction
        if len(self.failed) > max(limit * len(self.names), 1):
            raise TooManyFailedSlidesError(
                f"{len(self.failed)} of {len(self.names)} {self.kind}s failed, more than {limit:.0%}; the last: {error}"
            ) from error


@dataclass(frozen=True)
class TileReader:
    """Reads a random crop of an image at its own resolution."""

    files: tuple[Path, ...]
    side: int

    def __call__(self, number: int, place: Sequence[float], out: Pixels) -> None:
        """Read a crop of file `number` into `out`, at the place that two uniform numbers give."""
        side = self.side
        with Image.open(self.files[number]) as image:
            width, height = image.size
            if min(width, height) < side:
                name = self.files[number].name
                raise ValueError(f"{name} has {width} × {height} px, patches have {side}: lower data.size_px")
            x, y = int(place[0] * (width - side + 1)), int(place[1] * (height - side + 1))
            out[:] = np.asarray(image.convert("RGB").crop((x, y, x + side, y + side)))


def tile_patches(folder: Path, options: PatchOptions) -> FilePatches:
    """Random crops of the images in a folder.

    Raises:
        ValueError: There are no images, or the first is smaller than a patch.
    """
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in TILE_SUFFIXES)
    if not files:
        raise ValueError(f"{folder} holds no tiles: expected images ({', '.join(sorted(TILE_SUFFIXES))})")
    read = TileReader(tuple(files), options.size_px)
    read(0, (0.0, 0.0), np.empty((options.size_px, options.size_px, 3), np.uint8))
    return FilePatches([path.relative_to(folder).as_posix() for path in files], options, read, "tile")


def read_coordinates(path: Path, info: SlideInfo) -> tuple[npt.NDArray[np.int64], float]:
    """Upper left corners at level 0 (N, 2), and side at level 0, of an HDF5 file of TRIDENT or CLAM.

    TRIDENT's attribute ``patch_size_level0`` is the side; CLAM's are ``patch_size`` and ``patch_level``.
    """
    import h5py

    with h5py.File(path, "r") as file:
        if "coords" not in file:
            raise ValueError(f"{path.name} holds no coords: expected a file of TRIDENT or CLAM")
        coords, attributes = file["coords"], {**file.attrs, **file["coords"].attrs}
        corners = np.asarray(coords[()], np.int64)
    if "patch_size_level0" in attributes:
        return corners, float(attributes["patch_size_level0"])
    if "patch_size" not in attributes or "patch_level" not in attributes:
        raise ValueError(f"{path.name} does not state patch_size_level0, or patch_size and patch_level")
    return corners, float(attributes["patch_size"]) * info.downsample(int(attributes["patch_level"]))


class CoordinateReader:
    """Reads a patch of a slide at one of its coordinates.

    Args:
        entries: Slides.
        places: Corners and side at level 0, for each slide.
        options: Options of the patches.
    """

    def __init__(
        self,
        entries: Sequence[SlideEntry],
        places: Sequence[tuple[npt.NDArray[np.int64], float]],
        options: PatchOptions,
    ) -> None:
        self.entries, self.places, self.side = entries, places, options.size_px
        self.pool = SlidePool(options.open_slides)

    def __call__(self, number: int, place: Sequence[float], out: Pixels) -> None:
        """Read a patch of slide `number` into `out`, at the coordinate that a uniform number gives."""
        entry, (corners, side) = self.entries[number], self.places[number]
        corner = corners[min(int(place[0] * len(corners)), len(corners) - 1)].tolist()
        at = region(entry.info, corner, size_px=self.side, mpp=side * entry.info.mpp / self.side)
        with_retries(partial(read, self.pool, entry, [at], [out], tissue=False))


def coordinate_patches(folder: Path, slides: Path | None, options: PatchOptions) -> FilePatches:
    """Patches of slides at the coordinates of TRIDENT or CLAM.

    Raises:
        ValueError: A slide or its coordinates are absent.
    """
    if slides is None:
        raise ValueError(f"{folder} holds coordinates: name the folder of their slides with `slides`")
    entries, places = list[SlideEntry](), []
    by_stem: dict[str, list[FoundSlide]] = {}
    for slide in search(slides).slides:
        by_stem.setdefault(slide.path.stem, []).append(slide)
    for file in sorted(folder.rglob("*.h5")):
        stem = file.stem.removesuffix("_patches")  # TRIDENT's ending
        if len(of_stem := by_stem.get(stem, [])) != 1:
            raise ValueError(f"{file.name} has {len(of_stem) or 'no'} slides in {slides}: expected one {stem}.*")
        (slide,) = of_stem
        with stage(slide.path, slide.files) as local:
            info = inspect_slide(local, name=slide.name, files=slide.files)
        corners, side = read_coordinates(file, info)
        if len(corners):
            entries.append(SlideEntry(slide.path, info, patient_of(slide).patient, "", "train", 0.0))
            places.append((corners, side))
    if not entries:
        raise ValueError(f"{folder} holds no coordinates")
    reader = CoordinateReader(entries, places, options)
    return FilePatches([entry.info.name for entry in entries], options, reader, "slide")


class PatchMixture:
    """Patches of a manifest and of further sources, in a fixed mixture. Item i is a function of the seed and i.

    Args:
        main: Patches of the manifest.
        others: Further sources.
        weight: Weight of the manifest.
        options: Options of `PatchOptions`, for the further sources.
    """

    def __init__(
        self, main: TrainingPatches, others: Sequence[SourceOptions], *, weight: float, options: Mapping[str, Any]
    ) -> None:
        self.main = main
        self.sources: list[Any] = [main]
        self.notes: list[str] = []
        held_out = main.manifest.slides_in("held_out")
        for number, other in enumerate(others, start=1):
            seed = derive_seed(main.options.seed, SOURCE_STREAM, number) >> 1
            self.sources.append(self._open(other, dict(options) | {"size_px": main.size_px, "seed": seed}, held_out))
        self.weights = [weight, *(other.weight for other in others)]
        if not any(self.weights):
            raise ValueError("data.sources: all weights are 0")
        self._ends = np.cumsum(np.asarray(self.weights) / sum(self.weights)).tolist()

    def _open(self, source: SourceOptions, options: dict[str, Any], held_out: Sequence[SlideEntry]) -> Any:
        path = source.path
        if path.suffix == ".json":
            patches: Any = TrainingPatches(path, **options)
            slides, key = patches.slides, patches.manifest.options.get("pseudonyms")
        elif not path.is_dir():
            raise ValueError(f"data.sources: {path} is neither a manifest nor a folder")
        elif any(path.rglob("*.h5")):
            patches = coordinate_patches(path, source.slides, PatchOptions(**options))
            slides, key = patches.read.entries, None
        else:
            self.notes.append(f"sources: the tiles in {path} have no patients, so held-out patients cannot be left out")
            return tile_patches(path, PatchOptions(**options))
        if key != self.main.manifest.options.get("pseudonyms"):
            self.notes.append(f"sources: the patients of {path} have other pseudonyms, or none, and cannot be compared")
        # By content too: the manifest's patients may be pseudonyms, or come from a table.
        keys = {key for slide in held_out for key in (slide.patient, slide.info.fingerprint)}
        leaked = [slide.info.name for slide in slides if {slide.patient, slide.info.fingerprint} & keys]
        if leaked:
            raise ValueError(
                f"data.sources: {path} has {len(leaked)} slides of held-out patients, such as {min(leaked)}: remove "
                "them, or hold the same patients out"
            )
        return patches

    @property
    def digest(self) -> str:
        """Hash of the names of all files, and of the weights."""
        content = [_names(source) for source in self.sources]
        return hashlib.sha256(repr((content, self.weights)).encode()).hexdigest()

    def replace_main(self, main: TrainingPatches) -> None:
        """Take other patches of the manifest: those of the manifest before its extension."""
        self.main = self.sources[0] = main

    def state(self) -> dict[str, Any]:
        """What a resumed run compares and restores."""
        return {"digest": self.digest, "quarantined": [getattr(s, "quarantined", {}) for s in self.sources[1:]]}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore the state of an earlier run.

        Raises:
            ValueError: Files or weights changed.
        """
        if state.get("digest") != self.digest:
            raise ValueError("the files or weights of data.sources changed since the run started: restore them")
        for source, quarantined in zip(self.sources[1:], state["quarantined"], strict=True):
            if isinstance(source, TrainingPatches):
                source.quarantine(quarantined)

    def __getattr__(self, name: str) -> Any:
        """Everything else is that of the manifest's patches."""
        if name == "main":  # while unpickling
            raise AttributeError(name)
        return getattr(self.main, name)

    def source_of(self, index: int) -> int:
        """Number of the source of a patch; patches of one block share it."""
        block = index // self.main.crops_per_block
        return choose(self._ends, uniforms(self.main.options.seed, block, stream=SOURCE_STREAM, n=1)[0])

    def name_of(self, index: int) -> str | None:
        """Name of the slide or tile of a patch."""
        name: str | None = self.sources[self.source_of(index)].name_of(index)
        return name

    def read_into(self, indices: Sequence[int], out: Pixels) -> None:
        """Read patches into `out` (N, S, S, 3)."""
        sources = np.asarray([self.source_of(index) for index in indices])
        for number in np.unique(sources):
            rows = np.flatnonzero(sources == number)
            part = np.empty((len(rows), *out.shape[1:]), np.uint8)
            self.sources[number].read_into([indices[int(row)] for row in rows], part)
            out[rows] = part


def _names(source: TrainingPatches | FilePatches) -> list[str]:
    """Names of the slides or files of a source."""
    return source.names if isinstance(source, FilePatches) else [slide.info.name for slide in source.slides]
