"""eva's protocols: their constants, their training loop, and what is selected on which split."""

from __future__ import annotations

import math

import pytest
import torch
from torchmetrics.functional.classification import multiclass_accuracy

from repmetrics.data.features import Features
from repmetrics.probes import eva
from repmetrics.probes.common import _balanced_accuracy
from repmetrics.probes.eva import Protocol, SeedAccuracies, eva_v0_4, paper


def blobs(rows: int, *, classes: int = 3, seed: int = 0, spread: float = 1.0, width: int = 8) -> Features:
    generator = torch.Generator().manual_seed(seed)
    centers = 2 * torch.randn(classes, width, generator=torch.Generator().manual_seed(99))
    labels = torch.arange(rows) % classes
    values = centers[labels] + spread * torch.randn(rows, width, generator=generator)
    return Features(values, None, labels)


@pytest.mark.parametrize(("rows", "patience"), [(268, 1250), (100_000, 7), (2175, 278), (262_144, 3)])
def test_patience_of_v0_4_follows_its_rule(rows: int, patience: int) -> None:
    # BACH, CRC, MHIST and PCam as eva 0.4's configurations state them
    assert eva_v0_4().patience_for(rows) == patience


def test_constants_of_the_paper() -> None:
    assert (paper(4096).lr, paper(256).lr) == (0.01, 0.000625)
    assert paper(4096, patience=24).patience_for(100_000) == 24
    assert (paper().max_steps, eva_v0_4().max_steps) == (12_500, 12_500)
    optimizer, schedule = paper().optimizer(torch.nn.Linear(2, 2))
    assert isinstance(optimizer, torch.optim.SGD)
    assert isinstance(schedule, torch.optim.lr_scheduler.CosineAnnealingLR)
    assert (optimizer.defaults["momentum"], optimizer.defaults["weight_decay"]) == (0.9, 0)
    optimizer, schedule = eva_v0_4().optimizer(torch.nn.Linear(2, 2))
    assert isinstance(optimizer, torch.optim.AdamW)
    assert isinstance(schedule, torch.optim.lr_scheduler.ConstantLR)
    optimizer.step()
    rates = []
    for _ in range(7):
        rates += schedule.get_last_lr()
        schedule.step()
    assert rates == pytest.approx([1e-4] * 5 + [3e-4] * 2)


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("make", [paper, eva_v0_4])
def test_separable_classes_are_learned(make: object, classes: int) -> None:
    protocol = Protocol("paper", 64, 0.05) if make is paper else Protocol("v0.4", 64, 0.01)
    protocol = protocol._replace(max_steps=300)
    train, val, test = (blobs(n, classes=classes, seed=s, spread=0.3) for n, s in ((400, 0), (200, 1), (200, 2)))
    on_val, on_test = eva.eva_probe(train, val, test=test, protocol=protocol, runs=2)
    assert on_val.mean > 0.99
    assert on_test.mean > 0.97
    assert (on_val.used_for_selection, on_test.used_for_selection) == (True, False)


def test_random_labels_give_chance_on_test() -> None:
    train, val, test = (
        Features(torch.randn(2000, 4, generator=torch.Generator().manual_seed(s)), None, torch.arange(2000) % 2)
        for s in range(3)
    )
    _, on_test = eva.eva_probe(train, val, test=test, protocol=eva_v0_4()._replace(max_steps=200), runs=3)
    assert on_test.mean == pytest.approx(0.5, abs=0.04)  # 3.5 standard errors of 2000 coin flips


def test_runs_differ_by_their_seed_and_repeat() -> None:
    data = blobs(90, spread=4.0), blobs(90, seed=1, spread=4.0)
    protocol = Protocol("v0.4", 32, 0.01, max_steps=20)
    first, again = (eva.eva_probe(*data, protocol=protocol, runs=3)[0] for _ in range(2))
    assert first == again
    assert len(set(first.values)) > 1


def test_training_stops_when_patience_runs_out(monkeypatch: pytest.MonkeyPatch) -> None:
    accuracies: list[float] = []
    script = iter([0.5, 0.7, 0.7, 0.6, 0.9])

    def scripted(*args: object, **kwargs: object) -> float:
        accuracies.append(next(script))
        return accuracies[-1]

    monkeypatch.setattr(eva, "_balanced_accuracy", scripted)
    train = blobs(30)
    data = (train.values, torch.arange(30) % 3)
    eva._train(data, data, classes=3, protocol=eva_v0_4(patience=2), seed=0)
    assert accuracies == [0.5, 0.7, 0.7, 0.6]  # an equal value is no improvement


def test_the_kept_head_is_that_of_the_best_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    heads: list[torch.Tensor] = []
    script = iter([0.5, 0.9, 0.6])

    def scripted(head: torch.nn.Linear, *args: object, **kwargs: object) -> float:
        heads.append(head.weight.detach().clone())
        return next(script)

    monkeypatch.setattr(eva, "_balanced_accuracy", scripted)
    train = blobs(30)
    data = (train.values, torch.arange(30) % 3)
    head = eva._train(data, data, classes=3, protocol=eva_v0_4()._replace(max_steps=3), seed=0)
    assert torch.equal(head.weight, heads[1])
    assert not torch.equal(heads[1], heads[2])


def test_balanced_accuracy_is_torchmetrics_macro_accuracy() -> None:
    generator = torch.Generator().manual_seed(0)
    predicted, labels = (torch.randint(0, 4, (200,), generator=generator) for _ in range(2))
    expected = multiclass_accuracy(predicted, labels, num_classes=4, average="macro")
    value = _balanced_accuracy((predicted == labels).numpy(), labels.numpy(), 4)
    assert value == pytest.approx(float(expected), abs=1e-6)  # torchmetrics divides in float32


def test_no_spread_without_a_second_run() -> None:
    assert math.isnan(SeedAccuracies("val", (0.5,), True).sd)


@pytest.mark.parametrize(
    ("train", "val", "message"),
    [
        (blobs(9)._replace(labels=None), blobs(9), "the train split has no labels"),
        (blobs(9), blobs(9, width=5), r"val features must be \(N, 8\), got \(9, 5\)"),
        (blobs(9), blobs(9, classes=2), r"every split needs the classes \[0, 1, 2\], val has \[0, 1\]"),
        (blobs(9, classes=1), blobs(9, classes=1), r"every split needs the classes \[0\]"),
    ],
)
def test_splits_that_do_not_fit(train: Features, val: Features, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        eva.eva_probe(train, val, protocol=eva_v0_4())
