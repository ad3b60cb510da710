"""A checkpoint on a labelled task: embed each split once, train heads on the features, report beside the paper."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
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
from repmetrics.data.source import Source, hash_strings
from repmetrics.encoders.checkpoint import Encoder, load_encoder
from repmetrics.measurement.result import Measurement
from repmetrics.probes.eva import RUNS, SeedAccuracies, eva_probe
from repmetrics.probes.linear import linear_probe
from repmetrics.scoring.feature_cache import default_folder
from repmetrics.scoring.score import EmbedSettings, content_digests, embed_source, progress


class TaskResult(NamedTuple):
    """What came out: the runs on each split, beside what was published."""

    task: str
    encoder: str
    protocol: str
    rows: Mapping[str, int]
    runs: Sequence[SeedAccuracies]
    published: Mapping[str, float]
    remarks: tuple[str, ...]
    metric: str = "balanced accuracy"

    def to_json(self) -> str:
        """Every run, to full precision."""
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
    protocol: Literal["paper", "now"] = "now",
    runs: int = RUNS,
    settings: EmbedSettings | None = None,
    max_steps: int | None = None,
    **overrides: Any,
) -> TaskResult:
    """Linear probe on frozen features by one of eva's protocols, with eva's splits.

    ``overrides`` are those of :func:`repmetrics.encoders.checkpoint.load_encoder`, here and below.

    Raises:
        ValueError: an unknown task, data in another layout, or a checkpoint that does not fit.
    """
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}: choose among {', '.join(TASKS)}, consep, or give --slide-labels")
    chosen: Task = TASKS[task]
    how = chosen.paper if protocol == "paper" else chosen.now
    if max_steps is not None:
        how = how._replace(max_steps=max_steps)
    splits = chosen.open(data)
    encoder = load_encoder(checkpoint, **overrides)
    key = _key(checkpoint, overrides)
    features = {name: _embed(source, encoder, key, settings) for name, source in splits.items()}
    found = eva_probe(
        features["train"],
        features["val"],
        test=features.get("test"),
        protocol=how,
        runs=runs,
        device=(settings or EmbedSettings()).device,
    )
    rows = {name: len(split.values) for name, split in features.items()}
    source = f"{encoder.source} ({encoder.arch})"
    remarks = (chosen.remark, *_unlike_the_paper(chosen, protocol, how.max_steps, rows))
    return TaskResult(task, source, protocol, rows, found, chosen.published, remarks)


def _unlike_the_paper(task: Task, protocol: str, max_steps: int, rows: Mapping[str, int]) -> list[str]:
    """What keeps the numbers from standing beside the published ones."""
    remarks = []
    if protocol != task.paper.name or max_steps != task.paper.max_steps:
        remarks.append("the published numbers are of --protocol paper, with its 12,500 steps")
    if cut := [
        f"{rows[split]:,} of {count:,} in {split}" for split, count in task.rows.items() if rows[split] != count
    ]:
        remarks.append(f"the published numbers are of all images, here are {', '.join(cut)}")
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

    Raises:
        ValueError: data in another layout, or an encoder without tokens.
    """
    how = settings or EmbedSettings()
    splits, encoder = consep(data), load_encoder(checkpoint, **overrides).to(how.device)
    features = {}
    for name, split in splits.items():
        with progress(f"embedding {name}", total=len(split.images)) as on_batch:
            features[name] = tokens(encoder, split.images, on_batch=on_batch)
    values = []
    for seed in range(runs):
        decoder = train_decoder(
            features["train"],
            splits["train"].masks,
            classes=len(CLASSES),
            seed=seed,
            steps=max_steps or STEPS,
            device=how.device,
        )
        predicted = predict(decoder, features["val"], splits["val"].masks, device=how.device)
        values.append(dice_score(predicted, splits["val"].masks, classes=len(CLASSES)))
    rows = {name: len(split.images) for name, split in splits.items()}
    found = [SeedAccuracies("val", tuple(values), used_for_selection=False)]
    source = f"{encoder.source} ({encoder.arch})"
    return TaskResult("consep", source, "now", rows, found, {}, (SEGMENTED,), metric="Dice")


SEGMENTED = (
    "the last step's head, nothing is chosen on val; Dice without background, classes that a patch has; no published "
    "number at hand to stand beside"
)


def evaluate_slides(
    checkpoint: Path,
    *,
    data: Path,
    labels: Path,
    label: str | None = None,
    settings: EmbedSettings | None = None,
    **overrides: Any,
) -> Measurement:
    """Mean-pooled patch features of each slide, and a linear probe on the slides' labels, cross-fitted by patient."""
    table = read_slide_labels(labels, column=label)
    encoder = load_encoder(checkpoint, **overrides)
    source = open_data(data, labels="none")
    patches = _embed(source, encoder, _key(checkpoint, overrides), settings)
    frozen = source.images.manifest.held_out if isinstance(source.images, HeldOutPatches) else None
    pooled, _ = pool_slides(patches, table, slides=None if frozen is None else [patch.slide for patch in frozen])
    assert pooled.labels is not None
    return linear_probe(pooled.values, pooled.labels, groups=pooled.groups)


def _key(checkpoint: Path, overrides: Mapping[str, Any]) -> str:
    """Of the encoder, in the cache of features."""
    return hash_strings([*content_digests(checkpoint), repr(sorted(overrides.items()))])


def _embed(source: Source, encoder: Encoder, key: str, settings: EmbedSettings | None) -> Features:
    settings = settings or EmbedSettings(cache=default_folder())
    total = len(source.images) if source.images is not None else 0  # type: ignore[arg-type]
    with progress(f"embedding {source.path.name}", total=total) as on_batch:
        features, unreadable, _ = embed_source(source, encoder, settings, key, on_batch)
    if unreadable:
        raise ValueError(
            f"{source.path}: {len(unreadable)} images cannot be read, first {unreadable[0].name}: published numbers "
            "are of all of them"
        )
    return features


def table(found: TaskResult) -> RenderableType:
    """The runs, and below them what the paper published for the same task."""
    table = Table(title=f"{found.task}, {found.encoder}, protocol {found.protocol}", title_justify="left")
    table.add_column("encoder")
    table.add_column("split")
    table.add_column(found.metric, justify="right")
    table.add_column("± sd of runs", justify="right")
    table.add_column("images", justify="right")
    for run in found.runs:
        table.add_row("this checkpoint", run.split, f"{run.mean:.3f}", f"{run.sd:.3f}", str(found.rows[run.split]))
    reported = found.runs[-1].split
    for name, value in found.published.items():
        table.add_row(f"{name} (arXiv 2404.15217)", reported, f"{value:.3f}", "–", "–", style="dim")
    return Group(table, *(Text(remark) for remark in found.remarks))
