"""The export for eva: weights that timm loads, eva's protocol and splits.

A manual run of kaiko-eva 0.4.5 on such an export gave embeddings equal to ours to 1.5e-6.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml

from fmtrain import cli
from fmtrain.evaluation.tasks import TASKS
from fmtrain.export.encoder import exportable_encoder
from fmtrain.export.eva import EVA_SPLITS, export_eva
from repmetrics.encoders.checkpoint import load_encoder

KWARGS = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 1}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = timm.create_model("vit_small_patch16_224", num_classes=0, **KWARGS)
    hparams = {"arch": "vit_small_patch16_224", "arch_kwargs": KWARGS, "mean": [0.7] * 3, "std": [0.2] * 3}
    state = {f"teacher.backbone.{key}": value for key, value in model.state_dict().items()}
    torch.save({"hyper_parameters": hparams, "state_dict": state}, tmp_path / "last.ckpt")
    return tmp_path / "last.ckpt"


def exported(checkpoint: Path, out: Path, task: str) -> dict[str, Any]:
    encoder = exportable_encoder(checkpoint)
    read = yaml.safe_load(export_eva(encoder, out, task=task, data=Path("data"), runs=3).read_text())
    assert isinstance(read, dict)
    return read


def callback(config: dict[str, Any], name: str) -> dict[str, Any]:
    (spec,) = [c for c in config["trainer"]["init_args"]["callbacks"] if c["class_path"].endswith(name)]
    args = spec["init_args"]
    assert isinstance(args, dict)
    return args


def test_the_backbone_gives_the_same_features(checkpoint: Path, tmp_path: Path) -> None:
    config = exported(checkpoint, tmp_path / "out", "bach")
    backbone = callback(config, "ClassificationEmbeddingsWriter")["backbone"]["init_args"]
    assert backbone["path"] == "timm.create_model"
    model = timm.create_model(**backbone["arguments"])
    model.load_state_dict(torch.load(backbone["checkpoint_path"], weights_only=True), strict=True)
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(model.eval()((x - 0.7) / 0.2), load_encoder(checkpoint)(x))
    (transform,) = {str(d["init_args"]["transforms"]) for d in config["data"]["init_args"]["datasets"]["predict"]}
    assert "'size': 32, 'mean': [0.7, 0.7, 0.7], 'std': [0.2, 0.2, 0.2]" in transform


@pytest.mark.parametrize("task", TASKS)
def test_protocol_and_splits(checkpoint: Path, tmp_path: Path, task: str) -> None:
    config = exported(checkpoint, tmp_path / "out", task)
    protocol, binary = TASKS[task].v0_4, len(TASKS[task].classes) == 2
    trainer, model, data = (config[part]["init_args"] for part in ("trainer", "model", "data"))
    assert (trainer["max_steps"], trainer["n_runs"]) == (12_500, 3)
    stop = callback(config, "EarlyStopping")
    assert (stop["patience"], stop["mode"]) == (protocol.patience, "max")
    assert stop["monitor"] == ("val/BinaryBalancedAccuracy" if binary else "val/MulticlassAccuracy")
    assert callback(config, "ModelCheckpoint")["monitor"] == stop["monitor"]
    assert model["head"]["init_args"] == {"in_features": 64, "out_features": 1 if binary else len(TASKS[task].classes)}
    assert model["optimizer"]["init_args"] == {"lr": 3e-4}
    assert data["dataloaders"]["train"] == {"batch_size": 256, "shuffle": True}
    assert [d["init_args"]["split"] for d in data["datasets"]["predict"]] == list(EVA_SPLITS[task].values())
    names = callback(config, "ClassificationEmbeddingsWriter")["dataloader_idx_map"]
    assert [data["datasets"][name]["init_args"]["split"] for name in names.values()] == list(names.values())


def test_what_eva_cannot_build_is_refused(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(load_encoder(checkpoint).model.state_dict(), tmp_path / "bare.pth")
    with pytest.raises(ValueError, match=r"bare\.pth does not state its architecture, which timm builds by name"):
        exportable_encoder(tmp_path / "bare.pth")
    with pytest.raises(ValueError, match="unknown task 'camelyon'"):
        export_eva(exportable_encoder(checkpoint), tmp_path / "out", task="camelyon", data=tmp_path)
    with pytest.raises(SystemExit) as stop:
        cli.main(["export", str(checkpoint), "--data", "d", "--out", str(tmp_path / "out"), "--task", "crc"])
    assert not stop.value.code
    assert capsys.readouterr().out.startswith("eva predict_fit --config ")
