"""The public data sets in small copies of their published layouts, and heads trained on them."""

from __future__ import annotations

import json
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from PIL import Image
from timm.models.vision_transformer import VisionTransformer

from fmtrain import cli
from fmtrain.evaluation import datasets
from fmtrain.evaluation.evaluate import evaluate
from fmtrain.evaluation.slide_labels import pool_slides, read_slide_labels
from fmtrain.evaluation.tasks import TASKS
from fmtrain.patches.dataset import HeldOutPatches
from repmetrics.data.batches import load_batches
from repmetrics.data.features import Features, embed
from repmetrics.data.source import Source
from repmetrics.encoders.checkpoint import load_encoder
from repmetrics.probes.eva import eva_probe, eva_v0_4, paper

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 1}


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = VisionTransformer(**TINY, num_classes=0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    torch.save(model.state_dict(), tmp_path / "model.pth")
    return tmp_path / "model.pth"


def write(path: Path, red: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), (red, 0, 0)).save(path)


def first_pixels(source: Source) -> list[tuple[int, int]]:
    """(red, label) of every image."""
    batches = load_batches(source, image_size=None)
    return [(int(i[0, 0, 0]), int(k)) for batch in batches for i, k in zip(batch["image"], batch["label"], strict=True)]


def test_bach_has_evas_split(tmp_path: Path) -> None:
    photos = tmp_path / "ICIAR2018_BACH_Challenge" / "Photos"
    for name in datasets.BACH_CLASSES:
        for i in range(100):
            write(photos / name / f"{name[0].lower()}{i:03}.tif", i)
        (photos / name / "Thumbs.db").touch()
    splits = TASKS["bach"].open(tmp_path)
    train, val = first_pixels(splits["train"]), first_pixels(splits["val"])
    assert (len(train), len(val)) == (268, 132)
    assert sorted(train + val) == sorted((i, k) for k in range(4) for i in range(100))
    assert val[:2] == [(41, 0), (42, 0)]
    assert (59, 0) in train  # between two ranges
    assert (45, 2) not in train  # position 245
    (photos / "Normal" / "n099.tif").unlink()
    with pytest.raises(ValueError, match=r"BACH has 400 photos.*: found 399"):
        TASKS["bach"].open(tmp_path)


def test_crc_trains_on_one_folder_and_validates_on_the_other(tmp_path: Path) -> None:
    for folder, red in (("NCT-CRC-HE-100K", 1), ("CRC-VAL-HE-7K", 2)):
        for name in datasets.CRC_CLASSES:
            write(tmp_path / folder / name / f"{name}-A.tif", red)
    splits = TASKS["crc"].open(tmp_path)
    assert first_pixels(splits["train"]) == [(1, k) for k in range(9)]
    assert first_pixels(splits["val"]) == [(2, k) for k in range(9)]
    (tmp_path / "CRC-VAL-HE-7K" / "ADI" / "ADI-A.tif").unlink()
    (tmp_path / "CRC-VAL-HE-7K" / "ADI").rmdir()
    with pytest.raises(ValueError, match="has no class folder ADI"):
        TASKS["crc"].open(tmp_path)
    with pytest.raises(ValueError, match="does not hold NCT-CRC-HE-100K"):
        TASKS["crc"].open(tmp_path / "NCT-CRC-HE-100K")


def test_mhist_validates_on_its_test_partition(tmp_path: Path) -> None:
    lines = ["Image Name,Majority Vote Label,Number of Annotators who Selected SSA (Out of 7),Partition"]
    for i, (label, partition) in enumerate([("SSA", "train"), ("HP", "test"), ("HP", "train"), ("SSA", "test")]):
        write(tmp_path / "images" / f"MHIST_{i}.png", i)
        lines.append(f"MHIST_{i}.png,{label},3,{partition}")
    (tmp_path / "annotations.csv").write_text("\n".join(lines))
    splits = TASKS["mhist"].open(tmp_path)
    assert first_pixels(splits["train"]) == [(0, 0), (2, 1)]
    assert first_pixels(splits["val"]) == [(1, 1), (3, 0)]
    (tmp_path / "annotations.csv").write_text("\n".join(lines).replace("MHIST_2.png,HP", "MHIST_2.png,hp"))
    with pytest.raises(ValueError, match="has the label 'hp': MHIST has SSA, HP"):
        TASKS["mhist"].open(tmp_path)
    (tmp_path / "annotations.csv").write_bytes(b"\x91\x00")
    with pytest.raises(ValueError, match=r"annotations\.csv is not CSV in UTF-8"):
        TASKS["mhist"].open(tmp_path)
    (tmp_path / "annotations.csv").write_text("Image Name,Label\na,b\n")
    with pytest.raises(ValueError, match="has no column 'Majority Vote Label'"):
        TASKS["mhist"].open(tmp_path)


