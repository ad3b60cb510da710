"""Pictures of a representation: right values, fixed images, one forward pass, limits of size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from repmetrics.data.features import FeatureDict
from repmetrics.monitoring import pictures as module
from repmetrics.monitoring.monitor import Monitor
from repmetrics.monitoring.pictures import FARTHEST, MAPPED, SHOWN, THUMBNAILS, TOKEN_ROWS, TOKENS, Pictures
from repmetrics.tensorboard.sheets import map_places, sheets


def updated(pictures: Pictures, values: Tensor, *, step: int, tokens: Tensor | None = None, **ids: Any) -> Pictures:
    """Pictures after an evaluation of all rows, whose images are their number as a gray value."""
    n = len(values)
    images = (torch.arange(n) % 256).to(torch.uint8)[:, None, None, None].expand(n, 3, 48, 48)
    parts = {SHOWN: torch.ones(n, dtype=torch.bool), THUMBNAILS: images, TOKEN_ROWS: torch.zeros(n, dtype=torch.bool)}
    if tokens is not None:
        parts[TOKEN_ROWS][: len(tokens)] = True
        parts[TOKENS] = tokens
    pictures.update(FeatureDict({"": values}, **ids), parts, step=step, run="r")
    return pictures


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_neighbors_are_the_nearest_of_other_groups() -> None:
    centers = draw(10, 1, 16) * 3
    features = (centers + 0.1 * draw(10, 8, 16, seed=1)).flatten(0, 1)  # the nearest are of the same group
    groups = tuple(f"slide {row // 8}" for row in range(80))
    pictures = updated(Pictures(), features, step=0, groups=groups)
    assert len({groups[query] for query in pictures.queries}) == module.QUERIES
    unit = features.double().numpy() / np.linalg.norm(features.double().numpy(), axis=1, keepdims=True)
    for query, nearest in zip(pictures.queries, pictures.stages[0].neighbors, strict=True):
        others = [k for k in range(80) if groups[k] != groups[query]]
        expected = sorted(others, key=lambda k: -float(unit[query] @ unit[k]))[: module.NEIGHBORS]
        assert nearest.tolist() == expected


def test_without_groups_only_the_image_itself_is_left_out() -> None:
    features = draw(30, 8)
    pictures = updated(Pictures(), features, step=0)
    query, nearest = int(pictures.queries[2]), pictures.stages[0].neighbors[2]
    cosine = nn.functional.normalize(features, dim=1) @ nn.functional.normalize(features, dim=1)[query]
    assert nearest.tolist() == [k for k in cosine.argsort(descending=True).tolist() if k != query][:5]
    alone = updated(Pictures(), features, step=0, groups=("a",) * 30)
    assert (alone.stages[0].neighbors == -1).all()
    assert sheets(alone).keys() == {"map"}


def test_the_farthest_images_are_those_unlike_any_other() -> None:
    features = draw(60, 32) * 0.1 + 1
    features[[7, 40]] = 20 * draw(2, 32, seed=3)
    pictures = updated(Pictures(), features, step=0)
    assert set(pictures.farthest[:2].tolist()) == {7, 40}
    assert len(pictures.farthest) == FARTHEST


def test_tokens_have_one_basis_for_the_whole_run() -> None:
    tokens = draw(3, 4, 4, 24) * torch.arange(24, 0, -1)  # as wide as tokens of an encoder that learns
    pictures = Pictures()
    for step, each in enumerate((tokens, tokens.flip(1) * 50 + 7, tokens)):
        updated(pictures, draw(20, 8), step=step, tokens=each)
    first, flipped, last = pictures.token_colors()
    assert np.array_equal(first, last)
    assert np.abs(first[:, ::-1].astype(int) - flipped).max() <= 1  # neither scale nor offset changes a color
    rows = tokens.reshape(-1, 24).double().numpy()
    axes = np.linalg.svd(rows - rows.mean(0))[2][:3]
    scores = (rows - rows.mean(0)) @ axes.T
    low, high = np.percentile(scores, (2, 98), axis=0)
    expected = (255 * ((scores - low) / (high - low)).clip(0, 1)).astype(int).reshape(3, 4, 4, 3)
    mirrored = np.where(np.abs(expected - first).max((0, 1, 2)) > 60, 255 - expected, expected)  # signs are free
    assert np.abs(mirrored - first).max() < 25  # 16 components are kept


def test_the_first_the_second_and_the_last_evaluation_are_kept() -> None:
    pictures, features = Pictures(), [draw(40, 8, seed=k) for k in range(5)]
    for step, each in enumerate(features):
        updated(pictures, each, step=10 * step)
    assert [stage.step for stage in pictures.stages] == [0, 10, 40]
    assert np.array_equal(pictures.stages[1].neighbors, updated(Pictures(), features[1], step=0).stages[0].neighbors)


def test_the_map_turns_to_the_one_before() -> None:
    features = draw(50, 8) * torch.arange(8, 0, -1)
    pictures = updated(Pictures(), features, step=0)
    before = map_places(pictures)
    turned = features @ torch.linalg.qr(draw(8, 8, seed=5))[0]  # the same geometry in another basis
    assert np.abs(map_places(updated(pictures, turned, step=1)) - before).max() < 1e-4


def test_no_picture_exceeds_a_megabyte() -> None:
    pictures = updated(Pictures(), draw(MAPPED, 16), step=0, tokens=draw(6, 8, 8, 16))
    pictures.thumbnails = np.random.default_rng(0).integers(0, 256, pictures.thumbnails.shape, dtype=np.uint8)
    for step in (1, 2):
        updated(pictures, draw(MAPPED, 16), step=step, tokens=draw(6, 8, 8, 16))
    drawn = sheets(pictures)
    assert drawn.keys() == {"neighbors", "tokens", "map", "farthest"}
    assert all(sheet.dtype == np.uint8 and sheet.nbytes <= 1e6 for sheet in drawn.values())


class Counting(nn.Module):
    """A small convolutional encoder that counts its passes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Conv2d(3, 6, 4, 4)
        self.passes: list[int] = []

    def forward(self, images: Tensor) -> Tensor:
        self.passes.append(len(images))
        features: Tensor = self.body(images).mean((2, 3))
        return features


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_one_forward_pass_makes_the_pictures(dtype: torch.dtype) -> None:
    images = (255 * torch.rand(70, 3, 16, 16, generator=torch.Generator().manual_seed(0))).to(dtype)
    data = torch.utils.data.TensorDataset(images, torch.arange(70) % 2, torch.arange(70) // 7)
    measured = {}
    for pictures in (True, False):
        encoder = Counting()
        transform = (lambda batch: batch.float() / 255) if dtype == torch.uint8 else None
        monitor = Monitor(metrics=["rankme"], pictures=pictures, batch_size=16, transform=transform)
        for step in (0, 1):
            record = monitor.measure(encoder, data, step=step)
        measured[pictures] = encoder.passes, record.measurements["rankme"].value, monitor.pictures
    assert measured[True][:2] == measured[False][:2]
    assert measured[False][2] is None
    pictures = measured[True][2]
    assert pictures is not None
    assert pictures.groups.tolist() == [row // 7 for row in range(70)]
    assert pictures.labels.tolist() == [row % 2 for row in range(70)]
    assert pictures.token_rows.tolist() == [0, 11, 22, 33, 44, 55]
    assert [stage.scores.shape[:3] for stage in pictures.stages] == [(6, 4, 4), (6, 4, 4)]
    if dtype == torch.uint8:
        expected = nn.functional.interpolate(images[5:6].float(), (48, 48))[0]
        assert np.array_equal(pictures.thumbnails[5], expected.numpy().astype(np.uint8))


def test_the_same_images_are_shown_on_any_number_of_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.rand(1500, 3, 2, 2)
    encoder = nn.Sequential(nn.Conv2d(3, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())

    def shown(world: int) -> Tensor:
        masks = {}
        for rank in range(world):
            monkeypatch.setattr(module, "rank_and_world", lambda rank=rank: (rank, world))
            encode = module.add_pictures(
                lambda batch: {"": encoder(batch)}, Pictures(), encoder, size=1500, again=False, together=False
            )
            for index in range(rank, 15, world):
                parts = encode(images[100 * index : 100 * index + 100])
                masks[index] = torch.stack([parts[SHOWN], parts[TOKEN_ROWS]])
                assert len(parts[THUMBNAILS]) == parts[SHOWN].sum()
        return torch.cat([masks[index] for index in range(15)], dim=1)

    both = shown(1)
    assert both.sum(1).tolist() == [500, 6]
    assert bool((both[0] | ~both[1]).all())  # images with tokens are among those shown
    for world in (2, 4):
        assert torch.equal(both, shown(world))


@pytest.mark.parametrize("shape", [(3, 8), (5, 3, 8, 8), (3, 8, 8), (1, 8, 8), (4, 8, 8)])
def test_inputs_of_any_form_are_measured(shape: tuple[int, ...]) -> None:
    batches = [(draw(20, *shape, seed=k), torch.arange(20) % 4, torch.arange(20) // 5) for k in range(3)]
    monitor = Monitor(metrics=["rankme"], pictures=True)
    record = monitor.measure(nn.Sequential(nn.Flatten(), nn.LazyLinear(4)), batches)
    assert record.measurements["rankme"].value > 1
    assert monitor.pictures is not None
    assert len(monitor.pictures.thumbnails) == (60 if len(shape) == 3 else 0)
    assert bool(sheets(monitor.pictures)) == (len(shape) == 3)


def test_a_collapsed_encoder_has_pictures_too() -> None:
    pictures = updated(Pictures(), torch.ones(30, 8), step=0, tokens=torch.ones(3, 4, 4, 8))
    assert sheets(pictures).keys() == {"neighbors", "tokens", "map", "farthest"}
    assert len(np.unique(pictures.token_colors()[0])) == 1


def test_the_file_holds_everything(tmp_path: Path) -> None:
    pictures = updated(Pictures(), draw(20, 8), step=3, tokens=draw(2, 4, 4, 8), groups=tuple("ab" * 10))
    pictures.path = "body"
    pictures.save(tmp_path / "pictures.npz")
    loaded = Pictures.load(tmp_path / "pictures.npz")
    for name, value in vars(pictures).items():
        if isinstance(value, np.ndarray):
            assert np.array_equal(value, getattr(loaded, name)), name
    assert (loaded.run, loaded.path, loaded.stages[0].step) == ("r", "body", 3)
    assert all(map(np.array_equal, loaded.stages[0][1:], pictures.stages[0][1:]))
    for content in (b"", b"PK damaged", (tmp_path / "pictures.npz").read_bytes()[:500]):
        (tmp_path / "damaged.npz").write_bytes(content)
        with pytest.raises(ValueError, match="holds no pictures of a run"):
            Pictures.load(tmp_path / "damaged.npz")


def test_a_resumed_run_keeps_its_first_pictures(tmp_path: Path) -> None:
    encoder, images = Counting(), [torch.rand(24, 3, 8, 8, generator=torch.Generator().manual_seed(0))]
    monitor = Monitor(metrics=["rankme"], pictures=True)
    for step in (0, 5, 10, 15):
        monitor.measure(encoder, images, step=step)
        if step == 10:
            history = list(monitor.history)
    assert monitor.pictures is not None
    monitor.pictures.save(tmp_path / "pictures.npz")
    resumed = Monitor(metrics=["rankme"], pictures=True)
    resumed.reset(history)
    resumed.restore_pictures(tmp_path / "pictures.npz")
    resumed.measure(encoder, images, step=20)
    assert resumed.pictures is not None
    assert [stage.step for stage in resumed.pictures.stages] == [0, 5, 20]
    other = Monitor(metrics=["rankme"], pictures=True)
    other.measure(encoder, images, step=0)
    other.restore_pictures(tmp_path / "pictures.npz")  # of another run
    other.measure(encoder, images, step=1)
    assert other.pictures is not None
    assert [stage.step for stage in other.pictures.stages] == [0, 1]
