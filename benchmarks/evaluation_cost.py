"""Cost of everything in an evaluation but the encoder, compared with one SVD of the same features.

    python benchmarks/evaluation_cost.py [--repeats 5] [--shapes 4096x384 …] [--out benchmarks/results]

Features are in memory, in 64 groups and 4 classes, and drawn with a decaying spectrum. Times are CPU seconds on one
thread, so that other load changes little, as medians over repeats in turn. The unit is one `torch.linalg.svdvals` of
the features in float64, in the same turn. Metrics that compare views read pairs of features.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import torch

from repmetrics.atomic_write import write_text
from repmetrics.data.features import Features
from repmetrics.decisions.alarms import collapse_stats
from repmetrics.measurement.registry import DEFAULT_METRICS, DEFAULT_SIGNALS, METRICS
from repmetrics.monitoring.measure_features import measure_features
from repmetrics.probes.knn import knn_probe
from repmetrics.probes.linear import linear_probe

GROUPS, CLASSES = 64, 4
LATER = ("participation_ratio", "mean_direction", "alpha_distance", "cluster_agreement", "cluster_learnability")
"""Signals added after the targets were set."""


def draw(n: int, d: int) -> tuple[Features, Features, torch.Tensor]:
    """Features, pairs of views of every second row, labels."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(n, d, generator=generator) * torch.logspace(0, -2, d)
    rows = rows @ torch.linalg.qr(torch.randn(d, d, generator=generator))[0]
    groups = tuple(f"slide {i * GROUPS // n}" for i in range(n))
    half = rows[::2]
    views = torch.stack([half + 0.1 * half.std() * torch.randn(half.shape, generator=generator) for _ in range(2)], 1)
    labels = torch.randint(0, CLASSES, (n,), generator=generator)
    return Features(rows, groups), Features(views, groups[::2]), labels


def parts(n: int, d: int) -> dict[str, Callable[[], object]]:
    """What is timed, by name."""
    features, views, labels = draw(n, d)
    rows, groups = features.values, features.groups
    unit = torch.nn.functional.normalize(rows)

    def metrics(names: tuple[str, ...], method: str = "first_order") -> Callable[[], object]:
        return lambda: measure_features(features, metrics=names, pairs=views, jackknife=method)  # type: ignore[arg-type]

    of_views = tuple(name for name in DEFAULT_SIGNALS if METRICS[name].inputs == "views")
    return {
        "SVD": lambda: torch.linalg.svdvals(rows.double()),
        "metrics with errors": metrics(DEFAULT_METRICS),
        "metrics with exact errors": metrics(DEFAULT_METRICS, "exact"),
        "metrics without errors": metrics(DEFAULT_METRICS, "none"),
        "linear probe": lambda: linear_probe(rows, labels, groups=groups),
        "statistics of alarms": lambda: collapse_stats(rows),
        "kNN probe": lambda: knn_probe(rows, labels, groups=groups),
        "U·Uᵀ in float32": lambda: unit @ unit.T,
        **{f"later: {name}": metrics((name,)) for name in LATER},
        "later: view retrieval": metrics(of_views),
    }


def seconds(function: Callable[[], object]) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--shapes", nargs="+", default=["4096x384", "4096x1024"])
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    result: dict[str, dict[str, float]] = {}
    for shape in options.shapes:
        n, d = map(int, shape.split("x"))
        functions = parts(n, d)
        times: dict[str, list[float]] = {name: [] for name in functions}
        for _ in range(options.repeats):
            for name, function in functions.items():
                times[name].append(seconds(function))
        ratios = {name: statistics.median(t / svd for t, svd in zip(ts, times["SVD"], strict=True))
                  for name, ts in times.items()}  # fmt: skip
        ratios["everything but the encoder and kNN"] = sum(
            ratios[name] for name in ("metrics with errors", "linear probe", "statistics of alarms")
        )
        ratios["kNN probe over U·Uᵀ"] = ratios["kNN probe"] / ratios["U·Uᵀ in float32"]
        result[shape] = {"SVD seconds": statistics.median(times["SVD"])} | ratios
        print(shape, *(f"  {name:36} {value:6.2f}" for name, value in result[shape].items()), sep="\n", flush=True)
        content = {name: {key: round(value, 3) for key, value in row.items()} for name, row in result.items()}
        write_text(options.out / "evaluation_cost.json", json.dumps(content, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
