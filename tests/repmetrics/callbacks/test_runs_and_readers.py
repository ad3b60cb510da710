"""Which run a record is of, in which steps it counts, and what readers of the monitor's keys see."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from small_runs import LIGHTNING_NOISE, HeldOutImages, fit, loader, simclr, trainer
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from repmetrics.callbacks.early_stopping import RepresentationEarlyStopping
from repmetrics.callbacks.key_readers import find_readers
from repmetrics.callbacks.model_checkpoint import LocalMaximaCheckpoint
from repmetrics.callbacks.representation_monitor import RepresentationMonitor
from repmetrics.monitoring.record import read_jsonl, read_runs

pytestmark = [
    *(pytest.mark.filterwarnings(line) for line in LIGHTNING_NOISE),
    pytest.mark.filterwarnings("ignore:.*this fit will run with no optimizer"),
]


def held_out(**options: Any) -> RepresentationMonitor:
    return RepresentationMonitor(HeldOutImages(labels=False, groups=False), **{"on_alarm": "log"} | options)


def steps(monitor: RepresentationMonitor) -> list[int]:
    return [record.step for record in monitor.history]


def rank(monitor: RepresentationMonitor, index: int) -> float:
    return monitor.history[index].measurements["rankme"].value


# ── an evaluation without values ────────────────────────────────────────────────────────────────────────────────────


class TurnsNan(type(simclr())):  # type: ignore[misc]
    """Weights turn NaN in the third epoch."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        return loss * math.nan if self.trainer.current_epoch == 2 else loss


@pytest.mark.parametrize("options", [{}, {"val": None}])
def test_nan_weights_are_ranked_last_and_end_the_run(tmp_path: Path, options: Any) -> None:
    monitor = held_out()
    keeper = ModelCheckpoint(tmp_path / "best", monitor="repmetrics/rankme", mode="max")
    stopping = EarlyStopping("repmetrics/rankme", mode="max", patience=50)
    run = fit(tmp_path, TurnsNan(), monitor, keeper, stopping, max_epochs=6, logger=False, **options)
    assert [record.nonfinite for record in monitor.history] == [0, 0, 0, 96]
    assert stopping.stopped_epoch == 2
    assert torch.isfinite(keeper.best_model_score)
    saved = torch.load(keeper.best_model_path, weights_only=True)["state_dict"]
    assert all(torch.isfinite(value).all() for value in saved.values())
    published = {key: float(value) for key, value in run.callback_metrics.items() if key.startswith("repmetrics/")}
    assert math.isnan(published["repmetrics/rankme"])
    assert math.isnan(published["repmetrics/odcorr_null"])
    assert published["repmetrics/nonfinite"] == 96


def test_a_metric_without_a_value_is_published_as_nan(tmp_path: Path) -> None:
    """LiDAR does not exist once the encoder is constant: its last value must not be read as a new one."""
    monitor = held_out(
        encoder=lambda m, x: m(x) * (m.global_step < 6),
        metrics=["lidar", "rankme"],
        views=2,
        augmentation=lambda images: images + 0.1 * torch.randn_like(images),
    )
    run = fit(tmp_path, simclr(), monitor, logger=False)
    assert math.isnan(float(run.callback_metrics["repmetrics/lidar"]))
    assert float(run.callback_metrics["repmetrics/rankme"]) == 1


class Zero(type(simclr())):  # type: ignore[misc]
    """The last layer is initialized to zero."""

    def __init__(self) -> None:
        super().__init__()
        nn.init.zeros_(self.backbone[-1].weight)
        nn.init.zeros_(self.backbone[-1].bias)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        images, _ = batch
        return (self.backbone(images) - images.flatten(1)[:, :8]).square().mean()


def test_a_key_that_is_nan_at_first_can_be_monitored(tmp_path: Path) -> None:
    keys = ["repmetrics/odcorr", "repmetrics/odcorr_null"]
    monitor = held_out(metrics=["odcorr"])
    stops = [EarlyStopping(key, mode="min", patience=9) for key in keys]
    fit(tmp_path, Zero(), monitor, *stops, logger=False)
    assert math.isnan(monitor.history[0].measurements["odcorr"].value)
    assert [float(stop.best_score) for stop in stops] == pytest.approx(
        [min(r.scalars()[key] for r in monitor.history[1:]) for key in keys], rel=1e-6
    )
    with pytest.raises(ValueError, match="'repmetrics/odcorr_nul', which will never be logged"):
        fit(tmp_path, Zero(), held_out(), EarlyStopping("repmetrics/odcorr_nul"), logger=False)


