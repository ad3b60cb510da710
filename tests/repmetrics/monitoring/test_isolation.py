"""Final weights are bit for bit those of a run without the monitor, in every kind of run."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightly.loss import NegativeCosineSimilarity, NTXentLoss
from lightly.models.modules.heads import SimSiamPredictionHead, SimSiamProjectionHead
from lightning.pytorch.callbacks import EMAWeightAveraging
from small_runs import LIGHTNING_NOISE, Augmented, HeldOutImages, fit, loader, make_backbone, simclr, two_views
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from repmetrics.callbacks.representation_monitor import RepresentationMonitor
from repmetrics.monitoring import isolation, monitor

pytestmark = [
    *(pytest.mark.filterwarnings(line) for line in LIGHTNING_NOISE),
    pytest.mark.filterwarnings(
        "ignore:.*attribute 'optimizer'.*|.*lr_scheduler.step.*|.*saving a checkpoint outside.*"
    ),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),  # torch.compile, self.log
]


def by_hand() -> Any:
    """Manual optimization with two optimizers: each batch is two steps."""

    class ByHand(type(simclr())):  # type: ignore[misc]
        automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            for optimizer in self.optimizers():
                optimizer.zero_grad()
                self.manual_backward(two_views(self, batch[0]))
                optimizer.step()

        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(part.parameters(), 0.05, momentum=0.9) for part in (self.backbone, self.projector)]

    torch.manual_seed(0)
    return ByHand()


def with_teacher() -> Any:
    """A teacher, updated from the student after each step; the monitor measures the teacher."""

    class WithTeacher(type(simclr())):  # type: ignore[misc]
        def on_train_batch_end(self, *_: Any) -> None:
            with torch.no_grad():
                for target, source in zip(self.teacher.parameters(), self.backbone.parameters(), strict=True):
                    target.lerp_(source, 0.1)

    torch.manual_seed(0)
    return WithTeacher()


def compiled_part() -> Any:
    module = simclr()
    module.backbone = torch.compile(module.backbone, backend="eager")
    return module


def compiled_whole() -> Any:
    return torch.compile(simclr(), backend="eager")


class Case:
    """A kind of run: its module, the monitor's options, and the Trainer's options."""

    def __init__(
        self,
        make: Callable[[], Any] = simclr,
        *,
        callbacks: Callable[[], list[Any]] = list,
        resumed: bool = False,
        watch: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        self.make, self.callbacks, self.resumed, self.watch, self.options = (
            make,
            callbacks,
            resumed,
            watch or {},
            options,
        )


BOTH = {"encoder": lambda module, images: module.projector(module.backbone(images)), "layers": ["backbone.1"]}

RUNS = {
    "lightning": Case(watch=BOTH),
    "pytorch_lightning": Case(lambda: simclr("pytorch_lightning"), watch=BOTH),
    "by hand": Case(by_hand, watch={"every_n_steps": 3}),
    "by hand, validated": Case(by_hand, watch=BOTH),
    "no validation": Case(val=None),
    "no validation, by steps": Case(val=None, watch={"every_n_steps": 4, **BOTH}),
    "validation, by steps": Case(watch={"every_n_steps": 4}),
    "validation inside an epoch": Case(val_check_interval=0.5),
    "accumulation": Case(accumulate_grad_batches=4, watch={"every_n_steps": 1}),
    "two validation loaders": Case(val="two"),
    "teacher": Case(with_teacher, watch={"encoder": "teacher"}),
    "averaged weights": Case(callbacks=lambda: [EMAWeightAveraging(decay=0.9)]),
    "averaged weights, by steps": Case(callbacks=lambda: [EMAWeightAveraging(decay=0.9)], watch={"every_n_steps": 2}),
    "compiled part": Case(compiled_part, watch={"encoder": "backbone", "layers": ["backbone.1"]}),
    "compiled whole": Case(compiled_whole, watch={"layers": ["backbone.1"]}),
    "bf16-mixed": Case(precision="bf16-mixed"),
    "bf16-true": Case(precision="bf16-true"),
    "16-true": Case(precision="16-true"),
    "resumed": Case(resumed=True),
    "resumed, by steps": Case(resumed=True, val=None, watch={"every_n_steps": 4}),
}
# Each way of reading: with and without validation, within an epoch, from several loaders, after a resume.
WITH_WORKERS = (
    "lightning",
    "no validation, by steps",
    "validation inside an epoch",
    "two validation loaders",
    "resumed",
)


def trained(root: Path, case: Case, *, workers: int, watched: bool) -> tuple[nn.Module, int]:
    """The module after the run, and the number of evaluations."""
    module = case.make()
    options = {"logger": False, **case.options}
    val = options.pop("val", "one")
    loaders = [loader(32, workers=workers) for _ in range({"one": 1, "two": 2}.get(val, 0))] or None
    monitors = [RepresentationMonitor(HeldOutImages(), num_workers=workers, **case.watch)] if watched else []
    if case.resumed:
        fit(root, case.make(), *monitors, train=loader(workers=workers), val=loaders, max_epochs=1, **options)
        options["ckpt_path"] = next((root / "checkpoints").glob("*.ckpt"))
        monitors = [RepresentationMonitor(HeldOutImages(), num_workers=workers, **case.watch)] if watched else []
    fit(root, module, *monitors, *case.callbacks(), train=loader(workers=workers), val=loaders, **options)
    return module, len(monitors[0].history) if watched else 0


def same(first: nn.Module, second: nn.Module) -> bool:
    """Equal to the bit, parameters and buffers."""
    a, b = first.state_dict(), second.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize(("name", "workers"), [*((name, 0) for name in RUNS), *((name, 2) for name in WITH_WORKERS)])
def test_final_weights_are_bit_identical_with_and_without(tmp_path: Path, name: str, workers: int) -> None:
    off, _ = trained(tmp_path / "off", RUNS[name], workers=workers, watched=False)
    on, evaluations = trained(tmp_path / "on", RUNS[name], workers=workers, watched=True)
    assert evaluations >= 3
    assert same(off, on)
    assert [m.training for m in off.modules()] == [m.training for m in on.modules()]


def lightly_simsiam() -> pl.LightningModule:
    """SimSiam as lightly's examples write it: its heads, its loss, and a memory bank of its own."""

    class SimSiam(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = nn.Sequential(nn.Conv2d(3, 8, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
            self.projection_head = SimSiamProjectionHead(8, 8, 8)
            self.prediction_head = SimSiamPredictionHead(8, 4, 8)
            self.criterion, self.bank = NegativeCosineSimilarity(), NTXentLoss(memory_bank_size=(32, 8))

        def forward(self, x: Any) -> Any:
            z = self.projection_head(self.backbone(x).flatten(start_dim=1))
            return z.detach(), self.prediction_head(z)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            (z0, p0), (z1, p1) = (self(batch[0] + 0.1 * torch.randn_like(batch[0])) for _ in range(2))
            return (self.criterion(z0, p1) + self.criterion(z1, p0)) / 2 + 0.1 * self.bank(p0, p1)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.06)

    torch.manual_seed(0)
    return SimSiam()


def solo_learn_moco() -> pl.LightningModule:
    """MoCo as solo-learn writes its methods: momentum pairs, a queue in buffers, a classifier on detached features,
    batches (index, views, targets), and outputs as dicts."""

    class MoCo(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.backbone, self.momentum_backbone = make_backbone(), make_backbone()
            self.projector, self.momentum_projector = nn.Linear(8, 6), nn.Linear(8, 6)
            self.classifier = nn.Linear(8, 2)
            self.register_buffer("queue", nn.functional.normalize(torch.randn(6, 32), dim=0))
            self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))
            self.last_step = 0
            for pair in self.momentum_pairs:
                for online, target in zip(*(part.parameters() for part in pair), strict=True):
                    target.data.copy_(online.data)
                    target.requires_grad = False

        @property
        def momentum_pairs(self) -> list[tuple[nn.Module, nn.Module]]:
            return [(self.backbone, self.momentum_backbone), (self.projector, self.momentum_projector)]

        def forward(self, X: Any) -> dict[str, Any]:
            feats = self.backbone(X)
            return {"logits": self.classifier(feats.detach()), "feats": feats, "z": self.projector(feats)}

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            images, targets = batch
            out = self(images + 0.1 * torch.randn_like(images))
            with torch.no_grad():
                key = self.momentum_projector(self.momentum_backbone(images + 0.1 * torch.randn_like(images)))
                key = nn.functional.normalize(key, dim=1)
            query = nn.functional.normalize(out["z"], dim=1)
            logits = torch.cat([(query * key).sum(1, keepdim=True), query @ self.queue.clone()], 1) / 0.2
            ptr, n = int(self.queue_ptr), len(key)
            self.queue[:, ptr : ptr + n] = key.T
            self.queue_ptr[0] = (ptr + n) % 32
            loss = nn.functional.cross_entropy(logits, torch.zeros(n, dtype=torch.long))
            return loss + nn.functional.cross_entropy(out["logits"], targets)

        def on_train_batch_end(self, *_: Any) -> None:
            if self.trainer.global_step > self.last_step:
                for pair in self.momentum_pairs:
                    for online, target in zip(*(part.parameters() for part in pair), strict=True):
                        target.data.lerp_(online.data, 0.01)
            self.last_step = self.trainer.global_step

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD([p for p in self.parameters() if p.requires_grad], 0.05)
            return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 12)]

    torch.manual_seed(0)
    return MoCo()


