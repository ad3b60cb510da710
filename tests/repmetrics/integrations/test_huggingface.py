"""RepresentationCallback in Hugging Face's Trainer, with a masked autoencoder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import HeldOutImages
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from torch.utils.data import Dataset

pytest.importorskip("accelerate", reason="accelerate is not installed: pip install accelerate")
from transformers import EarlyStoppingCallback, Trainer, TrainingArguments, ViTMAEConfig, ViTMAEForPreTraining

from repmetrics.integrations.huggingface import RepresentationCallback
from repmetrics.monitoring.monitor import Monitor

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*pin_memory.*", "ignore::DeprecationWarning")


class Pixels(Dataset[dict[str, Tensor]]):
    def __init__(self, size: int = 48) -> None:
        self.images = torch.randn(size, 3, 4, 4, generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"pixel_values": self.images[index] + 0.1 * torch.randn(3, 4, 4)}


def model() -> Any:
    torch.manual_seed(0)
    config = ViTMAEConfig(
        image_size=4, patch_size=2, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
        decoder_hidden_size=8, decoder_num_hidden_layers=1, decoder_num_attention_heads=2, decoder_intermediate_size=8,
        hidden_dropout_prob=0.1,
    )  # fmt: skip
    return ViTMAEForPreTraining(config)


def cls_token(module: Any, images: Tensor) -> Tensor:
    features: Tensor = module.vit(images).last_hidden_state[:, 0]
    return features


def train(root: Path, *callbacks: Any, attach: bool = True, resume: bool = False, **options: Any) -> Trainer:
    arguments = {
        "num_train_epochs": 2, "per_device_train_batch_size": 16, "logging_steps": 1, "report_to": ["tensorboard"],
        "use_cpu": True, "disable_tqdm": True, "remove_unused_columns": False, "seed": 3, "learning_rate": 1e-3,
        "save_strategy": "no", "label_names": [],
    }  # fmt: skip
    args = TrainingArguments(str(root), **arguments | options)
    trainer = Trainer(model(), args, train_dataset=Pixels(), eval_dataset=Pixels(16))
    for callback in callbacks:
        callback.attach(trainer) if attach and hasattr(callback, "attach") else trainer.add_callback(callback)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.fixture(autouse=True)
def logging_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "tb"))


def steps(callback: RepresentationCallback) -> list[int]:
    return [record.step for record in callback.history]


def test_values_reach_reporters_and_the_weights_are_bit_identical(tmp_path: Path) -> None:
    callback = RepresentationCallback(HeldOutImages(), encoder=cls_token)
    plain, monitored = train(tmp_path / "plain"), train(tmp_path / "run", callback)
    expected = plain.model.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in monitored.model.state_dict().items())
    assert steps(callback) == [0, 3, 6]
    ranks = {record.step: record.measurements["rankme"].value for record in callback.history}
    log = {
        entry["step"]: entry["repmetrics/rankme"]
        for entry in monitored.state.log_history
        if "repmetrics/rankme" in entry
    }
    assert log == ranks
    assert [e["step"] for e in monitored.state.log_history if "loss" in e] == [1, 2, 3, 4, 5, 6]  # none is lost
    lines = [json.loads(line) for line in (tmp_path / "run" / "measurements.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == steps(callback)
    values = {}
    for folder in (tmp_path / "tb").rglob("events*"):
        events = EventAccumulator(str(folder))
        events.Reload()
        for tag in events.Tags()["scalars"]:
            if tag.endswith("repmetrics/rankme"):
                values |= {point.step: point.value for point in events.Scalars(tag)}
    assert values == pytest.approx(ranks, rel=1e-6)  # event files hold float32


def test_evaluations_choose_the_best_model_by_a_key(tmp_path: Path) -> None:
    callback = RepresentationCallback(HeldOutImages(), encoder=cls_token)
    trainer = train(
        tmp_path, callback, EarlyStoppingCallback(early_stopping_patience=9), eval_strategy="steps", eval_steps=2,
        save_strategy="steps", save_steps=2, load_best_model_at_end=True, greater_is_better=True,
        metric_for_best_model="repmetrics/rankme",
    )  # fmt: skip
    assert steps(callback) == [0, 2, 4, 6]
    best = max(callback.history[1:], key=lambda record: record.measurements["rankme"].value)
    assert trainer.state.best_global_step == best.step
    assert trainer.state.best_metric == best.measurements["rankme"].value


def test_a_resumed_run_continues_its_history(tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 2}
    first = RepresentationCallback(HeldOutImages(), encoder=cls_token, every_n_steps=2)
    train(tmp_path, first, max_steps=4, **options)
    second = RepresentationCallback(HeldOutImages(), encoder=cls_token, every_n_steps=2)
    train(tmp_path, second, max_steps=8, resume=True, **options)
    assert steps(second) == [0, 2, 4, 6, 8]
    lines = [json.loads(line) for line in (tmp_path / "measurements.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 2, 4, 6, 8]
    third = RepresentationCallback(HeldOutImages(), encoder=cls_token)
    train(tmp_path, third, max_steps=2)
    assert steps(third) == [0, 2]  # another run in the same folder


def test_an_alarm_stops_the_run_and_a_missing_attach_is_said(tmp_path: Path) -> None:
    def collapse(module: Any, images: Tensor) -> Tensor:
        return torch.ones(len(images), 8) + 1e-3 * cls_token(module, images)

    callback = RepresentationCallback(HeldOutImages(), encoder=collapse, every_n_steps=1, on_alarm="stop")
    with (
        pytest.warns(UserWarning, match="values of repmetrics do not reach tensorboard"),
        pytest.warns(UserWarning, match="complete collapse at step 3"),
    ):
        trainer = train(tmp_path, callback, attach=False)
    assert trainer.state.global_step == 3


def test_a_monitor_with_options_and_a_sink(tmp_path: Path) -> None:
    values: list[dict[str, float]] = []
    monitor = Monitor(metrics=["rankme"], layers=["vit.embeddings.patch_embeddings"], pool="mean", sink=values.append)
    callback = RepresentationCallback(HeldOutImages(labels=False), encoder=cls_token, monitor=monitor)
    train(tmp_path, callback, max_steps=1, report_to=[])
    assert [value["repmetrics/step"] for value in values] == [0, 1]
    assert "repmetrics/vit.embeddings.patch_embeddings/rankme" in values[0]


def test_options_that_make_no_sense() -> None:
    with pytest.raises(ValueError, match="every_n_steps must be at least 1, got 0"):
        RepresentationCallback(HeldOutImages(), every_n_steps=0)
    with pytest.raises(ValueError, match="on_alarm must be log, warn, stop or a function, got 'explode'"):
        RepresentationCallback(HeldOutImages(), on_alarm="explode")  # type: ignore[arg-type]
