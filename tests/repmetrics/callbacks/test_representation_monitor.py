"""RepresentationMonitor in real Trainers: what it logs, where and when, and that training does not change."""

from __future__ import annotations

import importlib
import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from absent_packages import run_code
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from small_runs import LIGHTNING_NOISE, HeldOutImages, fit, loader, make_backbone, simclr, trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.data import DataLoader

from repmetrics.callbacks.representation_monitor import RepresentationMonitor
from repmetrics.data.features import embed
from repmetrics.data.views import random_view
from repmetrics.functional.drift import cka_drift
from repmetrics.measurement.measure import measure
from repmetrics.monitoring.isolation import isolated
from repmetrics.monitoring.monitor import VIEWS, Monitor, add_views

pytestmark = [pytest.mark.filterwarnings(line) for line in LIGHTNING_NOISE]


def held_out(**options: Any) -> RepresentationMonitor:
    return RepresentationMonitor(HeldOutImages(), **options)


def steps(monitor: RepresentationMonitor) -> list[int]:
    return [record.step for record in monitor.history]


# ── what and when ───────────────────────────────────────────────────────────────────────────────────────────────


def test_the_last_row_is_what_measuring_the_final_weights_gives(tmp_path: Path) -> None:
    module, monitor = simclr(), held_out()
    fit(tmp_path, module, monitor)
    module.eval()
    features = embed(module, DataLoader(HeldOutImages(), batch_size=64))
    expected = measure(features.values, groups=features.groups, jackknife="first_order")
    assert features.groups is not None
    for name, measurement in expected.items():  # the same rows, summed by fold: the probe needs these sums
        got = monitor.history[-1].measurements[name]
        assert (got.value, got.standard_error) == pytest.approx((measurement.value, measurement.standard_error))
        assert got.replicates == pytest.approx(measurement.replicates)
    assert monitor.history[-1].measurements["linear_probe"].standard_error is not None


@pytest.mark.parametrize("namespace", ["lightning.pytorch", "pytorch_lightning"])
def test_both_namespaces(tmp_path: Path, namespace: str) -> None:
    monitor = held_out()
    run = fit(tmp_path, simclr(namespace), monitor)
    assert steps(monitor) == [0, 6, 12]
    assert float(run.callback_metrics["repmetrics/rankme"]) == pytest.approx(
        monitor.history[-1].measurements["rankme"].value,
        rel=1e-6,  # callback_metrics are float32
    )


def test_without_a_validation_loop(tmp_path: Path) -> None:
    monitor = held_out()
    fit(tmp_path, simclr(), monitor, val=None, max_epochs=3)
    assert steps(monitor) == [0, 6, 12, 18]
    assert [record.epoch for record in monitor.history] == [0, 0, 1, 2]


def test_validation_inside_an_epoch(tmp_path: Path) -> None:
    monitor = held_out()
    keeper = ModelCheckpoint(tmp_path, monitor="repmetrics/rankme", mode="max", save_top_k=-1)
    fit(tmp_path, simclr(), monitor, keeper, max_epochs=2, val_check_interval=0.5)
    assert steps(monitor) == [0, 3, 6, 9, 12]
    assert len(keeper.best_k_models) == 4


def test_several_validation_loaders_are_one_validation(tmp_path: Path) -> None:
    monitor = held_out()
    fit(tmp_path, simclr(), monitor, val=[loader(32), loader(32)])
    assert steps(monitor) == [0, 6, 12]


def test_by_steps_with_accumulation(tmp_path: Path) -> None:
    monitor = held_out(every_n_steps=2)
    stopping = EarlyStopping("repmetrics/rankme", mode="max", patience=100, check_on_train_epoch_end=True)
    fit(tmp_path, simclr(), stopping, monitor, accumulate_grad_batches=2, max_epochs=3)
    assert steps(monitor) == [0, 2, 3, 4, 6, 8, 9]  # EarlyStopping reads at the epochs' ends: 3, 6, 9


