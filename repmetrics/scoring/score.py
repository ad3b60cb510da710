"""Score: measurements of one encoder, or one file of embeddings, on one source."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from repmetrics.data.open import open_data
from repmetrics.data.source import Source, Unreadable
from repmetrics.decisions.alarms import CollapseStats, collapse_stats
from repmetrics.encoders.encoder import Encoder, IdentifiedEncoder
from repmetrics.measurement.registry import DEFAULT_METRICS, METRICS, check_metric_names
from repmetrics.measurement.result import Measurement
from repmetrics.monitoring.measure_features import measure_features, measure_probes
from repmetrics.progress import Meter, progress
from repmetrics.scoring.embedded import Embedded
from repmetrics.scoring.file_names import SUFFIXES
from repmetrics.scoring.parts import PartWorkers
from repmetrics.scoring.settings import EmbedSettings

MEASURABLE = ("moments", "directions", "features", "groups", "views", "turns")


@dataclass(frozen=True)
class Score:
    """Measurements of one encoder, or one file of embeddings, on one source.

    Attributes:
        name: Name of the checkpoint or of the file of embeddings.
        encoder: Architecture of the encoder; None for embeddings.
        step: Training step recorded in the checkpoint.
        data: Description of the source.
        measurements: Measurements by name.
        classes: Names of the labels, by index.
        unreadable: Images that could not be read.
        notes: What was inferred or assumed.
        seconds: Time for embedding and measuring.
        from_cache: Whether the features come from the cache.
        device: Device of the encoder; None for embeddings.
        images_per_second: Rate of the encoder, with reading the images; None if all features come from the cache.
        run: Folder of the file, if files of several folders are scored together.
        collapse_stats: Further numbers that the alarms read.
    """

    name: str
    encoder: str | None
    step: int | None
    data: str
    measurements: dict[str, Measurement]
    classes: tuple[str, ...] = ()
    unreadable: tuple[Unreadable, ...] = ()
    notes: tuple[str, ...] = ()
    seconds: float = 0.0
    from_cache: bool = False
    device: str | None = None
    images_per_second: float | None = None
    run: str = ""
    collapse_stats: CollapseStats | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain types for JSON."""
        return {
            "name": self.name,
            "run": self.run,
            "encoder": self.encoder,
            "step": self.step,
            "data": self.data,
            "measurements": {name: m.to_json() for name, m in self.measurements.items()},
            "classes": list(self.classes),
            "unreadable": [item._asdict() for item in self.unreadable],
            "notes": list(self.notes),
            "seconds": self.seconds,
            "from_cache": self.from_cache,
            "device": self.device,
            "images_per_second": self.images_per_second,
        }


def check_measurable(names: Sequence[str]) -> None:
    """Check that metrics can be measured on one checkpoint and one source.

    Raises:
        ValueError: A name is unknown, or the metric needs patch tokens or another checkpoint.
    """
    check_metric_names(names)
    for name in names:
        if METRICS[name].inputs not in MEASURABLE:
            raise ValueError(f"{name} needs {METRICS[name].inputs}, which score does not have: use repmetrics.measure")


def score(
    source: Source,
    *,
    encoder: Encoder | IdentifiedEncoder | None = None,
    metrics: Sequence[str] = DEFAULT_METRICS,
    settings: EmbedSettings | None = None,
    meter: Meter | None = None,
    on_features: Callable[[Embedded], None] | None = None,
    workers: PartWorkers | None = None,
) -> Score:
    """Embed a source of images, measure the features, and probe them if the source has labels.

    Args:
        source: Features or images.
        encoder: Encoder of images; None for a source of features. Features of an identified encoder can be cached.
        metrics: Names from :data:`~repmetrics.measurement.registry.METRICS`.
        settings: Settings for computing the features.
        meter: Meter of the images that are embedded, to show progress.
        on_features: Function called with the features of images.
        workers: Where parts of the features are computed; default: in this process.
    """
    settings = settings or EmbedSettings()
    check_measurable(metrics)
    start = time.perf_counter()
    if source.features is not None and encoder is not None:
        raise ValueError(f"{source.path.name} holds features already: leave the checkpoint out")
    meter, embedded, derived = meter or Meter(), None, dict[str, Any]()
    if source.features is not None:
        features = source.features
        if needs := [name for name in metrics if METRICS[name].inputs in ("views", "turns")]:
            raise ValueError(f"{', '.join(needs)} need views of images: {source.path.name} holds features only")
    else:
        from repmetrics.scoring.embed import embed_derived, embed_source, size_note

        embedded = embed_source(source, encoder, settings, meter, workers=workers)
        features = embedded.features
    if len(features.values) < 2:
        raise ValueError(f"{source.path.name} yields {len(features.values)} samples: at least 2 are needed")
    notes: list[str] = []
    if embedded is not None:
        assert encoder is not None
        if on_features is not None:
            on_features(embedded)
        count = len(features.values)
        derived = embed_derived(source, encoder, settings, meter, count=count, metrics=metrics, workers=workers)
        notes += derived.pop("notes")
        if (assumed := size_note(source, encoder, settings)) is not None:
            notes.append(assumed)
        if several := embedded.report.several_frames:
            notes.append(f"{several} files have several frames or pages: the first is read")
    try:
        probed = measure_probes(features, independent=source.independent)
    except ValueError as error:
        probed = {}
        notes.append(f"no probe: {error}")
    measurements = measure_features(features, metrics=metrics, independent=source.independent, **derived)
    return Score(
        name=encoder.source if encoder else source.path.name,
        encoder=encoder.arch if encoder else None,
        step=encoder.step if encoder else None,
        data=f"{source.path.name} ({source.kind})",
        measurements={name: measurements[name] for name in metrics} | probed,
        classes=source.classes,
        unreadable=tuple(embedded.report.unreadable) if embedded else (),
        notes=(*(encoder.notes if encoder else ()), *source.notes, *notes),
        seconds=time.perf_counter() - start,
        from_cache=embedded is not None and embedded.from_cache,
        device=settings.device if embedded else None,
        images_per_second=meter.rate,
        collapse_stats=collapse_stats(features.values),
    )