# ── steps that Lightning does not count ─────────────────────────────────────────────────────────────────────────────


class OwnOptimizer(type(simclr())):  # type: ignore[misc]
    """Manual optimization with an optimizer that Lightning does not know, ``None`` for updates by hand."""

    automatic_optimization = False

    def __init__(self, optimizer: Any = torch.optim.SGD) -> None:
        super().__init__()
        self.own = None if optimizer is None else optimizer(self.backbone.parameters(), 0.05)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.backbone.zero_grad()
        self.manual_backward(loss)
        if self.own is not None:
            self.own.step()
        else:
            with torch.no_grad():
                for parameter in self.backbone.parameters():
                    parameter -= 0.05 * parameter.grad
        return loss

    def configure_optimizers(self) -> None:
        return None


COUNTED = "trainer.global_step stays 0, .* repmetrics counts batches instead"


@pytest.mark.parametrize(
    ("optimizer", "options", "expected"),
    [
        (torch.optim.SGD, {"every_n_steps": 4}, [0, 4, 8, 12]),
        (torch.optim.SGD, {}, [0, 6, 12]),
        (None, {}, [0, 6, 12]),
        (None, {"val": None}, [0, 6, 12]),
    ],
)
def test_batches_are_counted_where_lightning_counts_no_step(
    tmp_path: Path, optimizer: Any, options: dict[str, Any], expected: list[int]
) -> None:
    val = {"val": options.pop("val")} if "val" in options else {}
    monitor = held_out(**options)
    with pytest.warns(UserWarning, match=COUNTED) as caught:
        run = fit(tmp_path, OwnOptimizer(optimizer), monitor, **val)
    assert sum("counts batches" in str(w.message) for w in caught) == 1
    assert run.global_step == 0
    assert steps(monitor) == expected
    state = json.loads(json.dumps(monitor.state_dict()))
    path = tmp_path / "resumed.ckpt"
    run.save_checkpoint(path)
    again = held_out(**options)
    fit(tmp_path, OwnOptimizer(optimizer), again, ckpt_path=path, max_epochs=3, **val)
    assert [r["step"] for r in state["history"]] == expected
    assert steps(again) == [*expected, *([16] if "every_n_steps" in options else []), 18]


def test_early_stopping_sees_every_epoch_of_such_a_run(tmp_path: Path) -> None:
    monitor, stopping = held_out(), EarlyStopping("repmetrics/rankme", mode="max", patience=99)
    with pytest.warns(UserWarning, match=COUNTED):
        fit(tmp_path, OwnOptimizer(), monitor, stopping, max_epochs=3, logger=False)
    assert float(stopping.best_score) == pytest.approx(max(rank(monitor, i) for i in (1, 2, 3)), rel=1e-6)


def test_accumulation_by_hand_is_counted_in_optimizer_steps(tmp_path: Path) -> None:
    class EveryFourth(OwnOptimizer):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            self.manual_backward(type(simclr()).training_step(self, batch, batch_idx))
            if batch_idx % 4 == 3:
                self.optimizers().step()
                self.optimizers().zero_grad()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.backbone.parameters(), 0.05)

    monitor = held_out(every_n_steps=1)
    fit(tmp_path, EveryFourth(), monitor, train=loader(192), max_epochs=1, logger=False)
    assert steps(monitor) == [0, 1, 2, 3]


