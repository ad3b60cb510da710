"""What is found in a folder, whose it is, and what the user's options and tables say about it."""

from __future__ import annotations

import csv
import errno
import json
import os
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pydicom
import pytest
from multi_file_slides import write_mrxs, write_vms
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid
from tifffile import TiffWriter
from typer.testing import CliRunner

from fmtrain.cli import app
from fmtrain.manifest.build import build_manifest, summary
from fmtrain.manifest.collection import parse_overrides
from fmtrain.manifest.doubts import mpp_outliers
from fmtrain.manifest.manifest import Manifest, SlideEntry, assets_dir, check_all_unchanged
from fmtrain.manifest.patients import patient_of
from fmtrain.manifest.search import FoundSlide, search
from fmtrain.manifest.tables import not_squares
from fmtrain.patches.dataset import TrainingPatches
from fmtrain.slides.inspection import inspect_slide
from fmtrain.slides.resolution import mpp_contradictions
from fmtrain.slides.synthetic import write_pyramid
from fmtrain.slides.tiles import SlideError

WHOLE_SLIDE, SEGMENTATION = "1.2.840.10008.5.1.4.1.1.77.1.6", "1.2.840.10008.5.1.4.1.1.66.4"


def tissue(seed: int, size: int = 512) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.clip(np.array([190, 110, 170]) + rng.normal(0, 20, (size, size, 3)), 0, 255).astype(np.uint8)