def test_by_steps_with_two_optimizers(tmp_path: Path) -> None:
    """Manual optimization raises global_step by two per batch: multiples of three are passed."""

    class TwoOptimizers(type(simclr())):  # type: ignore[misc]
        automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            for optimizer in self.optimizers():
                loss = self.backbone(batch[0]).square().mean()
                optimizer.zero_grad()
                self.manual_backward(loss)
                optimizer.step()

        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(part.parameters(), 0.01) for part in (self.backbone, self.projector)]

    monitor = held_out(every_n_steps=3)
    fit(tmp_path, TwoOptimizers(), monitor, max_epochs=1, val=None)
    assert steps(monitor) == [0, 4, 6, 10, 12]
    assert monitor.history[-1].loss is None
    with pytest.raises(ValueError, match=r"EarlyStopping monitors 'repmetrics/loss', which will never be logged"):
        fit(tmp_path, TwoOptimizers(), held_out(), EarlyStopping("repmetrics/loss"))


def test_a_loss_returned_from_manual_optimization_is_logged(tmp_path: Path) -> None:
    class ByHand(type(simclr())):  # type: ignore[misc]
        automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            self.optimizers().zero_grad()
            self.manual_backward(loss)
            self.optimizers().step()
            return {"loss": loss, "features": batch[0]}

    monitor, stopping = held_out(), EarlyStopping("repmetrics/loss", patience=9)
    run = fit(tmp_path, ByHand(), monitor, stopping)
    assert all(record.loss is not None for record in monitor.history[1:])
    assert torch.isfinite(stopping.best_score)
    assert "repmetrics/loss" in laid_out(run.log_dir)


def laid_out(log_dir: str) -> str:
    """The layout in a run's event file, as text."""
    events = EventAccumulator(log_dir)
    events.Reload()
    (layout,) = events.Tensors("custom_scalars__config__")
    return layout.tensor_proto.SerializeToString().decode(errors="ignore")


def test_two_monitors_share_one_board_and_keep_files_apart(tmp_path: Path) -> None:
    student, teacher = held_out(encoder="backbone"), held_out(encoder="teacher", prefix="teacher")
    stopping = EarlyStopping("teacher/rankme", mode="max", patience=9)
    run = fit(tmp_path, simclr(), student, teacher, stopping)
    board = laid_out(run.log_dir)
    assert all(
        f"Rank and probe ({prefix})" in board and f"{prefix}/rankme_lower" in board
        for prefix in ("repmetrics", "teacher")
    )
    for monitor, name in ((student, "measurements.jsonl"), (teacher, "measurements-teacher.jsonl")):
        lines = [json.loads(line) for line in Path(run.log_dir, name).read_text().splitlines()]
        assert [line["step"] for line in lines] == steps(monitor)
        assert lines[-1]["measurements"]["rankme"]["value"] == monitor.history[-1].measurements["rankme"].value


def test_layers_are_logged_apart(tmp_path: Path) -> None:
    monitor = held_out(
        encoder=lambda module, images: module.projector(module.backbone(images)), layers=["backbone", "backbone.1"]
    )
    run = fit(tmp_path, simclr(), monitor)
    measured = monitor.history[-1].measurements
    assert (measured["rankme"].d, measured["backbone/rankme"].d, measured["backbone.1/rankme"].d) == (6, 8, 16)
    assert "repmetrics/backbone.1/rankme" in run.callback_metrics


def test_a_path_follows_torch_compile(tmp_path: Path) -> None:
    plain, compiled = held_out(encoder="backbone"), held_out(encoder="backbone")
    fit(tmp_path, simclr(), plain, max_epochs=1, limit_train_batches=1)
    module = simclr()
    module.backbone = torch.compile(module.backbone, backend="eager")
    fit(tmp_path, module, compiled, max_epochs=1, limit_train_batches=1)
    assert compiled.history[0].measurements == plain.history[0].measurements


def test_separate_probe_data(tmp_path: Path) -> None:
    monitor = RepresentationMonitor(HeldOutImages(labels=False), probe_data=HeldOutImages(64, groups=False))
    fit(tmp_path, simclr(), monitor)
    measured = monitor.history[-1].measurements
    assert (measured["rankme"].n, measured["linear_probe"].n) == (96, 64)
    assert measured["linear_probe"].standard_error is None
    assert "no group ids" in str(measured["linear_probe"].reason)


