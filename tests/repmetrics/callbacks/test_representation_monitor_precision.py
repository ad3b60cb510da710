"""Precision plugins, torch.compile, averaged weights, and the encoder's edges."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from small_runs import LIGHTNING_NOISE, HeldOutImages, fit, simclr
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset

from repmetrics.callbacks.representation_monitor import RepresentationMonitor
from repmetrics.data.features import embed
from repmetrics.data.held_out import HeldOutData
from repmetrics.encoders.extractor import FeatureExtractor, get_submodule, pool_tokens
from repmetrics.measurement.measure import measure
from repmetrics.monitoring.isolation import isolated
from repmetrics.monitoring.monitor import Monitor

pytestmark = [pytest.mark.filterwarnings(line) for line in LIGHTNING_NOISE]


# ── precision ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.filterwarnings("ignore:.*attribute 'optimizer'.*|.*lr_scheduler.step.*")
@pytest.mark.parametrize(
    ("precision", "dtype"),
    [
        ("bf16-mixed", "bfloat16"),
        ("bf16-true", "bfloat16"),
        ("16-true", "float16"),
        pytest.param("16-mixed", "float16", marks=pytest.mark.gpu),  # Lightning refuses it on a CPU
    ],
)
def test_precision_is_that_of_training_and_weights_do_not_change(tmp_path: Path, precision: str, dtype: str) -> None:
    accelerator = "gpu" if precision == "16-mixed" else "cpu"
    if accelerator == "gpu" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    final = []
    for callbacks in ([], [RepresentationMonitor(HeldOutImages(), every_n_steps=3)]):
        module = simclr()
        fit(tmp_path, module, *callbacks, precision=precision, accelerator=accelerator, logger=False, max_epochs=1)
        final.append(module.state_dict())
    assert all(torch.equal(final[0][key], final[1][key]) for key in final[0])
    assert {m.dtype for m in callbacks[0].history[-1].measurements.values()} == {dtype}
    assert any("quantisation adds false rank" in w for w in callbacks[0].history[-1].measurements["rankme"].warnings)


def test_bfloat16_values_are_those_of_the_same_autocast(tmp_path: Path) -> None:
    module, monitor = simclr(), RepresentationMonitor(HeldOutImages())
    fit(tmp_path, module, monitor, precision="bf16-mixed", logger=False, max_epochs=1)
    module.eval()
    with torch.autocast("cpu", torch.bfloat16):
        features = embed(module, DataLoader(HeldOutImages(), batch_size=64)).values
    # the monitor has groups and adds block after block: float64 sums in another order
    expected = pytest.approx(measure(features)["rankme"].value, rel=1e-12)
    assert monitor.history[-1].measurements["rankme"].value == expected


# ── torch.compile ───────────────────────────────────────────────────────────────────────────────────────────────────


def compiles(counter: list[int]) -> Any:
    """A backend that counts what it compiles."""

    def backend(graph: Any, _inputs: Any) -> Any:
        counter.append(1)
        return graph.forward

    return backend


@pytest.mark.filterwarnings("ignore")  # of torch.compile
@pytest.mark.parametrize("encoder", ["backbone", None, lambda module, images: module.backbone(images)])
def test_compiled_encoders_are_measured_eagerly(encoder: Any) -> None:
    plain = simclr()
    expected = Monitor().measure(plain, HeldOutImages(), path="backbone").measurements
    module, counter = simclr(), []
    module.backbone = torch.compile(module.backbone, backend=compiles(counter))
    measured = Monitor().measure(module, HeldOutImages(), path=encoder).measurements
    assert measured == expected
    assert counter == []  # a recompilation would count against training's limit
    module.backbone(torch.randn(4, 3, 4, 4))
    assert counter  # the backend does work, outside


# ── averaged weights ────────────────────────────────────────────────────────────────────────────────────────────────


class SwapAtValidation(Callback):
    """As EMA callbacks do: other weights during validation, wherever it is in the list."""

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        self.kept = [p.detach().clone() for p in pl_module.backbone.parameters()]
        for parameter in pl_module.backbone.parameters():
            parameter.data.zero_()

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        for parameter, kept in zip(pl_module.backbone.parameters(), self.kept, strict=True):
            parameter.data.copy_(kept)


@pytest.mark.parametrize("first", [True, False])
def test_averaged_weights_are_what_is_measured(tmp_path: Path, first: bool) -> None:
    monitor, swap = RepresentationMonitor(HeldOutImages(), on_alarm="log"), SwapAtValidation()
    fit(tmp_path, simclr(), *([monitor, swap] if first else [swap, monitor]), logger=False)
    assert [record.collapse_stats.dead_features for record in monitor.history] == [0.0, 1.0, 1.0]


# ── isolation, part by part ───────────────────────────────────────────────────────────────────────────────────────────


def test_isolated_restores_each_flag_even_after_an_error() -> None:
    module = nn.Sequential(nn.Dropout(), nn.Sequential(nn.BatchNorm1d(3).eval(), nn.Dropout()))
    before = [m.training for m in module.modules()]
    state = torch.get_rng_state()

    def fail() -> None:
        with isolated([module]):
            assert not any(m.training for m in module.modules())
            torch.rand(3)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert [m.training for m in module.modules()] == before
    assert torch.equal(torch.get_rng_state(), state)


def test_buffers_stay_usable_in_training() -> None:
    """A cache made under inference_mode would raise at the next backward pass."""

    class Lazy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(48))
            self.cache: Tensor | None = None

        def forward(self, images: Tensor) -> Tensor:
            if self.cache is None:
                self.cache = torch.linspace(0, 1, 48)
            return images.flatten(1) * self.weight * self.cache

    encoder = Lazy()
    Monitor().measure(encoder, HeldOutImages())
    encoder(torch.randn(2, 3, 4, 4)).sum().backward()


class Counting(nn.Module):
    """Writes to a buffer, replaces another, and changes attributes in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.line, self.calls, self.bank = nn.Linear(48, 8), 0, torch.zeros(2)
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("last", torch.zeros(0))

    def forward(self, images: Tensor) -> Tensor:
        self.calls, self.bank, self.last = self.calls + 1, self.bank + 1, images.mean(0)
        self.seen.add_(1)
        features: Tensor = self.line(images.flatten(1))
        return features


