"""Embeddings as CLAM, TRIDENT, slideflow, eva and lightly leave them, and columns that are labels or are not."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import h5py
import numpy as np
import pytest
import torch
import zarr
from PIL import Image, ImageOps

from repmetrics.data.batches import ReadReport
from repmetrics.data.features import Features
from repmetrics.data.images import ImageFiles, read_image
from repmetrics.data.labels import encode_labels
from repmetrics.data.open import open_data
from repmetrics.scoring import feature_cache

X = np.random.default_rng(0).normal(size=(4, 10, 6)).astype("f4")


def write_bag(path: Path, rows: np.ndarray | None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".pt":
        torch.save(torch.from_numpy(rows), path)
        return
    with h5py.File(path, "w") as file:
        file["coords"] = np.zeros((10, 2), dtype="i8")
        if rows is not None:
            file["features"] = rows


def clam(root: Path) -> None:
    for k in range(4):
        write_bag(root / f"pt_files/s{k}.pt", X[k])
        write_bag(root / f"h5_files/s{k}.h5", X[k])


def clam_of_tensors(root: Path) -> None:
    for k in range(4):
        write_bag(root / f"pt_files/s{k}.pt", X[k])


def trident(root: Path) -> None:
    for k in range(4):
        write_bag(root / f"20x_256px/features_uni/s{k}.h5", X[k][None])
        write_bag(root / f"20x_256px/patches/s{k}_patches.h5", None)


def slideflow(root: Path) -> None:
    for k in range(4):
        write_bag(root / f"s{k}.pt", X[k])
        np.savez(root / f"s{k}.index.npz", np.zeros((10, 2), dtype="i8"))


@pytest.mark.parametrize("write", [clam, clam_of_tensors, trident, slideflow])
def test_a_bag_per_slide_is_found_and_grouped(tmp_path: Path, write: Callable[[Path], None]) -> None:
    tmp_path.joinpath("bags").mkdir()
    write(tmp_path / "bags")
    source = open_data(tmp_path / "bags")
    assert source.features is not None
    assert torch.equal(source.features.values, torch.from_numpy(X.reshape(40, 6)))
    assert source.features.groups == tuple(f"s{k}" for k in range(4) for _ in range(10))
    assert source.notes[-1] == "groups: the 4 files"


def test_two_sets_are_refused_by_name(tmp_path: Path) -> None:
    trident(tmp_path)
    write_bag(tmp_path / "20x_256px/features_conch/s0.h5", X[0])
    with pytest.raises(ValueError, match=r"several sets of embeddings: name one of 20x_256px/features_conch, 20x"):
        open_data(tmp_path)


def write_manifest(root: Path, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    root.mkdir(parents=True, exist_ok=True)
    with (root / "manifest.csv").open("w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])


def test_an_image_of_eva_is_no_slide_and_its_target_a_label(tmp_path: Path) -> None:
    rows = []
    for k in range(40):
        (tmp_path / "dino/images").mkdir(parents=True, exist_ok=True)
        torch.save([torch.from_numpy(X.reshape(40, 6)[k])], tmp_path / f"dino/images/{k}.pt")
        rows.append((f"{k}.png", f"images/{k}.pt", k % 2, "train", f"wsi {k // 10}"))
    columns = ("origin", "embeddings", "target", "split", "wsi_id")
    write_manifest(tmp_path / "dino", columns[:4], [row[:4] for row in rows])
    source = open_data(tmp_path)
    assert source.features is not None
    assert torch.equal(source.features.values, torch.from_numpy(X.reshape(40, 6)))
    assert source.features.labels is not None
    assert source.features.labels.tolist() == [0, 1] * 20
    assert source.features.groups is None
    write_manifest(tmp_path / "dino", columns, rows)
    grouped = open_data(tmp_path)
    assert grouped.features is not None
    assert grouped.features.groups == tuple(f"wsi {k // 10}" for k in range(40))


def test_the_csv_of_lightly_holds_embeddings(tmp_path: Path) -> None:
    header = ["filenames", *(f"embedding_{d}" for d in range(6)), "labels"]
    rows = [[f"{k}.png", *X.reshape(40, 6)[k].tolist(), k % 2] for k in range(40)]
    with (tmp_path / "embeddings.csv").open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    source = open_data(tmp_path / "embeddings.csv")
    assert source.features is not None
    np.testing.assert_allclose(source.features.values, X.reshape(40, 6), rtol=1e-6)
    assert source.classes == ("0", "1")


@pytest.mark.parametrize("name", ["bag.npy", "bag.pt"])
def test_a_batch_axis_of_one_is_dropped(tmp_path: Path, name: str) -> None:
    rows = X.reshape(1, 40, 6)
    np.save(tmp_path / name, rows) if name.endswith("npy") else torch.save(torch.from_numpy(rows), tmp_path / name)
    source = open_data(tmp_path / name)
    assert source.features is not None
    assert source.features.values.shape == (40, 6)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="the maps of a process are read from /proc")
def test_an_array_is_mapped_and_not_copied(tmp_path: Path) -> None:
    np.save(tmp_path / "e.npy", X.reshape(40, 6))
    source = open_data(tmp_path / "e.npy")
    assert source.features is not None
    assert source.features.values.shape == (40, 6)
    assert str(tmp_path / "e.npy") in Path("/proc/self/maps").read_text()


def test_repeated_rows_and_columns_used_are_named(tmp_path: Path) -> None:
    rows = X.reshape(40, 6).copy()
    rows[7] = rows[3]
    np.savez(tmp_path / "e.npz", features=rows, slide=np.arange(40) // 10, label=["a", "b"] * 20)
    notes = open_data(tmp_path / "e.npz").notes
    assert notes == (
        "labels: 'label' of e.npz",
        "groups: 'slide' of e.npz",
        "1 of 40 rows repeat an earlier row",
    )


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_a_zarr_store_is_read(tmp_path: Path, zarr_format: Literal[2, 3]) -> None:
    rows = X.reshape(40, 6)
    group = zarr.open_group(tmp_path / "e.zarr", mode="w", zarr_format=zarr_format)
    group.create_array("X", data=rows, chunks=(16, 6))
    group.create_array("slide", data=np.arange(40) // 10)
    zarr.create_array(tmp_path / "bags" / "a.zarr", data=rows, zarr_format=zarr_format)
    zarr.create_array(tmp_path / "bags" / "b", data=rows, zarr_format=zarr_format)
    source = open_data(tmp_path / "e.zarr")
    assert source.features is not None
    assert torch.equal(source.features.values, torch.from_numpy(rows))
    assert source.features.groups == tuple(str(k // 10) for k in range(40))
    bags = open_data(tmp_path / "bags").features
    assert bags is not None
    assert bags.groups == ("a",) * 40 + ("b",) * 40


def test_a_zarr_store_with_an_absent_chunk_is_refused(tmp_path: Path) -> None:
    array = zarr.create_array(tmp_path / "e.zarr", shape=(40, 6), chunks=(10, 6), dtype="float32")
    array[:30] = X.reshape(40, 6)[:30]
    with pytest.raises(ValueError, match=r"e\.zarr cannot be read as Zarr: the array has 3 of 4 chunks: rows of"):
        open_data(tmp_path / "e.zarr")
    (tmp_path / "empty.zarr").mkdir()
    (tmp_path / "empty.zarr" / "zarr.json").write_text("{")
    with pytest.raises(ValueError, match=r"empty\.zarr cannot be read as Zarr"):
        open_data(tmp_path / "empty.zarr")


# ── labels ────────────────────────────────────────────────────────────────────────────────────────────────────────


def write_table(root: Path, column: str, values: Sequence[object]) -> Path:
    for k in range(len(values)):
        Image.new("RGB", (8, 8), (k, k, k)).save(root / f"{k}.png")
    rows = [(f"{k}.png", value, f"s{k // 5}") for k, value in enumerate(values)]
    with (root / "t.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("file", column, "slide"), *rows])
    return root / "t.csv"


@pytest.mark.parametrize("missing", ["NaN", "", "None", "N/A", " ", "<NA>"])
def test_a_missing_label_is_no_class(tmp_path: Path, missing: str) -> None:
    with pytest.raises(ValueError, match="line 5 has no 'label'"):
        open_data(write_table(tmp_path, "label", ["a", "b", "a", missing, "b", "a"]))
    np.savez(tmp_path / "e.npz", features=X[0], label=["a", "b"] * 4 + ["a", missing])
    with pytest.raises(ValueError, match="missing for 1 of 10 rows"):
        open_data(tmp_path / "e.npz")


def test_numbers_are_compared_by_value() -> None:
    names, indices = encode_labels(["1", "1.0", "0", "2e0", " 1", "x"])
    assert names == ("0", "1", "2", "x")
    assert indices.tolist() == [1, 1, 0, 2, 1, 3]


def test_a_folder_of_slide_embeddings_has_one_row_per_file(tmp_path: Path) -> None:
    """TRIDENT's slide encoders write one vector per slide."""
    for k in range(4):
        write_bag(tmp_path / f"slide_features_titan/s{k}.h5", X[k, 0])
    source = open_data(tmp_path)
    assert source.features is not None
    assert torch.equal(source.features.values, torch.from_numpy(X[:, 0]))
    assert source.features.groups == ("s0", "s1", "s2", "s3")


