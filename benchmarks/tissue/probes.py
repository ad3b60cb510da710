"""Probes of three labeled targets, measured during training in addition to the monitor's label-free signals.

The targets are pcam (tumor), oscc (tissue by magnification), and nuclei (number in a 62.5 µm field, by patient). Each
is measured on the teacher's representations at step 0 and every `every_n_steps`. ``probes.jsonl`` has one line per
evaluation, with the paired change since step 0. The same probes on color statistics alone are the baseline, in
``colour.json``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import openslide
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from repmetrics.data.read_csv import read_csv
from repmetrics.measurement.blocks import Blocks
from repmetrics.measurement.jackknife import jackknife_error
from repmetrics.measurement.result import Measurement, difference
from repmetrics.probes.common import color_statistics
from repmetrics.probes.knn import knn_probe
from repmetrics.probes.linear import linear_probe

Embed = Callable[[Tensor], Tensor]


class Target(NamedTuple):
    """Images (N, 3, S, S) uint8, their labels or counts (N,), and the group of each."""

    images: Tensor
    values: Tensor
    groups: list[Hashable]


class Probes(Callback):
    """Measure the teacher on every target and write the results.

    Args:
        targets: File with the result of `load_targets` as dicts.
        out: Folder for ``probes.jsonl``.
        every_n_steps: Evaluation interval of the monitor.
    """

    def __init__(self, targets: Path, out: Path, *, every_n_steps: int) -> None:
        loaded = torch.load(targets, weights_only=True)
        self.targets = {name: Target(**parts) for name, parts in loaded.items()}
        self.out, self.every_n_steps = Path(out), every_n_steps
        self.first: Mapping[str, Measurement] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluate the initial weights."""
        self.evaluate(trainer, pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Evaluate every `every_n_steps` optimizer steps."""
        if trainer.global_step % self.every_n_steps == 0:
            self.evaluate(trainer, pl_module)

    @torch.no_grad()
    def evaluate(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Append one line to ``probes.jsonl``."""
        measurements = measure_targets(self.targets, pl_module)
        self.first = self.first or measurements
        line: dict[str, Any] = {"step": trainer.global_step}
        for name, m in measurements.items():
            line |= {name: m.value, f"{name}_se": m.standard_error}
            line[f"{name}_gain"], line[f"{name}_gain_se"] = gain(self.first[name], m)
        with (self.out / "probes.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def gain(before: Measurement, after: Measurement) -> tuple[float, float | None]:
    """Change of a probe, and its paired error; None where each image is a group of its own."""
    if before.replicates is None or after.replicates is None:
        return after.value - before.value, None
    change = difference(before, after)
    return change.value, change.standard_error


def load_targets(data: Path, *, size_px: int) -> dict[str, Target]:
    """All images in memory: about 4,600 of size_px × size_px."""
    (_, pcam), (_, oscc) = (read_csv(data / name / "labels.csv") for name in ("pcam", "oscc"))
    fields = [row for row in read_csv(data / "tcga_labels" / "patches250.csv")[1] if row["n_nuclei"]]
    tissues = sorted({(row["label"], row["magnification"]) for row in oscc})

    def field(row: Mapping[str, str]) -> Image.Image:
        with openslide.OpenSlide(data / "tcga_slides" / row["file"]) as slide:
            return slide.read_region((int(row["x"]), int(row["y"])), 0, (int(row["size"]),) * 2)

    return {
        "pcam": Target(
            stack((Image.open(data / "pcam" / row["file"]) for row in pcam), size_px),
            torch.tensor([int(row["tumor"]) for row in pcam]),
            list(range(len(pcam))),  # slides are unknown: each image is a group
        ),
        "oscc": Target(
            stack((Image.open(data / "oscc" / row["file"]) for row in oscc), size_px),
            torch.tensor([tissues.index((row["label"], row["magnification"])) for row in oscc]),
            list(range(len(oscc))),
        ),
        "nuclei": Target(
            stack(map(field, fields), size_px),
            torch.tensor([float(row["n_nuclei"]) for row in fields], dtype=torch.float64),
            [row["patient"] for row in fields],
        ),
    }


def stack(images: Any, size_px: int) -> Tensor:
    """Images → uint8 (N, 3, size_px, size_px), antialiased."""
    arrays = []
    for image in images:
        pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None].float()
        resized = interpolate(pixels, size=(size_px, size_px), mode="bilinear", antialias=True, align_corners=False)
        arrays.append(resized[0].round().to(torch.uint8))
    return torch.stack(arrays)


def measure_targets(targets: Mapping[str, Target], embed: Embed) -> dict[str, Measurement]:
    """All probes of all targets, on the features that `embed` computes."""
    measurements = {}
    for name, target in targets.items():
        features = torch.cat([embed(batch) for batch in target.images.split(256)]).double()
        if target.values.is_floating_point():
            measurements[name] = count_probe(features, target.values, groups=target.groups)
        else:
            measurements[name] = linear_probe(features, target.values, groups=target.groups)
            measurements[f"{name}_knn"] = knn_probe(features, target.values, groups=target.groups)
    return measurements


def count_probe(
    features: Tensor, counts: Tensor, *, groups: Sequence[Hashable], alphas: Sequence[float] = (1, 10, 100, 1e3, 1e4)
) -> Measurement:
    """Correlation between counts and their ridge prediction, cross-fitted over nine folds of whole patients.

    The penalty is selected within the training patients. The standard error is a jackknife over patients on the
    predictions, without refitting.
    """
    x, y = features.numpy(), counts.numpy()
    names = sorted(set(groups), key=str)
    fold_of_name = np.random.default_rng(0).permutation(len(names)) % 9
    fold = np.array([fold_of_name[names.index(group)] for group in groups])
    predicted = np.empty_like(y)
    for k in range(9):
        train = fold != k
        inner = [j for j in range(9) if j != k]
        errors = np.zeros(len(alphas))
        for j in inner:
            fitted = ridge(x[train & (fold != j)], y[train & (fold != j)], x[fold == j], alphas)
            errors += ((fitted - y[fold == j]) ** 2).sum(1)
        predicted[~train] = ridge(x[train], y[train], x[~train], [alphas[int(errors.argmin())]])[0]
    blocks = Blocks.from_groups(groups)
    index = blocks.index.numpy()
    value = correlation(predicted, y)
    replicates = [correlation(predicted[index != b], y[index != b]) for b in range(len(blocks.sizes))]
    return Measurement(
        name="nuclei",
        value=value,
        standard_error=jackknife_error(value, replicates, blocks.sizes),
        reason=None,
        direction="higher",
        n=len(y),
        d=x.shape[1],
        groups=blocks.groups,
        convention="correlation of counts with a ridge regression, nine folds of whole patients",
        dtype=str(features.dtype).removeprefix("torch."),
        replicates=tuple(replicates),
        blocks=blocks,
    )


def ridge(x: NDArray[Any], y: NDArray[Any], test: NDArray[Any], alphas: Sequence[float]) -> NDArray[Any]:
    """Predictions (len(alphas), len(test)) of ridge regressions on standardized features."""
    mean, scale = x.mean(0), x.std(0) + 1e-12
    values, vectors = np.linalg.eigh(((x - mean) / scale).T @ ((x - mean) / scale))
    target = vectors.T @ ((x - mean) / scale).T @ (y - y.mean())
    rotated = (test - mean) / scale @ vectors
    return np.stack([rotated @ (target / (np.maximum(values, 0) + alpha)) + y.mean() for alpha in alphas])


def correlation(a: NDArray[Any], b: NDArray[Any]) -> float:
    """Pearson's correlation; 0 for a constant."""
    return float(np.corrcoef(a, b)[0, 1]) if a.std() and b.std() else 0.0


def color_baseline(targets: Mapping[str, Target]) -> dict[str, float]:
    """Values of the probes on the mean and standard deviation of each color channel alone."""
    return {name: m.value for name, m in measure_targets(targets, color_statistics).items()}
