"""Several sources of patches: weights, the right pixels, resume, and refusals."""

from __future__ import annotations

import pickle
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from coded_slides import coded, decode, write_coded
from fit_runs import SMALL, call, equal
from PIL import Image
from small_runs import LIGHTNING_NOISE

from fmtrain.patches.dataset import TooManyFailedSlidesError, TrainingPatches
from fmtrain.patches.options import PatchOptions
from fmtrain.patches.sources import PatchMixture, SourceOptions, coordinate_patches, tile_patches
from fmtrain.training.datamodule import SlideDataModule

pytestmark = [
    *(pytest.mark.filterwarnings(line) for line in LIGHTNING_NOISE),
    pytest.mark.filterwarnings("ignore:.*args parameter is intended to run.*"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:lightning"),
    pytest.mark.filterwarnings("ignore:sources. the tiles in"),
]
OPTIONS = PatchOptions(size_px=32, seed=3)


def read(patches: Any, indices: list[int]) -> np.ndarray:
    out = np.empty((len(indices), 32, 32, 3), np.uint8)
    patches.read_into(indices, out)
    return out


def write_tiles(folder: Path, count: int = 6, side: int = 48) -> Path:
    folder.mkdir()
    for number in range(count):
        pixels = coded(side, side)
        pixels[..., 2] = 20 * number
        Image.fromarray(pixels).save(folder / f"tile{number}.png")
    return folder


def test_a_tile_is_a_crop_at_a_random_place_and_a_function_of_the_index(tmp_path: Path) -> None:
    patches = tile_patches(write_tiles(tmp_path / "tiles"), OPTIONS)
    pixels = read(patches, list(range(200)))
    for patch, index in zip(pixels, range(200), strict=True):
        x, y = int(patch[0, 0, 0]), int(patch[0, 0, 1])
        np.testing.assert_array_equal(patch[..., :2], coded(48, 48)[y : y + 32, x : x + 32, :2])
        assert patches.name_of(index) == f"tile{patch[0, 0, 2] // 20}.png"
    corners = {(int(p[0, 0, 0]), int(p[0, 0, 1])) for p in pixels}
    assert {x for x, _ in corners} == set(range(17)) == {y for _, y in corners}
    np.testing.assert_array_equal(read(pickle.loads(pickle.dumps(patches)), [7, 150]), pixels[[7, 150]])


def test_a_tile_that_cannot_be_read_is_left_out_and_many_stop_the_run(tmp_path: Path) -> None:
    folder = write_tiles(tmp_path / "tiles", count=12)
    (folder / "tile3.png").write_bytes(b"no image")
    patches = tile_patches(folder, OPTIONS)
    tiles = {int(patch[0, 0, 2]) for patch in read(patches, list(range(300)))}
    assert tiles == {20 * k for k in range(12) if k != 3}
    for number in (5, 7):
        Image.new("RGB", (8, 8)).save(folder / f"tile{number}.png")
    with pytest.raises(TooManyFailedSlidesError, match=r"2 of 12 tiles failed, more than 10%|3 of 12 tiles failed"):
        read(tile_patches(folder, OPTIONS), list(range(300)))
    with pytest.raises(ValueError, match="holds no tiles"):
        tile_patches(tmp_path / "empty", OPTIONS)


@pytest.mark.parametrize("tool", ["trident", "clam"])
def test_coordinates_are_read_where_they_say(tool: str, tmp_path: Path) -> None:
    (tmp_path / "slides").mkdir()
    (tmp_path / "coords").mkdir()
    write_coded(tmp_path / "slides" / "a.svs", [(1024, 1024), (512, 512)])
    corners = np.array([[64, 128], [300, 17], [901, 640]])
    side = 64 if tool == "trident" else 32
    name = "a_patches.h5" if tool == "trident" else "a.h5"
    with h5py.File(tmp_path / "coords" / name, "w") as file:
        coords = file.create_dataset("coords", data=corners)
        attributes = {"patch_size_level0": 64} if tool == "trident" else {"patch_size": 32, "patch_level": 0}
        coords.attrs.update(attributes)
    patches = coordinate_patches(tmp_path / "coords", tmp_path / "slides", OPTIONS)
    counts: Counter[tuple[int, int]] = Counter()
    for patch in read(patches, list(range(60))):
        x, y, level = decode(patch)
        scale = side // 32  # 64 px at level 0 are 32 px at level 1
        assert set(level.ravel()) == {scale - 1}
        corner = int(x[0, 0]) * scale, int(y[0, 0]) * scale
        match = corners[np.abs(corners - corner).max(1) <= scale]
        assert len(match) == 1, corner
        counts[tuple(match[0].tolist())] += 1
        np.testing.assert_array_equal(x[0], x[0, 0] + np.arange(32))
    assert len(counts) == 3
    with pytest.raises(ValueError, match="name the folder of their slides"):
        coordinate_patches(tmp_path / "coords", None, OPTIONS)


def test_a_mixture_has_the_weights_and_keeps_held_out_patients_out(manifest: Path, tmp_path: Path) -> None:
    folder = write_tiles(tmp_path / "tiles")
    main = TrainingPatches(manifest, size_px=32, seed=3)
    mixture = PatchMixture(main, [SourceOptions(path=folder, weight=3.0)], weight=1.0, options={})
    drawn = np.array([mixture.source_of(index) for index in range(2000)])
    assert drawn.mean() == pytest.approx(0.75, abs=0.03)  # three standard errors
    indices = list(range(12))
    pixels = read(mixture, indices)
    for index, patch in zip(indices, pixels, strict=True):
        np.testing.assert_array_equal(patch, read(mixture.sources[mixture.source_of(index)], [index])[0])
        assert (mixture.name_of(index) or "").startswith("tile") == (mixture.source_of(index) == 1)
    data = SlideDataModule(manifest, size_px=32, batch_size=4, seed=3, sources=[SourceOptions(path=folder)])
    with pytest.warns(UserWarning, match="have no patients, so held-out patients cannot be left out"):
        data.check(world_size=1)
    with pytest.raises(ValueError, match="all weights are 0"):
        PatchMixture(main, [SourceOptions(path=folder, weight=0.0)], weight=0.0, options={})
    with pytest.raises(ValueError, match="neither a manifest nor a folder"):
        PatchMixture(main, [SourceOptions(path=tmp_path / "absent")], weight=1.0, options={})


def test_a_source_may_not_show_held_out_slides_under_any_name(manifest: Path, tmp_path: Path) -> None:
    main = TrainingPatches(manifest, size_px=32, seed=3)
    held_out, train = (main.manifest.slides_in(side)[0].path for side in ("held_out", "train"))
    for path, refused in ((held_out, True), (train, False)):
        coordinates, slides = tmp_path / f"{refused}", tmp_path / f"{refused}_slides"
        coordinates.mkdir()
        slides.mkdir()
        shutil.copy(path, slides / "x.tiff")
        with h5py.File(coordinates / "x.h5", "w") as file:
            file.create_dataset("coords", data=np.array([[64, 128]])).attrs["patch_size_level0"] = 64
        source = [SourceOptions(path=coordinates, slides=slides)]
        if refused:
            with pytest.raises(ValueError, match=r"has 1 slides of held-out patients, such as x\.tiff"):
                PatchMixture(main, source, weight=1.0, options={})
        else:
            PatchMixture(main, source, weight=1.0, options={})
            shutil.copy(path, slides / "x.tif")
            with pytest.raises(ValueError, match=r"x\.h5 has 2 slides in .*: expected one x\.\*"):
                PatchMixture(main, source, weight=1.0, options={})


def test_a_run_with_sources_resumes_exactly(manifest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, folder = tmp_path / "small.yaml", write_tiles(tmp_path / "tiles")
    data = f"data: {{size_px: 40, batch_size: 8, sources: [{{path: {folder}, weight: 1.0}}]}}"
    lines = [data if line.startswith("data:") else line for line in SMALL.splitlines()]
    config.write_text("\n".join(lines).replace("every_n_steps: 3", "every_n_steps: 100, metrics: [rankme]"))
    common: list[Any] = ["fit", "--config", config, "--data.manifest", manifest, "--trainer.max_steps", 4]
    assert call(*common, "--out", tmp_path / "one") == 0
    states = {}
    (tmp_path / "two").mkdir()
    for name in ("config.yaml", "checkpoints"):
        source = tmp_path / "one" / name
        if source.is_dir():
            (tmp_path / "two" / name).mkdir()
            step = tmp_path / "two" / name / "step-00000002.ckpt"
            step.write_bytes((source / "step-00000002.ckpt").read_bytes())
        else:
            (tmp_path / "two" / name).write_text(source.read_text())
    assert call(*common, "--out", tmp_path / "two", "--resume") == 0
    for run in ("one", "two"):
        states[run] = torch.load(tmp_path / run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert equal(dict(states["one"]), dict(states["two"]))
    (folder / "tile0.png").unlink()
    assert call(*common, "--out", tmp_path / "two", "--resume", "--trainer.max_steps", 6) == 1
    assert "the files or weights of data.sources changed" in capsys.readouterr().err
