"""The labelled data sets of pathology, in the layout their publishers ship and with eva's splits."""

from __future__ import annotations

import csv
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from repmetrics.cache import digest, file_digest
from repmetrics.eva_probe import Protocol, now, paper
from repmetrics.features import Features
from repmetrics.images import ImageFiles
from repmetrics.sources import Source

Splits = dict[str, Source]


class Task(NamedTuple):
    """A data set with its protocol.

    Attributes:
        name: "bach", "crc", "mhist" or "pcam".
        classes: by index, in eva's order.
        open: the folder of the data → its splits: "train", "val", and "test" where rows are left that choose nothing.
        paper: eva's protocol at the time of arXiv 2404.15217.
        now: eva's protocol today.
        published: balanced accuracies in that paper, by encoder.
        rows: of each split as its publishers ship it, on which the published numbers are.
        remark: what to know of the numbers.
    """

    name: str
    classes: tuple[str, ...]
    open: Callable[[Path], Splits]
    paper: Protocol
    now: Protocol
    published: Mapping[str, float]
    rows: Mapping[str, int]
    remark: str


BACH_CLASSES = ("Benign", "InSitu", "Invasive", "Normal")
# eva's split of BACH's 400 images by patient: these places of the sorted list validate, the others train.
BACH_VAL = ((41, 59), (60, 90), (139, 169), (240, 258), (260, 273), (345, 368))
CRC_CLASSES = ("ADI", "BACK", "DEB", "LYM", "MUC", "MUS", "NORM", "STR", "TUM")
MHIST_CLASSES = ("SSA", "HP")
PCAM_CLASSES = ("no_tumor", "tumor")


def bach(root: Path) -> Splits:
    """``ICIAR2018_BACH_Challenge/Photos/<class>/*.tif``: 268 images train, 132 validate; no test labels exist."""
    photos = _folder(root, "ICIAR2018_BACH_Challenge/Photos", "Photos", "")
    files, labels = _by_class(photos, BACH_CLASSES, (".tif",))
    if len(files) != 400:
        raise ValueError(f"BACH has 400 photos, and its split goes by their places: found {len(files)} in {photos}")
    val = {place for start, stop in BACH_VAL for place in range(start, stop)}
    places = {"train": [i for i in range(400) if i not in val], "val": sorted(val)}
    return {
        split: _files(photos, [files[i] for i in chosen], [labels[i] for i in chosen], BACH_CLASSES)
        for split, chosen in places.items()
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
    rows = _read_csv(table)
    wanted = ("Image Name", "Majority Vote Label", "Partition")
    if rows and (lacking := [column for column in wanted if column not in rows[0]]):
        raise ValueError(f"annotations.csv lacks the column {lacking[0]!r}: found {', '.join(rows[0])}")
    if odd := {row["Majority Vote Label"] for row in rows} - set(MHIST_CLASSES):
        raise ValueError(f"annotations.csv has the label {min(odd, key=str)!r}: MHIST has {', '.join(MHIST_CLASSES)}")
    splits = {}
    for split, partition in (("train", "train"), ("val", "test")):
        chosen = [row for row in rows if row["Partition"] == partition]
        labels = [MHIST_CLASSES.index(row["Majority Vote Label"]) for row in chosen]
        splits[split] = _files(root / "images", [row["Image Name"] for row in chosen], labels, MHIST_CLASSES)
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
            images,
            "PatchCamelyon",
            images=dataset,
            classes=PCAM_CLASSES,
            resize=True,
            fingerprint=dataset.fingerprint,
        )
    return splits


class Hdf5Images(Dataset[dict[str, Any]]):
    """PatchCamelyon's images ("x": (N, 96, 96, 3) uint8) and labels ("y"); opened in the process that reads."""

    def __init__(self, images: Path, labels: Path) -> None:
        import h5py

        self.path, self.labels_path = images, labels
        try:
            with h5py.File(labels, "r") as y, h5py.File(images, "r") as x:
                self.labels = np.asarray(y["y"]).reshape(-1).astype(np.int64)
                shape, kind = x["x"].shape, x["x"].dtype
        except (OSError, KeyError) as error:
            raise ValueError(f"{images} and {labels.name} are not PatchCamelyon's: {error}") from error
        if shape != (len(self.labels), 96, 96, 3) or kind != np.uint8:
            raise ValueError(f"{images} must be ({len(self.labels)}, 96, 96, 3) of uint8, got {shape} of {kind}")
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
        """A digest of both files' content."""
        return digest([file_digest(self.path), file_digest(self.labels_path)])


def _read_csv(path: Path) -> list[dict[str, str]]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            return list(csv.DictReader(file))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path.name} is not a readable CSV: {error}") from error


def _folder(root: Path, *candidates: str) -> Path:
    """The first of these folders below `root` that exists; `root` itself if it already is the last part."""
    for candidate in candidates:
        if (root / candidate).is_dir() and (candidate or any(root.iterdir())):
            return root / candidate
    raise ValueError(f"{root} does not hold {candidates[0]}: name the folder that does")


def _by_class(folder: Path, classes: Sequence[str], suffixes: tuple[str, ...]) -> tuple[list[str], list[int]]:
    if lacking := [name for name in classes if not (folder / name).is_dir()]:
        raise ValueError(f"{folder} lacks the class folder {lacking[0]}: expected {', '.join(classes)}")
    found = [
        (file.relative_to(folder).as_posix(), label)
        for label, name in enumerate(classes)
        for file in sorted((folder / name).iterdir())
        if file.suffix.lower() in suffixes
    ]
    return [file for file, _ in found], [label for _, label in found]