def test_what_a_forward_pass_writes_is_put_back_and_hooks_are_named() -> None:
    encoder, monitor = Counting(), Monitor()
    tensors = encoder.seen, encoder.last, encoder.bank
    encoder.line.register_forward_hook(lambda *_: None)
    with pytest.warns(UserWarning, match=r"forward hooks run in evaluations too, .* of line$") as caught:
        monitor.measure(encoder, HeldOutImages())
    monitor.measure(encoder, HeldOutImages(), step=1)  # a second warning would be an error
    assert len(caught) == 1
    assert all(a is b for a, b in zip((encoder.seen, encoder.last, encoder.bank), tensors, strict=True))
    assert (encoder.calls, float(encoder.seen), encoder.last.numel(), encoder.bank.tolist()) == (0, 0, 0, [0, 0])


class OwnGenerator(Dataset[Tensor]):
    """Noise from a generator that is neither seeded nor restored."""

    def __init__(self) -> None:
        self.generator = np.random.default_rng(0)

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> Tensor:
        return torch.from_numpy(self.generator.normal(size=4)) + index


def test_a_generator_of_the_dataset_is_named_once() -> None:
    monitor, data = Monitor(), OwnGenerator()
    monitor.measure(nn.Flatten(), data)
    with pytest.warns(UserWarning, match="the held-out images are not those of the first evaluation"):
        monitor.measure(nn.Flatten(), data, step=1)
    monitor.measure(nn.Flatten(), data, step=2)  # a second warning would be an error


# ── held-out data ───────────────────────────────────────────────────────────────────────────────────────────────────


class Stream(IterableDataset[Tensor]):
    def __iter__(self) -> Any:
        yield from torch.arange(10.0).reshape(10, 1)


def read(data: HeldOutData, rank: int, world: int) -> list[list[float]]:
    return [batch.flatten().tolist() for batch in data.shard(rank, world)]


def test_shares_are_disjoint_complete_and_the_batches_of_one() -> None:
    rows = torch.arange(10.0).reshape(10, 1)
    distributed = DistributedSampler(rows, num_replicas=4, rank=1, shuffle=False)  # type: ignore[arg-type]
    for data in (
        HeldOutData(DataLoader(rows, batch_size=3)),  # type: ignore[arg-type]
        HeldOutData(DataLoader(rows, batch_size=3, sampler=distributed)),  # type: ignore[arg-type]
        HeldOutData(DataLoader(Stream(), batch_size=3)),
        HeldOutData(list(rows.split(3))),
    ):
        alone = read(data, 0, 1)
        assert [len(batch) for batch in alone] == [3, 3, 3, 1]
        first, second = read(data, 0, 2), read(data, 1, 2)
        assert [first[0], second[0], first[1], second[1]] == alone


def test_a_shuffling_loader_is_read_in_one_order() -> None:
    rows: Any = torch.arange(100.0).reshape(100, 1)
    data = HeldOutData(DataLoader(rows, batch_size=10, shuffle=True, generator=torch.Generator().manual_seed(0)))
    assert read(data, 0, 1) == read(data, 0, 1)


