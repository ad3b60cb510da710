"""Figures of the experiment, from results/trust/ into docs/images/trust/.

    python benchmarks/trust/figures.py

1: random against pretrained initialization. 2: fractions of the training images. 4: DINO against DINOv2. 5: every
signal against the probe on CIFAR-10. The numbers are those of arXiv 2404.15217. labels: worth in labels.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence

import numpy as np
from analysis import of_domain, sign_of, signals_of
from matplotlib.axes import Axes
from settings import METHODS
from table import HERE, RESULTS, RunRows, read_runs, targets, values

from repmetrics.atomic_write import write_text
from repmetrics.report.drawing import SERIES, Drawing
from repmetrics.trust.selection import pairwise_accuracy

OUT = HERE.parent.parent / "docs" / "images" / "trust"
COLUMNS, SIDE = 5, 1.7
CURVES = {"probe": "linear probe", "odcorr": "ODCorr (lower is better)", "rankme": "RankMe",
          "view_retrieval_whitened_stain": "view retrieval, stain"}  # fmt: skip
Line = Sequence[tuple[float, float, float]]  # share of training, value, error


def line(runs: Sequence[RunRows], signal: str) -> Line:
    """Mean over runs at each evaluation, with the standard error of the probe of a single run, or of several runs."""
    points = []
    for share in sorted(runs[0].signals):
        rows = [run.probes[share] if signal == "probe" else run.signals[share] for run in runs]
        column = [row[signal] for row in rows if signal in row]
        spread = statistics.stdev(column) / math.sqrt(len(column)) if len(column) > 1 else rows[0].get("probe_se", 0.0)
        points.append((100 * share, statistics.mean(column), spread if signal == "probe" or len(column) > 1 else 0.0))
    return points


def panel(ax: Axes, lines: Mapping[str, Line], title: str) -> None:
    """Lines with bands of one error."""
    for k, (name, points) in enumerate(lines.items()):
        xs, ys, errors = np.array(points).T
        ax.fill_between(xs, ys - errors, ys + errors, color=SERIES[k], alpha=0.15, linewidth=0)
        ax.plot(xs, ys, color=SERIES[k], label=name)
    ax.set_title(title)


def curves(groups: Mapping[str, Sequence[RunRows]], label: str) -> str:
    """Probe and signals of groups of runs over training."""
    with Drawing(label, width=3.0 * len(CURVES), height=2.8, columns=len(CURVES)) as drawing:
        for ax, (signal, title) in zip(drawing.axes, CURVES.items(), strict=True):
            panel(ax, {name: line(runs, signal) for name, runs in groups.items()}, title)
            ax.set_xlabel("% of training")
        legend(drawing)
        return drawing.to_svg()


def scatter(runs: Sequence[RunRows]) -> str:
    """Every signal against the probe at the end of training, colored by method, with pairwise accuracies."""
    truth, methods = targets(runs), [run.method for run in runs]
    columns = {name: values(runs, name, share=1.0) for name in signals_of(runs)}
    signs = {name: sign_of(name) for name in columns}
    accuracy = {name: pairwise_accuracy(signs[name] * column, truth)[0] for name, column in columns.items()}
    within = {
        name: pairwise_accuracy(signs[name] * column, truth, groups=methods)[0] for name, column in columns.items()
    }
    order = sorted(columns, key=lambda name: (name != "odcorr", -accuracy[name]))
    rows = math.ceil(len(order) / COLUMNS)
    label = "Signals against the probe on CIFAR-10, end of each run"
    with Drawing(label, width=SIDE * COLUMNS, height=SIDE * rows + 0.4, rows=rows, columns=COLUMNS) as drawing:
        for ax, name in zip(drawing.axes, order, strict=False):
            short = name.replace("view_", "").replace("retrieval", "retr.").replace("whitened", "wh.")
            ax.set_title(f"{short}\n{accuracy[name]:.2f}, in methods {within[name]:.2f}", fontsize=8)
            _points(ax, columns[name], truth, methods)
        for ax in drawing.axes[len(order) :]:
            ax.set_axis_off()
        legend(drawing)
        return drawing.to_svg()


def _points(ax: Axes, column: np.ndarray, truth: np.ndarray, methods: Sequence[str]) -> None:
    """Circles. Ranges are cut so that broken runs do not hide the others: signals at their 2nd and 98th percentile."""
    known = ~np.isnan(column)
    across = np.clip(column, *np.percentile(column[known], (2, 98)))
    up = np.maximum(truth, np.percentile(truth, 5))
    for k, method in enumerate(METHODS):
        chosen = known & (np.array(methods) == method)
        ax.scatter(across[chosen], up[chosen], s=8, color=SERIES[k], alpha=0.8, label=method)
    ax.tick_params(labelsize=6)
    ax.locator_params(nbins=3)


def labels(report: Mapping[str, Mapping[str, object]]) -> str:
    """Pairwise accuracy of a probe on n labels, of the views, and of the family that n labels choose."""
    with Drawing("Worth of the signal in labels", width=3.0 * len(report), height=2.8, columns=len(report)) as drawing:
        for ax, (domain, content) in zip(drawing.axes, report.items(), strict=True):
            rows: list[dict[str, list[float]]] = content["few_labels"]["1.0"]  # type: ignore[index]
            views: float = content["rules"]["views"]["pairwise"][0]  # type: ignore[index]
            xs = [float(row["labels"]) for row in rows]  # type: ignore[arg-type]
            lines: dict[str, Line] = {
                "probe on n labels": [(x, row["probe_pairwise"][0], 0.0) for x, row in zip(xs, rows, strict=True)],
                "views without labels": [(x, views, 0.0) for x in xs],
                "family chosen by n labels": [
                    (x, row["family_pairwise"][0], 0.0) for x, row in zip(xs, rows, strict=True)
                ],
            }
            panel(ax, lines, f"{domain}: pairwise accuracy")
            ax.set(xscale="log", xlabel="labels")
        legend(drawing)
        return drawing.to_svg()


def legend(drawing: Drawing) -> None:
    """A legend for all panels, above them."""
    handles, names = drawing.axes[0].get_legend_handles_labels()
    drawing.figure.legend(handles, names, loc="outside upper left", ncols=len(names))


def main() -> None:
    runs = read_runs(confirm=True)
    by_name = {run.name: [run] for run in runs}
    nuclei = [run for run in runs if run.domain == "nuclei" and run.kind == "random"]
    groups = {
        "figure-1": {
            "DINO, random": by_name["nuclei-DINO-default"],
            "DINO, from CIFAR-10": by_name["nuclei-DINO-pretrained"],
            "DINOv2, random": by_name["nuclei-DINOv2-default"],
            "DINOv2, from CIFAR-10": by_name["nuclei-DINOv2-pretrained"],
        },
        "figure-2": {
            "3 % of images": by_name["nuclei-DINO-fraction0.03"],
            "30 %": by_name["nuclei-DINO-fraction0.3"],
            "100 %": by_name["nuclei-DINO-default"],
        },
        "figure-4": {m: [run for run in nuclei if run.method == m] for m in ("DINO", "DINOv2")},
    }
    for name, group in groups.items():
        write_text(OUT / f"{name}.svg", curves(group, f"{name}: {', '.join(group)}"))
    cifar = [*of_domain(runs, "cifar10", half="explore"), *of_domain(runs, "cifar10", half="confirm")]
    write_text(OUT / "figure-5.svg", scatter(cifar))
    report = json.loads((RESULTS / "confirm.json").read_text(encoding="utf-8"))
    write_text(OUT / "labels.svg", labels(report["domains"]))


if __name__ == "__main__":
    main()
