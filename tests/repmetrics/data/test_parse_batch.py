"""Batches of data sets in use, and labels of every kind, through one evaluation."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import BatchFeature

from repmetrics.data.parse_batch import parse_batch, parse_labels
from repmetrics.monitoring.monitor import Monitor
from repmetrics.probes.linear import linear_probe

IMAGES = torch.randn(96, 3, 4, 4, generator=torch.Generator().manual_seed(0))
CLASSES = (IMAGES[:, 0].mean((1, 2)) > 0).long() + (IMAGES[:, 1].mean((1, 2)) > 0).long()
NAMES = ["adipose", "stroma", "tumor"]


def encoder() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 8))


def batches(labels: Any, *, size: int = 32) -> list[Any]:
    return [(IMAGES[i : i + size], labels[i : i + size]) for i in range(0, len(IMAGES), size)]


def measured(data: Any, **options: Any) -> Any:
    return Monitor(**options).measure(encoder(), data).measurements


# ── labels ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "labels",
    [
        [NAMES[c] for c in CLASSES],
        tuple(NAMES[c] for c in CLASSES),
        np.array([NAMES[c] for c in CLASSES]),
        [np.int64(c) for c in CLASSES],
        [float(c) for c in CLASSES],
        [c.clone() for c in CLASSES],
        CLASSES.numpy().astype(np.uint8),
        CLASSES[:, None],
        CLASSES.double(),
    ],
    ids=["list", "tuple", "array", "numpy", "floats", "tensors", "uint8", "column", "double"],
)
def test_labels_of_any_type_give_the_probes_of_class_numbers(labels: Any) -> None:
    expected, got = measured(batches(CLASSES)), measured(batches(labels))
    assert got == expected
    assert got["linear_probe"].details["classes"] == 3


def test_class_names_that_no_two_batches_share() -> None:
    order = CLASSES.argsort(stable=True)  # the first batch holds one class alone
    data = [(IMAGES[rows], [NAMES[c] for c in CLASSES[rows]]) for rows in order.split(16)]
    expected = measured([(IMAGES[rows], CLASSES[rows]) for rows in order.split(16)])
    assert measured(data) == expected


@pytest.mark.parametrize(
    ("labels", "reason"),
    [
        (torch.zeros(96), "all 96 labels are 0: a probe needs at least two classes"),
        (["tumor"] * 96, "all 96 labels are 0"),
        (torch.full((96,), -1), "0 of 96 samples have a label"),
        (torch.zeros(96, 5), r"labels must be \(96,\), one per row, got \(96, 5\)"),
    ],
)
def test_labels_that_allow_no_probe_are_left_out_with_one_warning(labels: Any, reason: str) -> None:
    monitor, module = Monitor(), encoder()
    with pytest.warns(UserWarning, match=f"no probe: {reason}"):
        first = monitor.measure(module, batches(labels))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        monitor.measure(module, batches(labels), step=1)
    assert first.measurements == measured([IMAGES[:32], IMAGES[32:64], IMAGES[64:]])


def test_labels_that_allow_no_probe_are_refused_where_they_are_for_the_probes() -> None:
    with pytest.raises(ValueError, match="all 96 labels are 0: a probe needs at least two classes"):
        measured([IMAGES], probe_data=batches(torch.zeros(96)))


@pytest.mark.parametrize("missing", [-1, None, float("nan"), ""])
def test_rows_without_a_label_take_no_part_in_the_probes(missing: Any) -> None:
    labels: list[Any] = [NAMES[c] if missing == "" else int(c) for c in CLASSES]
    rows = torch.arange(0, 96, 3)
    for row in rows.tolist():
        labels[row] = missing
    groups = [f"slide {i // 8}" for i in range(96)]
    with pytest.warns(UserWarning, match="32 of 96 held-out samples have no label: the probes skip them"):
        record = measured([(IMAGES, labels, groups)])
    kept = [i for i in range(96) if i % 3]
    with torch.no_grad():
        features = encoder()(IMAGES)[kept]
    alone = linear_probe(features, CLASSES[kept], groups=[groups[i] for i in kept])
    got = record["linear_probe"]
    assert (got.value, got.standard_error, got.n) == (alone.value, alone.standard_error, 64)
    assert got.warnings[0] == "32 of 96 samples have no label and are left out"
    assert record["rankme"].n == 96


def test_fractions_are_no_labels() -> None:
    with pytest.raises(ValueError, match=r"whole numbers or names.*got 0.5: leave them out with keys={'label': None}"):
        parse_labels(torch.tensor([0.0, 0.5]))
    assert set(measured([(IMAGES, torch.rand(96))], keys={"label": None})) == set(measured([IMAGES]))


# ── batches ─────────────────────────────────────────────────────────────────────────────────────────────────────────

VIEWS = [IMAGES, IMAGES + 1, IMAGES[..., :2, :2]]  # two global crops and a smaller one


@pytest.mark.parametrize(
    ("batch", "keys"),
    [
        ((IMAGES, CLASSES), None),
        ([IMAGES.numpy(), CLASSES], None),
        ({"image": IMAGES, "label": CLASSES}, None),
        (BatchFeature({"pixel_values": IMAGES, "labels": CLASSES}), None),
        ({"tile": IMAGES, "image": CLASSES}, {"image": "tile", "label": "image"}),
        ({"pixel_values": IMAGES, "image": 1, "class": CLASSES}, {"image": "pixel_values"}),
        ((torch.arange(96), IMAGES, CLASSES), {"image": 1, "label": 2}),
        ((IMAGES, 1, 2, CLASSES), {"label": 3}),
        (([IMAGES], CLASSES), None),
    ],
)
def test_batches_of_the_field(batch: Any, keys: Any) -> None:
    parsed = parse_batch(batch, keys=keys)
    assert torch.equal(parsed.images, IMAGES)
    assert isinstance(parsed.labels, Tensor)
    assert torch.equal(parsed.labels, CLASSES)
    assert parsed.groups is None


@pytest.mark.parametrize("batch", [VIEWS, (VIEWS, CLASSES), (VIEWS, CLASSES, ["a.png"] * 96), VIEWS[:2]])
def test_the_first_of_several_views_is_measured_and_the_warning_counts_them(batch: Any) -> None:
    with pytest.warns(UserWarning, match=r"has [23] views of each image, and the first is measured"):
        parsed = parse_batch(batch)
    assert torch.equal(parsed.images, IMAGES)
    assert (parsed.labels is None) == isinstance(batch, list)


def test_lightly_batches_of_views_targets_and_file_names(tmp_path: Any) -> None:
    from lightly.data import LightlyDataset
    from PIL import Image
    from torchvision.transforms import v2

    for name, level in (("light", 200), ("dark", 50)):
        (tmp_path / name).mkdir()
        for i in range(8):
            pixels = np.random.default_rng(i).integers(level - 40, level + 40, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{i}.png")
    tensor = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
    plain = LightlyDataset(str(tmp_path), transform=tensor)
    doubled = LightlyDataset(str(tmp_path), transform=lambda image: [tensor(image), tensor(image).flip(-1)])
    module = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
    expected = Monitor(keys={"image": 0, "label": 1}).measure(module, plain).measurements
    assert expected["linear_probe"].value > 0.9
    with pytest.warns(UserWarning, match="2 views of each image"):
        got = Monitor(keys={"image": 0, "label": 1}).measure(module, doubled).measurements
    assert got == expected


class OnlyImages(Dataset[Any]):
    def __len__(self) -> int:
        return len(IMAGES)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"pixels": IMAGES[index], "label": int(CLASSES[index]), "site": index // 8}


def test_keys_reach_datasets_and_probe_data() -> None:
    keys = {"image": "pixels", "group": "site"}
    record = measured(OnlyImages(), keys=keys, probe_data=DataLoader(OnlyImages(), batch_size=48))
    assert record["linear_probe"].groups == record["rankme"].groups == 12


def test_a_known_key_is_preferred_aloud() -> None:
    with pytest.warns(UserWarning, match=r"groups are those under 'slide_id'; keys={'group': 'patient_id'} takes"):
        parsed = parse_batch({"image": IMAGES[:2], "slide_id": ["a", "b"], "patient_id": ["p", "p"]})
    assert parsed.groups == ("a", "b")


@pytest.mark.parametrize(
    ("batch", "keys", "message"),
    [
        ({"picture": IMAGES, "id": 3}, None, r"must have the key 'image', got picture, id.*keys={'image': 'picture'}"),
        ({"image": IMAGES, "x": IMAGES}, None, r"may be under image or x: choose with keys={'image': 'image'}"),
        ({"image": IMAGES}, {"label": "y"}, r"names the label 'y', which a batch lacks: it has image"),
        ((torch.arange(96), [IMAGES, IMAGES], CLASSES), None, r"name them with keys={'image': 1}"),
        ((IMAGES, CLASSES), {"group": 2}, r"names the group 2, and a batch is a sequence of 2"),
        ((IMAGES, CLASSES), {"group": "slide"}, r"names the group 'slide', and a batch is a sequence of 2"),
        ((1, 2, 3, 4), None, r"got a tuple of int, int, int, int: name the parts with keys="),
        ({"image": IMAGES[0], "label": 0}, None, r"got a single sample, a dict with image, label: .*DataLoader"),
        ((IMAGES[0], torch.tensor(0)), None, r"got a single sample, a tuple of \(3, 4, 4\), \(\)"),
        ((IMAGES[0], 0, "slide"), None, r"got a single sample, a tuple of \(3, 4, 4\), int, str"),
        ("images", None, r"must be a tensor, .*got a str"),
    ],
)
def test_batches_that_cannot_be_read_say_what_to_give(batch: Any, keys: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        parse_batch(batch, keys=keys)


def test_an_unknown_part_is_refused() -> None:
    with pytest.raises(ValueError, match=r"keys= has the unknown part 'images': choose among image, label, group"):
        Monitor(keys={"images": "pixels"})