def with_run_name(score: Score, file: Path, *, base: Path) -> Score:
    """The score, named by the path of its file relative to `base`, so that equal file names differ."""
    run = Path(os.path.relpath(file.parent, base)).as_posix()
    return score if run == "." else replace(score, name=f"{run}/{score.name}", run=run)


def drop_duplicates(scores: Sequence[Score]) -> list[Score]:
    """The first of the scores of one run with equal steps and measurements: "last.ckpt" copies another checkpoint."""
    kept: list[Score] = []
    for candidate in scores:
        if not any(is_copy(candidate, other) for other in kept):
            kept.append(candidate)
    return kept


def is_copy(first: Score, second: Score) -> bool:
    """Whether two scores are of one run and one step, and have the same measurements."""
    a, b = ({name: m.to_json() for name, m in score.measurements.items()} for score in (first, second))
    return first.step is not None and (first.run, first.step, a) == (second.run, second.step, b)


def score_checkpoint(
    file: Path,
    source: Source,
    *,
    overrides: Mapping[str, Any],
    metrics: Sequence[str],
    settings: EmbedSettings,
    features_out: Path | None = None,
    executor: Executor | None = None,
    open_source: Callable[[], Source] | None = None,
    quiet: bool = False,
) -> Score:
    """Score one checkpoint, with progress on stderr.

    Args:
        file: Checkpoint.
        source: Images to embed.
        overrides: Arguments of `identify`.
        metrics: Names of metrics.
        settings: Settings for computing the features.
        features_out: Folder to write the features to.
        executor: Where parts of the features are computed; default: in this process.
        open_source: Function that opens the source again, in the processes of the executor.
        quiet: Whether to print nothing, as where several checkpoints are scored at the same time.
    """
    if source.images is None:
        raise ValueError(f"{source.path.name} holds features already: leave the checkpoint out")
    from repmetrics.encoders.checkpoint import identify
    from repmetrics.encoders.files import read_checkpoint_file
    from repmetrics.scoring.embed import count_embeddings, count_images
    from repmetrics.scoring.feature_files import FeatureFiles

    digests = settings.cache is not None or features_out is not None
    encoder = identify(read_checkpoint_file(file, digests=digests), **overrides)
    workers = None
    if executor is not None and open_source is not None:
        from repmetrics.scoring.parts import PartWorkers

        workers = PartWorkers.of(executor, open_source, partial(_identified, file, overrides))
    files = None if features_out is None else FeatureFiles(features_out, source, encoder, settings)
    total = count_embeddings(count_images(source), metrics, views=settings.views)
    shown = (
        nullcontext(Meter(total))
        if quiet
        else progress(f"embedding {source.path.name} with {encoder.source}", total=total)
    )
    with shown as meter:
        result = score(
            source,
            encoder=encoder,
            metrics=metrics,
            settings=settings,
            meter=meter,
            on_features=None if files is None else files.write,
            workers=workers,
        )
    return result if files is None else replace(result, notes=(*result.notes, files.summary()))


def _identified(file: Path, overrides: Mapping[str, Any]) -> IdentifiedEncoder:
    from repmetrics.encoders.checkpoint import identify
    from repmetrics.encoders.files import read_checkpoint_file

    return identify(read_checkpoint_file(file, digests=False), **overrides)


def score_embeddings(
    file: Path, *, labels: str | None, groups: str | None, metrics: Sequence[str], settings: EmbedSettings
) -> Score:
    """Score a file of embeddings, or a folder with one file per slide."""
    try:
        source = open_data(file, labels=labels, groups=groups)
    except ValueError as error:
        if file.suffix.lower() not in SUFFIXES:
            raise
        raise ValueError(f"{error}; a checkpoint is scored on images: name them with --data") from error
    if source.features is None:
        raise ValueError(f"{file.name} holds images: pass it as --data, and a checkpoint to embed them with")
    return score(source, metrics=metrics, settings=settings)