def test_the_null_floor_of_the_probe_is_that_of_color_statistics(tmp_path: Path) -> None:
    """The labels are the sign of channel 0's mean: color predicts them, an encoder without color does not."""
    blind = held_out(
        encoder=lambda module, images: images.flatten(2)[..., 1:].sub(images.flatten(2).mean(2, True)).flatten(1)
    )
    run = fit(tmp_path, simclr(), blind, precision="bf16-mixed")
    for record in blind.history:
        probe = record.measurements["linear_probe"]
        assert probe.details["null_floor"] > 0.9
        assert probe.value < 0.7
    assert float(run.callback_metrics["repmetrics/linear_probe_null"]) > 0.9


def test_probe_data_without_labels_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"probe_data= is for the probes, and its batches hold no labels"):
        fit(tmp_path, simclr(), held_out(probe_data=HeldOutImages(labels=False)))


def test_no_labels_no_probe(tmp_path: Path) -> None:
    monitor = RepresentationMonitor(HeldOutImages(labels=False, groups=False))
    run = fit(tmp_path, simclr(), monitor)
    assert not {"repmetrics/linear_probe", "repmetrics/rankme_se"} & set(run.callback_metrics)


def test_validate_alone_returns_the_values(tmp_path: Path) -> None:
    monitor = held_out()
    module = simclr()
    (logged,) = trainer(tmp_path, callbacks=[monitor]).validate(module, loader(32), verbose=False)
    module.eval()
    features = embed(module, DataLoader(HeldOutImages(), batch_size=64))
    assert logged["repmetrics/rankme"] == pytest.approx(measure(features.values)["rankme"].value, rel=1e-6)
    assert monitor.history == []


def test_fast_dev_run_only_checks_shapes(tmp_path: Path) -> None:
    monitor = held_out()
    fit(tmp_path, simclr(), monitor, fast_dev_run=True)
    assert monitor.history == []


# ── metrics of several evaluations and of several views ───────────────────────────────────────────────────────────────


def noisy(images: Tensor) -> Tensor:
    """An augmentation that draws from all three global generators."""
    return images + 0.1 * torch.randn_like(images) + 0.01 * (float(np.random.standard_normal()) + random.random())  # noqa: NPY002


EVERY = {"metrics": ["rankme", "cka_drift", "lidar", "alignment"], "views": 3, "augmentation": noisy}


@pytest.mark.parametrize("workers", [0, 2])
def test_drift_and_views_leave_the_weights_bit_identical(tmp_path: Path, workers: int) -> None:
    final = []
    monitor = held_out(num_workers=workers, layers=["backbone.1"], **EVERY)
    for callbacks in ([], [monitor]):
        module = simclr()
        fit(tmp_path, module, *callbacks, train=loader(workers=workers), logger=False)
        final.append(module.state_dict())
    assert {"cka_drift", "lidar", "backbone.1/cka_drift", "backbone.1/lidar"} <= set(monitor.history[-1].measurements)
    assert all(torch.equal(final[0][key], final[1][key]) for key in final[0])


def test_drift_compares_two_evaluations_and_the_first_has_none(tmp_path: Path) -> None:
    kept: list[Tensor] = []
    module = simclr()

    def keep(record: Any) -> None:
        with isolated([module]):
            kept.append(embed(module, DataLoader(HeldOutImages(), batch_size=64)).values)

    monitor = held_out(metrics=["cka_drift"], layers=["backbone.1"], on_measure=keep)
    stopping = EarlyStopping("repmetrics/cka_drift", mode="max", patience=9)
    run = fit(tmp_path, module, stopping, monitor)
    first, *later = monitor.history
    assert not any("cka_drift" in name for name in first.measurements)
    for record, before, now in zip(later, kept[:-1], kept[1:], strict=True):
        drift = record.measurements["cka_drift"]
        assert drift.value == float(cka_drift(now, previous=before)) < 1
        assert drift.standard_error is not None
        assert record.measurements["backbone.1/cka_drift"].d == 16
    events = EventAccumulator(run.log_dir)
    events.Reload()
    assert [point.step for point in events.Scalars("repmetrics/cka_drift")] == [6, 12]
    layout = events.Tensors("custom_scalars__config__")[0].tensor_proto.SerializeToString()
    assert b"repmetrics/cka_drift_lower" in layout  # laid out at the start, with its band
    state = torch.load(run.checkpoint_callback.best_model_path, weights_only=True)
    assert set(state["callbacks"][monitor.state_key]) == {"history", "timing"}  # no features in a checkpoint
    json.dumps(state["callbacks"][monitor.state_key])


