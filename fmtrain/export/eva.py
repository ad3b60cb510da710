"""Export of a checkpoint as weights and a configuration for kaiko-eva."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import yaml

from fmtrain.evaluation.tasks import TASKS, Task
from repmetrics.atomic_write import atomic_path, write_text
from repmetrics.encoders.encoder import Encoder

EVA_DATASETS = {"bach": "BACH", "crc": "CRC", "mhist": "MHIST", "pcam": "PatchCamelyon"}
# Functions, not classes: eva types its criterion as a function, and its parser would read a class as a return type.
CRITERIA = ("torch.nn.functional.cross_entropy", "torch.nn.functional.binary_cross_entropy_with_logits")
# eva uses the data set's own split names: MHIST has only train and test.
EVA_SPLITS = {
    "bach": {"train": "train", "val": "val"},
    "crc": {"train": "train", "val": "val"},
    "mhist": {"train": "train", "val": "test"},
    "pcam": {"train": "train", "val": "val", "test": "test"},
}


def export_eva(encoder: Encoder, out: Path, *, task: str, data: Path, runs: int = 5) -> Path:
    """Write the encoder's weights and a configuration for kaiko-eva's ``eva predict_fit --config``.

    eva embeds each split once with timm's model and these weights, and trains its head on the embeddings. The encoder
    is from :func:`fmtrain.export.encoder.exportable_encoder`.
    """
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}: choose among {', '.join(TASKS)}")
    weights, path = out / "encoder.pth", out / f"{task}.yaml"
    with atomic_path(weights) as temporary, temporary.open("wb") as file:
        torch.save(encoder.model.state_dict(), file)
    paths = {"weights": weights.resolve(), "data": data.resolve(), "out": out.resolve()}
    write_text(path, yaml.safe_dump(eva_config(encoder, TASKS[task], **paths, runs=runs), sort_keys=False))
    return path


def eva_config(encoder: Encoder, task: Task, *, weights: Path, data: Path, out: Path, runs: int) -> dict[str, Any]:
    """Eva 0.4's protocol for a task, in the format of eva's command line."""
    binary = len(task.classes) == 2
    metric = "BinaryBalancedAccuracy" if binary else "MulticlassAccuracy"
    monitor = {"monitor": f"val/{metric}", "mode": "max"}
    splits = EVA_SPLITS[task.name]
    embeddings = str(out / "embeddings")
    backbone = {
        "class_path": "eva.models.ModelFromFunction",
        "init_args": {
            "path": "timm.create_model",
            "arguments": {"model_name": encoder.arch, "num_classes": 0, **_plain(encoder.arch_kwargs)},
            "checkpoint_path": str(weights),
        },
    }
    writer = {
        "output_dir": embeddings,
        "dataloader_idx_map": dict(enumerate(splits)),
        "backbone": backbone,
        "overwrite": True,
    }
    trainer = {
        "n_runs": runs,
        "default_root_dir": str(out / "logs"),
        "max_steps": task.v0_4.max_steps,
        "checkpoint_type": "best",
        "callbacks": [
            _obj("lightning.pytorch.callbacks.ModelCheckpoint", filename="best", save_top_k=1, **monitor),
            _obj("lightning.pytorch.callbacks.EarlyStopping", min_delta=0, patience=task.v0_4.patience, **monitor),
            _obj("eva.callbacks.ClassificationEmbeddingsWriter", **writer),
        ],
        "logger": [_obj("lightning.pytorch.loggers.TensorBoardLogger", save_dir=str(out / "logs"), name="")],
    }
    head = {
        "head": _obj(
            "torch.nn.Linear",
            in_features=encoder.model.num_features,
            out_features=1 if binary else len(task.classes),
        ),
        "criterion": CRITERIA[binary],
        "optimizer": _obj("torch.optim.AdamW", lr=task.v0_4.lr),
        "metrics": {
            "common": [
                _obj("eva.metrics.BinaryClassificationMetrics")
                if binary
                else _obj("eva.metrics.MulticlassClassificationMetrics", num_classes=len(task.classes))
            ]
        },
    }
    transforms = _obj(
        "eva.vision.data.transforms.common.ResizeAndCrop",
        size=encoder.image_size,
        mean=list(encoder.mean),
        std=list(encoder.std),
    )
    dataset = f"eva.vision.datasets.{EVA_DATASETS[task.name]}"
    target = {"target_transforms": _obj("eva.core.data.transforms.dtype.ArrayToFloatTensor")} if binary else {}
    datasets: dict[str, Any] = {
        split: _obj(
            "eva.datasets.EmbeddingsClassificationDataset",
            root=embeddings,
            manifest_file="manifest.csv",
            split=split,
            **target,
        )
        for split in splits
    }
    datasets["predict"] = [_obj(dataset, root=str(data), split=name, transforms=transforms) for name in splits.values()]
    loaders: dict[str, Any] = {split: {"batch_size": task.v0_4.batch_size} for split in splits}
    loaders["train"]["shuffle"] = True
    loaders["predict"] = {"batch_size": 64}
    return {
        "trainer": _obj("eva.Trainer", **trainer),
        "model": _obj("eva.HeadModule", **head),
        "data": _obj("eva.DataModule", datasets=datasets, dataloaders=loaders),
    }


def _obj(class_path: str, **init_args: Any) -> dict[str, Any]:
    return {"class_path": class_path, "init_args": init_args} if init_args else {"class_path": class_path}


def _plain(kwargs: Any) -> dict[str, Any]:
    """Keyword arguments as plain types, without loss."""
    plain: dict[str, Any] = json.loads(json.dumps(dict(kwargs or {})))
    return plain