LIBRARIES = {
    "lightly": Case(lightly_simsiam, val=None, watch={"encoder": "backbone", "metrics": ["rankme"]}),
    "solo-learn": Case(
        solo_learn_moco,
        val=None,
        watch={"encoder": lambda module, images: module(images)["feats"], "metrics": ["rankme"], "every_n_steps": 3},
    ),
}


@pytest.mark.parametrize("name", LIBRARIES)
def test_modules_of_libraries_train_bit_for_bit(tmp_path: Path, name: str) -> None:
    off, _ = trained(tmp_path / "off", LIBRARIES[name], workers=0, watched=False)
    on, evaluations = trained(tmp_path / "on", LIBRARIES[name], workers=0, watched=True)
    assert evaluations >= 3
    assert same(off, on)


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        yield from HeldOutImages()


@pytest.mark.parametrize("data", [HeldOutImages(), Stream()])
def test_a_generator_that_both_loaders_draw_from(tmp_path: Path, data: Any) -> None:
    def run(*, watched: bool) -> nn.Module:
        shared, module = torch.Generator().manual_seed(3), simclr()
        shuffle = isinstance(data, HeldOutImages)
        held_out = DataLoader(data, 16, shuffle=shuffle, generator=shared)
        train = DataLoader(Augmented(), 16, shuffle=True, generator=shared)
        monitors = [RepresentationMonitor(held_out)] if watched else []
        fit(tmp_path, module, *monitors, train=train, val=None, logger=False)
        return module

    assert same(run(watched=False), run(watched=True))


@pytest.mark.parametrize("broken", ["generators", "modes"])
def test_the_proof_can_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    """Without either half of ``isolated`` the final weights differ, so that the test above can fail."""
    if broken == "generators":
        monkeypatch.setattr(isolation, "_generators", lambda *_: nullcontext())
    else:

        def naive(modules: Any, **_: Any) -> Any:
            for module in modules:
                module.eval()
                module.train()
            return nullcontext()

        monkeypatch.setattr(monitor, "isolated", naive)
    off, on = (trained(tmp_path / f"{w}", RUNS["lightning"], workers=0, watched=w)[0] for w in (False, True))
    assert not same(off, on)