# ── another run ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_fit_that_is_no_resume_starts_anew(tmp_path: Path) -> None:
    """The same callbacks in a crashed fit, a whole one and another: each record and decision is of its own fit."""

    class Broken(type(simclr())):  # type: ignore[misc]
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            raise RuntimeError("out of memory")

    monitor = held_out(on_alarm="warn")
    stopping = RepresentationEarlyStopping("odcorr", patience=1, min_delta_errors=0)  # a rank may fall first
    keeper = LocalMaximaCheckpoint(metric="rankme", k=9)
    with pytest.raises(RuntimeError, match="out of memory"):
        fit(tmp_path / "a", Broken(), stopping, monitor, keeper, logger=False)
    first = fit(tmp_path / "b", simclr(collapse=True, lr=0.1), stopping, monitor, keeper, logger=False, max_epochs=9)
    before, kept = monitor.history, dict(keeper.kept)
    assert stopping.stopped_step == first.global_step
    other = simclr()
    other.backbone[-1].weight.data *= torch.logspace(0, -3, 8)[:, None]
    fresh = held_out()
    fit(tmp_path / "c", other, stopping, monitor, keeper, logger=False, max_epochs=1)
    fit(tmp_path / "d", simclr(), fresh, logger=False, max_epochs=1)  # neither stopped nor kept by the others
    assert steps(monitor) == [0, 6]
    assert before is not monitor.history
    assert len(before) > 2
    assert rank(monitor, 0) < 0.9 * before[0].measurements["rankme"].value
    assert stopping.stopped_step is None
    assert {path.parent for path in keeper.kept.values()} == {tmp_path / "c" / "maxima"}
    assert all(path.is_file() for path in kept.values())
    assert len({record.run for record in (*before, *monitor.history)}) == 2


def test_a_listener_of_an_earlier_fit_does_not_decide(tmp_path: Path) -> None:
    monitor, old = held_out(), RepresentationEarlyStopping("rankme", patience=1)
    fit(tmp_path, simclr(), old, monitor, logger=False, max_epochs=1)
    fit(tmp_path, simclr(collapse=True, lr=0.1), monitor, logger=False, max_epochs=5)
    assert old.stopped_step is None
    assert steps(monitor)[-1] == 30


def test_checkpoints_of_another_run_keep_their_files(tmp_path: Path) -> None:
    paths = []
    for _ in range(2):
        keeper = LocalMaximaCheckpoint(tmp_path / "maxima", metric="rankme")
        fit(tmp_path, simclr(), held_out(), keeper, logger=False, max_epochs=1)
        paths += [path.name for path in keeper.kept.values()]
    assert paths == ["step=6.ckpt", "step=6-v1.ckpt"]
    assert len(list((tmp_path / "maxima").iterdir())) == 2


@pytest.mark.parametrize("namespace", ["lightning.pytorch", "pytorch_lightning"])
@pytest.mark.filterwarnings("ignore:.*lr_find.*|.*LR finder.*|.*log_every_n_steps.*|.*tuner.*")
def test_a_fit_after_the_tuner(tmp_path: Path, namespace: str) -> None:
    """The tuner closes the logger's event file, and puts back the state of the callbacks."""
    import importlib

    tuner = importlib.import_module(f"{namespace}.tuner").Tuner
    logger = importlib.import_module(f"{namespace}.loggers").TensorBoardLogger
    monitor, module = held_out(), simclr(namespace)
    run = trainer(tmp_path, namespace, callbacks=[monitor], logger=logger(tmp_path))
    module.lr = 0.05
    tuner(run).lr_find(module, loader(), num_training=4)
    run.fit(module, loader())
    assert steps(monitor) == [0, 6, 12]
    assert [entry["step"] for entry in read_jsonl(Path(run.log_dir, "measurements.jsonl"))] == [0, 6, 12]


def test_two_runs_and_a_resume_in_one_folder(tmp_path: Path) -> None:
    """Three epochs, another run, then the first is resumed from its first epoch: entries of the others remain."""
    first, second, third = held_out(), held_out(), held_out(metrics=["rankme", "cka_drift"])
    keeper = ModelCheckpoint(tmp_path / "kept", save_top_k=-1, filename="{step}")
    fit(tmp_path, simclr(), first, keeper, logger=False, max_epochs=3)
    fit(tmp_path, simclr(lr=0.01), second, logger=False, max_epochs=2)
    path = tmp_path / "measurements.jsonl"
    assert read_jsonl(path) == [record.to_json() for record in second.history]
    fit(tmp_path, simclr(), third, ckpt_path=tmp_path / "kept" / "step=6.ckpt", logger=False, max_epochs=2)
    runs = read_runs(path)
    assert list(runs) == [second.history[0].run, first.history[0].run]
    assert steps(third) == [0, 6, 12]
    assert runs[first.history[0].run] == [record.to_json() for record in third.history]
    assert len(path.read_text().splitlines()) == 6
    assert "cka_drift" in third.history[-1].measurements  # compared with the checkpoint's features
    elsewhere = held_out()
    fit(
        tmp_path,
        simclr(),
        elsewhere,
        ckpt_path=tmp_path / "kept" / "step=6.ckpt",
        logger=TensorBoardLogger(tmp_path),
        max_epochs=2,
    )
    new = next((tmp_path / "lightning_logs").rglob("measurements.jsonl"))
    assert [entry["step"] for entry in read_jsonl(new)] == [0, 6, 12]  # the whole run