def write_pcam(root: Path, *, rows: int = 60) -> None:
    """Images of tumor are red, the others are not."""
    root.mkdir(exist_ok=True)
    for seed, split in enumerate(("train", "valid", "test")):
        generator = np.random.default_rng(seed)
        labels = np.arange(rows) % 2
        images = generator.integers(0, 100, (rows, 96, 96, 3), dtype=np.uint8)
        images[..., 0] += (100 * labels).astype(np.uint8)[:, None, None]
        for part, array in (("x", images), ("y", labels.reshape(-1, 1, 1, 1))):
            with h5py.File(root / f"camelyonpatch_level_2_split_{split}_{part}.h5", "w") as file:
                file[part] = array


def test_pcam_is_read_from_its_files(tmp_path: Path) -> None:
    write_pcam(tmp_path / "pcam")
    splits = TASKS["pcam"].open(tmp_path / "pcam")
    assert list(splits) == ["train", "val", "test"]
    with h5py.File(tmp_path / "pcam" / "camelyonpatch_level_2_split_test_x.h5") as file:
        expected = [int(image[0, 0, 0]) for image in file["x"]]
    assert first_pixels(splits["test"]) == [(red, i % 2) for i, red in enumerate(expected)]
    (tmp_path / "pcam" / "camelyonpatch_level_2_split_valid_y.h5").unlink()
    with pytest.raises(ValueError, match=r"expected camelyonpatch_level_2_split_valid_x.h5 and .*_y\.h5, unpacked"):
        TASKS["pcam"].open(tmp_path / "pcam")


def test_files_that_are_not_patchcamelyons(tmp_path: Path) -> None:
    write_pcam(tmp_path)
    labels = tmp_path / "camelyonpatch_level_2_split_train_y.h5"
    with h5py.File(labels, "w") as file:
        file["y"] = np.zeros((7, 1, 1, 1))
    with pytest.raises(ValueError, match=r"train_x\.h5 must be \(7, 96, 96, 3\) of uint8, got \(60, 96, 96, 3\)"):
        TASKS["pcam"].open(tmp_path)
    labels.write_bytes(b"\x1f\x8b")  # still packed
    with pytest.raises(ValueError, match=r"train_x\.h5 and .*train_y\.h5 are not PatchCamelyon's: "):
        TASKS["pcam"].open(tmp_path)


def test_protocols_are_evas() -> None:
    settings = {
        name: (task.paper.batch_size, task.paper.lr, task.paper.patience, task.v0_4.patience)
        for name, task in TASKS.items()
    }
    assert settings == {
        "bach": (256, 0.000625, 400, 1250),
        "crc": (4096, 0.01, 24, 7),
        "mhist": (256, 0.000625, 51, 278),
        "pcam": (4096, 0.01, 9, 3),
    }
    assert paper(256).max_steps == eva_v0_4().max_steps == 12_500


