from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import openslide
import pytest
from PIL import Image

from fmtrain.slides import synthetic
from fmtrain.slides.synthetic import BACKGROUND, CLASSES, draw, write_slides


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_slides(tmp_path_factory.mktemp("slides"), count=4, size_px=1536, mpp=0.5, seed=3)


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "labels.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_openslide_reads_mpp_levels_and_the_very_pixels(slides: list[Path]) -> None:
    with openslide.OpenSlide(slides[0]) as slide:
        assert float(slide.properties[openslide.PROPERTY_NAME_MPP_X]) == pytest.approx(0.5)
        assert slide.level_dimensions == ((1536, 1536), (384, 384))
        pixels = np.asarray(slide.read_region((0, 0), 0, (1536, 1536)).convert("RGB")).astype(int)
    drawn = draw(size_px=1536, mpp=0.5, seed=3 * 100_003, site=0).pixels.astype(int)
    # JPEG at quality 88 with halved chroma: a few gray levels on average, never another image.
    assert np.abs(pixels - drawn).mean() < 6


def test_every_class_is_known_somewhere_and_the_map_has_background(slides: list[Path]) -> None:
    assert {row["label"] for row in rows_of(slides[0].parent)} == set(CLASSES)
    kinds = set(np.unique(draw(size_px=1536, mpp=0.5, seed=0).classes).tolist())
    assert kinds == {*range(len(CLASSES)), BACKGROUND}


def test_labels_say_what_the_pixels_show(slides: list[Path]) -> None:
    darkness: dict[str, list[float]] = {name: [] for name in CLASSES}
    nuclei: dict[str, list[int]] = {name: [] for name in CLASSES}
    for row in rows_of(slides[0].parent):
        x, y, size = int(row["x"]), int(row["y"]), int(row["size"])
        with openslide.OpenSlide(slides[0].parent / row["file"]) as slide:
            red = np.asarray(slide.read_region((x, y), 0, (size, size)))[..., 0]  # hematoxylin absorbs red
        darkness[row["label"]].append(float((red < 120).mean()))
        nuclei[row["label"]].append(int(row["n_nuclei"]))
    share = {name: np.mean(values) for name, values in darkness.items()}
    count = {name: np.mean(values) for name, values in nuclei.items()}
    assert min(share["tumour"], share["lymphocytes"]) > 3 * max(share["stroma"], share["fat"], share["necrosis"])
    assert count["lymphocytes"] > count["tumour"] > count["necrosis"] > count["stroma"] > count["fat"]


def test_same_seed_same_pixels_other_seed_other_slide_other_site_other_stain() -> None:
    first = draw(size_px=512, mpp=0.5, seed=1)
    np.testing.assert_array_equal(first.pixels, draw(size_px=512, mpp=0.5, seed=1).pixels)
    assert (first.pixels != draw(size_px=512, mpp=0.5, seed=2).pixels).mean() > 0.5
    other_site = draw(size_px=512, mpp=0.5, seed=1, site=1)
    np.testing.assert_array_equal(first.classes, other_site.classes)
    np.testing.assert_array_equal(first.nuclei, other_site.nuclei)
    tissue = np.asarray(Image.fromarray(first.classes).resize((512, 512), Image.Resampling.NEAREST)) != BACKGROUND
    shift = np.abs(first.pixels[tissue].mean(0) - other_site.pixels[tissue].mean(0))
    assert shift.max() > 4  # gray levels: far beyond the grain, which averages out over the slide


def test_names_are_barcodes_and_some_patients_have_two_slides(slides: list[Path]) -> None:
    patients = [path.name[:12] for path in slides]
    assert all(name.startswith("TCGA-") for name in patients)
    assert len(set(patients)) == 3
    assert {row["patient"] for row in rows_of(slides[0].parent)} == set(patients)
    assert len(synthetic._barcodes(50)) == len(set(synthetic._barcodes(50))) == 50


def test_progress_is_reported_and_no_partial_file_remains(tmp_path: Path) -> None:
    finished: list[Path] = []
    paths = write_slides(tmp_path, count=2, size_px=256, mpp=1.0, seed=0, on_slide=finished.append)
    assert finished == paths
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize("change", [{"count": 0}, {"size_px": 255}, {"mpp": 0.0}, {"mpp": float("nan")}])
def test_nonsense_is_refused(tmp_path: Path, change: dict[str, float]) -> None:
    arguments = {"count": 1, "size_px": 256, "mpp": 0.5, "seed": 0} | change
    with pytest.raises(ValueError, match="count must be"):
        write_slides(tmp_path, **arguments)  # type: ignore[arg-type]
