"""CoNSeP in a small copy of its published layout, a head on frozen tokens, and Dice against NumPy."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat
from timm.models.vision_transformer import VisionTransformer

from fmtrain import cli
from fmtrain.evaluation.consep import consep, read_tile
from fmtrain.evaluation.segmentation import dice_loss, dice_score, predict, tokens, train_decoder
from repmetrics.encoders.checkpoint import load_encoder

TINY = {"img_size": 64, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 1}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    torch.save(VisionTransformer(**TINY, num_classes=0).state_dict(), tmp_path / "model.pth")
    return tmp_path / "model.pth"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """41 tiles of one patch: squares of a color per type, 1 … 7, on background."""
    root, rng = tmp_path_factory.mktemp("CoNSeP"), np.random.default_rng(0)
    for folder, count in (("Train", 27), ("Test", 14)):
        (root / folder / "Images").mkdir(parents=True)
        (root / folder / "Labels").mkdir()
        for number in range(1, count + 1):
            types = np.zeros((250, 250), np.float64)
            for _ in range(3):
                y, x = rng.integers(0, 150, 2)
                types[y : y + 100, x : x + 100] = rng.integers(1, 8)
            colors = np.array([[240] * 3, [40] * 3, [250, 0, 0], *[[0, 250, 0]] * 2, *[[0, 0, 250]] * 3], np.uint8)
            name = f"{folder.lower()}_{number}"
            Image.fromarray(colors[types.astype(int)]).save(root / folder / "Images" / f"{name}.png")
            savemat(root / folder / "Labels" / f"{name}.mat", {"type_map": types, "inst_map": types})
    return root


def test_types_become_evas_classes_pixel_for_pixel(data: Path):
    splits = consep(data)
    assert [len(split.images) for split in splits.values()] == [27, 14]
    assert splits["val"].tiles[0] == "test_1"
    for split in splits.values():
        red, green, blue = (split.images[:, channel] > 200 for channel in range(3))
        expected = torch.zeros_like(split.masks)
        expected[(split.images == 40).all(1)] = 1
        expected[red & ~green] = 2
        expected[green & ~red] = 3
        expected[blue & ~red & ~green] = 4
        assert torch.equal(expected, split.masks)


def numpy_dice(predicted: np.ndarray, target: np.ndarray, classes: int) -> float:
    images = []
    for p, t in zip(predicted, target, strict=True):
        kept = []
        for k in range(1, classes):
            a, b = set(zip(*np.nonzero(p == k), strict=True)), set(zip(*np.nonzero(t == k), strict=True))
            if b:
                kept.append(2 * len(a & b) / (len(a) + len(b)))
        if kept:
            images.append(np.mean(kept))
    return float(np.mean(images))


def test_dice_by_sets_of_pixels():
    rng = np.random.default_rng(1)
    predicted, target = rng.integers(0, 5, (2, 6, 9, 7))
    target[2] = 0  # only background: left out
    target[3][target[3] == 4] = 1
    score = dice_score(torch.from_numpy(predicted), torch.from_numpy(target), classes=5)
    assert score == pytest.approx(numpy_dice(predicted, target, 5), abs=1e-12)


def test_the_loss_is_one_minus_soft_dice():
    logits = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    target = torch.randint(0, 3, (2, 4, 5), generator=torch.Generator().manual_seed(1))
    p = np.exp(logits.numpy()) / np.exp(logits.numpy()).sum(1, keepdims=True)
    scores = [
        (2 * p[b, k][target[b] == k].sum() + 1e-5) / (p[b, k].sum() + (target[b] == k).sum().item() + 1e-5)
        for b in range(2)
        for k in range(3)
    ]
    assert float(dice_loss(logits, target)) == pytest.approx(1 - np.mean(scores), abs=1e-6)


def test_tokens_are_the_models_in_grid_order(checkpoint: Path):
    encoder = load_encoder(checkpoint)
    images = torch.full((1, 3, 64, 64), 128, dtype=torch.uint8)
    images[:, :, 16:24, 40:48] = 0  # row 2, column 5 of the grid
    plain = tokens(encoder, torch.full_like(images, 128))
    features = tokens(encoder, images)
    assert features.shape == (1, 64, 8, 8)
    moved = (features - plain).float().norm(dim=1)[0]
    assert divmod(int(moved.argmax()), 8) == (2, 5)


@pytest.mark.slow
def test_the_head_learns_from_the_tokens(data: Path, checkpoint: Path):
    encoder = load_encoder(checkpoint)
    splits = consep(data)
    features = {name: tokens(encoder, split.images) for name, split in splits.items()}
    masks = {name: split.masks[:, ::5, ::5] for name, split in splits.items()}  # small, for speed

    def score(train: torch.Tensor) -> float:
        decoder = train_decoder(train, masks["train"], classes=5, seed=0, steps=80)
        return dice_score(predict(decoder, features["val"], masks["val"]), masks["val"], classes=5)

    assert score(features["train"]) > 0.8
    assert score(features["train"].roll(1, 0)) < 0.5  # tokens of other images than the masks'


@pytest.mark.slow
def test_the_command_prints_dice_of_every_run(data: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["evaluate", str(checkpoint), "--task", "consep", "--data", str(data), "--runs", "2",
                  "--max-steps", "2", "--json"])  # fmt: skip
    assert stopped.value.code in (0, None)
    result = json.loads(capsys.readouterr().out)
    assert result["metric"] == "Dice"
    assert result["rows"] == {"train": 27, "val": 14}
    assert len(result["runs"][0]["values"]) == 2
    assert all(0 <= value <= 1 for value in result["runs"][0]["values"])


def test_another_layout_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"is not CoNSeP: expected Train/Images"):
        consep(tmp_path)
    (tmp_path / "Train" / "Images").mkdir(parents=True)
    Image.new("RGB", (250, 250)).save(tmp_path / "Train" / "Images" / "train_1.png")
    with pytest.raises(ValueError, match="27 tiles in Train, found 1"):
        consep(tmp_path)


@pytest.mark.parametrize(
    ("types", "message"),
    [
        (None, "is missing"),
        ({"inst_map": np.zeros((250, 250))}, "has no type_map"),
        ({"type_map": np.zeros((250, 9))}, "its tile"),
        ({"type_map": np.full((250, 250), 9)}, "CoNSeP has 0 to 7"),
        ({"type_map": np.full((250, 250), np.nan)}, "CoNSeP has 0 to 7"),
        (b"MATLAB 5.0 MAT-file, cut short", "not a MATLAB file"),
    ],
)
def test_labels_that_do_not_fit_are_refused(tmp_path: Path, types: object, message: str):
    Image.new("RGB", (250, 250)).save(tmp_path / "a.png")
    if isinstance(types, bytes):
        (tmp_path / "a.mat").write_bytes(types)
    elif types is not None:
        savemat(tmp_path / "a.mat", types)
    with pytest.raises(ValueError, match=message):
        read_tile(tmp_path / "a.png", tmp_path / "a.mat")


def test_a_tile_smaller_than_a_patch_is_refused(tmp_path: Path):
    Image.new("RGB", (300, 200)).save(tmp_path / "a.png")
    savemat(tmp_path / "a.mat", {"type_map": np.zeros((200, 300))})
    with pytest.raises(ValueError, match="300 × 200: smaller than a patch of 250"):
        read_tile(tmp_path / "a.png", tmp_path / "a.mat")


def test_an_encoder_without_tokens_is_refused(tmp_path: Path):
    import timm

    torch.save(timm.create_model("resnet18", num_classes=0).state_dict(), tmp_path / "resnet.pth")
    encoder = load_encoder(tmp_path / "resnet.pth", arch="resnet18")
    with pytest.raises(ValueError, match="has no patch tokens"):
        tokens(encoder, torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