def test_drift_continues_after_a_resume(tmp_path: Path) -> None:
    first, second = held_out(metrics=["cka_drift"]), held_out(metrics=["cka_drift"])
    path = fit(tmp_path, simclr(), first, val=None).checkpoint_callback.best_model_path
    stopping = EarlyStopping("repmetrics/cka_drift", mode="max", patience=9)
    with pytest.warns(UserWarning, match="neither better higher nor lower"):
        trainer(tmp_path, callbacks=[second, stopping], max_epochs=4).fit(simclr(), loader(), ckpt_path=path)
    assert ["cka_drift" in record.measurements for record in second.history] == [False, True, True, True, True]


def test_drift_skips_an_evaluation_that_was_not_finite() -> None:
    module, monitor = simclr(), Monitor(metrics=["cka_drift"])
    monitor.measure(module, HeldOutImages())
    monitor.measure(module, HeldOutImages(), path=lambda m, x: m(x) * math.nan, step=1)
    assert monitor.measure(module, HeldOutImages(), step=2).measurements["cka_drift"].value == pytest.approx(1)
    other = monitor.measure(module, HeldOutImages(64), step=3).measurements["cka_drift"]
    assert math.isnan(other.value)
    assert other.reason == "drift compares the same rows, got 64 and 96"


class Pictures(HeldOutImages):
    """Held-out images as a decoder gives them, or scaled to 0 … 1."""

    def __init__(self, *, dtype: torch.dtype) -> None:
        super().__init__(labels=False)
        generator = torch.Generator().manual_seed(3)
        small = torch.randint(0, 256, (96, 3, 4, 4), dtype=torch.uint8, generator=generator)
        self.images = small if dtype == torch.uint8 else small.to(dtype) / 255


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_lidar_and_alignment_are_those_of_the_views(dtype: torch.dtype) -> None:
    module = simclr()
    seen: list[Tensor] = []

    def watching(m: Any, images: Tensor) -> Any:
        seen.append(images)
        return m(images.float())

    data = Pictures(dtype=dtype)
    monitor = Monitor(metrics=["lidar", "rankme", "alignment"], views=4)
    twice = [monitor.measure(module, data, path=watching, step=step).measurements for step in (0, 1)]
    assert twice[0] == twice[1]  # the same views at each evaluation
    plain, *views = seen[:5]  # of the first batch
    assert torch.equal(plain, data.images[:64])
    assert all(view.dtype == dtype and not torch.equal(view, plain) for view in views)
    rows = [torch.stack([*seen[i + 1 : i + 5]], dim=1).flatten(0, 1) for i in (0, 5)]
    module.eval()
    with torch.no_grad():
        features = torch.cat([module(batch.float()) for batch in rows])
    ids = [row // 4 for row in range(4 * 96)]
    slides = [i // 8 for i in ids]
    expected = measure(features, views=ids, groups=slides, metrics=["lidar", "alignment"])
    for name, measurement in expected.items():
        measured = twice[0][name]
        # one forward pass over all views, or one per view: float32 sums differ in their last bits
        assert measured.value == pytest.approx(measurement.value, rel=1e-4)
        assert measured.standard_error == pytest.approx(measurement.standard_error, rel=1e-2)
        assert (measured.groups, measured.details["views"], measured.n) == (12, 4, 384)
    alone, among_others = twice[0]["rankme"], Monitor().measure(module, data, path=watching).measurements["rankme"]
    assert alone.value == pytest.approx(among_others.value, rel=1e-12)  # updated from another decomposition
    assert alone.standard_error == pytest.approx(among_others.standard_error, rel=1e-9)


def test_views_do_not_repeat_from_batch_to_batch() -> None:
    seen: list[Tensor] = []
    images = torch.zeros(8, 3, 4, 4)
    monitor = Monitor(metrics=["lidar"], views=2, augmentation=lambda x: seen.append(noisy(x)) or seen[-1])
    monitor.measure(simclr(), [images, images])
    assert len(seen) == 4
    assert not any(torch.equal(a, b) for i, a in enumerate(seen) for b in seen[:i])


def test_views_are_the_same_on_any_number_of_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    batches = list(torch.rand(5, 4, 3, 6, 6, generator=torch.Generator().manual_seed(0)))

    def flat(images: Tensor) -> dict[str, Tensor]:
        return {"": images.flatten(1)}

    def views(rank: int, world: int) -> list[Tensor]:
        monkeypatch.setattr("repmetrics.monitoring.monitor.rank_and_world", lambda: (rank, world))
        encode = add_views(flat, flat, count=2, augmentation=random_view, together=False)
        return [encode(batch)[VIEWS] for batch in batches[rank::world]]

    alone = views(0, 1)
    for rank in (0, 1):
        assert all(torch.equal(a, b) for a, b in zip(views(rank, 2), alone[rank::2], strict=True))


def test_views_and_probes_on_separate_probe_data() -> None:
    options = {**EVERY, "probe_data": HeldOutImages(64)}
    measured = Monitor(**options).measure(simclr(), HeldOutImages(labels=False)).measurements
    alone = Monitor(probe_data=HeldOutImages(64)).measure(simclr(), HeldOutImages(labels=False)).measurements
    assert measured["linear_probe"] == alone["linear_probe"]
    both = Monitor(**EVERY).measure(simclr(), HeldOutImages()).measurements
    assert both["linear_probe"] == Monitor().measure(simclr(), HeldOutImages()).measurements["linear_probe"]


def test_after_a_collapse_lidar_has_no_value_and_the_run_continues(tmp_path: Path) -> None:
    monitor = held_out(encoder=lambda m, x: m(x) * (m.global_step < 6), on_alarm="log", **EVERY)
    run = fit(tmp_path, simclr(), monitor)
    first, *later = (record.measurements for record in monitor.history)
    assert run.global_step == 12
    assert math.isfinite(first["lidar"].value)
    assert all(
        math.isnan(m["lidar"].value) and "views of each sample are identical" in str(m["lidar"].reason) for m in later
    )
    assert all("no direction" in str(m["alignment"].reason) and m["rankme"].value == 1 for m in later)
    assert monitor.history[-1].alarms


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"views": 1}, r"lidar needs at least 2 views of each image, got views=1: give views=10"),
        ({}, r"lidar needs at least 2 views of each image, got views=0"),
        ({"views": 2}, r"takes uint8 images or floats in 0 … 1, got -\d.* … \d.*: give augmentation="),
        ({"views": 2, "augmentation": lambda x: x}, r"the views of each sample are identical"),
        ({"views": 2, "augmentation": lambda x: [x, x]}, r"one view of each of 64 images, got list"),
        ({"views": 2, "augmentation": lambda x: x[:5]}, r"one view of each of 64 images, got \(5, 3, 4, 4\)"),
    ],
)
def test_views_that_cannot_be_computed(tmp_path: Path, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, simclr(), held_out(metrics=["lidar"], **options))


