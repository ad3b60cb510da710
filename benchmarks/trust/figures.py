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
from settings import METHODS
from table import HERE, RESULTS, RunRows, read_runs, targets, values

from repmetrics.atomic_write import write_text
from repmetrics.trust.selection import pairwise_accuracy
from repmetrics.trust.svg import INK, STYLE, tag

OUT = HERE.parent.parent / "docs" / "images" / "trust"
PANEL, HIGH, LEFT = 240, 200, 46
COLUMNS, SIDE = 5, 150
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


def panel(lines: Mapping[str, Line], title: str, *, left: int) -> list[str]:
    """Lines with bands of one error, scaled to their range."""
    all_points = [point for points in lines.values() for point in points]
    low, high = min(y - e for _, y, e in all_points), max(y + e for _, y, e in all_points)

    def position(x: float, y: float) -> str:
        across, down = x / 100, (high - y) / (high - low or 1)
        return f"{left + LEFT + (PANEL - LEFT - 14) * across:.1f},{40 + (HIGH - 80) * down:.1f}"

    body = [tag("text", title, x=left + LEFT, y=34, _class="t")]
    for k, points in enumerate(lines.values()):
        band = [position(x, y + e) for x, y, e in points] + [position(x, y - e) for x, y, e in reversed(points)]
        body.append(tag("polygon", points=" ".join(band), fill=INK[k], fill_opacity=0.15))
        center = " ".join(position(x, y) for x, y, _ in points)
        body.append(tag("polyline", points=center, fill="none", stroke=INK[k], stroke_width=2))
    for value in (low, high):
        x, y = position(0, value).split(",")
        body.append(tag("text", f"{value:.3g}", x=float(x) - 4, y=float(y) + 4, text_anchor="end"))
    return [*body, tag("text", "% of training", x=left + PANEL - 14, y=HIGH - 22, text_anchor="end")]


def curves(groups: Mapping[str, Sequence[RunRows]], label: str) -> str:
    """Probe and signals of groups of runs over training."""
    body = legend(list(groups))
    for k, (signal, title) in enumerate(CURVES.items()):
        body += panel({name: line(runs, signal) for name, runs in groups.items()}, title, left=k * PANEL)
    return svg(body, PANEL * len(CURVES), HIGH, label)


def scatter(runs: Sequence[RunRows]) -> str:
    """Every signal against the probe at the end of training, colored by method, with pairwise accuracies."""
    truth, methods = targets(runs), [run.method for run in runs]
    columns = {name: values(runs, name, share=1.0) for name in signals_of(runs)}
    signs = {name: sign_of(name) for name in columns}
    accuracy = {name: pairwise_accuracy(signs[name] * column, truth)[0] for name, column in columns.items()}
    within = {
        name: pairwise_accuracy(signs[name] * column, truth, groups=methods)[0] for name, column in columns.items()
    }
    body = legend(METHODS)
    order = sorted(columns, key=lambda name: (name != "odcorr", -accuracy[name]))
    for k, name in enumerate(order):
        left, top = (k % COLUMNS) * SIDE, 24 + (k // COLUMNS) * SIDE
        body.append(
            tag(
                "text",
                name.replace("view_", "").replace("retrieval", "retr.").replace("whitened", "wh."),
                x=left + 8,
                y=top + 12,
                _class="t",
            )
        )
        body.append(tag("text", f"{accuracy[name]:.2f}, in methods {within[name]:.2f}", x=left + 8, y=top + 26))
        body.append(tag("rect", x=left + 8, y=top + 32, width=SIDE - 18, height=SIDE - 48, _class="g"))
        body += _points(columns[name], truth, methods, left=left + 14, top=top + 38, width=SIDE - 30, height=SIDE - 60)
    height = 30 + math.ceil(len(order) / COLUMNS) * SIDE
    return svg(body, COLUMNS * SIDE, height, "Signals against the probe on CIFAR-10, end of each run")


def _points(
    column: np.ndarray, truth: np.ndarray, methods: Sequence[str], *, left: int, top: int, width: int, height: int
) -> list[str]:
    """Circles. Ranges are cut so that broken runs do not hide the others: signals at their 2nd and 98th percentile."""
    known = ~np.isnan(column)
    low, high = np.percentile(column[known], (2, 98))
    across = np.clip((column - low) / ((high - low) or 1), 0, 1)
    bottom = np.percentile(truth, 5)
    up = np.clip((truth - bottom) / (truth.max() - bottom), 0, 1)
    return [
        tag("circle", cx=f"{left + width * across[k]:.1f}", cy=f"{top + height * (1 - up[k]):.1f}", r=2.6,
            fill=INK[METHODS.index(methods[k])], fill_opacity=0.8)
        for k in np.flatnonzero(known)
    ]  # fmt: skip


def labels(report: Mapping[str, Mapping[str, object]]) -> str:
    """Pairwise accuracy of a probe on n labels, of the views, and of the family that n labels choose."""
    names = ("probe on n labels", "views without labels", "family chosen by n labels")
    body = legend(names)
    for k, (domain, content) in enumerate(report.items()):
        rows: list[dict[str, list[float]]] = content["few_labels"]["1.0"]  # type: ignore[index]
        views: float = content["rules"]["views"]["pairwise"][0]  # type: ignore[index]
        xs = [100 * math.log(row["labels"] / 20) / math.log(50) for row in rows]  # type: ignore[operator]
        lines: dict[str, Line] = {
            names[0]: [(x, row["probe_pairwise"][0], 0.0) for x, row in zip(xs, rows, strict=True)],
            names[1]: [(0.0, views, 0.0), (100.0, views, 0.0)],
            names[2]: [(x, row["family_pairwise"][0], 0.0) for x, row in zip(xs, rows, strict=True)],
        }
        drawn = panel(lines, f"{domain}: pairwise accuracy", left=k * PANEL)
        body += [
            *drawn[:-1],
            tag("text", "20 to 1,000 labels", x=k * PANEL + PANEL - 14, y=HIGH - 22, text_anchor="end"),
        ]
    return svg(body, PANEL * len(report), HIGH, "Worth of the signal in labels")


def legend(names: Sequence[str]) -> list[str]:
    """Colored circles with names."""
    body = []
    for k, name in enumerate(names):
        body += [tag("circle", cx=12 + 175 * k, cy=12, r=4, fill=INK[k]), tag("text", name, x=20 + 175 * k, y=16)]
    return body


def svg(body: Sequence[str], width: int, height: int, label: str) -> str:
    """A standalone drawing."""
    attributes = {"xmlns": "http://www.w3.org/2000/svg", "viewBox": f"0 0 {width} {height}", "role": "img"}
    return tag("svg", tag("style", STYLE), *body, **attributes, aria_label=label)


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