class Crops(Dataset[Tensor]):
    """The same pictures, shifted by a random offset at each reading."""

    def __init__(self) -> None:
        self.images = torch.rand(24, 3, 6, 6, generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> Tensor:
        top, left = torch.randint(3, (2,)).tolist()
        return self.images[index, :, top : top + 4, left : left + 4]


class CropStream(IterableDataset[Tensor]):
    def __iter__(self) -> Any:
        yield from map(Crops().__getitem__, range(24))


class RandomBatches:
    """A batch sampler that draws its order from the global generator, and another number of values each time."""

    def __iter__(self) -> Any:
        order = torch.randperm(24)
        torch.rand(int(torch.randint(1, 9, ())))
        yield from order.split(5)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("options", [{}, {"shuffle": True}, {"batch_sampler": RandomBatches()}, {"stream": True}])
def test_each_evaluation_sees_the_same_pixels(options: dict[str, Any], workers: int) -> None:
    stream, options = options.get("stream"), {key: value for key, value in options.items() if key != "stream"}
    options |= {} if "batch_sampler" in options else {"batch_size": 5}
    data: Any = CropStream() if stream else Crops()
    loader = DataLoader(data, num_workers=workers, persistent_workers=workers > 0, **options)
    monitor, seen = Monitor(), []
    for step in range(3):
        torch.rand(step)  # training goes on in between
        batches: list[Tensor] = []
        monitor.measure(nn.Flatten(), loader, step=step, path=lambda m, x: batches.append(x) or m(x))  # noqa: B023
        seen.append(torch.cat(batches))
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[0], seen[2])


def test_a_reading_does_not_restart_persistent_workers_of_training() -> None:
    loader = DataLoader(Stream(), batch_size=3, num_workers=1, persistent_workers=True)
    training = iter(loader)
    first = next(training)
    Monitor().measure(nn.Flatten(), loader)
    assert [first.flatten().tolist(), *(batch.flatten().tolist() for batch in training)] == [
        [0, 1, 2], [3, 4, 5], [6, 7, 8], [9],
    ]  # fmt: skip


def test_a_map_style_dataset_of_another_library_is_a_dataset() -> None:
    class Table:
        def __len__(self) -> int:
            return 5

        def __getitem__(self, index: int) -> dict[str, Any]:
            return {"image": torch.full((2,), float(index))}

    batches = list(HeldOutData(Table(), batch_size=3).shard(0, 1))  # type: ignore[arg-type]
    assert [batch["image"].shape for batch in batches] == [(3, 2), (2, 2)]


def test_what_cannot_be_read_twice_is_refused() -> None:
    with pytest.raises(TypeError, match="re-readable iterable of batches, got generator"):
        HeldOutData(torch.zeros(2, 1) for _ in range(3))


def test_metrics_that_no_loader_can_feed_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"dse takes patch tokens \(B, T, D\), and a monitor keeps one vector per image"
    ):
        Monitor(metrics=["rankme", "dse"])


def test_every_other_metric_is_measured_with_its_error() -> None:
    names = ["participation_ratio", "stable_rank", "dead_features", "uniformity_w2", "mean_direction", "slide_leakage"]
    record = Monitor(metrics=names).measure(simclr(), HeldOutImages())
    assert all(record.measurements[name].standard_error is not None for name in names)


# ── encoders ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_pooling() -> None:
    tokens = torch.arange(24.0).reshape(2, 3, 4)
    assert torch.equal(pool_tokens(tokens, pool="cls", name="x"), tokens[:, 0])
    assert torch.equal(pool_tokens(tokens, pool="mean", name="x"), tokens.mean(1))
    maps = torch.arange(48.0).reshape(2, 3, 2, 4)
    assert torch.equal(pool_tokens(maps, pool="mean", name="x"), maps.mean((2, 3)))
    with pytest.raises(ValueError, match=r'feature maps .* choose pool="mean"'):
        pool_tokens(maps, pool="cls", name="x")


def test_an_extractor_returns_each_layer_in_its_own_dtype() -> None:
    class Bfloat16(nn.Module):
        def forward(self, rows: Tensor) -> Tensor:
            return rows.bfloat16()

    module = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2), Bfloat16())
    images = torch.randn(5, 3)
    parts = FeatureExtractor(module, layers=["0", "1"])(images)
    assert {name: part.dtype for name, part in parts.items()} == {
        "": torch.bfloat16, "0": torch.float32, "1": torch.float32,
    }  # fmt: skip
    assert torch.equal(parts[""], module(images))
    assert torch.equal(parts["0"], module[0](images))
    assert torch.equal(parts["1"], module[0](images).relu())
    assert not module[0]._forward_hooks


def test_a_path_without_near_names_lists_the_children() -> None:
    with pytest.raises(ValueError, match=r"Sequential has no submodule 'xyz': did you mean 0"):
        get_submodule(nn.Sequential(nn.ReLU()), "xyz")
