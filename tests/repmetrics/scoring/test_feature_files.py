"""Features that `score` writes, and its progress."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch.utils.data import Dataset

from repmetrics import progress
from repmetrics.data.open import open_data
from repmetrics.data.source import Items, Source, Unreadable
from repmetrics.scoring import embed
from repmetrics.scoring.score import Score, score_checkpoint, score_embeddings
from repmetrics.scoring.settings import EmbedSettings

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 1, "num_heads": 1}
PATCHES, BROKEN = 90, 7


class Patches(Dataset[Any]):
    """Patches of nine slides in turn, of three patients; one is broken."""

    def __len__(self) -> int:
        return PATCHES

    def __getitem__(self, index: int) -> Any:
        if index == BROKEN:
            return Unreadable("broken", "no image")
        pixels = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(index))
        return {"image": pixels, "group": f"P{index % 9 // 3}", "label": index % 9 % 2}


def slides() -> Source:
    items = Items(
        ids=[f"patch {k}" for k in range(PATCHES)],
        slides=[f"{k % 9}.svs" for k in range(PATCHES)],
        coordinates=[(100 * k, 7 * k) for k in range(PATCHES)],
        mpp=[0.5] * PATCHES,
    )
    return Source(
        Path("manifest.json"), "slides manifest", images=Patches(), classes=("normal", "tumor"), items=items,
        fingerprint=lambda: "1",
    )  # fmt: skip


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return save(tmp_path / "a.pth", seed=0)


def save(path: Path, *, seed: int) -> Path:
    torch.manual_seed(seed)
    torch.save(VisionTransformer(**TINY, num_classes=0).state_dict(), path)
    return path


def run(file: Path, source: Source, out: Path | None, **settings: Any) -> Score:
    options = EmbedSettings(batch_size=16, **settings)
    return score_checkpoint(file, source, overrides={}, metrics=["rankme"], settings=options, features_out=out)


def test_each_slide_is_a_file_that_is_scored_to_the_same_numbers(tmp_path: Path, checkpoint: Path) -> None:
    out = tmp_path / "out"
    direct = run(checkpoint, slides(), out)
    assert sorted(path.name for path in out.iterdir()) == [f"{k}.h5" for k in range(9)]
    assert f"features written to {out}: 9 files of HDF5" in direct.notes
    with h5py.File(out / "7.h5") as file:
        assert file["ids"].asstr()[:2].tolist() == ["patch 16", "patch 25"]
        assert file["coords"][:2].tolist() == [[1600, 112], [2500, 175]]
        assert set(file["group"].asstr()[()]) == {"P2"}
        assert set(file["label"].asstr()[()]) == {"tumor"}
        assert file["features"].shape == (9, 64)
        assert file.attrs["checkpoint"] == "a.pth"
    again = score_embeddings(out, labels=None, groups=None, metrics=["rankme"], settings=EmbedSettings())
    assert again.classes == direct.classes
    expected = direct.measurements["rankme"]
    for name in ("value", "standard_error"):
        assert getattr(again.measurements["rankme"], name) == pytest.approx(getattr(expected, name), rel=1e-6)
    assert again.measurements["rankme"].groups == 3
    assert open_data(out, groups="folder").features.groups[0] == "0"


def test_images_are_one_file(tmp_path: Path, checkpoint: Path) -> None:
    source = slides()
    images = Source(source.path, "image folder", images=source.images, classes=source.classes)
    run(checkpoint, images, tmp_path / "out")
    read = open_data(tmp_path / "out" / "features.h5")
    assert read.features.values.shape == (PATCHES - 1, 64)
    assert read.classes == source.classes
    with h5py.File(tmp_path / "out" / "features.h5") as file:
        assert file["ids"].asstr()[6:8].tolist() == ["6", "8"]


def test_the_features_of_another_encoder_are_kept(tmp_path: Path, checkpoint: Path) -> None:
    out, other = tmp_path / "out", save(tmp_path / "b.pth", seed=1)
    run(checkpoint, slides(), out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embed, "embed", pytest.fail)  # refused before any work
        for file, settings in ((other, {}), (checkpoint, {"image_size": 40})):
            source = slides() if not settings else Source(**{**vars(slides()), "resize": True})
            with pytest.raises(ValueError, match=r"0\.h5 has features of another encoder"):
                run(file, source, out, **settings)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_an_interrupted_run_continues(tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embed, "PART_BATCHES", 2)
    expected = run(checkpoint, slides(), tmp_path / "whole")
    seen: list[int] = []
    original = embed.embed

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        seen.append(1)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(embed, "embed", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(checkpoint, slides(), tmp_path / "out", cache=tmp_path / "cache")
    assert not (tmp_path / "out").exists()
    result = run(checkpoint, slides(), tmp_path / "out", cache=tmp_path / "cache")
    assert len(seen) == 4  # two parts, the interrupted one, and the last one
    assert result.measurements == expected.measurements
    assert result.unreadable == expected.unreadable
    for path in (tmp_path / "whole").iterdir():
        with h5py.File(path) as first, h5py.File(tmp_path / "out" / path.name) as second:
            assert np.array_equal(first["features"], second["features"])
            assert first["ids"].asstr()[()].tolist() == second["ids"].asstr()[()].tolist()


def test_where_there_is_no_terminal_a_line_tells_rate_and_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    seconds = iter([0.0, 10.0, 10.0, 40.0, 40.0, 40.0, 50.0, 50.0, 50.0])
    with progress.progress("embedding x", total=1000, clock=lambda: next(seconds)) as meter:
        for _ in range(2):
            meter.advance(100)
        meter.skip(500)
        meter.advance(100)
    assert capsys.readouterr().err == "embedding x: 200/1000 · 3.33 images/s · 4:00 left\n"
    assert str(meter) == "800/1000 · 5 images/s · 0:40 left"