def write_slide(path: Path, seed: int, *, mpp: float | None = 0.5, description: str | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with TiffWriter(path) as tif:
        tif.write(
            tissue(seed),
            tile=(256, 256),
            compression="jpeg",
            photometric="rgb",
            metadata=None,
            description=description,
            resolution=None if mpp is None else (1e4 / mpp, 1e4 / mpp),
            resolutionunit=None if mpp is None else "CENTIMETER",
        )
    return path


def write_dicom(
    path: Path, pixels: np.ndarray, *, patient: str, uid: str, mpp: float = 0.5, kind: str = WHOLE_SLIDE
) -> None:
    """One level of a DICOM slide, uncompressed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    h, w = pixels.shape[:2]
    data, meta = Dataset(), FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = data.SOPClassUID = kind
    meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID = generate_uid()
    data.SeriesInstanceUID, data.StudyInstanceUID, data.FrameOfReferenceUID = uid, uid[:50] + ".1", uid[:50] + ".2"
    data.Modality, data.PatientID, data.ImageType = "SM", patient, ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"]
    data.SamplesPerPixel, data.PhotometricInterpretation, data.PlanarConfiguration = 3, "RGB", 0
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 8, 8, 7, 0
    data.Rows, data.Columns, data.NumberOfFrames = 256, 256, h // 256 * (w // 256)
    data.TotalPixelMatrixRows, data.TotalPixelMatrixColumns, data.TotalPixelMatrixFocalPlanes = h, w, 1
    data.DimensionOrganizationType = "TILED_FULL"
    spacing, functional, optical = Dataset(), Dataset(), Dataset()
    spacing.PixelSpacing = [mpp / 1000] * 2
    functional.PixelMeasuresSequence, optical.OpticalPathIdentifier = [spacing], "1"
    data.SharedFunctionalGroupsSequence, data.OpticalPathSequence = [functional], [optical]
    frames = [pixels[y : y + 256, x : x + 256] for y in range(0, h, 256) for x in range(0, w, 256)]
    data.PixelData = b"".join(frame.tobytes() for frame in frames)
    data.file_meta = meta
    pydicom.dcmwrite(path, data, enforce_file_format=True)


def rows_of(manifest: Manifest) -> dict[str, dict[str, str]]:
    with (assets_dir(manifest.path) / "slides.csv").open(newline="") as file:
        return {row["file"]: row for row in csv.DictReader(file)}


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve slides of six patients."""
    folder = tmp_path_factory.mktemp("slides")
    for k in range(12):
        write_slide(folder / f"p{k // 2}_{k % 2}.tif", k)
    return folder


PATIENT = r"p\d+"  # of these slides


# What is found


def test_every_file_is_listed_with_its_state(tmp_path: Path) -> None:
    root, elsewhere = tmp_path / "s", tmp_path / "elsewhere"
    for name in ("a.svs", "sub/b.tif", "c.btf", ".hidden/d.tif", "scan.isyntax", "e.tif.part"):
        write_slide(root / name, 0)
    write_slide(elsewhere / "f.tif", 1)
    shutil.copy(root / "a.svs", root / "no_suffix")
    for name in ("notes.txt", "photo.PNG", "sub/README"):
        (root / name).write_text("text")
    os.symlink(elsewhere, root / "cohort")
    os.symlink(root, root / "sub" / "loop")
    os.symlink(elsewhere / "gone", root / "broken.tif")
    os.mkfifo(root / "pipe.svs")
    found = search(root)
    assert [slide.relative for slide in found.slides] == ["a.svs", "c.btf", "cohort/f.tif", "no_suffix", "sub/b.tif"]
    others = {other.relative: (other.state, other.reason) for other in found.others}
    assert set(others) == {
        *(".hidden/d.tif", "scan.isyntax", "e.tif.part", "notes.txt", "photo.PNG", "sub/README"),
        *("sub/loop", "broken.tif", "pipe.svs"),
    }
    assert others[".hidden/d.tif"] == ("not searched", "hidden: its name, or that of a folder, begins with a dot")
    assert others["sub/loop"] == ("not searched", "a link to a folder that is searched elsewhere")
    assert "OpenSlide does not read (.isyntax, Philips)" in others["scan.isyntax"][1]
    assert "a picture (.png)" in others["photo.PNG"][1]
    assert others["pipe.svs"] == ("not a slide", "not a regular file")
    kept = search(root, include=["*.tif"], exclude=["sub"])
    assert [slide.relative for slide in kept.slides] == ["cohort/f.tif"]


def test_a_folder_without_permission_is_named(slides: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scandir = os.scandir

    def locked(path: Path) -> object:
        if Path(path).name == "locked":
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    (slides / "locked").mkdir(exist_ok=True)
    monkeypatch.setattr(os, "scandir", locked)
    (other,) = [other for other in search(slides).others if other.relative == "locked"]
    assert (other.state, other.reason) == ("not searched", "the folder cannot be read (Permission denied)")


def test_files_that_cannot_be_examined_are_named_and_errors_that_pass_are_retried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fmtrain.slides.retries.WAITS_SECONDS", (0.0, 0.0))
    for name in ("a.svs", "b", "denied.svs"):
        write_slide(tmp_path / "s" / name, 0)
    write_mrxs(tmp_path / "s" / "m.mrxs", tissue(1))
    failures, stat, scandir, opened = Counter[str](), os.stat, os.scandir, Path.open

    def fail_twice(path: object) -> None:
        name = Path(str(path)).name
        failures[name] += 1
        if failures[name] < 3:
            raise OSError(errno.EIO, "Input/output error")

    def denied(path: object, **options: object) -> os.stat_result:
        if str(path).endswith("denied.svs"):
            raise PermissionError(errno.EACCES, "Permission denied")
        return stat(path, **options)

    monkeypatch.setattr(os, "stat", denied)
    monkeypatch.setattr(os, "scandir", lambda path: (fail_twice(path), scandir(path))[1])
    monkeypatch.setattr(Path, "open", lambda path, *rest, **more: (fail_twice(path), opened(path, *rest, **more))[1])
    found = search(tmp_path / "s")
    assert [(slide.name, slide.problem) for slide in found.slides] == [("a.svs", ""), ("b", ""), ("m.mrxs", "")]
    (other,) = [other for other in found.others if other.relative == "denied.svs"]
    assert other[1:] == ("not searched", "cannot be read (Permission denied)")
    assert {name for name, count in failures.items() if count >= 3} == {"s", "m", "b", "Slidedat.ini"}
    info = inspect_slide(tmp_path / "s" / "b")
    failures.clear()
    check_all_unchanged([SlideEntry(tmp_path / "s" / "b", info, "", "", "train", 0.0)])
    assert failures["b"] == 3


def test_slides_of_one_file_name_are_named_by_their_path(tmp_path: Path) -> None:
    for k in range(4):
        write_slide(tmp_path / "s" / f"case{k}" / "scan.tif", k)
    built = build_manifest(tmp_path / "s", tmp_path / "out", held_out=4)
    assert [slide.info.name for slide in built.slides] == [f"case{k}/scan.tif" for k in range(4)]
    assert all(built.mask(slide).any() for slide in Manifest.load(built.path).slides)
    assert TrainingPatches(built.path, size_px=256, seed=0)[0].shape == (3, 256, 256)


def test_names_that_are_no_text_are_left_out(tmp_path: Path) -> None:
    for k in range(3):
        write_slide(tmp_path / "s" / f"{k}.tif", k)
    shutil.copy(tmp_path / "s" / "0.tif", os.fsdecode(os.fsencode(tmp_path / "s") + b"/bad\xff.tif"))
    built = build_manifest(tmp_path / "s", tmp_path / "out", held_out=4)
    assert built.excluded == {"bad\\xff.tif": "its path is not text in UTF-8: rename it"}
    assert len(built.slides) == 3


@pytest.mark.parametrize(("suffix", "part"), [(".mrxs", "a/Data0001.dat"), (".vms", "a_1.jpg")])
def test_a_slide_of_several_files_is_all_of_them(suffix: str, part: str, tmp_path: Path) -> None:
    root, pixels = tmp_path / "s", tissue(0)
    {".mrxs": write_mrxs, ".vms": write_vms}[suffix](root / f"a{suffix}", pixels)
    for k in range(2):
        write_slide(root / f"b{k}.tif", k)
    (root / "a").mkdir(exist_ok=True)
    (root / "a" / "Thumbs.db").write_text("no part of the slide")
    built = build_manifest(root, tmp_path / "out", held_out=4, size_px=128)
    slide = built.slides[0]
    assert slide.info.name == f"a{suffix}"
    assert part in slide.info.files
    rows = rows_of(built)
    assert {rows[name]["state"] for name in slide.info.files if name != slide.info.name} == {"part of a slide"}
    assert (rows["a/Thumbs.db"]["state"], rows[part]["problem"]) == ("not a slide", slide.info.name)
    (root / "a" / "Thumbs.db").unlink()
    check_all_unchanged(built.slides)
    content = (root / part).read_bytes()
    (root / part).write_bytes(content[:-1] + b"x")
    with pytest.raises(SlideError, match=rf"^a{suffix} has changed"):
        check_all_unchanged(built.slides)
    (root / part).unlink()
    with pytest.raises(SlideError, match=rf"^a{suffix}: cannot be read at .*/{part}"):
        check_all_unchanged(built.slides)
    again = build_manifest(root, tmp_path / "again", held_out=4, size_px=128)
    assert Path(part).name in again.excluded[f"a{suffix}"]


# DICOM


def test_a_dicom_series_is_one_slide_and_its_patient_is_in_the_header(tmp_path: Path) -> None:
    root = tmp_path / "s"
    uids = [generate_uid() for _ in range(4)]
    for k, uid in enumerate(uids):  # in one folder; the second level of each has a name without suffix
        write_dicom(root / f"slide{k}.dcm", tissue(k, 1024), patient=f"TCGA-AA-000{k // 2}", uid=uid)
        write_dicom(root / f"z{k}", tissue(k, 1024)[::2, ::2], patient="", uid=uid, mpp=1.0)
    write_dicom(root / "seg.dcm", tissue(9), patient="x", uid=generate_uid(), kind=SEGMENTATION)
    (root / "broken.dcm").write_bytes(b"no DICOM")
    built = build_manifest(root, tmp_path / "out", held_out=8)
    assert {s.info.name: (s.patient, s.site) for s in built.slides} == {
        f"slide{k}.dcm": (f"TCGA-AA-000{k // 2}", "AA") for k in range(4)
    }
    assert all(slide.info.levels == ((1024, 1024), (512, 512)) for slide in built.slides)
    assert set(built.excluded) == {"broken.dcm"}
    rows = rows_of(built)
    assert (rows["z1"]["state"], rows["z1"]["problem"]) == ("part of a slide", "slide1.dcm")
    assert "Segmentation" in rows["seg.dcm"]["problem"]

    (root / "z2").unlink()
    with pytest.raises(SlideError, match=r"^slide2\.dcm: cannot be read at .*/z2"):
        check_all_unchanged(Manifest.load(built.path).slides)


def test_a_level_that_is_lost_and_a_blank_patch_are_faults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fmtrain.slides.retries.WAITS_SECONDS", ())
    for k in range(3):
        uid = generate_uid()
        write_dicom(tmp_path / f"s/{k}/a.dcm", tissue(k, 1024)[::2, ::2], patient=f"P{k}", uid=uid, mpp=1.0)
        write_dicom(tmp_path / f"s/{k}/b.dcm", tissue(k, 1024), patient=f"P{k}", uid=uid)
    built = build_manifest(tmp_path / "s", tmp_path / "out", held_out=4)
    monkeypatch.setattr("fmtrain.patches.slide_pool.check_unchanged", lambda entry: None)
    patches = TrainingPatches(built.path, size_px=256, seed=0, max_failed_fraction=1.0)
    lost = patches.slides[0]
    (lost.path.parent / "b.dcm").unlink()
    for index in range(12):
        assert patches[index].float().std() > 5
    assert set(patches.quarantined) == {lost.info.name}

    blank = TrainingPatches(built.path, size_px=256, seed=0, max_failed_fraction=1.0)
    monkeypatch.setattr(
        "fmtrain.slides.slide.Slide.read_patches", lambda self, regions, outs: [out.fill(255) for out in outs]
    )
    with pytest.raises(RuntimeError, match=r"2 of 2|could not be drawn"):
        blank[0]
    assert set(blank.quarantined) == {slide.info.name for slide in blank.slides}


# Resolution


def test_the_users_mpp_wins_and_what_is_not_used_is_named(tmp_path: Path) -> None:
    aperio = "Aperio Image Library v11\r\n512x512 (256x256) JPEG/RGB Q=70|AppMag = 40"
    for k in range(3):
        write_slide(tmp_path / "s" / f"inch{k}.tif", k, mpp=1.267)
        write_slide(tmp_path / "s" / f"mag{k}.svs", 10 + k, mpp=None, description=aperio)
    table = tmp_path / "t.csv"
    table.write_text("file,mpp\ninch0.tif,0.499\nmag0,0.2528\nabsent.svs,0.5\n")
    built = build_manifest(
        *(tmp_path / "s", tmp_path / "out"),
        table=table,
        mpp=0.3,
        mpp_override={"inch*": 0.5, "nothing*": 1.0},
        include=["*.tif", "*.svs"],
        exclude=["no_folder"],
        held_out=4,
    )
    taken = {slide.info.name: (slide.info.mpp, slide.info.mpp_source) for slide in built.slides}
    assert taken["inch0.tif"] == (0.499, "table")
    assert taken["inch1.tif"] == (0.5, "--mpp-override")
    assert taken["mag0.svs"] == (0.2528, "table")
    assert taken["mag1.svs"] == (0.25, "openslide.objective-power (nominal)")
    text = "\n".join(built.warnings)
    assert "--mpp 0.3 was not used" in text
    assert "--mpp-override nothing* fits no slide" in text
    assert [line for line in built.warnings if "--exclude" in line] == ["--include or --exclude no_folder fits no file"]
    assert "t.csv has rows of 1 slides that are not there: absent.svs" in text
    assert "t.csv has no row of 4 slides" in text
    assert Manifest.load(built.path).warnings == built.warnings


def test_contradictory_and_unusual_mpp_are_named() -> None:
    inch = {"tiff.XResolution": "20040.1", "tiff.ResolutionUnit": "inch"}
    assert mpp_contradictions(inch, 1.26745, "openslide.mpp-x") == (
        "its mpp 1.267 would be 0.499 if an inch and a centimeter were confused (factor 2.54)",
    )
    assert mpp_contradictions(inch | {"openslide.objective-power": "20"}, 0.499, "openslide.mpp-x") == ()
    assert mpp_contradictions({"openslide.objective-power": "40"}, 0.2271, "openslide.mpp-x") == ()
    assert mpp_contradictions(
        {"openslide.objective-power": "20", "tiff.XResolution": "72", "tiff.ResolutionUnit": "inch"},
        0.25,
        "ome.PhysicalSizeX",
    ) == ("its objective 20 suggests mpp 0.5, not 0.25",)
    assert mpp_outliers({f"{k}": 0.25 + 0.001 * k for k in range(9)}) == {}
    assert mpp_outliers({"a": 0.5, "b": 0.25}) == {}
    assert set(mpp_outliers({**{f"{k}": 0.25 for k in range(20)}, "x": 0.5})) == {"x"}
    assert parse_overrides(["a=b=0.5"]) == {"a=b": 0.5}
    for wrong in ("0.5", "*.svs=", "*.svs=264", "*.svs=x"):
        with pytest.raises(ValueError, match="must be like"):
            parse_overrides([wrong])


def test_ome_tiff_is_read_with_its_levels_and_its_size(tmp_path: Path) -> None:
    pixels = tissue(0, 1024)
    common = {"tile": (256, 256), "compression": "zlib", "photometric": "rgb"}
    size = {f"PhysicalSize{side}": 500.0 for side in "XY"} | {f"PhysicalSize{side}Unit": "nm" for side in "XY"}
    with TiffWriter(path := tmp_path / "q.ome.tif", bigtiff=True, ome=True) as tif:
        tif.write(pixels, subifds=2, metadata={"axes": "YXS", **size}, resolution=(72, 72), **common)
        for k in (2, 4):
            tif.write(pixels[::k, ::k], subfiletype=1, **common)
    info = inspect_slide(path)
    assert (info.mpp, info.mpp_source, info.reader) == (0.5, "ome.PhysicalSizeX", "tifffile")
    assert info.levels == ((1024, 1024), (512, 512), (256, 256))
    from fmtrain.slides.slide import Slide

    with Slide(path, info) as slide:
        for level, k in enumerate((1, 2, 4)):
            np.testing.assert_array_equal(slide.read(level, 100, 60, (150, 120)), pixels[::k, ::k][60:180, 100:250])
        assert (slide.read(0, -5, -5, (10, 10))[:5] == 255).all()
    with TiffWriter(path := tmp_path / "f.ome.tif", ome=True) as tif:
        tif.write(np.zeros((3, 256, 256), np.uint16), metadata={"axes": "CYX"}, photometric="minisblack")
    with pytest.raises(SlideError, match="only one plane of 8-bit RGB is a bright-field slide"):
        inspect_slide(path)


def test_real_files_of_many_formats(data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fmtrain.slides.retries.WAITS_SECONDS", ())
    built = build_manifest(data_dir / "wsi_formats", tmp_path, held_out=4, mpp=2.0, mpps=(0.5, 2.0))
    mpps = {slide.info.name: slide.info.mpp for slide in built.slides}
    assert mpps == {
        "OS-1-detail.ome.tif": pytest.approx(0.2271, abs=1e-4),
        "OS-2-ndpi.ome.tif": pytest.approx(0.2271, abs=1e-4),
        "OS-2-vsi.ome.tif": pytest.approx(0.3461, abs=1e-4),
        **dict.fromkeys(
            ("camelyon_multiframe_jpeg.dcm", "camelyon_multiframe_jpeg2000.dcm", "cptac_C3L-00601-26_overview.tiff"),
            2.0,
        ),
    }
    assert len(built.excluded) == 8
    states = Counter(row["state"] for row in rows_of(built).values())
    assert states == {"used": 6, "excluded": 8, "part of a slide": 1, "not a slide": 1}


def test_masks_of_the_user_replace_detection(slides: Path, tmp_path: Path) -> None:
    masks = tmp_path / "masks"
    masks.mkdir()
    pixels = np.zeros((32, 32), np.uint8)
    pixels[:, :16] = 1
    Image.fromarray(pixels).save(masks / "p0_0.png")
    Image.fromarray(pixels).save(masks / "absent.png")
    built = build_manifest(slides, tmp_path / "out", held_out=4, masks=masks, patient=PATIENT, size_px=128)
    areas = {slide.info.name: slide.tissue_mm2 for slide in built.slides}
    assert areas["p0_0.tif"] == pytest.approx(areas["p0_1.tif"] / 2)
    assert "masks has masks of 1 slides that are not there: absent" in built.warnings
    assert 0 <= float(rows_of(built)["p0_0.tif"]["mask_quality"]) < 0.1  # half of the tissue is left out


# Patients and copies


def test_patients_come_from_rules_folders_and_headers() -> None:
    def origin(relative: str, rule: str | None = None, patient: str = "") -> tuple[str, str, bool]:
        path = Path(relative)
        return patient_of(FoundSlide(path, path.name, relative, (), patient), rule=rule)

    assert origin("a/b/x.svs", "folder") == ("a", "", True)
    assert origin("S-12_3.svs", r"^(S)-(\d+)") == ("S-12", "", True)
    assert origin("a/x.svs", r"no match") == ("x", "", False)
    assert origin("x.dcm", None, "tcga-18-5592") == ("TCGA-18-5592", "18", True)
    assert origin("x.dcm", None, "lab 7") == ("lab 7", "", True)
    assert origin("TCGA-18-5592/x.svs") == ("TCGA-18-5592", "18", True)


def test_options_are_checked_before_a_slide_is_opened(slides: Path, tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    table.write_text("file,split\np0_0.tif,train\np1_0.tif,held_out\n")
    squares = tmp_path / "l.csv"
    squares.write_text("file,x,y,size,label\nabsent.tif,0,0,256,a\n")
    for options, message in (
        ({"held_out_fraction": 0.0}, "held-out fraction must lie between 0 and 1, got 0"),
        ({"split_by": "site"}, "needs every site: unknown for p0_0.tif"),
        ({"table": table}, "for some slides only"),
        ({"patient": "("}, "no regular expression"),
        ({"patient": "nothing"}, "fits no slide"),
        ({"patient": "p"}, r"only one patient or site \(p\)"),
        ({"labels": squares}, "names no slide of the folder"),
        ({"label": "organ"}, "--label names a column of --labels, which is missing"),
        ({"pseudonyms": squares}, None),
    ):
        if message is None:
            squares.write_text("short")
            message = "must hold a secret of at least 16 bytes, got 5"
        with pytest.raises(ValueError, match=message):
            build_manifest(slides, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_manifest_named_as_the_folder_of_slides_is_refused(slides: Path) -> None:
    """Its masks and thumbnails would be written among the slides."""
    before = sorted(slides.rglob("*"))
    out = slides.with_suffix(".json")
    with pytest.raises(ValueError, match=r"\.json writes masks and thumbnails into .*: give .* another name"):
        build_manifest(slides, out, held_out=4, size_px=64)
    assert sorted(slides.rglob("*")) == before
    assert not out.exists()


def test_slide_labels_in_the_folder_are_left_alone_and_tables_go_by_stem(slides: Path, tmp_path: Path) -> None:
    root = tmp_path / "s"
    shutil.copytree(slides, root)
    (root / "labels.csv").write_text("slide,label\np0_0,tumor\n")
    write_slide(root / "p0_0.svs", 77)  # the stem of two slides
    table = tmp_path / "t.csv"
    table.write_text("file,patient\np1_0,x\np1_1.tif,x\n")
    built = build_manifest(root, tmp_path / "out", held_out=4, table=table, patient=PATIENT)
    assert {s.info.name for s in built.slides if s.patient == "x"} == {"p1_0.tif", "p1_1.tif"}
    assert "labels.csv is not used as labels: it has no columns file, x, y, size" in built.warnings
    (root / "labels.csv").write_bytes("file,label\np0_0,Müller\n".encode("latin-1"))
    assert not_squares(root / "labels.csv") == "it is not CSV in UTF-8"
    table.write_text("file,patient\np0_0,x\n")
    with pytest.raises(ValueError, match=r"p0_0 names 2 slides, p0_0\.svs, p0_0\.tif"):
        build_manifest(root, tmp_path / "other", table=table)


def test_squares_outside_of_their_slide_are_counted(slides: Path, tmp_path: Path) -> None:
    labels = tmp_path / "l.csv"
    rows = [f"{path.name},{x},0,256,{x}" for path in slides.glob("*.tif") for x in (0, 256, 5000)]
    labels.write_text("\n".join(["file,x,y,size,label", *rows]))
    built = build_manifest(slides, tmp_path / "out", held_out=99, labels=labels, patient=PATIENT)
    count = len(built.slides_in("held_out"))
    assert {(patch.x, patch.label) for patch in built.held_out} == {(0, "0"), (256, "256")}
    assert f"{count} labeled squares lie outside of their held-out slides and are not used" in built.warnings


def test_copies_of_a_slide_are_on_one_side(slides: Path, tmp_path: Path) -> None:
    root = tmp_path / "s"
    shutil.copytree(slides, root)
    for k in range(6):
        shutil.copy(root / f"p{k}_0.tif", root / f"copy_{k}.tif")
    built = build_manifest(root, tmp_path / "out", held_out=4)
    sides = {slide.info.name: slide.split for slide in built.slides}
    assert all(sides[f"p{k}_0.tif"] == sides[f"copy_{k}.tif"] for k in range(6))
    assert "the same slide 2 times: copy_0.tif, p0_0.tif" in built.warnings
    assert any(warning.startswith("each slide is a patient of its own: ") for warning in built.warnings)


# Extension


def test_new_slides_extend_a_manifest_and_nothing_else_changes(slides: Path, tmp_path: Path) -> None:
    root, out = tmp_path / "s", tmp_path / "out"
    shutil.copytree(slides, root)
    first = build_manifest(root, out, held_out=8, patient=PATIENT)
    text, masks = first.path.read_bytes(), {s.info.name: first.mask(s) for s in first.slides}
    assert build_manifest(root, out, held_out=8, patient=PATIENT).path.read_bytes() == text

    held_out = first.slides_in("held_out")[0]
    write_slide(root / f"{held_out.patient}_new.tif", 50)
    for k in range(3):
        write_slide(root / f"a{k}.tif", 60 + k)
    shutil.copy(held_out.path, root / "copy.tif")
    (root / "sub").mkdir()
    shutil.copy(root / "a0.tif", root / "sub" / first.slides[0].info.name)  # the name of another slide
    second = build_manifest(root, out, held_out=8, patient=PATIENT)
    assert second.held_out == first.held_out
    sides = {slide.info.name: slide.split for slide in second.slides}
    assert {name: sides[name] for name in masks} == {slide.info.name: slide.split for slide in first.slides}
    assert all(np.array_equal(second.mask(s), masks[s.info.name]) for s in second.slides if s.info.name in masks)
    new = {name: side for name, side in sides.items() if name not in masks}
    assert new == {
        **{f"a{k}.tif": "train" for k in range(3)},
        f"{held_out.patient}_new.tif": "held_out",
        "copy.tif": "held_out",
        f"sub/{first.slides[0].info.name}": first.slides[0].split,  # by its patient
    }
    loaded = Manifest.load(second.path)
    assert loaded.content_hash() != first.content_hash()
    earlier = loaded.before_extension(first.content_hash())
    assert earlier is not None
    assert [s.info for s in earlier.slides] == [s.info for s in first.slides]
    assert loaded.before_extension("0" * 64) is None


def test_an_extension_needs_the_same_options_and_all_slides(slides: Path, tmp_path: Path) -> None:
    root, out = tmp_path / "s", tmp_path / "out"
    shutil.copytree(slides, root)
    text = build_manifest(root, out, held_out=8, patient=PATIENT).path.read_bytes()
    for options, message in (
        ({"seed": 1}, "was built with seed = 0, the call has 1"),
        ({"size_px": 128}, "was built with size_px = 256, the call has 128"),
        ({"mpp_override": {"p0*": 0.25}}, r"p0_0\.tif has mpp 0\.5 in .*, not 0\.25"),
    ):
        with pytest.raises(ValueError, match=message):
            build_manifest(root, out, **{"held_out": 8, "patient": PATIENT, **options})
    (root / "p3_0.tif").rename(tmp_path / "away.tif")
    with pytest.raises(ValueError, match=r"1 of its slides are not in the folder: p3_0\.tif"):
        build_manifest(root, out, held_out=8, patient=PATIENT)
    (tmp_path / "away.tif").rename(root / "new.tif")
    with pytest.raises(ValueError, match=r"not in the folder: p3_0\.tif; p3_0\.tif is now new\.tif; put them back"):
        build_manifest(root, out, held_out=8, patient=PATIENT)
    (root / "new.tif").unlink()
    write_slide(root / "p3_0.tif", 99)
    with pytest.raises(SlideError, match=r"p3_0\.tif has changed"):
        build_manifest(root, out, held_out=8, patient=PATIENT)
    assert (out / "manifest.json").read_bytes() == text
    anew = build_manifest(root, out, held_out=6, patient=PATIENT, overwrite=True)
    assert len(anew.held_out) == 6


def test_a_run_goes_on_with_the_slides_that_the_manifest_had(slides: Path, tmp_path: Path) -> None:
    root, out = tmp_path / "s", tmp_path / "out"
    shutil.copytree(slides, root)
    first = build_manifest(root, out, held_out=8, patient=PATIENT)
    before = [TrainingPatches(first.path, size_px=256, seed=3).plan(k) for k in range(20)]
    write_slide(root / "a.tif", 80)
    build_manifest(root, out, held_out=8, patient=PATIENT)
    extended = TrainingPatches(first.path, size_px=256, seed=3)
    earlier = extended.before_extension(first.content_hash())
    assert earlier is not None
    assert [earlier.plan(k) for k in range(20)] == before
    assert len(extended.slides) == len(earlier.slides) + 1


# Pseudonyms


@pytest.fixture
def key(tmp_path: Path) -> Path:
    path = tmp_path / "key"
    path.write_text("0123456789abcdef\n")
    return path


def messages(error: BaseException | None) -> str:
    """Texts of an error and of the errors before it, as a traceback shows them."""
    if error is None:
        return ""
    earlier = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return f"{error}\n{messages(earlier)}"


def named_collection(root: Path) -> None:
    """Slides of every kind, sound or not, whose names contain `Jane`."""
    for k in range(4):
        write_slide(root / f"Jane{k}.svs", k)
        write_dicom(root / f"Jane_{k}.dcm", tissue(10 + k), patient=f"Jane Doe {k}", uid=generate_uid())
    for k in range(2):
        write_slide(root / f"Jane {k}" / "scan.tif", 20 + k)
        write_dicom(root / "series" / f"Jane_s{k}.dcm", tissue(30)[:: k + 1, :: k + 1], patient="Jane", uid="1.2.3")
    write_mrxs(root / "Jane_m.mrxs", tissue(40))
    write_mrxs(root / "Jane_lost.mrxs", tissue(41))
    (root / "Jane_lost" / "Data0001.dat").unlink()
    write_vms(root / "Jane_v.vms", tissue(42))
    write_slide(root / "Jane_twice.svs", 0)
    write_slide(root / "Jane_mpp.svs", 43, description="Aperio Image Library v1\r\n512x512|AppMag = 40|MPP = 0.5")
    shutil.copy(root / "Jane1.svs", root / "Jane.Doe")
    write_slide(root / ".Jane" / "hidden.svs", 0)
    for name in ("Jane9.svs", "Jane9.dcm", "Mrs.Jane", "Jane.xml", "Jane.vsi", "Jane.svs.part", "Jane.png"):
        (root / name).write_text("no slide")
    os.symlink(root / "no Jane", root / "Jane_link.svs")


def test_pseudonyms_replace_every_name(tmp_path: Path, key: Path, caplog: pytest.LogCaptureFixture) -> None:
    root, masks, table = tmp_path / "s", tmp_path / "masks", tmp_path / "table.csv"
    named_collection(root)
    masks.mkdir()
    for k, content in enumerate((b"no picture", b"\x89PNG\r\n\x1a\n")):
        (masks / f"Jane{k + 2}.png").write_bytes(content)
    (masks / "Jane77.png").write_bytes(b"")
    table.write_text("file,patient,site\nJane2,Jane Roe,Basel\nJane77,,Bern\n")
    options = {"pseudonyms": key, "held_out": 8, "size_px": 128}
    built = build_manifest(
        *(root, tmp_path / "a"), table=table, masks=masks, mpp_override={"Jane7*": 0.5}, patient=r"Jane\d", **options
    )
    assert len(built.slides) == 14
    texts = [*built.warnings, *summary(built), *built.excluded.values(), caplog.text]
    for part in (
        *("rows of 1 slides that are not there", "masks of 1 slides that are not there", "its mask cannot be read"),
        *("--mpp-override number 1 fits no slide", "suggests mpp 0.25", "the same slide 2 times", "--patient does not"),
        *("1 of its 3 files of pixels are missing", "a format that OpenSlide does not read", "an incomplete file"),
    ):
        assert any(part in text for text in texts), part
    for file in (tmp_path / "a").rglob("*"):
        texts.append(file.relative_to(tmp_path).as_posix())
        if file.is_file() and (not file.is_symlink() or file.suffix in (".vms", ".ini")):
            texts.append(file.read_text(encoding="latin-1"))
    for text in texts:
        assert "jane" not in text.lower(), text
        assert "0123456789abcdef" not in text, text
    patches = TrainingPatches(built.path, size_px=128, seed=0)
    assert len({patches[k].numpy().tobytes() for k in range(40)}) == 40
    check_all_unchanged(built.slides)

    again = build_manifest(root, tmp_path / "b", **options)
    assert {s.info.name: s.info.fingerprint for s in built.slides}.items() <= {
        s.info.name: s.info.fingerprint for s in again.slides
    }.items()
    assert build_manifest(root, tmp_path / "b", **options).path.read_bytes() == again.path.read_bytes()
    plain = build_manifest(root, tmp_path / "c", held_out=8, size_px=128)
    assert Counter(s.split for s in plain.slides) == Counter(s.split for s in again.slides)
    areas = [{slide.tissue_mm2 for slide in manifest.slides_in("held_out")} for manifest in (plain, again)]
    assert areas[0] == areas[1]
    key.write_text("another key of many bytes")
    with pytest.raises(ValueError, match="was built with pseudonyms"):
        build_manifest(root, tmp_path / "b", **options)

    for slide in again.slides_in("train")[::2]:  # damaged, or without a file, during a run
        part = slide.path.parent / (slide.info.files or (slide.path.name,))[0]
        original = part.resolve()
        original.write_bytes(b"damaged") if len(slide.info.files) < 2 else original.unlink()
    patches = TrainingPatches(again.path, size_px=128, seed=0, max_failed_fraction=1.0)
    for k in range(60):
        assert patches[k].float().std() > 1
    assert len(patches.quarantined) >= 4
    assert caplog.text.count("slide quarantined") == len(patches.quarantined)
    assert "jane" not in caplog.text.lower()


def test_a_refused_call_shows_pseudonyms(tmp_path: Path, key: Path) -> None:
    root, out = tmp_path / "s", tmp_path / "out"
    for name in ("Jane0.svs", "Jane1.svs", "a/Jane.svs", "a/Jane.tif"):
        write_slide(root / name, 0)
    table, labels, masks = tmp_path / "t.csv", tmp_path / "l.csv", tmp_path / "masks"
    sides = "Jane0,{0},{1}\nJane1,Jane,train\na/Jane.svs,Jane,train\na/Jane.tif,Jane,train"
    squares = "file,x,y,size,label\n"
    masks.mkdir()
    (masks / "Jane7.png").touch()
    for options, text, message in (
        ({"table": table}, "file,patient\nJane,x", "names 2 slides, S-"),
        ({"table": table}, "file,patient\nJane0,x\nJane0,x", "is named twice"),
        ({"table": table}, "file,patient\nJane0,x\nJane0.svs,x", "is named twice"),
        ({"table": table}, "file,split\nJane0,Jane", "split must be train or held_out, got S-"),
        ({"table": table}, "file,mpp\nJane0,Jane", "0.05 to 10, got S-"),
        ({"table": table}, "file,mpp\nJane7,0.5", "names no slide of the folder, for example S-"),
        ({"table": table}, "file,split\nJane0,train", "for some slides only: it is missing for S-"),
        ({"table": table}, "file,patient,split\n" + sides.format("Jane", "held_out"), "patient P-[0-9a-f]+ is on both"),
        ({"table": table}, "file,patient,split\n" + sides.format("Jane2", "train"), "leaves no slide in held_out"),
        ({"patient": "Jane"}, "", r"only one patient or site \(P-"),
        ({"patient": "x.x"}, "", "fits no slide, for example S-"),
        ({"split_by": "site"}, "", "needs every site: unknown for S-"),
        ({"mpp_override": {"*0.svs": 0.5, "J*": 0.25}}, "", "--mpp-override gives S-"),
        ({"labels": labels}, squares + "Jane0,Jane,0,128,a", "not a square: x, y, size = S-"),
        ({"labels": labels}, squares + "Jane7,0,0,128,a", "names no slide of the folder, for example S-"),
        ({"masks": masks}, "", "has no mask of any slide"),
        ({"include": ["*.mrxs"]}, "", "contains no slides.*passed over: F-"),
    ):
        table.write_text(text)
        labels.write_text(text)
        with pytest.raises(ValueError, match=message) as caught:
            build_manifest(root, out, pseudonyms=key, **options)
        assert "jane" not in messages(caught.value).lower(), messages(caught.value)
        assert not out.exists()


def test_errors_after_the_scan_show_pseudonyms(tmp_path: Path, key: Path) -> None:
    """No slide can be used; one patient is left; a link cannot be created; a slide is missing, or has changed."""
    root, out = tmp_path / "s", tmp_path / "out"
    for k in range(3):
        write_slide(root / f"Jane{k}.svs", k)
    options = {"pseudonyms": key, "held_out": 4, "patient": r"Jane\d"}
    for count, message in ((3, "none of the 3 slides"), (2, "1 patient or site has usable slides")):
        for k in range(3):
            write_slide(root / f"Jane{k}.svs", k) if k >= count else (root / f"Jane{k}.svs").write_text("no slide")
        with pytest.raises(ValueError, match=message) as caught:
            build_manifest(root, out, **options)
        assert "jane" not in messages(caught.value).lower()
    for k in range(3):
        write_slide(root / f"Jane{k}.svs", k)
    built = build_manifest(root, out, **options)
    write_slide(root / "Jane1.svs", 7)
    with pytest.raises(SlideError, match=r"S-\w+\.svs has changed") as caught:
        build_manifest(root, out, **options)
    assert "jane" not in messages(caught.value).lower()
    (root / "Jane1.svs").unlink()
    with pytest.raises(ValueError, match=r"not in the folder: S-\w+\.svs") as caught:
        build_manifest(root, out, **options)
    assert "jane" not in messages(caught.value).lower()
    with pytest.raises(SlideError, match=r"S-\w+\.svs: cannot be read at .*manifest/slides/S-\w+\.svs") as caught:
        check_all_unchanged(built.slides)
    assert "jane" not in messages(caught.value).lower()
    link = built.slides[0].path
    link.unlink()
    link.mkdir()
    with pytest.raises(OSError, match="a link cannot be created: File exists") as caught:
        build_manifest(root, out, overwrite=True, **options)
    assert "jane" not in messages(caught.value).lower()


# People and pages


def test_the_command_prints_warnings_progress_and_the_page(slides: Path, tmp_path: Path) -> None:
    arguments = ["manifest", str(slides), "--out", str(tmp_path / "out"), "--held-out", "8", "--workers", "1"]
    result = CliRunner().invoke(app, [*arguments, "--mpp", "0.4"])
    assert result.exit_code == 0
    assert str(tmp_path / "out" / "manifest" / "index.html") in result.stdout
    assert "warning: --mpp 0.4 was not used" in result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("slides: ")]
    assert lines[-1].startswith("slides: 12/12 · ")
    assert len(lines) == 11  # the first, and every tenth
    assert all("slides/s · 0:0" in line for line in lines[1:])
    document = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert document["options"]["seed"] == 0


def test_the_page_shows_names_with_any_character(tmp_path: Path) -> None:
    names = ["S-12#3", "20% ki67", "really?", "a%41b", "it's <b>"]
    for k, name in enumerate(names):
        write_pyramid(tmp_path / "s" / f"{name}.tif", tissue(k), mpp=0.5) if (tmp_path / "s").exists() else write_slide(
            tmp_path / "s" / f"{name}.tif", k
        )
    build_manifest(tmp_path / "s", tmp_path / "out", held_out=4)
    from html.parser import HTMLParser
    from urllib.parse import unquote

    images: list[dict[str, str | None]] = []

    class Page(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            if tag == "img":
                images.append(dict(attrs))

    folder = tmp_path / "out" / "manifest"
    page = (folder / "index.html").read_text()
    Page().feed(page)
    assert len(images) == len(names)
    for image in images:
        assert (folder / unquote(str(image["src"]))).is_file()
        assert str(image["alt"]).endswith(": the slide, and its tissue")
        assert int(str(image["width"])) > int(str(image["height"])) > 0
    for part in ("name='viewport'", "prefers-color-scheme: dark", 'type="search"', "<b>it&#x27;s &lt;b&gt;.tif</b>"):
        assert part in page