def test_a_checkpoint_is_evaluated_and_shown_with_the_paper(
    tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_pcam(tmp_path / "pcam")
    command = ["evaluate", str(checkpoint), "--task", "pcam", "--data", str(tmp_path / "pcam"), "--runs", "2"]
    with pytest.raises(SystemExit) as stop:
        cli.main([*command, "--max-steps", "100", "--json"])
    assert not stop.value.code
    read = json.loads(capsys.readouterr().out)
    assert [(run["split"], run["selected_here"]) for run in read["runs"]] == [("val", True), ("test", False)]
    encoder = load_encoder(checkpoint)
    features = {}
    for name, source in TASKS["pcam"].open(tmp_path / "pcam").items():
        batches = load_batches(source, image_size=32)
        features[name] = embed(encoder, batches)
    direct = eva_probe(**features, protocol=TASKS["pcam"].v0_4._replace(max_steps=100), runs=2)
    assert [run["values"] for run in read["runs"]] == [list(run.values) for run in direct]
    assert read["rows"] == {"train": 60, "val": 60, "test": 60}
    with pytest.raises(SystemExit):
        cli.main([*command, "--max-steps", "3", "--protocol", "paper"])
    shown = capsys.readouterr().out
    assert [line.split("│")[3].strip() for line in shown.splitlines() if "(arXiv 2404.15217)" in line] == [
        "0.728", "0.849", "0.893", "0.887", "0.898", "0.921", "0.898"
    ]  # fmt: skip
    assert "kaiko L/14 (arXiv 2404.15217)" in shown
    assert "the published numbers use --protocol paper, with its 12,500 steps" in shown
    assert "60 of 262,144 in train, 60 of 32,768 in val, 60 of 32,768 in test" in shown


def test_features_of_another_preprocessing_are_computed_again(tmp_path: Path, checkpoint: Path) -> None:
    write_pcam(tmp_path / "pcam", rows=20)
    sidecar, cached = tmp_path / "preprocessor_config.json", tmp_path / "cache" / "repmetrics"
    evaluate(checkpoint, task="pcam", data=tmp_path / "pcam", runs=1, max_steps=1)
    evaluate(checkpoint, task="pcam", data=tmp_path / "pcam", runs=1, max_steps=1)
    assert len(list(cached.iterdir())) == 3
    sidecar.write_text('{"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}')
    evaluate(checkpoint, task="pcam", data=tmp_path / "pcam", runs=1, max_steps=1)
    assert len(list(cached.iterdir())) == 6


def test_the_student_is_evaluated_on_request(
    tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_pcam(tmp_path / "pcam")
    teacher = torch.load(checkpoint, weights_only=True)
    student = {name: weight.flip(0) for name, weight in teacher.items()}
    torch.save({"teacher": teacher, "student": student}, tmp_path / "both.pth")
    torch.save(student, tmp_path / "student.pth")

    def runs(file: str, *options: str) -> list[dict[str, object]]:
        with pytest.raises(SystemExit):
            cli.main(["evaluate", str(tmp_path / file), "--task", "pcam", "--data", str(tmp_path / "pcam"), "--json",
                      "--runs", "1", "--max-steps", "20", *options])  # fmt: skip
        values: list[dict[str, object]] = json.loads(capsys.readouterr().out)["runs"]
        return values

    requested, alone, default = runs("both.pth", "--student"), runs("student.pth"), runs("both.pth")
    assert requested == alone != default


def test_an_unknown_task_names_the_known(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown task 'camelyon': choose among bach, crc, mhist, pcam"):
        evaluate(checkpoint, task="camelyon", data=tmp_path)


def test_slides_are_pooled_and_probed(tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generator = np.random.default_rng(0)
    rows = ["file,slide"]
    for slide in range(12):
        for i in range(3):
            pixels = generator.integers(0, 100, (32, 32, 3), dtype=np.uint8)
            pixels[..., 0] += 100 * (slide % 2)
            Image.fromarray(pixels).save(tmp_path / f"s{slide}_{i}.png")
            rows.append(f"s{slide}_{i}.png,S{slide:02}")
    (tmp_path / "patches.csv").write_text("\n".join(rows))
    (tmp_path / "tp53.csv").write_text("slide,tp53\n" + "".join(f"S{s:02},{'wm'[s % 2]}\n" for s in range(12)))
    with pytest.raises(SystemExit) as stop:
        cli.main(
            ["evaluate", str(checkpoint), "--data", str(tmp_path / "patches.csv"), "--slide-labels",
             str(tmp_path / "tp53.csv")]
        )  # fmt: skip
    assert not stop.value.code
    assert "balanced accuracy 1.000" in (text := capsys.readouterr().out)
    assert "over 12 slides; chance 0.500" in text


def test_slides_of_one_patient_may_differ(tmp_path: Path) -> None:
    patches = Features(torch.tensor([[0.0], [2.0], [5.0], [7.0]]), ("p", "p", "p", "q"), None)
    slides = ["a.svs", "a.svs", "b.svs", "c.svs"]
    for labels in ({"a.svs": 0, "b.svs": 1, "c.svs": 1}, {"a": 0, "b": 1, "c": 1}):
        pooled, _ = pool_slides(patches, labels, slides=slides)
        assert pooled.values.flatten().tolist() == [1.0, 5.0, 7.0]
        assert pooled.groups == ("p", "p", "q")
        assert pooled.labels is not None
        assert pooled.labels.tolist() == [0, 1, 1]
    pooled, _ = pool_slides(patches, {"p": 0, "q": 1}, slides=slides)
    assert len(pooled.values) == 2


def test_slides_of_a_manifest_are_labeled_by_name(
    manifest: Path,
    checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    names = sorted({patch.slide for patch in HeldOutPatches(manifest).manifest.held_out})
    (tmp_path / "tp53.csv").write_text("slide,tp53\n" + "".join(f"{name},{i % 2}\n" for i, name in enumerate(names)))
    labels = ["--slide-labels", str(tmp_path / "tp53.csv")]
    with pytest.raises(SystemExit) as stop:
        cli.main(["evaluate", str(checkpoint), "--data", str(manifest), *labels])
    assert not stop.value.code
    assert f"over {len(names)} slides; chance 0.5" in capsys.readouterr().out


def test_slide_labels_that_do_not_cover(tmp_path: Path) -> None:
    patches = Features(torch.zeros(3, 2), ("a", "a", "b"), None)
    with pytest.raises(ValueError, match="1 of 2 slides have no label, first 'b'"):
        pool_slides(patches, {"a": 1})
    with pytest.raises(ValueError, match="the patches have no groups"):
        pool_slides(Features(torch.zeros(3, 2)), {"a": 1})
    (tmp_path / "a.csv").write_text("patient,x,y\np,1,2\n")
    assert read_slide_labels(tmp_path / "a.csv", column="y") == {"p": "2"}
    with pytest.raises(ValueError, match=r"a\.csv needs a column of slides .*found patient, x, y"):
        read_slide_labels(tmp_path / "a.csv")
    (tmp_path / "empty.csv").write_text("slide,label\ns,1\nt,\n")
    assert read_slide_labels(tmp_path / "empty.csv") == {"s": "1"}
    (tmp_path / "b.csv").write_text("slide,label\ns,1\ns,2\n")
    with pytest.raises(ValueError, match="gives 's' two labels: 1 and 2"):
        read_slide_labels(tmp_path / "b.csv")
