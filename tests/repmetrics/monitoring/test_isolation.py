"""Final weights are bit for bit those of a run without the monitor, in every kind of run."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from small_runs import LIGHTNING_NOISE, Augmented, HeldOutImages, fit, loader, simclr, two_views
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


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("name", RUNS)
def test_final_weights_are_bit_identical_with_and_without(tmp_path: Path, name: str, workers: int) -> None:
    off, _ = trained(tmp_path / "off", RUNS[name], workers=workers, watched=False)
    on, evaluations = trained(tmp_path / "on", RUNS[name], workers=workers, watched=True)
    assert evaluations >= 3
    assert same(off, on)
    assert [m.training for m in off.modules()] == [m.training for m in on.modules()]


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