# ── readers of keys ─────────────────────────────────────────────────────────────────────────────────────────────────


class Plateau(type(simclr())):  # type: ignore[misc]
    """ReduceLROnPlateau on a key of the monitor."""

    def __init__(self, **config: Any) -> None:
        super().__init__()
        self.config, self.read = config, []

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), 0.05)
        scheduler = ReduceLROnPlateau(optimizer, mode="max", patience=99)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "monitor": "repmetrics/rankme", **self.config},
        }

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        self.read.append((self.global_step, float(metric)))
        scheduler.step(metric)


class Reader(Callback):
    """Reads a key where a pruning callback does; its name is in a container, as Ray Tune's."""

    def __init__(self) -> None:
        self.metrics = {"rank": "repmetrics/rankme"}
        self.read: list[tuple[int, float]] = []

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if not trainer.sanity_checking:
            self.read.append((trainer.global_step, float(trainer.callback_metrics["repmetrics/rankme"])))


@pytest.mark.parametrize(
    ("config", "fits", "expected", "options"),
    [
        ({}, {}, range(6, 73, 6), {}),
        ({}, {"check_val_every_n_epoch": 5}, range(6, 73, 6), {}),
        ({}, {"val": None}, range(6, 73, 6), {"every_n_steps": 100}),
        ({"interval": "step", "frequency": 4}, {"val": None}, [s for s in range(73) if s % 6 == 4], {}),
    ],
)
def test_a_scheduler_reads_new_values(tmp_path: Path, config: Any, fits: Any, expected: Any, options: Any) -> None:
    """12 epochs of 6 steps; by default evaluations are 7 steps apart, so that every other epoch would be skipped."""
    monitor, module = held_out(**options), Plateau(**config)
    fit(tmp_path, module, monitor, max_epochs=12, logger=False, **fits)
    values = {record.step: record.measurements["rankme"].value for record in monitor.history}
    assert [step for step, _ in module.read] == list(expected)
    assert [value for _, value in module.read] == pytest.approx([values[step] for step in expected], rel=1e-6)


@pytest.mark.parametrize("options", [{}, {"every_n_steps": 100}])
def test_a_callback_that_names_a_key_reads_new_values(tmp_path: Path, options: Any) -> None:
    monitor, reader = held_out(**options), Reader()
    every = ModelCheckpoint(tmp_path / "c", monitor="repmetrics/odcorr", every_n_train_steps=5, save_top_k=-1)
    fit(tmp_path, simclr(), monitor, reader, every, max_epochs=4, logger=False, val_check_interval=0.5)
    values = {record.step: record.measurements["rankme"].value for record in monitor.history}
    assert [step for step, _ in reader.read] == list(range(3, 25, 3))
    assert [value for _, value in reader.read] == pytest.approx([values[step] for step, _ in reader.read], rel=1e-6)
    assert {5, 10, 20} <= set(values)
    odcorr = {record.step: record.measurements["odcorr"].value for record in monitor.history}
    assert sorted(map(float, every.best_k_models.values())) == pytest.approx(
        sorted(odcorr[step] for step in (5, 10, 15, 20)), rel=1e-6
    )


def test_an_unknown_key_of_a_scheduler_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="ReduceLROnPlateau monitors 'repmetrics/rank', which will never be logged"):
        fit(tmp_path, Plateau(monitor="repmetrics/rank"), held_out(), logger=False)


def test_a_text_that_is_no_key_is_no_reader(tmp_path: Path) -> None:
    keys = {"repmetrics/rankme"}
    folder = ModelCheckpoint(dirpath="repmetrics/run")
    assert find_readers([folder, Reader()], [], keys) == find_readers([Reader()], [], keys) != []