# ── stopping and keeping by stock callbacks ─────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("first", "validation"), [(True, True), (False, False)])
def test_early_stopping_really_stops_a_collapsing_run(tmp_path: Path, first: bool, validation: bool) -> None:
    monitor = held_out(on_alarm="log")
    stopping = EarlyStopping("repmetrics/rankme", mode="max", patience=6)
    order = [stopping, monitor] if first else [monitor, stopping]
    val = loader(32) if validation else None
    run = fit(tmp_path, simclr(collapse=True, lr=0.1), *order, max_epochs=30, val=val)
    assert run.current_epoch < 20
    assert stopping.stopped_epoch > 0
    ranks = [record.measurements["rankme"].value for record in monitor.history]
    assert ranks[-1] < 0.7 * ranks[0]
    odcorr = [record.measurements["odcorr"].value for record in monitor.history]
    assert odcorr[-1] > odcorr[0]


@pytest.mark.parametrize("namespace", ["lightning.pytorch", "pytorch_lightning"])
@pytest.mark.parametrize("options", [{}, {"val": None}, {"val_check_interval": 0.5}])
@pytest.mark.filterwarnings("ignore:.*is better. give mode=.*", "ignore:.*neither better higher nor lower")
def test_stock_callbacks_decide_by_every_key(tmp_path: Path, namespace: str, options: Any) -> None:
    stock = importlib.import_module(f"{namespace}.callbacks")
    asked: Any = {"metrics": ["rankme", "odcorr"], "layers": ["backbone.1"]}
    monitor = held_out(**asked)
    keys = [*Monitor(**asked).measure(simclr(), HeldOutImages()).scalars(), "repmetrics/loss"]
    assert len(keys) == 40
    stops = [stock.EarlyStopping(key, patience=99) for key in keys]
    keeps = [stock.ModelCheckpoint(tmp_path / f"{i}", monitor=key) for i, key in enumerate(keys)]
    run = fit(tmp_path, simclr(namespace), *stops, monitor, *keeps, **options)
    assert {key for key in run.callback_metrics if key.startswith("repmetrics/")} == set(keys)
    for stop, keep in zip(stops, keeps, strict=True):
        lowest = min(record.scalars().get(stop.monitor, math.inf) for record in monitor.history[1:])
        assert float(stop.best_score) == pytest.approx(lowest, rel=1e-6), stop.monitor  # kept as float32
        assert float(keep.best_model_score) == pytest.approx(lowest, rel=1e-6), keep.monitor