def test_minus_one_is_no_label(tmp_path: Path) -> None:
    """As in the monitor's batches."""
    labels = ["1", "-1", "0", "-1.0", "1", "0"]
    note = "2 of 6 labels are −1, which stands for no label: rename it if it is a class"
    source = open_data(write_table(tmp_path, "label", labels))
    assert isinstance(source.images, ImageFiles)
    assert source.images.labels is not None
    np.savez(tmp_path / "e.npz", features=X[0][:6], label=np.array(labels, dtype=float))
    embeddings = open_data(tmp_path / "e.npz")
    assert embeddings.features is not None
    assert embeddings.features.labels is not None
    for each, indices in ((source, source.images.labels), (embeddings, embeddings.features.labels)):
        assert each.classes == ("0", "1")
        assert indices.tolist() == [1, -1, 0, -1, 1, 0]
        assert note in each.notes
    assert len(embeddings.features.labeled().values) == 4


def test_measurements_are_no_classes(tmp_path: Path) -> None:
    ages = [20 + 0.37 * k for k in range(30)]
    table = write_table(tmp_path, "age", ages)
    source = open_data(table)
    assert source.classes == ()
    assert source.notes[0] == "no labels taken from t.csv: choose one of age with --labels"
    with pytest.raises(ValueError, match=r"--labels age: column 'age' of t.csv has 30 numbers in 30 rows, not classes"):
        open_data(table, labels="age")
    assert open_data(write_table(tmp_path, "target", ages)).classes == ()
    assert open_data(write_table(tmp_path, "age", list(range(30)))).classes == ()
    assert open_data(write_table(tmp_path, "grade", [k % 3 for k in range(30)])).classes == ("0", "1", "2")
    assert open_data(write_table(tmp_path, "name", [f"n{k}" for k in range(30)])).classes == ()


