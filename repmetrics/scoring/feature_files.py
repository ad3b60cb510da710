"""Write the features that were measured as HDF5: one file per slide, or one for images without slides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from repmetrics.atomic_write import atomic_path
from repmetrics.data.source import Items, Source, hash_strings
from repmetrics.encoders.encoder import IdentifiedEncoder
from repmetrics.functional.ids import factorize
from repmetrics.scoring.embed import count_images, image_size
from repmetrics.scoring.embedded import Embedded
from repmetrics.scoring.settings import EmbedSettings

IMAGES = "features.h5"
ENCODER = "encoder_sha256"


class FeatureFiles:
    """A folder of features of one encoder, as CLAM and TRIDENT lay it out: ``features`` (N, D) and ``coords`` (N, 2).

    Each file also has ``ids``, ``slide``, ``group`` (what errors come from) and ``label`` where they are known.
    `repmetrics score` reads the folder.

    Args:
        folder: Folder to write to.
        source: Source of the images.
        encoder: Encoder of the images.
        settings: Settings for computing the features.

    Raises:
        ValueError: The folder has features of another encoder, or of other preprocessing.
    """

    def __init__(self, folder: Path, source: Source, encoder: IdentifiedEncoder, settings: EmbedSettings) -> None:
        self.folder, self.source = folder, source
        size = image_size(source, encoder, settings)
        self.about: dict[str, Any] = {
            ENCODER: hash_strings([*(encoder.inputs or ()), str(encoder.mean), str(encoder.std), str(size)]),
            "checkpoint": encoder.source,
            "architecture": encoder.arch,
            "step": -1 if encoder.step is None else encoder.step,
            "mean": encoder.mean,
            "std": encoder.std,
            "data": str(source.path),
            "notes": "\n".join(encoder.notes),
        }
        self._written: list[Path] = []
        for path in sorted(folder.glob("*.h5")):
            if _encoder_of(path) != self.about[ENCODER]:
                raise ValueError(
                    f"{path} has features of another encoder, or of other preprocessing: name another --features-out"
                )

    def write(self, embedded: Embedded) -> None:
        """Write the features of all images that could be read."""
        kept = np.flatnonzero(embedded.report.readable).tolist()
        items = self.source.items or Items([str(index) for index in range(count_images(self.source))])
        columns = self._columns(embedded, items, kept)
        if items.slides is None or items.coordinates is None:
            self._write(self.folder / IMAGES, columns)
            return
        codes, slides = factorize([items.slides[index] for index in kept])
        for code, name in enumerate(file_names(slides).values()):
            rows = (codes == code).numpy()
            self._write(self.folder / f"{name}.h5", {key: value[rows] for key, value in columns.items()})

    def summary(self) -> str:
        """The files that were written, in one sentence."""
        count = len(self._written)
        return f"features written to {self.folder}: {count} {'file' if count == 1 else 'files'} of HDF5"

    def _columns(self, embedded: Embedded, items: Items, kept: Sequence[int]) -> dict[str, np.ndarray[Any, Any]]:
        """Arrays of the readable images, by the names in the file."""
        features = embedded.features
        columns = {"features": features.values.float().numpy(), "ids": _texts([items.ids[index] for index in kept])}
        if items.slides is not None:
            columns["slide"] = _texts([items.slides[index] for index in kept])
        if features.groups is not None:
            columns["group"] = _texts(features.groups)
        if features.labels is not None and features.labels.ndim == 1:
            names = self.source.classes
            columns["label"] = _texts([names[k] if 0 <= k < len(names) else str(k) for k in features.labels.tolist()])
        if items.coordinates is not None:
            columns["coords"] = np.array([items.coordinates[index] for index in kept], dtype=np.int64).reshape(-1, 2)
        if items.mpp is not None:
            columns["mpp"] = np.array([items.mpp[index] for index in kept])
        return columns

    def _write(self, path: Path, columns: Mapping[str, np.ndarray[Any, Any]]) -> None:
        with atomic_path(path) as temporary, h5py.File(temporary, "w") as file:
            for name, values in columns.items():
                file[name] = values
            file.attrs.update(self.about)
        self._written.append(path)


def _texts(values: Sequence[str]) -> np.ndarray[Any, Any]:
    return np.array(values, dtype=h5py.string_dtype())


def _encoder_of(path: Path) -> str | None:
    try:
        with h5py.File(path, "r") as file:
            return str(file.attrs.get(ENCODER))
    except OSError:
        return None


def file_names(slides: Sequence[str]) -> dict[str, str]:
    """Name of a file for each slide: its stem, or its whole path where stems repeat.

    Example:
        >>> file_names(["a/1.svs", "b/2.tif"]), file_names(["a/1.svs", "b/1.svs"])
        ({'a/1.svs': '1', 'b/2.tif': '2'}, {'a/1.svs': 'a_1.svs', 'b/1.svs': 'b_1.svs'})
    """
    stems = {slide: Path(slide).stem for slide in slides}
    if len(set(stems.values())) == len(stems):
        return stems
    return {slide: slide.replace("/", "_").replace("\\", "_") for slide in slides}
