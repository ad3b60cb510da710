"""Folders, CSVs and files of embeddings: what is read, and which errors are raised."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow
import pytest
import torch
from PIL import Image
from pyarrow import parquet
from safetensors.torch import save_file
from torch import Tensor, nn

from repmetrics.data.batches import ReadReport, collate, load_batches, resize_and_crop
from repmetrics.data.features import FeatureDict, Features, concatenate, embed
from repmetrics.data.held_out import HeldOutData
from repmetrics.data.images import ImageFiles, read_image
from repmetrics.data.open import open_data
from repmetrics.data.source import Source, Unreadable

X = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
SLIDES = [f"s{i // 10}" for i in range(40)]
LABELS = [i % 2 for i in range(40)]


def color(index: int) -> tuple[int, int, int]:
    return (index, 2 * index, 3 * index)


def write_images(root: Path, names: list[str], size: tuple[int, int] = (20, 20)) -> None:
    for index, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, color(index)).save(root / name)


def load(source: Source, size: int | None = 16, **options: Any) -> tuple[list[dict[str, Any]], list[Unreadable]]:
    report = ReadReport()
    return list(load_batches(source, image_size=size, report=report, **options)), report.unreadable


def test_plain_folder_is_read_in_order_of_names(tmp_path: Path) -> None:
    write_images(tmp_path, ["a.png", "b/c.png", "d.bmp"])
    (tmp_path / ".hidden").mkdir()
    write_images(tmp_path, [".hidden/x.png"])
    source = open_data(tmp_path)
    batches, unreadable = load(source)
    assert not unreadable
    assert batches[0]["image"].dtype == torch.uint8
    assert [tuple(image[:, 0, 0].tolist()) for image in batches[0]["image"]] == [color(i) for i in range(3)]
    assert "label" not in batches[0]
    assert "group" not in batches[0]


@pytest.mark.parametrize("workers", [0, 2])
def test_corrupt_images_are_left_out_and_named(tmp_path: Path, workers: int) -> None:
    write_images(tmp_path, [f"{i:02}.png" for i in range(6)])
    whole = (tmp_path / "02.png").read_bytes()
    (tmp_path / "02.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "04.png").write_text("no image")
    batches, unreadable = load(open_data(tmp_path), batch_size=4, num_workers=workers)
    assert [item.name for item in unreadable] == ["02.png", "04.png"]
    assert [image[0, 0, 0].item() for batch in batches for image in batch["image"]] == [0, 1, 3, 5]


def test_the_monitor_and_score_read_the_same_batches(tmp_path: Path) -> None:
    write_images(tmp_path, [f"{label}/{i}.png" for label in "ab" for i in range(5)])
    source = open_data(tmp_path)
    assert source.images is not None
    monitored, scored = HeldOutData(source.images, batch_size=4).shard(0, 1), load(source, None, batch_size=4)[0]
    for first, second in zip(monitored, scored, strict=True):
        assert torch.equal(first["image"], second["image"])
        assert torch.equal(first["label"], second["label"])


def test_labels_or_groups_of_some_samples_only_are_refused() -> None:
    images = torch.rand(4, 3, 2, 2)
    with pytest.raises(ValueError, match="labels cover 4 of 8 held-out samples: give them for all or for none"):
        embed(nn.Flatten(), [(images, torch.arange(4)), images])
    with pytest.raises(ValueError, match="groups cover 2 of 4 held-out samples"):
        embed(nn.Flatten(), [{"image": images, "group": ["a", "b"]}])
    with pytest.raises(ValueError, match=r"one D for all held-out batches, got \[12, 48\]"):
        embed(nn.Flatten(), [images, torch.rand(4, 3, 4, 4)])


def test_a_layer_that_some_batches_lack_is_refused() -> None:
    whole = FeatureDict({"": torch.ones(2, 3), "layer": torch.ones(2, 3)})
    batches = [whole, FeatureDict({"": torch.ones(2, 3)})]
    with pytest.raises(ValueError, match="1 of 2 held-out batches gave no 'layer'"):
        concatenate(batches)
    assert len(concatenate(batches, partial=["layer"]).values["layer"]) == 2


def test_a_strip_fills_no_memory(tmp_path: Path) -> None:
    Image.new("RGB", (60_000, 1), (9, 8, 7)).save(tmp_path / "strip.png")  # resized whole, it would take 100 GB
    image = resize_and_crop(read_image(tmp_path / "strip.png"), size=768)
    assert image.shape == (3, 768, 768)
    assert image.amin((1, 2)).tolist() == image.amax((1, 2)).tolist() == [9, 8, 7]


def test_sub_folders_are_labels_or_slides(tmp_path: Path) -> None:
    write_images(tmp_path, ["tumour/a.png", "tumour/b.png", "normal/c.png"])
    source = open_data(tmp_path)
    assert source.classes == ("normal", "tumour")
    assert load(source)[0][0]["label"].tolist() == [0, 1, 1]
    batch = load(open_data(tmp_path, groups="folder"))[0][0]
    assert batch["group"] == ["normal", "tumour", "tumour"]
    assert "label" not in batch
    assert "label" not in load(open_data(tmp_path, labels="none"))[0][0]


def test_labels_csv_with_slides(tmp_path: Path) -> None:
    write_images(tmp_path, ["images/a.png", "images/b.png"])
    (tmp_path / "labels.csv").write_text("file,tumor,slide\nimages/b.png,1,S2\nimages/a.png,0,S1\n")
    source = open_data(tmp_path)
    batch = load(source)[0][0]
    assert source.classes == ("0", "1")
    assert (batch["label"].tolist(), batch["group"]) == ([1, 0], ["S2", "S1"])
    assert [image[0, 0, 0].item() for image in batch["image"]] == [1, 0]
    assert load(open_data(tmp_path / "labels.csv", groups="none"))[0][0].keys() == {"image", "label"}


def test_of_several_columns_the_labels_must_be_chosen(tmp_path: Path) -> None:
    write_images(tmp_path, ["a.png", "b.png"])
    (tmp_path / "labels.csv").write_text("file,organ,stage\na.png,lung,10\nb.png,colon,9\n")
    source = open_data(tmp_path)
    assert source.notes == ("no labels taken from labels.csv: choose one of organ, stage with --labels",)
    assert open_data(tmp_path, labels="stage").classes == ("9", "10")


@pytest.mark.parametrize(
    ("csv", "options", "message"),
    [
        ("file,label\na.png,0\nc.png,1\n", {}, "lists 1 files that do not exist, first 'c.png'"),
        ("file,label\na.png,0\n", {}, "does not list 1 of 2 images, first 'b.png'"),
        ("file,label\na.png,0\nb.png,\n", {}, "labels.csv: line 3 has no 'label'"),
        ("picture,label\na.png,0\n", {}, "has no column of files .*found picture, label"),
        ("file,label\n", {}, "has no rows"),
        ("file,label\na.png,0\nb.png,1\n", {"labels": "tumor"}, "--labels tumor: labels.csv has the columns"),
        ("file,label\na.png,0\nb.png,1\n", {"groups": "slide"}, "--groups slide: labels.csv has the columns"),
    ],
)  # fmt: skip
def test_labels_that_do_not_cover(tmp_path: Path, csv: str, options: dict[str, str], message: str) -> None:
    write_images(tmp_path, ["a.png", "b.png"])
    (tmp_path / "labels.csv").write_text(csv)
    with pytest.raises(ValueError, match=message):
        open_data(tmp_path, **options)


def test_nothing_to_score(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        open_data(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="holds no images: expected"):
        open_data(tmp_path)
    (tmp_path / "a.docx").write_text("x")
    with pytest.raises(ValueError, match=r"a.docx is no source .*: expected an image folder"):
        open_data(tmp_path / "a.docx")
    write_images(tmp_path, ["a.png"])
    with pytest.raises(ValueError, match="not sorted into sub-folders"):
        open_data(tmp_path, groups="folder")


@pytest.mark.parametrize(
    ("mode", "pixel", "expected"),
    [
        ("L", 7, (7, 7, 7)),
        ("1", 1, (255, 255, 255)),
        ("RGBA", (10, 20, 30, 0), (255, 255, 255)),
        ("RGBA", (10, 20, 30, 255), (10, 20, 30)),
        ("LA", (9, 255), (9, 9, 9)),
        ("I;16", 0x0A00, (10, 10, 10)),
    ],
)
def test_odd_modes(tmp_path: Path, mode: str, pixel: Any, expected: tuple[int, int, int]) -> None:
    Image.new(mode, (3, 2), pixel).save(tmp_path / "a.png")
    image = read_image(tmp_path / "a.png")
    assert image.shape == (3, 2, 3)
    assert tuple(image[:, 1, 2].tolist()) == expected


def test_palette_and_cmyk(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4), (200, 100, 50)).quantize(4).save(tmp_path / "a.png")
    assert tuple(read_image(tmp_path / "a.png")[:, 0, 0].tolist()) == (200, 100, 50)
    Image.new("CMYK", (4, 4), (0, 0, 0, 0)).save(tmp_path / "b.tif")
    assert read_image(tmp_path / "b.tif").min() == 255


def test_floating_pixels_have_no_range(tmp_path: Path) -> None:
    Image.new("F", (4, 4), 0.5).save(tmp_path / "a.tif")
    item = ImageFiles(tmp_path, ["a.tif"])[0]
    assert item == Unreadable("a.tif", "mode F has no known range: convert it to 8 bits")


def test_fit_keeps_the_right_size_untouched_and_crops_the_center_otherwise() -> None:
    image = torch.randint(0, 256, (3, 16, 16), dtype=torch.uint8)
    assert resize_and_crop(image, size=16) is image
    wide = torch.zeros(3, 10, 30, dtype=torch.uint8)
    wide[:, :, 10:20] = 255
    assert resize_and_crop(wide, size=10).min() == 255
    assert resize_and_crop(wide, size=20).shape == (3, 20, 20)


def test_images_of_different_sizes_need_a_size() -> None:
    items = [{"image": torch.zeros(3, s, s, dtype=torch.uint8)} for s in (4, 5)]
    with pytest.raises(ValueError, match=r"different sizes in one batch, .*: pass --image-size"):
        collate(items)


def write_embeddings(path: Path, x: Tensor = X) -> None:
    columns: dict[str, Any] = {"slides": SLIDES, "labels": LABELS}
    if path.suffix == ".npy":
        np.save(path, x.numpy())
    elif path.suffix == ".npz":
        np.savez(path, features=x.numpy(), **{key: np.array(value) for key, value in columns.items()})
    elif path.suffix == ".pt":
        torch.save({"features": x, **columns}, path)
    elif path.suffix == ".h5":
        with h5py.File(path, "w") as file:
            file["features"] = x.numpy()
            file["slides"] = np.array(SLIDES, dtype="S4")
            file["labels"] = LABELS
    elif path.suffix == ".parquet":
        parquet.write_table(pyarrow.table({"features": x.tolist(), **columns}), path)
    else:
        ids = torch.tensor([int(name[1:]) for name in SLIDES])
        save_file({"features": x, "slides": ids, "labels": torch.tensor(LABELS)}, path)


@pytest.mark.parametrize("suffix", [".npz", ".pt", ".safetensors", ".h5", ".parquet"])
def test_embeddings_with_ids(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"e{suffix}"
    write_embeddings(path)
    features = open_data(path).features
    assert features is not None
    assert torch.equal(features.values.float(), X)  # Parquet holds Python's floats, which are double
    assert features.groups is not None
    assert [group.removeprefix("s") for group in features.groups] == [name[1:] for name in SLIDES]
    assert features.labels is not None
    assert features.labels.tolist() == LABELS
    bare = open_data(path, labels="none", groups="none").features
    assert bare is not None
    assert (bare.groups, bare.labels) == (None, None)


def test_bare_embeddings(tmp_path: Path) -> None:
    write_embeddings(tmp_path / "e.npy")
    torch.save(X, tmp_path / "e.pt")
    for name in ("e.npy", "e.pt"):
        assert torch.equal(values(open_data(tmp_path / name)), X)


def values(source: Source) -> Tensor:
    assert source.features is not None
    return source.features.values


def test_the_dtype_is_kept_and_foreign_byte_order_read(tmp_path: Path) -> None:
    np.save(tmp_path / "e.npy", X.double().numpy().astype(">f8"))
    assert torch.equal(values(open_data(tmp_path / "e.npy")), X.double())
    torch.save(X.bfloat16(), tmp_path / "e.pt")
    assert values(open_data(tmp_path / "e.pt")).dtype == torch.bfloat16


def test_a_likely_transposed_file_is_remarked(tmp_path: Path) -> None:
    np.save(tmp_path / "e.npy", X.T.numpy())
    assert open_data(tmp_path / "e.npy").notes == (
        "N = 6 < D = 40: if rows are features and columns samples, transpose the file",
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"features": X.numpy()[:, :, None]}, r"features must be \(N, D\), got \(40, 6, 1\): pool the tokens first"),
        ({"features": X.long().numpy()}, "features must be floating, got int64"),
        ({"features": X.numpy().astype(np.longdouble)}, "must be floating, of 64 bits at most, got"),
        ({f"m{i}": X.numpy() for i in range(9)}, r"several matrices: found m0 \(40, 6\) float32, .* and 5 more;"),
        ({"features": np.where(np.arange(40)[:, None] == 3, np.nan, X)}, r"1 of 40 rows hold NaN .*first: row 3\)"),
        ({"a": X.numpy(), "b": X.numpy()}, r"several matrices: found a \(40, 6\) float32, b \(40, 6\)"),
        ({"a": np.arange(3)}, r"no floating matrix \(N, D\): found a \(3,\)"),
        ({"features": X.numpy(), "labels": np.arange(3)}, r"labels under 'labels' must be \(40,\), got \(3,\)"),
        ({"features": np.array([object()])}, "cannot be read as NumPy"),
        ({"features": X.numpy(), "labels": [0, 1, np.nan, np.nan] * 10}, "labels under 'labels' are missing for 20 of"),
        ({"features": X.numpy(), "slides": [*SLIDES[1:], ""]}, "groups under 'slides' are missing for 1 of 40 rows"),
    ],
)
def test_embeddings_that_cannot_be_used(tmp_path: Path, content: dict[str, Any], message: str) -> None:
    np.savez(tmp_path / "e.npz", **content)
    with pytest.raises(ValueError, match=message):
        open_data(tmp_path / "e.npz")


def test_a_key_that_is_not_there(tmp_path: Path) -> None:
    write_embeddings(tmp_path / "e.npz")
    with pytest.raises(ValueError, match="no groups under 'site': it holds features, slides, labels"):
        open_data(tmp_path / "e.npz", groups="site")


def test_parquet_with_a_column_a_feature(tmp_path: Path) -> None:
    columns: dict[str, Any] = {f"f{i}": X[:, i].numpy() for i in range(X.shape[1])}
    parquet.write_table(pyarrow.table({"slide": SLIDES, **columns}), tmp_path / "e.parquet")
    source = open_data(tmp_path / "e.parquet")
    assert torch.equal(values(source), X)


def test_floating_columns_of_labels_and_coordinates_are_no_features(tmp_path: Path) -> None:
    others = {"target": [float(label) for label in LABELS], "age": [50.0 + i % 3 for i in range(40)]}
    coordinates = {"x": [0.5 * i for i in range(40)], "y": [1.5 * i for i in range(40)]}
    columns: dict[str, Any] = {f"f{i}": X[:, i].numpy() for i in range(X.shape[1])}
    parquet.write_table(pyarrow.table({**columns, **others, **coordinates, "slide": SLIDES}), tmp_path / "e.parquet")
    source = open_data(tmp_path / "e.parquet", groups="age")
    assert torch.equal(values(source), X)
    assert source.notes[0] == "features: 6 floating columns, f0, f1 … f5"
    assert source.features is not None
    assert source.features.labels is not None
    assert source.features.labels.tolist() == LABELS
    assert source.features.groups is not None
    assert len(set(source.features.groups)) == 3
    assert open_data(tmp_path / "e.parquet").notes[0] == "features: 7 floating columns, f0, f1 … age"
    with pytest.raises(ValueError, match=r"--labels y: 'y' of e.parquet has 40 numbers in 40 rows, not classes"):
        open_data(tmp_path / "e.parquet", labels="y", groups="age")


def test_null_labels_are_no_class(tmp_path: Path) -> None:
    labels = [None, *("tumour", "normal") * 19, "normal"]
    parquet.write_table(pyarrow.table({"features": X.tolist(), "label": labels}), tmp_path / "e.parquet")
    with pytest.raises(ValueError, match=r"missing for 1 of 40 rows: .* leave the labels out with --labels none"):
        open_data(tmp_path / "e.parquet")
    assert open_data(tmp_path / "e.parquet", labels="none").classes == ()


def test_a_coordinate_y_is_not_a_label(tmp_path: Path) -> None:
    np.savez(tmp_path / "e.npz", vectors=X.numpy(), x=np.arange(40.0), y=np.arange(40.0))
    assert open_data(tmp_path / "e.npz").classes == ()
    np.savez(tmp_path / "e.npz", x=X.numpy(), y=np.array(LABELS))
    assert open_data(tmp_path / "e.npz").classes == ("0", "1")


def test_a_folder_with_a_file_of_patches_for_each_slide(tmp_path: Path) -> None:
    for i, rows in enumerate(X.split(10)):
        with h5py.File(tmp_path / f"TCGA-{i}.h5", "w") as file:
            file["features"] = rows[None].numpy() if i else rows.numpy()
            file["coords"] = np.zeros((10, 2), int)
    source = open_data(tmp_path)
    assert torch.equal(values(source), X)
    assert source.features is not None
    assert source.features.groups == tuple(f"TCGA-{i // 10}" for i in range(40))
    np.save(tmp_path / "other.npy", np.zeros((3, 5)))
    with pytest.raises(ValueError, match="features of different D: 6 in TCGA-3, 5 in other"):
        open_data(tmp_path)


@pytest.mark.parametrize("name", ["e.h5", "e.parquet", "e.npz", "e.npy"])
def test_damaged_embeddings(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"no such format" * 100)
    with pytest.raises(ValueError, match=f"{name} cannot be read as"):
        open_data(tmp_path / name)


class Point:
    """Stands for an installed entry point."""

    def __init__(self, name: str, opener: Any) -> None:
        self.name = name
        self.opener = opener

    def load(self) -> Any:
        if isinstance(self.opener, Exception):
            raise self.opener
        return self.opener


def register(monkeypatch: pytest.MonkeyPatch, *points: Point) -> None:
    def installed(*, group: str) -> tuple[Point, ...]:
        assert group == "repmetrics.sources"
        return points

    monkeypatch.setattr("repmetrics.data.open.entry_points", installed)


def test_plugins_are_asked_in_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.xyz"
    path.touch()
    source = Source(path, "plugin", features=Features(X))
    register(monkeypatch, Point("other", lambda path: None), Point("plugin", lambda path: source))
    assert open_data(path) is source
    with pytest.raises(ValueError, match="--groups slide: a plugin defines its own labels and groups"):
        open_data(path, groups="slide")


def test_a_plugin_that_cannot_be_imported_is_named_only_when_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(monkeypatch, Point("slides", ImportError("No module named 'openslide'")))
    write_images(tmp_path, ["a.png", "b.png"])
    assert open_data(tmp_path).kind == "image folder"
    (tmp_path / "m.json").touch()
    message = re.escape("the source 'slides' could not be loaded (No module named 'openslide')")
    with pytest.raises(ValueError, match=message):
        open_data(tmp_path / "m.json")


def test_a_source_holds_features_or_images() -> None:
    with pytest.raises(ValueError, match="exactly one"):
        Source(Path(), "nothing")


def test_real_labeled_tiles(data_dir: Path) -> None:
    pcam = open_data(data_dir / "pcam")
    assert (len(pcam.images), pcam.classes) == (3000, ("0", "1"))  # type: ignore[arg-type]
    oscc = open_data(data_dir / "oscc")
    assert oscc.classes == ("Normal", "OSCC")
    batch = next(iter(load_batches(oscc, image_size=None, batch_size=8)))
    assert batch["image"].shape == (8, 3, 224, 224)