def test_classes_that_differ_in_case_and_repeated_files_are_noted(tmp_path: Path) -> None:
    write_table(tmp_path, "label", ["Tumor", "tumor", "other"] * 4)
    notes = open_data(tmp_path / "t.csv").notes
    assert "labels 'Tumor' and 'tumor' differ only in case: they are two classes" in notes
    assert "groups: column 'slide' of t.csv" in notes
    with (tmp_path / "t.csv").open("a") as file:
        file.write("0.png,other,s0\n")
    (note,) = [note for note in open_data(tmp_path / "t.csv").notes if "more than once" in note]
    assert note == "t.csv lists 1 files more than once (1 rows too many), first '0.png'"


# ── images and the cache ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photographs_are_turned_upright(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = np.random.default_rng(0).integers(0, 255, (8, 16, 3), dtype="u1")
    Image.fromarray(pixels).save(tmp_path / "p.png", exif=exif.tobytes())
    with Image.open(tmp_path / "p.png") as image:
        upright = np.asarray(ImageOps.exif_transpose(image))
    assert np.array_equal(read_image(tmp_path / "p.png").permute(1, 2, 0).numpy(), upright)


def test_a_changed_cache_entry_is_computed_again(tmp_path: Path) -> None:
    calls = []

    def compute(start: int) -> list[feature_cache.Embedded]:
        calls.append(start)
        return [feature_cache.Embedded(Features(torch.from_numpy(X[0])), ReadReport([True] * 10))]

    load = partial(feature_cache.load_or_compute, tmp_path, "key", compute, total=10)
    load()
    (entry,) = tmp_path.iterdir()
    content = bytearray(entry.read_bytes())
    content[-8:] = b"\xff" * 8
    entry.write_bytes(content)
    again = load()
    assert not again.from_cache
    assert torch.equal(again.features.values, torch.from_numpy(X[0]))
    assert load().from_cache
    assert len(calls) == 2


def test_a_cache_that_cannot_be_written_names_the_option(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"the cache .*file.* cannot be used \(.*\): pass --no-cache"):
        feature_cache.load_or_compute(tmp_path / "file" / "cache", "key", pytest.fail, total=10)
