"""Does the grouped jackknife hold? Its standard error against the true spread, and claims where nothing differs.

    python benchmarks/coverage.py [--draws 200] [--claims 400] [--out benchmarks/results/coverage.json]

**Errors.** A draw has 64 new slides of 24 tiles each, and 48 features of decreasing scale. A share of the variance
(0, 30, 70 %) lies between slides. The true standard deviation of a metric is that of its value over draws. The output
compares:

- the mean standard error by slide (exact replicates)
- the mean standard error by tile, as if tiles were independent
- how often value ± 1.96 standard errors contains the mean over draws
- first-order replicates with exact ones, draw by draw

**Claims.** A draw has 2 to 64 new slides and 16 features. Slides have equal numbers of tiles, or numbers that fall to a
tenth, or one slide has half of the tiles. The output has the rate of false statements, of which 5 % are intended:

- compare: two encoders with the same distribution of features are called different
- score: value ± margin does not contain the mean over draws
- probe: a probe on labels of slides, or of tiles, that are unrelated to the features differs from chance
- probes: two such probes are called different

Each is the mean over two settings (30 and 70 % between slides; labels by slide and by tile) of the metric, or the
probe, with the highest rate.

Refused statements are not counted; their share is in the output.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from repmetrics.atomic_write import write_text
from repmetrics.decisions.checkpoint_selection import compare
from repmetrics.measurement.measure import measure
from repmetrics.measurement.registry import DEFAULT_METRICS, METRICS
from repmetrics.measurement.result import Measurement
from repmetrics.probes import knn_probe, linear_probe

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
GROUPS = (2, 3, 5, 8, 16, 32, 64)
SHAPES = ("equal", "falling", "one")
STATEMENTS = ("compare", "score", "probe", "probes")
ROWS, WIDTH = 400, 16
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
    rows: dict[str, list[tuple[float, float, float, float]]] = {name: [] for name in NAMES}
    for _ in range(draws):
        x = draw(share, generator)
        by_slide = measure(x, groups=slides, metrics=NAMES, jackknife="exact")
        first = measure(x, groups=slides, metrics=NAMES, jackknife="first_order")
        by_tile = measure(x, groups="independent", metrics=NAMES, jackknife="exact")
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


def group_sizes(count: int, shape: str, *, rows: int = ROWS) -> list[int]:
    """Rows of each of ``count`` groups: "equal", "falling" to a tenth, or "one" group with half of them."""
    relative = {
        "equal": np.ones(count),
        "falling": np.geomspace(1, 0.1, count),
        "one": np.array([max(count - 1, 2), *[1] * (count - 1)], dtype=float),
    }[shape]
    return np.maximum(2, np.round(relative / relative.sum() * max(rows, 8 * count))).astype(int).tolist()


def false_comparisons(sizes: Sequence[int], share: float, draws: int, *, seed: int = 0) -> dict[str, dict[str, float]]:
    """Share of draws in which ``compare`` calls equals different, and in which a margin misses the mean, by metric."""
    group = np.repeat(np.arange(len(sizes)), sizes)
    differ: dict[str, list[bool]] = {name: [] for name in DEFAULT_METRICS}
    values: dict[str, list[tuple[float, float]]] = {name: [] for name in DEFAULT_METRICS}
    for k in range(draws):
        random = np.random.default_rng([seed, k])

        def noise(random: np.random.Generator = random) -> Any:
            slide, tile = random.normal(size=(len(sizes), WIDTH)), random.normal(size=(len(group), WIDTH))
            return share**0.5 * slide[group] + (1 - share) ** 0.5 * tile

        common, scale = noise(), np.arange(1, WIDTH + 1) ** -0.5
        first, second = (
            measure(torch.from_numpy((common + 0.7 * noise()) * scale), groups=group.tolist()) for _ in range(2)
        )
        for c in compare(first, second):
            differ[c.name].append(c.outcome in ("better", "worse"))
            values[c.name].append((first[c.name].value, first[c.name].margin or math.inf))
    missed = {name: np.array(pairs) for name, pairs in values.items()}
    return {
        "compare": {name: float(np.mean(flags)) for name, flags in differ.items()},
        "score": {name: float((abs(v[:, 0] - v[:, 0].mean()) > v[:, 1]).mean()) for name, v in missed.items()},
    }


def false_probes(
    probe: Callable[..., Measurement], sizes: Sequence[int], labels: str, draws: int, *, classes: int = 2, seed: int = 0
) -> dict[str, float]:
    """Rates of claims by a probe of noise: that it differs from chance, and that it differs on other features."""
    group = np.repeat(np.arange(len(sizes)), sizes)
    chance, differ = [], []
    for k in range(draws):
        random = np.random.default_rng([seed, k])
        of_slide = random.permutation(np.arange(len(sizes)) % classes)[group]
        target = torch.from_numpy(of_slide if labels == "slide" else random.integers(0, classes, len(group)))
        first, second = (
            probe(
                torch.from_numpy(
                    random.normal(size=(len(sizes), WIDTH))[group] + random.normal(size=(len(group), WIDTH))
                ),
                target,
                groups=group.tolist(),
            )
            for _ in range(2)
        )
        if first.margin is not None:
            chance.append(abs(first.value - 1 / classes) > first.margin)
        (compared,) = compare({first.name: first}, {first.name: second})
        if compared.outcome != "unknown":
            differ.append(compared.outcome != "no difference")
    return {
        "chance": float(np.mean(chance)) if chance else math.nan,
        "compare": float(np.mean(differ)) if differ else math.nan,
        "refused": 1 - len(differ) / draws,
    }


def claims(count: int, shape: str, draws: int) -> dict[str, Any]:
    """Rates of false statements with ``count`` groups of a shape."""
    sizes = group_sizes(count, shape)
    record: dict[str, Any] = {}
    for share in (0.3, 0.7):
        record[f"between {share:.0%}"] = false_comparisons(sizes, share, draws)
    for name, probe in (("linear_probe", linear_probe), ("knn", knn_probe)):
        for labels in ("slide", "tile"):
            record[f"{name}, labels by {labels}"] = false_probes(probe, sizes, labels, draws)
    return record


def rates(record: dict[str, Any]) -> dict[str, float | None]:
    """Rate of each kind of false statement: the highest of the metrics (or probes), each a mean of its settings."""
    between = [part for key, part in record.items() if key.startswith("between")]
    probes = {
        probe: [part for key, part in record.items() if key.startswith(f"{probe},")]
        for probe in ("linear_probe", "knn")
    }
    of_metrics = {
        kind: [np.mean([part[kind][name] for part in between]) for name in DEFAULT_METRICS]
        for kind in ("compare", "score")
    }
    of_probes = {
        statement: [
            np.mean(known)
            for parts in probes.values()
            if (known := [part[kind] for part in parts if part[kind] is not None and not math.isnan(part[kind])])
        ]
        for statement, kind in (("probe", "chance"), ("probes", "compare"))
    }
    return {kind: float(max(values)) if values else None for kind, values in (of_metrics | of_probes).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=200, help="draws of the errors; 0 keeps those in the file")
    parser.add_argument("--claims", type=int, default=120, help="draws of the claims; 0 keeps those in the file")
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # decompositions of 48×48 matrices do not benefit from threads
    record: dict[str, Any] = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    record["versions"] = {n: version(n) for n in ("repmetrics", "torch")}
    if arguments.draws:
        record["settings"] = {"slides": SLIDES, "tiles": TILES, "d": DIM, "draws": arguments.draws}
        print(f"{'between':8}{'metric':20}" + "".join(f"{heading:>10}" for heading in COLUMNS.values()))
        for share in SHARES:
            summaries = record[f"between {share:.0%}"] = simulate(share, arguments.draws)
            for name, s in summaries.items():
                print(f"{share:<8.0%}{name:20}" + "".join(f"{s[key]:10.4f}" for key in COLUMNS), flush=True)
        record["conventions"] = {name: METRICS[name].convention for name in NAMES}
    if arguments.claims:
        settings = {"rows": ROWS, "d": WIDTH, "draws": arguments.claims}
        if record.get("claims", {}).get("settings") != settings:
            record["claims"] = {"settings": settings}
        print(f"{'groups':8}{'rows':10}" + "".join(f"{heading:>10}" for heading in STATEMENTS))
        for count in GROUPS:
            for shape in SHAPES:
                name = f"{count} groups, {shape}"
                record["claims"][name] = record["claims"].get(name) or claims(count, shape, arguments.claims)
                shown = record.setdefault("false claims", {})[name] = rates(record["claims"][name])
                cells = ("refused" if rate is None else f"{rate:.3f}" for rate in shown.values())
                print(f"{count:<8}{shape:10}" + "".join(f"{cell:>10}" for cell in cells), flush=True)
                write_record(record, arguments.out)  # an interrupted simulation continues
    write_record(record, arguments.out)


def write_record(record: dict[str, Any], path: Path) -> None:
    text = json.dumps(record, indent=1, ensure_ascii=False).replace("NaN", "null")
    write_text(path, text + "\n")


if __name__ == "__main__":
    main()