def test_model_checkpoint_keeps_the_best(tmp_path: Path) -> None:
    monitor = held_out(on_alarm="log")
    keeper = ModelCheckpoint(tmp_path / "kept", filename="{step}", monitor="repmetrics/rankme", mode="max")
    fit(tmp_path, simclr(collapse=True, lr=0.1), monitor, keeper, max_epochs=4)
    at_validations = monitor.history[1:]
    best = max(at_validations, key=lambda record: record.measurements["rankme"].value)
    assert Path(keeper.best_model_path).name == f"step={best.step}.ckpt"
    assert float(keeper.best_model_score) == pytest.approx(best.measurements["rankme"].value, rel=1e-6)


def test_an_on_measure_hook_ends_a_run(tmp_path: Path) -> None:
    class Pruned(Exception):  # noqa: N818  Optuna's name for it
        pass

    seen = []

    def prune(record: Any) -> None:
        seen.append(record.step)
        if record.step >= 6:
            raise Pruned

    with pytest.raises(Pruned):
        fit(tmp_path, simclr(), held_out(on_measure=prune), max_epochs=9)
    assert seen == [0, 6]


# ── where the values go ─────────────────────────────────────────────────────────────────────────────────────────


def test_event_files_and_jsonl_hold_the_history(tmp_path: Path) -> None:
    monitor = held_out()
    run = fit(tmp_path, simclr(), monitor)
    events = EventAccumulator(run.log_dir)
    events.Reload()
    for name in ("rankme", "rankme_centered", "effective_rank", "odcorr", "linear_probe", "knn"):
        points = {point.step: point.value for point in events.Scalars(f"repmetrics/{name}")}
        expected = {record.step: record.measurements[name].value for record in monitor.history}
        assert points == pytest.approx(expected, rel=1e-6)  # event files hold float32
        lower = [point.value for point in events.Scalars(f"repmetrics/{name}_lower")]
        assert all(low < value for low, value in zip(lower, expected.values(), strict=True))
    assert "custom_scalars__config__" in events.Tags()["tensors"]
    lines = [json.loads(line) for line in Path(run.log_dir, "measurements.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == steps(monitor)
    assert lines[-1]["measurements"]["rankme"]["value"] == monitor.history[-1].measurements["rankme"].value


def test_the_loss_is_the_mean_since_the_previous_evaluation(tmp_path: Path) -> None:
    monitor = held_out()
    run = fit(tmp_path, simclr(), monitor, max_epochs=1, accumulate_grad_batches=2)
    events = EventAccumulator(run.log_dir)
    events.Reload()
    losses = [point.value for point in events.Scalars("train/loss")]
    # Lightning logs each optimizer step's last batch: the mean over all six is near, not equal.
    assert monitor.history[-1].loss == pytest.approx(sum(losses) / len(losses), rel=0.2)
    assert monitor.history[0].loss is None


def test_other_loggers_get_the_same(tmp_path: Path) -> None:
    monitor = held_out()
    run = fit(tmp_path, simclr(), monitor, logger=CSVLogger(tmp_path))
    header = Path(run.log_dir, "metrics.csv").read_text().splitlines()[0]
    assert {"repmetrics/rankme", "repmetrics/rankme_se", "repmetrics/odcorr_null"} <= set(header.split(","))


def test_tensorboard_is_not_needed(tmp_path: Path) -> None:
    code = (
        "from small_runs import *; from repmetrics import RepresentationMonitor\n"
        "from lightning.pytorch.loggers import CSVLogger\n"
        f"fit({str(tmp_path)!r}, simclr(), RepresentationMonitor(HeldOutImages()), logger=CSVLogger({str(tmp_path)!r}))"
    )
    done = run_code(code, absent=["tensorboard", "tensorboardX"], folder=tmp_path / "process")
    assert done.code == 0, done.stderr
    (table,) = tmp_path.rglob("metrics.csv")
    assert "repmetrics/rankme" in table.read_text().splitlines()[0]


def test_either_lightning_suffices_and_the_error_without_one_is_plain(tmp_path: Path) -> None:
    code = "from repmetrics import RepresentationMonitor as M; print(len(M.__mro__)); M([])"
    for package in ("lightning", "pytorch_lightning"):
        done = run_code(code, absent=[package], folder=tmp_path / package)
        assert done.code == 0, done.stderr
    code = "from repmetrics import Monitor\n" + code
    none = run_code(code, absent=["lightning", "pytorch_lightning"], folder=tmp_path / "none")
    assert none.code == 1
    assert none.stderr.strip().endswith(
        "ImportError: RepresentationMonitor needs Lightning: pip install 'repmetrics[lightning]'"
    )


def test_without_a_logger_the_jsonl_is_in_the_root(tmp_path: Path) -> None:
    fit(tmp_path, simclr(), held_out(), logger=False)
    assert len((tmp_path / "measurements.jsonl").read_text().splitlines()) == 3


def test_resume_goes_on_with_the_history(tmp_path: Path) -> None:
    first = held_out()
    run = fit(tmp_path, simclr(), first, max_epochs=2, val=None)
    path = run.checkpoint_callback.best_model_path
    torch.load(path, weights_only=True)  # the history is plain types
    second = held_out()
    again = trainer(tmp_path, callbacks=[second], max_epochs=3)
    again.fit(simclr(), loader(), ckpt_path=path)
    assert steps(second) == [0, 6, 12, 18]
    assert second.history[:3] == first.history
    assert second.history[1].measurements["rankme"].replicates == first.history[1].measurements["rankme"].replicates


# ── bad input ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_key_that_will_never_be_logged_is_refused_at_the_start(tmp_path: Path) -> None:
    stopping = EarlyStopping("repmetrics/rank_me", mode="max")
    with pytest.raises(ValueError, match=r"EarlyStopping monitors 'repmetrics/rank_me'.*repmetrics/rankme,"):
        fit(tmp_path, simclr(), held_out(), stopping)


def test_a_path_that_does_not_exist_lists_similar_names(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no submodule 'bakbone': did you mean backbone"):
        fit(tmp_path, simclr(), held_out(encoder="bakbone"))


def test_a_module_without_forward_asks_for_the_encoder(tmp_path: Path) -> None:
    module = simclr()
    del type(module).forward
    with pytest.raises(ValueError, match=r"SimCLR has no forward\(\): name the encoder.*backbone, projector, teacher"):
        fit(tmp_path, module, held_out())


@pytest.mark.parametrize(
    ("encoder", "message"),
    [
        (lambda m, x: {"cls": m(x), "patches": x}, r"dict with keys cls, patches: choose one with encoder="),
        (lambda m, x: (m(x), x), r"tuple of 2 .*choose one with encoder="),
        (lambda m, x: m(x)[:, None].expand(-1, 5, -1), r'tokens \(64, 5, 8\): choose pool="cls" or pool="mean"'),
        (lambda m, x: x, r'feature maps \(64, 3, 4, 4\): choose pool="mean"'),
        (lambda m, x: m(x)[0], r"must return \(B, D\), got \(8,\)"),
        (lambda m, x: m(x)[:5], r"must return \(64, D\), got \(5, 8\)"),
        (lambda m, x: None, r"must return one tensor, got NoneType"),
        (3, r"encoder must be a path, a module or a function, got int"),
    ],
)
def test_outputs_that_are_not_one_vector_per_image_are_refused(tmp_path: Path, encoder: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        fit(tmp_path, simclr(), held_out(encoder=encoder))


def test_a_layer_that_does_not_run_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"layer 'projector' did not run"):
        fit(tmp_path, simclr(), held_out(layers=["projector"]))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], r"yields 0 samples: it takes at least 2"),
        (HeldOutImages(1), r"yields 1 sample: it takes at least 2"),
        ([{"picture": torch.zeros(4, 3, 4, 4)}], r"must have the key 'image', got picture"),
        (torch.zeros(4, 3, 4, 4), r"must be a DataLoader, a Dataset or a re-readable iterable of batches, got Tensor"),
        ([torch.zeros(4, 3, 4, 4), torch.zeros(4, 3, 5, 5)], r"failed on held-out images \(4, 3, 5, 5\) of float32"),
        ([(torch.randn(8, 3, 4, 4), torch.rand(8) + 0.1)], r"labels must be whole numbers or names, .* class, got"),
    ],
)
def test_held_out_data_that_cannot_be_measured(tmp_path: Path, data: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError, RuntimeError), match=message):
        fit(tmp_path, simclr(), RepresentationMonitor(data))


