"""Is the error bar right? The grouped jackknife's standard error against the true spread over redrawn slides.

    python benchmarks/coverage.py [--draws 200] [--out benchmarks/results/coverage.json]

A draw is 64 new slides of 24 tiles each, 48 features of falling scale; a share of the variance (0, 30, 70 %) lies
between slides. The true standard deviation of a metric is that of its value over draws. Beside it: the mean standard
error by slide (exact replicates), the same by tile, as if tiles were independent, and how often value ± 1.96 standard
errors holds the mean over draws. Then, draw by draw, first-order replicates against exact ones.
"""

from __future__ import annotations

import argparse
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from repmetrics.measurement.measure import measure
from repmetrics.measurement.registry import METRICS
from repmetrics.measurement.result import Measurement

SLIDES, TILES, DIM = 64, 24, 48
SHARES = (0.0, 0.3, 0.7)
NAMES = ("rankme", "rankme_centered", "effective_rank", "participation_ratio", "odcorr", "uniformity_w2")
OUT = Path(__file__).resolve().parent / "results" / "coverage.json"


def draw(share: float, generator: torch.Generator) -> Tensor:
    """(SLIDES·TILES, DIM) features, ``share`` of the variance between slides."""
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
    return {name: summary(torch.tensor(found, dtype=torch.float64)) for name, found in rows.items()}


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
    torch.set_num_threads(1)  # thousands of 48×48 decompositions: threads would only wait for one another
    settings = {"slides": SLIDES, "tiles": TILES, "d": DIM, "draws": arguments.draws}
    record: dict[str, Any] = {"settings": settings, "versions": {n: version(n) for n in ("repmetrics", "torch")}}
    columns = ("mean", "true sd", "slide se", "covers", "tile se", "covers", "1st/exact")
    print(f"{'between':8}{'metric':20}" + "".join(f"{column:>10}" for column in columns))
    for share in SHARES:
        found = record[f"between {share:.0%}"] = simulate(share, arguments.draws)
        for name, s in found.items():
            cells = [
                s["mean"],
                s["true_sd"],
                s["slide_se"],
                s["slide_coverage_95"],
                s["tile_se"],
                s["tile_coverage_95"],
            ]
            cells.append(s["first_order_se_over_exact"])
            print(f"{share:<8.0%}{name:20}" + "".join(f"{cell:10.4f}" for cell in cells), flush=True)
    record["conventions"] = {name: METRICS[name].convention for name in NAMES}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    partial = arguments.out.with_suffix(".partial")
    partial.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    partial.replace(arguments.out)


if __name__ == "__main__":
    main()
