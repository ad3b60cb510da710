"""Evaluation of a checkpoint on a labeled task: embed each split once, train heads on the features, report."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from fmtrain.evaluation.consep import CLASSES, consep
from fmtrain.evaluation.segmentation import STEPS, dice_score, predict, tokens, train_decoder
from fmtrain.evaluation.slide_labels import pool_slides, read_slide_labels
from fmtrain.evaluation.tasks import TASKS, Task
from fmtrain.patches.dataset import HeldOutPatches
from repmetrics.data.features import Features
from repmetrics.data.open import open_data
from repmetrics.data.source import Source
from repmetrics.encoders.checkpoint import identify, load_encoder
from repmetrics.encoders.encoder import IdentifiedEncoder
from repmetrics.encoders.files import read_checkpoint_file
from repmetrics.measurement.result import Measurement, format_value
from repmetrics.probes.eva import RUNS, SeedAccuracies, eva_probe
from repmetrics.probes.linear import linear_probe
from repmetrics.progress import progress
from repmetrics.scoring.embed import count_images, embed_source
from repmetrics.scoring.settings import EmbedSettings, cache_folder

SEGMENTATION_REMARK = (
    "the head of the last step; nothing is selected on val; Dice without background, over the classes in each patch; "
    "no published number to compare with"
)


class TaskResult(NamedTuple):
    """Accuracies of the runs on each split, with the published numbers. The names are keys of the JSON output."""

    task: str
    encoder: str
    protocol: str
    rows: Mapping[str, int]
    runs: Sequence[SeedAccuracies]
    published: Mapping[str, float]
    remarks: tuple[str, ...]
    metric: str = "balanced accuracy"

    def to_json(self) -> str:
        """All runs, in full precision."""
        content = self._asdict() | {"rows": dict(self.rows), "published": dict(self.published)}
        content["runs"] = [
            {"split": run.split, "values": run.values, "selected_here": run.used_for_selection, "mean": run.mean}
            for run in self.runs
        ]
        return json.dumps(content, indent=2)


def evaluate(
    checkpoint: Path,
    *,
    task: str,
    data: Path,
    protocol: Literal["paper", "v0.4"] = "v0.4",
    runs: int = RUNS,
    settings: EmbedSettings | None = None,
    max_steps: int | None = None,
    **overrides: Any,
) -> TaskResult:
    """Linear probe on frozen features by one of eva's protocols, with eva's splits."""
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}: choose among {', '.join(TASKS)}, consep, or give --slide-labels")
    spec: Task = TASKS[task]
    training = spec.paper if protocol == "paper" else spec.v0_4
    if max_steps is not None:
        training = training._replace(max_steps=max_steps)
    settings = settings or EmbedSettings(cache=cache_folder())
    splits = spec.open(data)
    encoder = _identify(checkpoint, settings, overrides)
    features = {name: _embed(source, encoder, settings) for name, source in splits.items()}
    accuracies = eva_probe(**features, protocol=training, runs=runs, device=settings.device)
    rows = {name: len(split.values) for name, split in features.items()}
    source = f"{encoder.source} ({encoder.arch})"
    remarks = (spec.remark, *_differences_from_paper(spec, protocol, training.max_steps, rows), *encoder.notes)
    return TaskResult(task, source, protocol, rows, accuracies, spec.published, remarks)


def _differences_from_paper(task: Task, protocol: str, max_steps: int, rows: Mapping[str, int]) -> list[str]:
    """Reasons why the numbers do not compare with the published ones."""
    remarks = []
    if protocol != task.paper.name or max_steps != task.paper.max_steps:
        remarks.append("the published numbers use --protocol paper, with its 12,500 steps")
    partial = [f"{rows[name]:,} of {count:,} in {name}" for name, count in task.rows.items() if rows[name] != count]
    if partial:
        remarks.append(f"the published numbers use all images, these use {', '.join(partial)}")
    return remarks


def evaluate_segmentation(
    checkpoint: Path,
    *,
    data: Path,
    runs: int = RUNS,
    settings: EmbedSettings | None = None,
    max_steps: int | None = None,
    **overrides: Any,
) -> TaskResult:
    """Dice of a head on frozen patch tokens, on CoNSeP with eva's split, patches and classes.

    The arguments are those of :func:`evaluate`.
    """
    settings = settings or EmbedSettings()
    device = settings.device
    splits, encoder = consep(data), load_encoder(checkpoint, **overrides).to(device)
    encoder.image_size = settings.image_size or encoder.image_size
    features = {}
    for name, split in splits.items():
        with progress(f"embedding {name}", total=len(split.images)) as meter:
            features[name] = tokens(encoder, split.images, on_batch=meter.advance)
    train, val = splits["train"].masks, splits["val"].masks
    values = []
    for seed in range(runs):
        decoder = train_decoder(
            features["train"], train, classes=len(CLASSES), seed=seed, steps=max_steps or STEPS, device=device
        )
        predicted = predict(decoder, features["val"], val, device=device)
        values.append(dice_score(predicted, val, classes=len(CLASSES)))
    rows = {name: len(split.images) for name, split in splits.items()}
    scores = [SeedAccuracies("val", tuple(values), used_for_selection=False)]
    source = f"{encoder.source} ({encoder.arch})"
    return TaskResult("consep", source, "v0.4", rows, scores, {}, (SEGMENTATION_REMARK, *encoder.notes), metric="Dice")


def evaluate_slides(
    checkpoint: Path,
    *,
    data: Path,
    labels: Path,
    label: str | None = None,
    settings: EmbedSettings | None = None,
    **overrides: Any,
) -> Measurement:
    """Linear probe on mean-pooled patch features of slides, cross-fitted by patient."""
    label_of = read_slide_labels(labels, column=label)
    settings = settings or EmbedSettings(cache=cache_folder())
    encoder = _identify(checkpoint, settings, overrides)
    source = open_data(data, labels="none")
    patches = _embed(source, encoder, settings)
    held_out = source.images.manifest.held_out if isinstance(source.images, HeldOutPatches) else None
    slides = None if held_out is None else [patch.slide for patch in held_out]
    pooled, _ = pool_slides(patches, label_of, slides=slides)
    assert pooled.labels is not None
    probed = linear_probe(pooled.values, pooled.labels, groups=pooled.groups)
    return replace(probed, warnings=(*probed.warnings, *encoder.notes))


def _identify(checkpoint: Path, settings: EmbedSettings, overrides: Mapping[str, Any]) -> IdentifiedEncoder:
    return identify(read_checkpoint_file(checkpoint, digests=settings.cache is not None), **overrides)


def _embed(source: Source, encoder: IdentifiedEncoder, settings: EmbedSettings) -> Features:
    with progress(f"embedding {source.path.name}", total=count_images(source)) as meter:
        embedded = embed_source(source, encoder, settings, meter)
    if unreadable := embedded.report.unreadable:
        raise ValueError(
            f"{source.path}: {len(unreadable)} images cannot be read, first {unreadable[0].name}: restore them, the "
            "published numbers use all images"
        )
    return embedded.features


def table(result: TaskResult) -> RenderableType:
    """The runs, followed by the published numbers of the same task."""
    rows = Table(title=f"{result.task}, {result.encoder}, protocol {result.protocol}", title_justify="left")
    rows.add_column("encoder")
    rows.add_column("split")
    rows.add_column(f"{result.metric} ± sd of runs", justify="right")
    rows.add_column("images", justify="right")
    for run in result.runs:
        rows.add_row("this checkpoint", run.split, format_value(run.mean, run.sd), str(result.rows[run.split]))
    for name, value in result.published.items():
        rows.add_row(f"{name} (arXiv 2404.15217)", result.runs[-1].split, f"{value:.3f}", "–", style="dim")
    return Group(rows, *(Text(remark) for remark in result.remarks))
