"""Evaluations in the background: weights, values and decisions are those of evaluations between two steps."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from small_runs import LIGHTNING_NOISE, HeldOutImages, fit, simclr

from repmetrics.callbacks.background import BackgroundComputation
from repmetrics.callbacks.early_stopping import RepresentationEarlyStopping
from repmetrics.callbacks.representation_monitor import RepresentationMonitor
from repmetrics.functional.linalg import single_torch_thread
from repmetrics.monitoring.monitor import Monitor
from repmetrics.monitoring.record import Record

pytestmark = [pytest.mark.filterwarnings(line) for line in LIGHTNING_NOISE]


class Threads:
    """The thread in which each evaluation of a monitor is computed; each waits until it is let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, go: threading.Event | None = None) -> None:
        self.main: list[bool] = []
        compute = Monitor._measure

        def measure(monitor: Monitor, *args: Any, **kwargs: Any) -> Record:
            self.main.append(threading.current_thread() is threading.main_thread())
            if go is not None and not self.main[-1]:
                assert go.wait(60)
            return compute(monitor, *args, **kwargs)

        monkeypatch.setattr(Monitor, "_measure", measure)


class Steps(Callback):
    """The steps of the records that are published at the end of each training batch."""

    def __init__(self, monitor: RepresentationMonitor, *, go: threading.Event | None = None, at: int = -1) -> None:
        self.monitor, self.published, self.go, self.at = monitor, [], go, at

    def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
        if self.go is not None and trainer.global_step == self.at:
            self.go.set()
            while not self.monitor._computation.done:
                time.sleep(0.01)

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        self.published.append([record.step for record in self.monitor.history])


def values(monitor: RepresentationMonitor) -> list[dict[str, Any]]:
    """Records without their seconds and the run's name."""
    states = [record.to_state() for record in monitor.history]
    return [{key: value for key, value in state.items() if key not in ("seconds", "run")} for state in states]


def run(
    folder: Path, *callbacks: Any, epochs: int = 2, **options: Any
) -> tuple[dict[str, torch.Tensor], RepresentationMonitor]:
    monitor, module = RepresentationMonitor(HeldOutImages(), every_n_steps=3, **options), simclr()
    fit(folder, module, monitor, *callbacks, max_epochs=epochs, val=None)
    return module.state_dict(), monitor


def test_weights_and_records_are_those_of_the_foreground(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights, monitor = run(tmp_path / "foreground")
    threads = Threads(monkeypatch)
    others, in_background = run(tmp_path / "background", background=True)
    assert threads.main == [True, *[False] * 4]  # the first at once
    assert all(torch.equal(weights[name], others[name]) for name in weights)
    assert values(monitor) == values(in_background)


def test_training_keeps_its_number_of_threads_during_a_computation() -> None:
    go, computation = threading.Event(), BackgroundComputation()

    def compute() -> Record:
        with single_torch_thread():
            assert torch.get_num_threads() == 1
            assert go.wait(60)
        return Record(step=3, epoch=0, seconds=0.0)

    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        computation.start(compute)
        assert torch.get_num_threads() == before + 1
        go.set()
        assert computation.result().step == 3
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)


def test_a_record_is_published_at_the_first_step_at_which_it_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go = threading.Event()
    Threads(monkeypatch, go=go)
    monitor = RepresentationMonitor(HeldOutImages(), every_n_steps=3, background=True)
    steps = Steps(monitor, go=go, at=4)  # computed while the fifth batch begins
    fit(tmp_path, simclr(), monitor, steps, max_epochs=1, val=None, logger=CSVLogger(tmp_path))
    assert steps.published[:5] == [[0], [0], [0], [0], [0, 3]]
    logged = [line.split(",") for line in next(tmp_path.rglob("metrics.csv")).read_text().splitlines()]
    by_name = [dict(zip(logged[0], line, strict=True)) for line in logged[1:]]
    assert [row["step"] for row in by_name if row["repmetrics/rankme"]] == ["0", "3", "6"]


def test_a_reader_of_a_key_gets_the_value_of_its_own_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = []
    for background in (False, True):
        folder = tmp_path / str(background)
        keeper = ModelCheckpoint(folder, monitor="repmetrics/rankme", mode="max", save_top_k=-1)
        stopping = EarlyStopping("repmetrics/rankme", mode="max", patience=100)
        monitor = RepresentationMonitor(HeldOutImages(), background=background)
        threads = Threads(monkeypatch)
        fit(folder, simclr(), monitor, keeper, stopping, max_epochs=2)
        assert all(threads.main)
        scores.append({Path(path).name: float(score) for path, score in keeper.best_k_models.items()})
    assert scores[0] == scores[1]


def test_decisions_at_each_measurement_are_made_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stops = []
    for background in (False, True):
        threads = Threads(monkeypatch)
        stopping = RepresentationEarlyStopping("rankme", patience=1, min_delta_errors=1000)
        _, monitor = run(tmp_path / str(background), stopping, background=background)
        assert all(threads.main)
        stops.append((stopping.stopped_step, stopping.reason, values(monitor)))
    assert stops[0] == stops[1]
    assert stops[0][0] is not None
    for option in ({"on_measure": lambda record: None}, {"on_alarm": "stop"}, {"on_alarm": lambda *_: None}):
        threads = Threads(monkeypatch)
        run(tmp_path / "other", background=True, epochs=1, **option)
        assert all(threads.main)


def test_a_checkpoint_holds_the_record_in_computation(tmp_path: Path) -> None:
    keeper = ModelCheckpoint(tmp_path, every_n_train_steps=3, save_top_k=-1)
    run(tmp_path, keeper, epochs=1, background=True)
    state = torch.load(next(tmp_path.glob("*step=3.ckpt")), weights_only=False)
    history = state["callbacks"]["RepresentationMonitor[repmetrics]"]["history"]
    assert [record["step"] for record in history] == [0, 3]


def test_an_error_in_the_background_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compute = Monitor._measure

    def measure(monitor: Monitor, *args: Any, step: int, **kwargs: Any) -> Record:
        if step == 3:
            raise ValueError("no such value")
        return compute(monitor, *args, step=step, **kwargs)

    monkeypatch.setattr(Monitor, "_measure", measure)
    with pytest.raises(ValueError, match="no such value"):
        run(tmp_path, background=True)


def test_a_run_that_ends_in_an_error_keeps_the_record_in_computation(tmp_path: Path) -> None:
    class Fails(Callback):
        def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
            if trainer.global_step == 3:
                raise RuntimeError("the training failed")

    monitor = RepresentationMonitor(HeldOutImages(), every_n_steps=3, background=True)
    with pytest.raises(RuntimeError, match="the training failed"):
        fit(tmp_path, simclr(), monitor, Fails(), max_epochs=1, val=None)
    assert [record.step for record in monitor.history] == [0, 3]
    fit(tmp_path, simclr(), monitor, max_epochs=1, val=None)
    assert [record.step for record in monitor.history] == [0, 3, 6]


def test_a_signal_does_not_interrupt_training_during_a_background_computation() -> None:
    monitor = Monitor()

    def compute() -> None:
        with monitor.interruption:
            started.set()
            assert go.wait(60)

    started, go = threading.Event(), threading.Event()
    thread = threading.Thread(target=compute)
    thread.start()
    started.wait(60)
    monitor.interruption.request()  # raises nothing here
    go.set()
    thread.join()