def test_nan_at_the_first_evaluation_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"96 of 96 held-out samples have NaN or Inf features at the first evaluation"):
        fit(tmp_path, simclr(), held_out(encoder=lambda m, x: m(x) / 0))


def test_nan_in_mid_run_is_logged_and_training_goes_on(tmp_path: Path) -> None:
    monitor = held_out(encoder=lambda m, x: m(x) + (math.nan if m.global_step == 6 else 0))
    stopping = EarlyStopping("repmetrics/rankme", mode="max", patience=9, check_finite=False)
    with pytest.warns(UserWarning, match="not finite at step 6: 96 held-out samples have NaN or Inf features"):
        run = fit(tmp_path, simclr(), monitor, stopping, max_epochs=3)
    assert steps(monitor) == [0, 6, 12, 18]
    assert [record.nonfinite for record in monitor.history] == [0, 96, 0, 0]
    assert [len(record.alarms) for record in monitor.history] == [0, 1, 0, 0]
    assert monitor.history[1].measurements == {}
    events = EventAccumulator(run.log_dir)
    events.Reload()
    assert [point.value for point in events.Scalars("repmetrics/nonfinite")] == [0, 96, 0, 0]
    assert [point.step for point in events.Scalars("repmetrics/rankme")] == [0, 12, 18]


