from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fmtrain.slides.given_masks import given_mask, mask_errors
from fmtrain.slides.ink import not_bright_field
from fmtrain.slides.inspection import inspect_slide
from fmtrain.slides.slide import Slide
from fmtrain.slides.synthetic import BACKGROUND, COARSE, draw
from fmtrain.slides.tiles import SlideError
from fmtrain.slides.tissue import (
    CELL_UM,
    EligibleCells,
    load_mask,
    otsu,
    save_mask,
    separability,
    stained_share,
    tissue_mask,
)

PINK, GLASS = (200, 120, 180), 240


def glass(height: int = 100, width: int = 120) -> np.ndarray:
    return np.full((height, width, 3), GLASS, np.uint8)


def test_blank_slides_of_any_tint_contain_no_tissue() -> None:
    rng = np.random.default_rng(0)
    for tint in ((240, 240, 240), (244, 240, 238), (255, 255, 255), (10, 10, 10)):
        noisy = np.clip(np.array(tint) + rng.normal(0, 1, (100, 120, 3)), 0, 255).astype(np.uint8)
        if tint[0] > 10:  # black noise is saturated by chance, and too dark to matter
            assert not tissue_mask(noisy).any()


def test_a_slide_full_of_tissue_is_not_split_in_two() -> None:
    rng = np.random.default_rng(0)
    full = np.where(rng.random((100, 120, 1)) < 0.5, (120, 60, 140), (220, 160, 200)).astype(np.uint8)
    assert tissue_mask(full).all()


def test_pens_specks_and_glass_are_removed_and_gaps_closed() -> None:
    thumbnail = glass()
    thumbnail[20:60, 20:60] = PINK
    thumbnail[30:34, 30:34] = GLASS  # a lumen of 32 µm
    thumbnail[80:90, 80:110] = (30, 60, 200)  # a blue pen
    thumbnail[5:15, 80:110] = (40, 180, 60)  # a green pen
    thumbnail[95, 5] = PINK  # dust
    mask = tissue_mask(thumbnail)
    expected = np.zeros((50, 60), bool)
    expected[10:30, 10:30] = True
    np.testing.assert_array_equal(mask, expected)


STAINS = {
    "hematoxylin and eosin": (190, 110, 170),
    "Alcian blue": (120, 180, 205),
    "Giemsa": (110, 120, 190),
    "Luxol fast blue": (70, 140, 190),
    "light green": (110, 180, 140),
    "Masson": (80, 120, 170),
    "PAS": (190, 90, 160),
    "DAB": (150, 110, 80),
    "silver": (110, 95, 80),
}


