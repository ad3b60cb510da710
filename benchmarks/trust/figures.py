"""Figures 1, 2 and 4 of arXiv 2404.15217 in miniature, from benchmarks/results/trust.csv into docs/images/trust/.

    python benchmarks/trust/figures.py

1: random against pretrained initialization. 2: fractions of the slides. 4: DINO against DINOv2, with the probe and
ODCorr.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from repmetrics.atomic_write import write_text
from repmetrics.trust.runs import Evaluation, read_runs
from repmetrics.trust.svg import INK, STYLE, tag

HERE = Path(__file__).resolve().parent
TABLE, OUT = HERE.parent / "results" / "trust.csv", HERE.parent.parent / "docs" / "images" / "trust"
PANEL, HIGH, LEFT = 300, 210, 46
SIGNALS = {"pcam": "linear probe, pcam", "odcorr": "ODCorr (lower is better)", "rankme": "RankMe"}
Line = Sequence[tuple[int, float, float]]  # step, value, error

FIGURES: Mapping[str, Mapping[str, Sequence[str]]] = {
    "figure-1": {
        "DINO, random": ["dino-default-seed0"],
        "DINO, from drawn slides": ["dino-init-drawn"],
        "DINOv2, random": ["dinov2-default-seed0"],
        "DINOv2, from drawn slides": ["dinov2-init-drawn"],
    },
    "figure-2": {
        "10 % of slides": ["dino-slides-0"],
        "30 %": ["dino-slides-1"],
        "100 %": ["dino-default-seed0"],
    },
    "figure-4": {
        "DINO, 3 seeds": [f"dino-default-seed{k}" for k in range(3)],
        "DINOv2, 3 seeds": [f"dinov2-default-seed{k}" for k in range(3)],
    },
}


def line(evaluations: Sequence[Evaluation], runs: Sequence[str], signal: str) -> Line:
    """Mean over runs at each step, with the standard error of a single run or the standard deviation of several."""
    points = []
    for step in sorted({x.step for x in evaluations if x.run in runs}):
        at_step = [x for x in evaluations if x.run in runs and x.step == step and signal in x.values]
        values = [x.values[signal] for x in at_step]
        error = statistics.stdev(values) if len(values) > 1 else at_step[0].errors.get(signal, 0.0)
        points.append((step, statistics.mean(values), error))
    return points


def panel(lines: Mapping[str, Line], title: str, *, left: int) -> list[str]:
    """Lines with bands of one error, scaled to their range."""
    all_points = [point for points in lines.values() for point in points]
    right = max(x for x, _, _ in all_points)
    low, high = min(y - e for _, y, e in all_points), max(y + e for _, y, e in all_points)

    def position(x: float, y: float) -> str:
        across, down = x / right, (high - y) / (high - low or 1)
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
    return [*body, tag("text", f"{right} steps", x=left + PANEL - 14, y=HIGH - 22, text_anchor="end")]


def figure(evaluations: Sequence[Evaluation], groups: Mapping[str, Sequence[str]], label: str) -> str:
    """Probe, ODCorr and RankMe of groups of runs over training."""
    body = []
    for k, name in enumerate(groups):
        body += [tag("circle", cx=12 + 190 * k, cy=12, r=4, fill=INK[k]), tag("text", name, x=20 + 190 * k, y=16)]
    for k, (signal, title) in enumerate(SIGNALS.items()):
        body += panel({name: line(evaluations, runs, signal) for name, runs in groups.items()}, title, left=k * PANEL)
    attributes = {"xmlns": "http://www.w3.org/2000/svg", "viewBox": f"0 0 {PANEL * len(SIGNALS)} {HIGH}", "role": "img"}
    return tag("svg", tag("style", STYLE), *body, **attributes, aria_label=label)


def main() -> None:
    evaluations = read_runs(TABLE)
    known = {item.run for item in evaluations}
    for name, groups in FIGURES.items():
        present = {label: runs for label, runs in groups.items() if set(runs) <= known}
        if len(present) > 1:
            write_text(OUT / f"{name}.svg", figure(evaluations, present, name))
            print(OUT / f"{name}.svg")


if __name__ == "__main__":
    main()
