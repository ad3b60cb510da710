"""The monitor's signals from views and turns: which images, which views, what is recorded."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from repmetrics.data.derived import DerivedImages, draw_view, image_keys, turn
from repmetrics.data.views import VIEW_SETS, ViewSet, quarter_turns
from repmetrics.functional.retrieval import match_views
from repmetrics.functional.rotation import rotation_probe
from repmetrics.measurement.registry import DEFAULT_SIGNALS, METRICS
from repmetrics.monitoring.monitor import Monitor

PAIRED = [name for name in DEFAULT_SIGNALS if METRICS[name].two_views]


def images(n: int = 90, side: int = 12) -> Tensor:
    smooth = torch.rand(n, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    return nn.functional.interpolate(smooth, size=(side, side), mode="bilinear")


def encoder() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()).eval()


def pairs(network: nn.Module, part: Tensor, view_set: ViewSet) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        first, second = (network(view_set.draw(part, indices=image_keys(part), view=view)) for view in (0, 1))
    return first, second


def test_every_second_image_is_viewed_twice_for_one_more_pass() -> None:
    x, network = images(), encoder()
    samples: list[int] = []
    network.register_forward_hook(lambda _m, args, _out: samples.append(len(args[0])))
    monitor = Monitor()
    with pytest.warns(UserWarning, match="forward hooks run in evaluations too"):
        record = monitor.measure(network, x.split(30))
    assert sum(samples) == 2 * len(x) == monitor.forward_passes
    first, second = pairs(network, x[::2], VIEW_SETS["geometry"])
    expected = match_views(first, second)
    assert record.measurements["view_retrieval"].value == pytest.approx(expected.hits.mean().item(), abs=1e-9)
    assert record.measurements["view_infonce"].value == pytest.approx(expected.losses.mean().item(), rel=1e-5)
    white = match_views(first, second, whiten=True).hits.mean().item()
    assert record.measurements["view_retrieval_whitened"].value == pytest.approx(white, abs=0.05)  # rounding of ties
    assert 0.05 < expected.hits.mean().item() < 1


@pytest.mark.parametrize("view_set", ["weak", ViewSet("mine", area=(0.9, 1.0))], ids=str)
def test_the_view_set_is_recorded_with_its_values(view_set: str | ViewSet) -> None:
    record = Monitor(view_set=view_set).measure(encoder(), [images()])
    expected = VIEW_SETS[view_set] if isinstance(view_set, str) else view_set
    for name in PAIRED:
        measured = record.measurements[name]
        assert measured.convention == f"{METRICS[name].convention}; {expected}"
        assert measured.details["views"] == 2
        assert measured.n == 90
    with pytest.raises(ValueError, match="unknown view set 'strong'"):
        Monitor(view_set="strong")


def test_views_do_not_depend_on_batches_and_evaluations() -> None:
    x, network = images(), encoder()
    monitor = Monitor(metrics=["view_infonce"])
    values = [monitor.measure(network, x.split(size)).measurements["view_infonce"].value for size in (90, 90, 30, 18)]
    assert values == pytest.approx([values[0]] * 4, rel=1e-6)


def test_errors_come_from_the_groups_of_the_viewed_images() -> None:
    x = images()
    groups = [f"slide {i // 9}" for i in range(90)]
    loader = [(x[s : s + 30], None, groups[s : s + 30]) for s in (0, 30, 60)]
    record = Monitor().measure(encoder(), loader)
    for name in PAIRED:
        assert record.measurements[name].groups == 10
        assert record.measurements[name].standard_error > 0


def test_inputs_without_views_have_a_reason_and_no_value() -> None:
    record = Monitor().measure(nn.Linear(6, 4), [torch.randn(40, 6, generator=torch.Generator().manual_seed(0))])
    for name in PAIRED:
        assert math.isnan(record.measurements[name].value)
        assert record.measurements[name].reason == "no views of these inputs"
    assert math.isfinite(record.measurements["rankme"].value)


def test_nan_features_of_a_view_count_once() -> None:
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            out = x.flatten(1)
            if len(x) == 46:  # two views of 23 images
                out = out.clone()
                out[3] = math.nan
            return out

    monitor = Monitor()
    monitor.measure(nn.Flatten(), [images(45)])
    assert monitor.measure(Broken(), [images(45)]).nonfinite == 1


def test_a_decomposition_that_does_not_converge_ends_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise np.linalg.LinAlgError("Eigenvalues did not converge")

    monitor, x = Monitor(metrics=["rankme", "odcorr"]), images(45)
    batches = [{"image": x, "group": [f"slide {i // 5}" for i in range(45)]}]
    monitor.measure(nn.Flatten(), batches)
    for name in ("eigh", "eigvalsh"):
        monkeypatch.setattr(f"repmetrics.functional.linalg.{name}", fail)
    record = monitor.measure(nn.Flatten(), batches, step=1)
    assert math.isnan(record.measurements["rankme"].value)
    assert record.measurements["rankme"].reason == "Eigenvalues did not converge"
    assert record.measurements["odcorr"] == monitor.history[0].measurements["odcorr"]
    assert record.spectrum == ()


def test_the_rotation_probe_turns_each_image() -> None:
    x, network = images(60), encoder()
    monitor = Monitor(metrics=["rotation_probe"])
    value = monitor.measure(network, x.split(20)).measurements["rotation_probe"].value
    with torch.no_grad():
        turned = torch.stack([network(each) for each in quarter_turns(x)], dim=1)
    assert value == pytest.approx(rotation_probe(turned).item(), abs=0.05)  # rounding moves a boundary


def test_derived_images_are_those_of_batches() -> None:
    x = images(7)
    keys = image_keys(x)
    assert len(np.unique(keys)) == 7
    dataset = [{"image": image, "group": f"{i}"} for i, image in enumerate(x)]
    viewed = DerivedImages(dataset, lambda image, k: draw_view(image, k, view_set=VIEW_SETS["weak"]), count=2, stride=2)
    assert len(viewed) == 8
    assert [viewed[i]["group"] for i in range(8)] == ["0", "0", "2", "2", "4", "4", "6", "6"]
    for view in (0, 1):
        batch = VIEW_SETS["weak"].draw(x[::2], indices=keys[::2], view=view)
        each = torch.stack([viewed[2 * i + view]["image"] for i in range(4)])
        torch.testing.assert_close(each, batch, rtol=0, atol=1e-6)
    turned = DerivedImages(dataset, turn, count=4)
    assert torch.equal(turned[5]["image"], x[1].rot90(1, (-2, -1)))


def test_samples_declared_independent_have_errors_without_groups() -> None:
    images = torch.rand(96, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(96) % 2
    monitor = Monitor(groups="independent")
    with pytest.warns(UserWarning, match="errors hold for independent samples"):
        record = monitor.measure(encoder(), [(images, labels)])
    for name in ("rankme", "view_retrieval", "linear_probe", "knn"):
        assert record.measurements[name].standard_error is not None
    with pytest.raises(ValueError, match="have group ids: leave groups='independent' out"):
        Monitor(groups="independent").measure(encoder(), [(images, labels, list(range(96)))])
    with pytest.raises(ValueError, match="groups must be 'independent' or None, got 'slide'"):
        Monitor(groups="slide")  # type: ignore[arg-type]