def drawn(color: tuple[int, ...], around: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """A disc of stained tissue on a plain surround, and its cells."""
    rng, n = np.random.default_rng(0), 200
    y, x = np.mgrid[:n, :n]
    disc = np.hypot(y - n / 2, x - n / 2) < n / 4
    tissue, plain = np.array(color) + rng.normal(0, 12, (n, n, 3)), np.array(around) + rng.normal(0, 1, (n, n, 3))
    picture = np.clip(np.where(disc[..., None], tissue, plain), 0, 255).astype(np.uint8)
    return picture, disc.reshape(n // 2, 2, n // 2, 2).mean((1, 3)) >= 0.5


@pytest.mark.parametrize("stain", STAINS)
def test_stains_of_every_hue_are_tissue_on_white_and_tinted_glass_and_in_the_dark(stain: str) -> None:
    for around in ((243, 242, 244), (235, 225, 205), (215, 225, 235), (0, 0, 0), (12, 10, 16)):
        picture, truth = drawn(STAINS[stain], around)
        mask = tissue_mask(picture)
        overlap = (mask & truth).sum() / (mask | truth).sum()
        assert overlap > (0.85 if sum(around) < 100 else 0.95), around  # noise darkens single pixels in the dark
        assert separability(picture, mask) > 0.3


@pytest.mark.parametrize("tint", [(235, 225, 205), (215, 225, 235), (225, 210, 230), (240, 235, 215), (250, 250, 250)])
def test_blank_tinted_glass_is_no_tissue(tint: tuple[int, ...]) -> None:
    picture = np.clip(np.array(tint) + np.random.default_rng(0).normal(0, 1.5, (100, 120, 3)), 0, 255)
    assert not tissue_mask(picture.astype(np.uint8)).any()
    assert np.isnan(separability(picture.astype(np.uint8), np.zeros((50, 60), bool)))


@pytest.mark.parametrize(
    "ink",
    [
        (120, 20, 160),
        (230, 30, 150),
        (30, 130, 70),
        (120, 170, 230),
        (30, 60, 160),
        (25, 40, 90),
        (20, 25, 110),
        (35, 35, 40),
        (50, 45, 60),
        (200, 30, 40),
    ],
)
def test_pens_of_every_color_are_removed_beside_tissue(ink: tuple[int, ...]) -> None:
    picture, truth = drawn(STAINS["hematoxylin and eosin"], (243, 242, 244))
    stroke = np.random.default_rng(1).normal(0, 3, (30, 180, 3)) + ink
    picture[5:35, 10:190] = np.clip(stroke, 0, 255)
    mask = tissue_mask(picture)
    assert not mask[:18].any()
    assert (mask & truth).sum() > 0.98 * truth.sum()


def test_a_picture_without_light_is_no_slide() -> None:
    assert "brightest pixel is 5" in not_bright_field(np.full((4, 4, 3), 5, np.uint8))
    assert not not_bright_field(glass())


def test_masks_of_the_user_are_pictures_or_polygons(tmp_path: Path) -> None:
    size, mpp = (640, 320), 0.5  # 20 × 10 cells
    expected = np.zeros((10, 20), bool)
    expected[2:6, 5:15] = True
    expected[3:5, 8:10] = False
    fine = np.kron(expected, np.ones((4, 4), np.uint8))
    Image.fromarray(fine * 3).save(tmp_path / "labels.png")  # labels of annotators are small numbers
    Image.fromarray(np.stack([fine * 200, fine * 0, fine * 0], -1)).save(tmp_path / "rgb.png")
    box, hole = (
        [[x0, y0], [x1, y0], [x1, y1], [x0, y1], [x0, y0]]
        for x0, y0, x1, y1 in ((160, 64, 480, 192), (256, 96, 320, 160))
    )
    feature = {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [box, hole]}, "properties": {}}
    (tmp_path / "a.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": [feature]}))
    (tmp_path / "b.geojson").write_text(json.dumps([feature]))
    for name in ("labels.png", "rgb.png"):
        np.testing.assert_array_equal(given_mask(tmp_path / name, size=size, mpp=mpp), expected)
    for name in ("a.geojson", "b.geojson"):
        assert (given_mask(tmp_path / name, size=size, mpp=mpp) == expected).mean() > 0.97  # outlines are drawn too
    around = {"type": "Polygon", "coordinates": [[[0, 0], [640, 0], [640, 320], [0, 320]], box]}
    whole = np.ones_like(expected)
    whole[3:5, 8:10] = False
    for features in ([feature, around], [around, {"type": "Feature", "geometry": None}, feature]):
        (tmp_path / "c.geojson").write_text(json.dumps(features))  # a hole cuts into no other polygon
        assert (given_mask(tmp_path / "c.geojson", size=size, mpp=mpp) != whole).sum() <= 2
    (tmp_path / "bad.geojson").write_text("{}")
    Image.fromarray(fine[:, :40]).save(tmp_path / "narrow.png")
    (tmp_path / "text.png").write_text("no picture")
    for name, reason in (
        *(("bad.geojson", "'type'"), ("narrow.png", "40×40 pixels have not the shape of 640×320")),
        *(("text.png", "not a picture"), ("absent.png", "No such file or directory")),
    ):
        with pytest.raises(SlideError, match=rf"^a\.svs: its mask cannot be read \({reason}\)$"), mask_errors("a.svs"):
            given_mask(tmp_path / name, size=size, mpp=mpp)


def test_the_mask_finds_what_was_drawn() -> None:
    drawing = draw(size_px=2048, mpp=0.5, seed=4)
    shrunk = drawing.pixels.reshape(128, 16, 128, 16, 3).mean((1, 3)).astype(np.uint8)  # 8 µm
    truth = (drawing.classes != BACKGROUND).reshape(64, 4, 64, 4).mean((1, 3)) >= 0.5
    assert COARSE * 0.5 * 4 == CELL_UM
    mask = tissue_mask(shrunk)
    overlap = (mask & truth).sum() / (mask | truth).sum()
    assert overlap > 0.85  # wide fat at the border is glass to any mask by color


def test_real_slides_have_tissue_where_it_is(data_dir: Path) -> None:
    with Slide(path := data_dir / "tcga_mosaics" / "breast.derived.svs", inspect_slide(path)) as slide:
        mask = tissue_mask(slide.thumbnail(mpp=CELL_UM / 2))
    tiles = [(300 + 1300 * column, 300 + 1300 * row) for row in range(3) for column in range(3)][:8]  # map.csv
    truth = np.zeros((4200, 4200), bool)
    for x, y in tiles:
        truth[y : y + 1000, x : x + 1000] = True
    h, w = mask.shape
    at = truth[((np.arange(h) + 0.5) * 4200 / h).astype(int)][:, ((np.arange(w) + 0.5) * 4200 / w).astype(int)]
    assert (mask == at).mean() > 0.93  # the borders of the tiles fall within cells


