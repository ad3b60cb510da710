"""A checkpoint → what another tool evaluates it with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import yaml

from fmtrain.evaluation.tasks import TASKS, Task
from repmetrics.encoders.checkpoint import Encoder, load_encoder

EVA_DATASETS = {"bach": "BACH", "crc": "CRC", "mhist": "MHIST", "pcam": "PatchCamelyon"}
# As functions: eva's criterion is typed as one, and its parser takes a class for what the function returns.
CRITERIA = ("torch.nn.functional.cross_entropy", "torch.nn.functional.binary_cross_entropy_with_logits")
# eva names the splits by what they are in the data set: MHIST has train and test only.
EVA_SPLITS = {
    "bach": {"train": "train", "val": "val"},
    "crc": {"train": "train", "val": "val"},
    "mhist": {"train": "train", "val": "test"},
    "pcam": {"train": "train", "val": "val", "test": "test"},
}


def export_eva(checkpoint: Path, out: Path, *, task: str, data: Path, arch: str | None = None, runs: int = 5) -> Path:
    """Write the encoder's weights and a configuration for kaiko-eva's ``eva predict_fit --config``.

    eva embeds each split once with timm's model and these weights, and trains its head on the embeddings.

    Args:
        checkpoint: any whose architecture is stated, or named with `arch`.
        out: folder for ``encoder.pth`` and ``<task>.yaml``.
        task: a name in `TASKS`.
        data: where eva will find the data set.
        arch: timm architecture, for a checkpoint that states none.
        runs: heads trained.

    Returns:
        The configuration.

    Raises:
        ValueError: an unknown task, or an architecture that timm cannot build by name.
    """
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}: choose among {', '.join(TASKS)}")
    encoder = load_encoder(checkpoint, arch=arch)
    if encoder.arch_kwargs is None:
        raise ValueError(f"{checkpoint.name} does not state its architecture, which eva builds by name: pass --arch")
    out.mkdir(parents=True, exist_ok=True)
    weights = out / "encoder.pth"
    draft = weights.with_suffix(".part")
    torch.save(encoder.model.state_dict(), draft)
    draft.replace(weights)
    config = out / f"{task}.yaml"
    text = yaml.safe_dump(
        eva_config(encoder, TASKS[task], weights=weights.resolve(), data=data.resolve(), out=out.resolve(), runs=runs),
        sort_keys=False,
    )
    draft = config.with_suffix(".part")
    draft.write_text(text)
    draft.replace(config)
    return config


def eva_config(encoder: Encoder, task: Task, *, weights: Path, data: Path, out: Path, runs: int) -> dict[str, Any]:
    """Eva 0.4's protocol for this task as its command line reads it."""
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
        "max_steps": task.now.max_steps,
        "checkpoint_type": "best",
        "callbacks": [
            _of("lightning.pytorch.callbacks.ModelCheckpoint", filename="best", save_top_k=1, **monitor),
            _of("lightning.pytorch.callbacks.EarlyStopping", min_delta=0, patience=task.now.patience, **monitor),
            _of("eva.callbacks.ClassificationEmbeddingsWriter", **writer),
        ],
        "logger": [_of("lightning.pytorch.loggers.TensorBoardLogger", save_dir=str(out / "logs"), name="")],
    }
    head = {
        "head": _of(
            "torch.nn.Linear",
            in_features=encoder.model.num_features,
            out_features=1 if binary else len(task.classes),
        ),
        "criterion": CRITERIA[binary],
        "optimizer": _of("torch.optim.AdamW", lr=task.now.lr),
        "metrics": {
            "common": [
                _of("eva.metrics.BinaryClassificationMetrics")
                if binary
                else _of("eva.metrics.MulticlassClassificationMetrics", num_classes=len(task.classes))
            ]
        },
    }
    transforms = _of(
        "eva.vision.data.transforms.common.ResizeAndCrop",
        size=encoder.image_size,
        mean=list(encoder.mean),
        std=list(encoder.std),
    )
    dataset = f"eva.vision.datasets.{EVA_DATASETS[task.name]}"
    target = {"target_transforms": _of("eva.core.data.transforms.dtype.ArrayToFloatTensor")} if binary else {}
    datasets: dict[str, Any] = {
        split: _of(
            "eva.datasets.EmbeddingsClassificationDataset",
            root=embeddings,
            manifest_file="manifest.csv",
            split=split,
            **target,
        )
        for split in splits
    }
    datasets["predict"] = [_of(dataset, root=str(data), split=name, transforms=transforms) for name in splits.values()]
    loaders: dict[str, Any] = {split: {"batch_size": task.now.batch_size} for split in splits}
    loaders["train"]["shuffle"] = True
    loaders["predict"] = {"batch_size": 64}
    return {
        "trainer": _of("eva.Trainer", **trainer),
        "model": _of("eva.HeadModule", **head),
        "data": _of("eva.DataModule", datasets=datasets, dataloaders=loaders),
    }


def _of(class_path: str, **init_args: Any) -> dict[str, Any]:
    return {"class_path": class_path, "init_args": init_args} if init_args else {"class_path": class_path}


def _plain(kwargs: Any) -> dict[str, Any]:
    """Only what YAML can say, and only without loss."""
    plain: dict[str, Any] = json.loads(json.dumps(dict(kwargs or {})))
    return plain
