"""A long evaluation shows its progress, and a signal ends it without a trace."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import LIGHTNING_NOISE, HeldOutImages, fit, make_backbone, simclr
from torch import Tensor, nn

from repmetrics import progress
from repmetrics.callbacks.representation_monitor import RepresentationMonitor
from repmetrics.data.interruption import EvaluationInterruptedError
from repmetrics.monitoring.monitor import Monitor

pytestmark = [pytest.mark.filterwarnings(line) for line in LIGHTNING_NOISE]


def test_a_long_evaluation_prints_lines_and_a_short_none(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    encoder = make_backbone()
    options: dict[str, Any] = {"metrics": ["rankme"], "batch_size": 32, "progress": lines.append}
    Monitor(**options).measure(encoder, HeldOutImages())
    assert lines == []
    monkeypatch.setattr(progress, "FIRST_SECONDS", 0.0)
    Monitor(**options, probe_data=HeldOutImages(32)).measure(encoder, HeldOutImages(), step=5)
    assert [line.partition(" images")[0] for line in lines] == [
        *(f"evaluation at step 5: {count} of 128" for count in (32, 64, 96, 128))
    ]


class Counting(nn.Module):
    """Encoder that calls a function in each batch."""

    def __init__(self, on_batch: Any) -> None:
        super().__init__()
        self.layers = make_backbone()
        self.on_batch = on_batch

    def forward(self, images: Tensor) -> Tensor:
        torch.rand(1)
        self.on_batch()
        features: Tensor = self.layers(images)
        return features


@pytest.mark.parametrize("error", [KeyboardInterrupt, EvaluationInterruptedError])
def test_a_signal_ends_an_evaluation_and_restores_the_model(error: type[BaseException]) -> None:
    """Ctrl-C of a loop without handlers, and a handler that asks the monitor to stop."""
    monitor, calls = Monitor(metrics=["rankme"], batch_size=32), iter(range(100))
    handlers = {KeyboardInterrupt: signal.default_int_handler}
    encoder = Counting(lambda: signal.raise_signal(signal.SIGINT) if next(calls) == 1 else None).train()
    before, generator = signal.getsignal(signal.SIGINT), torch.get_rng_state()
    signal.signal(signal.SIGINT, handlers.get(error, lambda *_: monitor.interruption.request()))
    try:
        with pytest.raises(error):
            monitor.measure(encoder, HeldOutImages())
        assert next(calls) == 2  # the third batch was not begun
        assert encoder.training
        assert torch.equal(generator, torch.get_rng_state())
        assert not monitor.history
        if error is EvaluationInterruptedError:
            signal.raise_signal(signal.SIGINT)  # outside of an evaluation: no effect
    finally:
        signal.signal(signal.SIGINT, before)
    monitor.measure(encoder, HeldOutImages())
    assert len(monitor.history) == 1


def test_an_interrupted_evaluation_stops_the_run_without_a_record(tmp_path: Path) -> None:
    def encode(module: Any, images: Tensor) -> Tensor:
        if module.global_step == 4:
            monitor.interrupt()
        features: Tensor = module.backbone(images)
        return features

    monitor = RepresentationMonitor(HeldOutImages(), encoder=encode, metrics=["rankme"], every_n_steps=2)
    run = fit(tmp_path, simclr(), monitor, max_epochs=9, val=None)
    assert [record.step for record in monitor.history] == [0, 2]
    assert run.global_step == 4