def test_otsu_separates_two_groups_whatever_their_sizes() -> None:
    for few in (10, 100, 900):
        values = np.r_[np.full(few, 0.6), np.full(1000 - few, 0.1)].astype(np.float32)
        assert 0.2 < otsu(values) < 0.5


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 1000),
    extent=st.floats(20, 700),
    shape=st.tuples(st.integers(1, 30), st.integers(1, 40)),
    draws=st.lists(st.tuples(*[st.floats(0, 1, exclude_max=True)] * 3), min_size=1, max_size=10),
)
def test_every_patch_lies_inside_and_its_cell_holds_tissue(
    seed: int, extent: float, shape: tuple[int, int], draws: list[tuple[float, float, float]]
) -> None:
    mask = np.random.default_rng(seed).random(shape) < 0.6
    size = (shape[1] * 32 + 5, shape[0] * 32 - 3)
    cells = EligibleCells(mask, size=size, extent_px=extent, min_tissue=0.4)
    if extent > min(size):
        assert len(cells) == 0
    if len(cells) == 0:
        return
    cell = (size[0] / shape[1], size[1] / shape[0])
    fine = np.kron(mask, np.ones((8, 8)))
    for u, v, w in draws:
        x, y = cells.location(u, v, w)
        assert 0 <= x <= size[0] - extent + 1e-9
        assert 0 <= y <= size[1] - extent + 1e-9
    for column, row in cells.within(0, 0, *size):
        assert mask[row, column]
        # Brute force: the share of tissue in a patch centered on the cell, on a grid eight times finer.
        corner = [
            np.clip((k + 0.5) * c - extent / 2, 0, s - extent)
            for k, c, s in zip((column, row), cell, size, strict=True)
        ]
        ys, xs = ((np.arange(200) + 0.5) / 200 * extent + c for c in reversed(corner))
        rows = np.clip((ys / cell[1] * 8).astype(int), 0, fine.shape[0] - 1)
        columns = np.clip((xs / cell[0] * 8).astype(int), 0, fine.shape[1] - 1)
        assert fine[np.ix_(rows, columns)].mean() >= 0.4 - 0.05
    assert len(cells.within(0, 0, *size)) == len(cells)


def test_cells_are_drawn_evenly_and_tightly_packed_masks_are_read_back_right() -> None:
    mask = np.zeros((20, 37), bool)
    mask[3:9, 5:30] = True
    cells = EligibleCells(mask, size=(370, 200), extent_px=10, min_tissue=0.4)
    np.testing.assert_array_equal(
        np.sort(cells.within(0, 0, 370, 200), axis=0), np.sort(np.argwhere(mask)[:, ::-1], axis=0)
    )
    hits = np.zeros_like(mask, int)
    n = len(cells)
    for k in range(n):
        x, y = cells.location((k + 0.5) / n, 0.5, 0.5)
        hits[(y + 5) // 10, (x + 5) // 10] += 1
    np.testing.assert_array_equal(hits, mask.astype(int))


def test_patches_are_as_dense_at_the_border_as_inside() -> None:
    cells = EligibleCells(np.ones((70, 60), bool), size=(1915, 2230), extent_px=250.0)
    u = np.random.default_rng(0).random((20_000, 3))
    places = np.array([cells.location(*row) for row in u])
    for axis, last in enumerate((1915 - 250, 2230 - 250)):
        counts, _ = np.histogram(places[:, axis], bins=20, range=(0, last))
        assert np.abs(counts / 1000 - 1).max() < 0.15  # five standard deviations of a count of 1000
    earlier = EligibleCells(np.ones((70, 60), bool), size=(1915, 2230), extent_px=250.0, sampling=1)
    assert [earlier.location(*row) for row in u[:3]] == [(1287, 1246), (92, 31), (1398, 1198)]  # frozen
    np.testing.assert_array_equal([cells.cell(k) for k in range(len(cells))], cells.within(0, 0, 1915, 2230))


@pytest.mark.parametrize("side", [512, 500, 256])
def test_a_slide_as_large_as_a_patch_has_one_patch(side: int) -> None:
    cells = EligibleCells(np.ones((side // 32, side // 32), bool), size=(side, side), extent_px=float(side))
    assert len(cells) >= 1
    assert cells.location(0.999, 0.5, 0.5) == (0, 0)


def test_within_finds_the_cells_of_a_rectangle_only() -> None:
    cells = EligibleCells(np.ones((10, 10), bool), size=(100, 100), extent_px=10, min_tissue=0.4)
    assert sorted(map(tuple, cells.within(20, 30, 20, 10).tolist())) == [(2, 3), (3, 3)]
    assert len(cells.within(500, 0, 10, 10)) == 0


def test_a_mask_survives_the_disk(tmp_path: Path) -> None:
    mask = np.random.default_rng(0).random((13, 29)) < 0.5
    save_mask(tmp_path / "mask.png", mask, note="of slide a")
    read, note = load_mask(tmp_path / "mask.png")
    np.testing.assert_array_equal(read, mask)
    assert note == "of slide a"
    assert [p.name for p in tmp_path.iterdir()] == ["mask.png"]


@pytest.mark.parametrize(
    ("color", "share"),
    [((200, 120, 180), 1.0), ((90, 60, 150), 1.0), ((240, 240, 240), 0.0), ((60, 200, 60), 0.0), ((60, 20, 50), 0.0)],
)
def test_the_hue_filter_detects_stained_tissue(color: tuple[int, int, int], share: float) -> None:
    assert stained_share(np.full((8, 8, 3), color, np.uint8)) == share
