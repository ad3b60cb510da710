"""Compare the standard error of the grouped jackknife with the true spread over redrawn slides.

    python benchmarks/coverage.py [--draws 200] [--out benchmarks/results/coverage.json]

A draw has 64 new slides of 24 tiles each, and 48 features of decreasing scale. A share of the variance (0, 30, 70 %)
lies between slides. The true standard deviation of a metric is that of its value over draws. The output compares:

- the mean standard error by slide (exact replicates)
- the mean standard error by tile, as if tiles were independent
- how often value ± 1.96 standard errors contains the mean over draws
- first-order replicates with exact ones, draw by draw
"""

from __future__ import annotations

import argparse
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from repmetrics.atomic_write import write_text
from repmetrics.measurement.measure import measure
from repmetrics.measurement.registry import METRICS
from repmetrics.measurement.result import Measurement

SLIDES, TILES, DIM = 64, 24, 48
SHARES = (0.0, 0.3, 0.7)
NAMES = ("rankme", "rankme_centered", "effective_rank", "participation_ratio", "odcorr", "uniformity_w2")
COLUMNS = {
    "mean": "mean",
    "true_sd": "true sd",
    "slide_se": "slide se",
    "slide_coverage_95": "covers",
    "tile_se": "tile se",
    "tile_coverage_95": "covers",
    "first_order_se_over_exact": "1st/exact",
}
OUT = Path(__file__).resolve().parent / "results" / "coverage.json"


def draw(share: float, generator: torch.Generator) -> Tensor:
    """(SLIDES·TILES, DIM) features, with ``share`` of the variance between slides."""
    scale = torch.arange(1, DIM + 1) ** -0.5
    slide = torch.randn(SLIDES, 1, DIM, generator=generator) * share**0.5
    tile = torch.randn(SLIDES, TILES, DIM, generator=generator) * (1 - share) ** 0.5
    return ((slide + tile) * scale).flatten(0, 1)


def error(measurement: Measurement) -> float:
    if measurement.standard_error is None:
        raise RuntimeError(f"{measurement.name} has no standard error: {measurement.reason}")
    return measurement.standard_error


def simulate(share: float, draws: int) -> dict[str, dict[str, float]]:
    generator = torch.Generator().manual_seed(round(1000 * share))
    slides = [i // TILES for i in range(SLIDES * TILES)]
    tiles = range(SLIDES * TILES)
    rows: dict[str, list[tuple[float, float, float, float]]] = {name: [] for name in NAMES}
    for _ in range(draws):
        x = draw(share, generator)
        by_slide = measure(x, groups=slides, metrics=NAMES, jackknife="exact")
        first = measure(x, groups=slides, metrics=NAMES, jackknife="first_order")
        by_tile = measure(x, groups=tiles, metrics=NAMES, jackknife="exact")
        for name in NAMES:
            m = by_slide[name]
            rows[name].append((m.value, error(m), error(first[name]), error(by_tile[name])))
    return {name: summary(torch.tensor(draws, dtype=torch.float64)) for name, draws in rows.items()}


def summary(rows: Tensor) -> dict[str, float]:
    value, slide, first, tile = rows.T
    true = value.std()
    return {
        "mean": float(value.mean()),
        "true_sd": float(true),
        "true_sd_standard_error": float(true / (2 * (len(value) - 1)) ** 0.5),
        "slide_se": float(slide.mean()),
        "slide_se_over_true": float(slide.mean() / true),
        "slide_coverage_95": float(((value - value.mean()).abs() < 1.96 * slide).double().mean()),
        "tile_se": float(tile.mean()),
        "tile_se_over_true": float(tile.mean() / true),
        "tile_coverage_95": float(((value - value.mean()).abs() < 1.96 * tile).double().mean()),
        "first_order_se_over_exact": float((first / slide).mean()),
        "first_order_se_over_exact_worst": float((first / slide - 1).abs().max()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=200)
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # decompositions of 48×48 matrices do not benefit from threads
    settings = {"slides": SLIDES, "tiles": TILES, "d": DIM, "draws": arguments.draws}
    record: dict[str, Any] = {"settings": settings, "versions": {n: version(n) for n in ("repmetrics", "torch")}}
    print(f"{'between':8}{'metric':20}" + "".join(f"{heading:>10}" for heading in COLUMNS.values()))
    for share in SHARES:
        summaries = record[f"between {share:.0%}"] = simulate(share, arguments.draws)
        for name, s in summaries.items():
            print(f"{share:<8.0%}{name:20}" + "".join(f"{s[key]:10.4f}" for key in COLUMNS), flush=True)
    record["conventions"] = {name: METRICS[name].convention for name in NAMES}
    write_text(arguments.out, json.dumps(record, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
