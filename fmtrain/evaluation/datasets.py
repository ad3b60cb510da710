"""Public labeled data sets of patches, in their publishers' layouts and with eva's splits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from repmetrics.data.images import ImageFiles
from repmetrics.data.read_csv import read_csv
from repmetrics.data.source import Source, file_digest, hash_strings

Splits = dict[str, Source]

BACH_CLASSES = ("Benign", "InSitu", "Invasive", "Normal")
# eva's split of BACH's 400 images by patient: these positions of the sorted list validate, the others train.
BACH_VAL = ((41, 59), (60, 90), (139, 169), (240, 258), (260, 273), (345, 368))
CRC_CLASSES = ("ADI", "BACK", "DEB", "LYM", "MUC", "MUS", "NORM", "STR", "TUM")
MHIST_CLASSES = ("SSA", "HP")
PCAM_CLASSES = ("no_tumor", "tumor")


def bach(root: Path) -> Splits:
    """``ICIAR2018_BACH_Challenge/Photos/<class>/*.tif``: 268 images train, 132 validate; no test labels exist."""
    photos = _folder(root, "ICIAR2018_BACH_Challenge/Photos", "Photos", "")
    files, labels = _by_class(photos, BACH_CLASSES, (".tif",))
    if len(files) != 400:
        raise ValueError(f"BACH has 400 photos, and its split needs all of them: found {len(files)} in {photos}")
    val = {i for start, stop in BACH_VAL for i in range(start, stop)}
    indices = {"train": [i for i in range(400) if i not in val], "val": sorted(val)}
    return {
        split: _files(photos, [files[i] for i in rows], [labels[i] for i in rows], BACH_CLASSES)
        for split, rows in indices.items()
    }


def crc(root: Path) -> Splits:
    """``NCT-CRC-HE-100K/<class>/*.tif`` trains, ``CRC-VAL-HE-7K/<class>/*.tif`` validates."""
    splits = {}
    for split, name in (("train", "NCT-CRC-HE-100K"), ("val", "CRC-VAL-HE-7K")):
        folder = _folder(root, name)
        splits[split] = _files(folder, *_by_class(folder, CRC_CLASSES, (".tif",)), CRC_CLASSES)
    return splits


def mhist(root: Path) -> Splits:
    """``images/*.png`` with ``annotations.csv``; its test partition validates, as in eva."""
    table = root / "annotations.csv"
    if not table.is_file():
        raise ValueError(f"{root} is not MHIST: expected annotations.csv and images/ in it")
    columns, rows = read_csv(table)
    for column in ("Image Name", "Majority Vote Label", "Partition"):
        if column not in columns:
            raise ValueError(f"annotations.csv has no column {column!r}: it has {', '.join(columns) or 'none'}")
    if unknown := {row["Majority Vote Label"] for row in rows} - set(MHIST_CLASSES):
        raise ValueError(f"annotations.csv has the label {min(unknown)!r}: MHIST has {', '.join(MHIST_CLASSES)}")
    splits = {}
    for split, partition in (("train", "train"), ("val", "test")):
        in_split = [row for row in rows if row["Partition"] == partition]
        labels = [MHIST_CLASSES.index(row["Majority Vote Label"]) for row in in_split]
        splits[split] = _files(root / "images", [row["Image Name"] for row in in_split], labels, MHIST_CLASSES)
    return splits


def pcam(root: Path) -> Splits:
    """``camelyonpatch_level_2_split_{train,valid,test}_{x,y}.h5``, unpacked."""
    splits = {}
    for split, name in (("train", "train"), ("val", "valid"), ("test", "test")):
        images, labels = (root / f"camelyonpatch_level_2_split_{name}_{part}.h5" for part in "xy")
        if not images.is_file() or not labels.is_file():
            raise ValueError(f"{root} is not PatchCamelyon: expected {images.name} and {labels.name}, unpacked")
        dataset = Hdf5Images(images, labels)
        splits[split] = Source(
            images, "PatchCamelyon", images=dataset, classes=PCAM_CLASSES, resize=True, fingerprint=dataset.fingerprint
        )
    return splits


class Hdf5Images(Dataset[dict[str, Any]]):
    """PatchCamelyon's images ("x": (N, 96, 96, 3) uint8) and labels ("y"); each process opens the file itself."""

    def __init__(self, images: Path, labels: Path) -> None:
        import h5py

        self.path, self.labels_path = images, labels
        try:
            with h5py.File(labels, "r") as y, h5py.File(images, "r") as x:
                self.labels = np.asarray(y["y"]).reshape(-1).astype(np.int64)
                shape, dtype = x["x"].shape, x["x"].dtype
        except (OSError, KeyError) as error:
            raise ValueError(f"{images} and {labels.name} are not PatchCamelyon's: {error}") from error
        if shape != (len(self.labels), 96, 96, 3) or dtype != np.uint8:
            raise ValueError(f"{images} must be ({len(self.labels)}, 96, 96, 3) of uint8, got {shape} of {dtype}")
        self._file: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_file": None}

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Image and label `index`."""
        import h5py

        self._file = self._file or h5py.File(self.path, "r")
        pixels = torch.from_numpy(self._file["x"][index])
        return {"image": pixels.permute(2, 0, 1).contiguous(), "label": int(self.labels[index])}

    def fingerprint(self) -> str:
        """Digest of the content of both files."""
        return hash_strings([file_digest(self.path), file_digest(self.labels_path)])


def _folder(root: Path, *candidates: str) -> Path:
    """The first of these folders that exists below `root`; the candidate "" is `root` itself."""
    for candidate in candidates:
        if (root / candidate).is_dir() and (candidate or any(root.iterdir())):
            return root / candidate
    raise ValueError(f"{root} does not hold {candidates[0]}: name the folder that does")


def _by_class(folder: Path, classes: Sequence[str], suffixes: tuple[str, ...]) -> tuple[list[str], list[int]]:
    if missing := [name for name in classes if not (folder / name).is_dir()]:
        raise ValueError(f"{folder} has no class folder {missing[0]}: expected {', '.join(classes)}")
    pairs = [
        (file.relative_to(folder).as_posix(), label)
        for label, name in enumerate(classes)
        for file in sorted((folder / name).iterdir())
        if file.suffix.lower() in suffixes
    ]
    return [file for file, _ in pairs], [label for _, label in pairs]


def _files(folder: Path, files: Sequence[str], labels: Sequence[int], classes: tuple[str, ...]) -> Source:
    if not files:
        raise ValueError(f"{folder} holds no images")
    images = ImageFiles(folder, files, labels=torch.tensor(labels))
    return Source(folder, "image folder", images=images, classes=classes, resize=True, fingerprint=images.fingerprint)
