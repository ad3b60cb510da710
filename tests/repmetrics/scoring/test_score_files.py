from __future__ import annotations

import json
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from PIL import Image
from timm.models.vision_transformer import VisionTransformer

from repmetrics.cli import main
from repmetrics.scoring.score_files import _portable


def write_checkpoints_and_images(checkpoints: Path, images: Path) -> None:
    """Two checkpoints and a broken one; 40 images, of which one is broken."""
    checkpoints.mkdir()
    images.mkdir()
    for k in range(2):
        torch.manual_seed(k)
        model = VisionTransformer(img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=1, num_classes=0)
        torch.save({"model": model.state_dict(), "step": k}, checkpoints / f"{k}.pt")
    (checkpoints / "broken.pt").write_bytes(b"PK\x03\x04 no more")
    for k in range(40):
        pixels = np.random.default_rng(k).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(images / f"{k:02}.png")
    (images / "33.png").write_text("no image")


def test_scores_and_features_are_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints, images = tmp_path / "runs", tmp_path / "images"
    write_checkpoints_and_images(checkpoints, images)
    # Starts sooner than processes; one thread, for random views use torch's generator, which a process has once.
    monkeypatch.setattr("repmetrics.executor.Processes", lambda count: ThreadPoolExecutor(1))
    where = ["--processes", "2"]
    common = ["--data", str(images), "--no-cache", "--json", "--metrics", "rankme,alignment", "--views", "2"]
    common += ["--batch-size", "2"]  # so that 40 images are two parts

    def score(*arguments: str) -> tuple[dict[str, Any], str]:
        with pytest.raises(SystemExit):
            main(["score", *arguments, *common])
        out, err = capsys.readouterr()
        rows = json.loads(out)
        for row in rows["scores"]:
            for key in ("seconds", "images_per_second"):
                row.pop(key)
        return rows, err

    for k, arguments in enumerate(([str(checkpoints)], [str(checkpoints / "0.pt"), "--features-out"])):
        out = [[str(tmp_path / f"features-{n}")] if k else [] for n in range(2)]
        here, there = score(*arguments, *out[0]), score(*arguments, *out[1], *where)
        assert json.dumps(there[0]).replace("features-1", "features-0") == json.dumps(here[0])
        assert ("skipped" in here[1]) == ("skipped" in there[1]) == (k == 0)
    values = [h5py.File(tmp_path / f"features-{n}" / "features.h5")["features"][:] for n in range(2)]
    assert values[0].tobytes() == values[1].tobytes()


def test_an_error_that_does_not_pickle_is_its_text() -> None:
    class OddError(ValueError):
        def __init__(self, first: str, second: str) -> None:
            super().__init__(f"{first} and {second}")

    assert str(_portable(OddError("a", "b"))) == "a and b"
    assert pickle.loads(pickle.dumps(_portable(FileNotFoundError(2, "gone", "x.pt")))).filename == "x.pt"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["a.npy", "--gpus", "2"], "take checkpoints and --data"),
        (["a.pt", "--data", ".", "--gpus", "2", "--dask", "tcp://a:1"], "exclude each other"),
        (["a.pt", "--data", ".", "--gpus", "2", "--device", "cpu"], "leave --device cpu out"),
        (["runs", "--data", ".", "--gpus", "2", "--watch"], "scores one checkpoint at a time"),
    ],
)
def test_wrong_usage_is_refused(arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["score", *arguments])
    assert (stop.value.code, text in " ".join(capsys.readouterr().err.split())) == (2, True)