def _files(folder: Path, files: Sequence[str], labels: Sequence[int], classes: tuple[str, ...]) -> Source:
    if not files:
        raise ValueError(f"{folder} holds no images")
    images = ImageFiles(folder, files, labels=torch.tensor(labels))
    return Source(folder, "image folder", images=images, classes=classes, resize=True, fingerprint=images.fingerprint)


ENCODERS = ("random S/16", "ImageNet S/16", *(f"kaiko {size}" for size in ("S/16", "S/8", "B/16", "B/8", "L/14")))


def _published(*values: float) -> dict[str, float]:
    return dict(zip(ENCODERS, values, strict=True))


SELECTED = "the epoch is chosen on the split that is reported, as in eva: optimistic"

TASKS: Mapping[str, Task] = {
    "bach": Task(
        "bach",
        BACH_CLASSES,
        bach,
        paper(256, patience=400),
        now(256, patience=1250),
        _published(0.410, 0.695, 0.797, 0.834, 0.810, 0.865, 0.870),
        {"train": 268, "val": 132},
        SELECTED,
    ),
    "crc": Task(
        "crc",
        CRC_CLASSES,
        crc,
        paper(4096, patience=24),
        now(256, patience=7),
        _published(0.617, 0.935, 0.943, 0.946, 0.960, 0.956, 0.930),
        {"train": 100_000, "val": 7_180},
        SELECTED,
    ),
    "mhist": Task(
        "mhist",
        MHIST_CLASSES,
        mhist,
        paper(256, patience=51),
        now(256, patience=278),
        _published(0.501, 0.831, 0.828, 0.832, 0.826, 0.809, 0.809),
        {"train": 2_175, "val": 977},
        SELECTED,
    ),
    "pcam": Task(
        "pcam",
        PCAM_CLASSES,
        pcam,
        paper(4096, patience=9),
        now(256, patience=3),
        _published(0.728, 0.849, 0.893, 0.887, 0.898, 0.921, 0.898),
        {"train": 262_144, "val": 32_768, "test": 32_768},
        "the epoch is chosen on val; test chooses nothing",
    ),
}


def pool_slides(
    features: Features, labels: Mapping[str, Hashable], *, slides: Sequence[str] | None = None
) -> tuple[Features, tuple[str, ...]]:
    """Mean of the patches of each slide, with the slide's label.

    Args:
        features: of patches, with groups.
        labels: of slides, with or without the ending of their files, or of groups.
        slides: of each patch; None: its group.

    Returns:
        One row a slide (a group, if `labels` are theirs), in the order of names, with its group; the names of the
        classes, by index.

    Raises:
        ValueError: no groups, or slides without a label.

    Example:
        >>> patches = Features(torch.tensor([[0.0], [2.0], [5.0]]), ("a", "a", "b"), None)
        >>> pooled, classes = pool_slides(patches, {"a": "wild", "b": "mutated"})
        >>> pooled.values.tolist(), pooled.labels.tolist(), classes
        ([[1.0], [5.0]], [1, 0], ('mutated', 'wild'))
    """
    from repmetrics.embeddings import encode

    if features.groups is None:
        raise ValueError("slide labels need slides: the patches have no groups")
    stems = [Path(slide).stem for slide in slides or ()]
    ways = (slides or features.groups, stems, features.groups)
    units = next((way for way in ways if any(name in labels for name in way)), ways[0])
    group_of = dict(zip(units, features.groups, strict=True))
    names = sorted(group_of)
    if lacking := [name for name in names if name not in labels]:
        raise ValueError(f"{len(lacking)} of {len(names)} slides have no label, first {lacking[0]!r}")
    place = {name: i for i, name in enumerate(names)}
    rows = torch.tensor([place[name] for name in units])
    sums = torch.zeros(len(names), features.values.shape[1]).index_add_(0, rows, features.values.float())
    means: Tensor = sums / torch.bincount(rows)[:, None]
    classes, ids = encode([labels[name] for name in names])
    return Features(means, tuple(group_of[name] for name in names), ids), classes


def read_slide_labels(path: Path, *, column: str | None = None) -> dict[str, str]:
    """A CSV of slides (or patients) and their labels → label by name; rows with an empty label are left out.

    Args:
        path: with a header; a column of slides or patients and one of labels.
        column: of the labels, where there are several.
    """
    from repmetrics.embeddings import GROUP_KEYS

    rows = _read_csv(path)
    columns = list(rows[0]) if rows else []
    names = next((c for key in GROUP_KEYS for c in columns if c.lower() == key), None)
    others = [c for c in columns if c != names]
    chosen = column or (others[0] if len(others) == 1 else None)
    if names is None or chosen is None or chosen not in columns:
        raise ValueError(
            f"{path.name} needs a column of slides ({', '.join(GROUP_KEYS)}) and one of labels "
            f"(--label where there are several): found {', '.join(columns) or 'nothing'}"
        )
    found: dict[str, str] = {}
    for row in rows:
        if row[chosen] and found.setdefault(row[names], row[chosen]) != row[chosen]:
            raise ValueError(f"{path.name} gives {row[names]!r} two labels: {found[row[names]]} and {row[chosen]}")
    return found