def test_options_that_make_no_sense() -> None:
    with pytest.raises(ValueError, match=r"every_n_steps must be at least 1, got 0"):
        held_out(every_n_steps=0)
    with pytest.raises(ValueError, match=r"unknown metric 'rank_me'"):
        held_out(metrics=["rank_me"])
    with pytest.raises(ValueError, match=r"metrics must be a list of names, got the text 'rankme'"):
        held_out(metrics="rankme")
    with pytest.raises(ValueError, match=r"layers must be a list of paths, got the text 'backbone'"):
        held_out(layers="backbone")
    with pytest.raises(ValueError, match=r"pool must be one of cls, mean, got 'max'"):
        held_out(pool="max")
    with pytest.raises(ValueError, match=r"on_alarm must be log, warn, stop or a function, got 'explode'"):
        held_out(on_alarm="explode")
    assert isinstance(make_backbone(), nn.Module)


@pytest.mark.parametrize(("key", "meant"), [("rankme", "repmetrics/rankme"), ("repmetric/odcorr", "repmetrics/odcorr")])
def test_a_key_without_its_prefix_is_named_before_the_first_step(tmp_path: Path, key: str, meant: str) -> None:
    with pytest.warns(UserWarning, match=f"monitors '{key}', which is not logged: did you mean '{meant}'"):
        fit(tmp_path, simclr(), held_out(), EarlyStopping(key, mode="max", strict=False))
