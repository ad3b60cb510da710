"""The experiment on trust: its plan, and one tiny run of each method from data to rows."""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

pytest.importorskip("lightly")
TRUST = Path(__file__).resolve().parents[2] / "benchmarks" / "trust"
sys.path.insert(0, str(TRUST))

import experiment  # noqa: E402
import probes  # noqa: E402
from domains import Domain  # noqa: E402
from methods import METHODS as MODULES  # noqa: E402
from settings import METHODS, RANDOM_RUNS, defaults, plan  # noqa: E402
from signals import fixed_views  # noqa: E402


def drawn_domain(*, orientation_free: bool) -> Domain:
    """Images of four colors with noise."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(160) % 4
    color = torch.rand(4, 3, 1, 1, generator=generator)[labels]
    images = ((color + torch.rand(160, 3, 32, 32, generator=generator)) * 127).to(torch.uint8)
    rows = torch.arange(160)
    return Domain(images, labels, rows, rows[:96], rows[96:], rows[96:], orientation_free)


def worker_in(out: Path, *, orientation_free: bool) -> experiment.Worker:
    options = experiment.Options(out, "cpu", steps=20, batch_size=16, probe_rows=128, few_label_draws=2)
    worker = experiment.Worker(options)
    domain = drawn_domain(orientation_free=orientation_free)
    worker.domains = dict.fromkeys(RANDOM_RUNS, (domain, fixed_views(domain)))
    return worker


def read(out: Path, kind: str, name: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in (out / kind / f"{name}.jsonl").read_text().splitlines()]


def test_plan_has_the_runs_of_the_protocol() -> None:
    runs = plan()
    random = Counter((run.domain, run.method) for run in runs if run.kind == "random")
    assert all(random["cifar10", method] == 16 for method in METHODS)
    assert all(random[domain, method] == 10 for domain in ("cells", "nuclei") for method in METHODS)
    halves = Counter((run.domain, run.method, run.half) for run in runs if run.kind == "random")
    assert all(count in (5, 8) for count in halves.values())
    assert len({run.name for run in runs}) == len(runs)
    assert plan() == runs


@pytest.mark.filterwarnings("ignore")  # lightly and Lightning warn of their own use of torch
@pytest.mark.parametrize("method", METHODS)
def test_each_method_learns_from_every_part(method: str) -> None:
    """The loss is finite, every trained weight has a gradient, and a teacher has none and moves."""
    domain = drawn_domain(orientation_free=False)
    torch.manual_seed(0)
    parts = {"images": domain.images, "rows": domain.train, "epochs": [4], "batch_size": 8, "quarter_turns": True}
    module = MODULES[method](defaults(method), **parts)
    module.__class__ = type(method, (type(module),), {"global_step": 1})  # Lightning's needs a trainer
    teacher = [name for name, p in module.named_parameters() if name.startswith("teacher")]
    before = {name: p.clone() for name, p in module.named_parameters()}
    loss = module.training_step(domain.train[:8], 0)
    loss.backward()
    assert math.isfinite(loss)
    missing = [n for n, p in module.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert all("bias" in name or "pos_embed" in name for name in missing), missing  # before a batch norm
    assert bool(teacher) == (method in ("BYOL", "DINO", "DINOv2"))
    torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.1).step()
    module.training_step(domain.train[:8], 1)
    moved = {name for name, p in module.named_parameters() if not torch.equal(p, before[name])}
    assert not teacher or any(name in moved for name in teacher)
    assert all(p.grad is None for name, p in module.named_parameters() if name in teacher)


@pytest.mark.filterwarnings("ignore")  # lightly and Lightning warn of their own use of torch
@pytest.mark.parametrize("method", ["BYOL"])
def test_a_run_writes_signals_and_probes(tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experiment, "SHARES", (0.5, 1.0))
    run = next(r for r in plan() if r.method == method and r.domain == "nuclei" and r.half == "confirm")
    experiment.train_and_record(worker_in(tmp_path, orientation_free=True), run)
    signals = read(tmp_path, "signals", run.name)
    assert [row["step"] for row in signals] == [0, 10, 20]
    for row in signals:
        for name in ("rankme", "view_retrieval_weak", "view_retrieval_stain", "rotation_probe", "dse", "lidar"):
            assert math.isfinite(row[name]), name  # type: ignore[arg-type]
        assert not any("probe" in name or "knn" in name or "labels" in name for name in row if name not in {
            "rotation_probe", "knn_entropy", "knn_entropy_se"})  # fmt: skip
    assert signals[-1]["loss"] is not None
    assert not (tmp_path / "probes" / f"{run.name}.jsonl").exists()
    sealed = read(tmp_path, "sealed", run.name)
    assert [row["step"] for row in sealed] == [0, 10, 20]
    assert sealed[-1]["probe"] > 0.5  # type: ignore[operator]  # color tells the classes
    assert len(str(sealed[-1]["labels_20"]).split()) == 2
    experiment.tables(tmp_path, tmp_path)
    assert (tmp_path / "signals.csv.gz").exists()
    assert (tmp_path / "sealed.csv.gz").exists()
    assert not (tmp_path / "probes.csv.gz").exists()


def test_steps_fit_into_the_time() -> None:
    timings = [{"step": 0.01, "rest": 4.0}, {"step": 0.03, "rest": 6.0}]
    steps = experiment.steps_that_fit(timings, runs=28, workers=14, seconds=100)
    assert 28 * (steps * 0.02 + 5) / 14 == pytest.approx(100 * experiment.SAFETY, abs=0.5)
    assert experiment.steps_that_fit(timings, runs=1000, workers=1, seconds=1) == experiment.MIN_STEPS


def test_few_label_accuracy_is_leave_one_out() -> None:
    """The closed form equals refitting without each row."""
    generator = torch.Generator().manual_seed(3)
    y = torch.arange(30) % 3
    x = torch.nn.functional.one_hot(y, 3) + torch.randn(30, 3, generator=generator)
    rows = torch.randperm(30, generator=torch.Generator().manual_seed(30))
    x, y = x[rows].double(), y[rows]
    z = (x - x.mean(0)) / x.std(0, correction=0)
    target = torch.nn.functional.one_hot(y, 3).double()

    def left_out(penalty: float) -> torch.Tensor:
        design = torch.cat([torch.ones(30, 1, dtype=z.dtype), z], 1)
        ridge = torch.diag(torch.tensor([0.0, 1, 1, 1], dtype=z.dtype)) * penalty * 30
        scores = []
        for i in range(30):
            keep = torch.arange(30) != i
            fit = torch.linalg.solve(design[keep].T @ design[keep] + ridge, design[keep].T @ target[keep])
            scores.append(design[i] @ fit)
        return torch.stack(scores)

    predictions = [left_out(penalty) for penalty in probes.PENALTIES]
    errors = [float((p - target).square().sum()) for p in predictions]
    expected = float((predictions[errors.index(min(errors))].argmax(1) == y).double().mean())
    inverse = torch.empty_like(rows)
    inverse[rows] = torch.arange(30)
    assert probes.few_label_accuracies(x[inverse], y[inverse], labels=30, draws=1) == [pytest.approx(expected)]


def test_jackknife_error_of_independent_rows() -> None:
    correct = torch.arange(400) % 4 < 3
    value, error = probes.balanced_accuracy(correct, torch.arange(400) // 200, torch.arange(400))
    assert value == 0.75
    assert error == pytest.approx(math.sqrt(0.75 * 0.25 / 400), rel=0.01)
