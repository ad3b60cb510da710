"""Do held-out images reach the encoder as training images do?"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import LIGHTNING_NOISE, HeldOutImages, fit, loader, simclr
from torch import Tensor, nn

from repmetrics.callbacks.representation_monitor import RepresentationMonitor, refuse_sharded
from repmetrics.measurement.measure import measure
from repmetrics.monitoring.monitor import Monitor

pytestmark = [pytest.mark.filterwarnings(line) for line in LIGHTNING_NOISE]
MISMATCH = (
    r"mean -?0\.\d+, standard deviation 1\.0\d in training, but 12\d and (49|50).* in an evaluation: .*give transform="
)


def normalize(images: Tensor) -> Tensor:
    return (images - 125) / 50


class Plain(HeldOutImages):
    """Held-out images as a decoder gives them, on another scale than the training images."""

    def __init__(self) -> None:
        super().__init__(labels=False)
        self.images = 50 * self.images + 125


class Scaled(torch.utils.data.Dataset[Any]):
    def __len__(self) -> int:
        return 96

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, label = loader().dataset[index]
        return 50 * image + 125, label


def module_that_normalizes(where: str) -> Any:
    class Module(type(simclr())):  # type: ignore[misc]
        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return [normalize(batch[0]), batch[1]] if where == "hook" else batch

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if where == "step":
                batch = [normalize(batch[0]), batch[1]]
            loss: Tensor = super().training_step(batch, batch_idx)
            return loss

    torch.manual_seed(0)
    return Module()


def train() -> Any:
    return torch.utils.data.DataLoader(Scaled(), batch_size=16, drop_last=True)


@pytest.mark.parametrize(("where", "encoder"), [("hook", None), ("hook", "backbone"), ("step", "backbone")])
def test_a_normalization_that_held_out_images_lack_is_named(tmp_path: Path, where: str, encoder: Any) -> None:
    module = module_that_normalizes(where)
    with pytest.warns(UserWarning, match=MISMATCH):
        fit(tmp_path, module, RepresentationMonitor(Plain(), encoder=encoder), train=train(), val=None, max_epochs=1)
    assert not module.backbone._forward_pre_hooks


@pytest.mark.parametrize("encoder", [None, "backbone"])
def test_transform_makes_them_alike_and_is_what_is_measured(tmp_path: Path, encoder: Any) -> None:
    module = module_that_normalizes("hook")
    monitor = RepresentationMonitor(Plain(), encoder=encoder, transform=normalize, views=2, metrics=["rankme", "lidar"],
                                    augmentation=lambda images: images + 50 * torch.randn_like(images))  # fmt: skip
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*standard deviation.*")
        fit(tmp_path, module, monitor, train=train(), val=None, max_epochs=1)
    module.eval()
    with torch.no_grad():
        features = module.backbone(normalize(Plain().images))
    expected = measure(features, metrics=["rankme"])["rankme"].value
    assert monitor.history[-1].measurements["rankme"].value == pytest.approx(expected, rel=1e-12)
    assert monitor.history[-1].measurements["lidar"].value < 8  # noise of one deviation per view


def test_images_on_one_scale_and_functions_raise_no_warning(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*standard deviation.*")
        fit(tmp_path, simclr(), RepresentationMonitor(HeldOutImages()), max_epochs=1)
        function = RepresentationMonitor(Plain(), encoder=lambda module, images: module.backbone(normalize(images)))
        fit(tmp_path, module_that_normalizes("hook"), function, train=train(), val=None, max_epochs=1)


def test_a_compiled_encoder_is_not_hooked(tmp_path: Path) -> None:
    module = module_that_normalizes("hook")
    module.backbone = torch.compile(module.backbone, backend="eager")
    with pytest.warns(UserWarning, match=MISMATCH):
        fit(tmp_path, module, RepresentationMonitor(Plain()), train=train(), val=None, max_epochs=1)


def test_the_check_leaves_the_weights_bit_identical(tmp_path: Path) -> None:
    final = []
    for callbacks in ([], [RepresentationMonitor(HeldOutImages(), encoder="backbone")]):
        module = simclr()
        fit(tmp_path, module, *callbacks, val=None, max_epochs=1, logger=False)
        final.append(module.state_dict())
    assert all(torch.equal(final[0][key], final[1][key]) for key in final[0])


@pytest.mark.parametrize("name", ["FSDPStrategy", "DeepSpeedStrategy"])
def test_strategies_that_shard_parameters_are_refused(name: str) -> None:
    import lightning.pytorch.strategies as strategies

    with pytest.raises(ValueError, match=f"does not measure parameters that {name} shards: train with ddp"):
        refuse_sharded(object.__new__(type("Sub", (getattr(strategies, name),), {})))
    refuse_sharded(strategies.SingleDeviceStrategy())


def test_a_transform_must_return_the_batch() -> None:
    with pytest.raises(ValueError, match=r"transform must return a batch of 64 images, got \(5, 3, 4, 4\)"):
        Monitor(transform=lambda images: images[:5]).measure(nn.Flatten(), HeldOutImages())
