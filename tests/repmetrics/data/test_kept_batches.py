"""Held-out batches kept after the first reading are those of the data set, in their own dtype."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from repmetrics.data.kept_batches import Cache, KeptBatches
from repmetrics.data.parse_batch import Batch
from repmetrics.monitoring.monitor import Monitor


class Counted(Dataset[Any]):
    """uint8 images that count their readings; labels and groups."""

    def __init__(self) -> None:
        self.images = torch.randint(
            0, 256, (40, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
        )
        self.readings = 0

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        self.readings += 1
        return {"image": self.images[index], "label": index % 2, "group": f"slide {index // 4}"}


class Writing(nn.Module):
    """Encoder that normalizes its input in place."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(48, 6)

    def forward(self, images: Tensor) -> Tensor:
        assert images.dtype == torch.uint8
        images.bitwise_xor_(1)
        features: Tensor = self.layer(images.flatten(1).float() / 255)
        return features


@pytest.mark.parametrize("cache", ["memory", "disk"])
def test_later_evaluations_read_the_kept_batches(cache: Cache) -> None:
    data, encoder = Counted(), Writing()
    options: dict[str, Any] = {"metrics": ["rankme"], "batch_size": 16}
    monitor = Monitor(**options, cache=cache)
    for step in range(3):
        monitor.measure(encoder, data, step=step)
        assert data.readings == 40
    expected = Monitor(**options).measure(encoder, Counted()).measurements
    for record in monitor.history:
        assert record.measurements == expected


def test_a_check_of_two_batches_does_not_count_as_a_reading() -> None:
    data, monitor = Counted(), Monitor(metrics=["rankme"], batch_size=16, cache="memory")
    extractor = monitor.make_extractor(Writing(), None)
    monitor.check(extractor, extractor, data, device="cpu")
    assert monitor.measure(Writing(), data).measurements["rankme"].n == 40


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.float32, torch.bfloat16])
def test_dtypes_on_disk(dtype: torch.dtype) -> None:
    images = [(torch.rand(n, 2, 3) * 255).to(dtype) for n in (3, 2)]
    kept = KeptBatches("disk")
    for each in images:
        kept.add(Batch(each, None, None))
    for _ in range(2):
        assert all(torch.equal(a, b.images) for a, b in zip(images, kept, strict=True))


def test_a_full_disk_is_named() -> None:
    kept = KeptBatches("disk")
    kept._file = open("/dev/full", "r+b")  # noqa: SIM115  closed with the batches
    with pytest.raises(ValueError, match=r"cache='disk' cannot keep .*No space left on device.* give cache=None"):
        kept.add(Batch(torch.zeros(1000, 1000), None, None))


def test_an_unknown_place_is_refused() -> None:
    with pytest.raises(ValueError, match="cache must be memory, disk or None"):
        Monitor(cache="ram")  # type: ignore[arg-type]
