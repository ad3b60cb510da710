"""The alarms of the monitor on the runs of the experiment: hits, false alarms and delays.

python benchmarks/trust/alarms.py

A run is *healthy* if its probe ends above that of the untrained network, and *broken* if it ends below by more than
three standard errors. It breaks at the first evaluation at which its probe is that far below. The constants of
`repmetrics.decisions.alarms` were set on the exploring half of the random runs. The settings meant to break training
belong to neither half. Writes results/trust/alarms.json.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from table import RESULTS, RunRows, read_runs

from repmetrics.atomic_write import write_text
from repmetrics.decisions.alarms import RANK_METRIC, RETRIEVAL_METRICS, AlarmInput, CollapseStats, alarms
from repmetrics.measurement.registry import METRICS
from repmetrics.measurement.result import Measurement

VIEW_SET = "geometry"
"""The monitor's default."""
IMAGES, WIDTH = 1000, 128
"""Held-out images, each with two views, and D."""
BROKEN_ERRORS = 3.0
SOON = 2
"""An alarm in time comes at most this many evaluations after the break."""


def alarm_inputs(run: RunRows) -> list[AlarmInput]:
    """What the monitor would have read at each evaluation."""
    return [_alarm_input(values) for _, values in sorted(run.signals.items())]


def _alarm_input(values: Any) -> AlarmInput:
    def measurement(name: str, column: str, n: int) -> Measurement:
        value = values.get(column, math.nan)
        return Measurement(name, value, None, None, METRICS[name].direction, n, WIDTH, None, "", "float32")

    stats = CollapseStats(1 - values.get("mean_direction", 0.0), 1.0, values.get("dead_features", 0.0), 1.0, False)
    return AlarmInput(
        int(values["step"]),
        measurement(RANK_METRIC, RANK_METRIC, IMAGES),
        stats,
        int(values["nonfinite"]),
        tuple(measurement(name, f"{name}_{VIEW_SET}", 2 * IMAGES) for name in RETRIEVAL_METRICS),
    )


def first_alarm(run: RunRows) -> tuple[int, str] | None:
    """Evaluation of the first alarm, from 0, with its kind."""
    inputs = alarm_inputs(run)
    for i in range(len(inputs)):
        if active := alarms(inputs[: i + 1]):
            return i, active[0].kind
    return None


def break_index(run: RunRows) -> int | None:
    """First evaluation at which the probe is below that of the untrained network by more than BROKEN_ERRORS."""
    start = run.probes[0.0]
    for i, (_, probe) in enumerate(sorted(run.probes.items())):
        error = math.hypot(start["probe_se"], probe["probe_se"])
        if probe["probe"] < start["probe"] - BROKEN_ERRORS * error:
            return i
    return None


def summarize(runs: Sequence[RunRows]) -> dict[str, Any]:
    """Counts over runs with a probe at their start and their end."""
    known = [run for run in runs if {0.0, 1.0} <= set(run.probes)]
    change = {run.name: run.probes[1.0]["probe"] - run.probes[0.0]["probe"] for run in known}
    error = {run.name: math.hypot(run.probes[0.0]["probe_se"], run.probes[1.0]["probe_se"]) for run in known}
    healthy = [run for run in known if change[run.name] > 0]
    broken = [run for run in known if change[run.name] < -BROKEN_ERRORS * error[run.name]]
    hits = {run.name: (first_alarm(run), break_index(run)) for run in broken}
    return {
        "healthy": len(healthy),
        "rank_fall": _pairs_in_order(healthy, broken),
        "false": {run.name: first[1] for run in healthy if (first := first_alarm(run)) is not None},
        "broken": {
            name: {
                "change": round(change[name], 3),
                "errors": round(change[name] / error[name], 1),
                "breaks": at,
                "alarm": first,
            }
            for name, (first, at) in hits.items()
        },
        "found": sum(first is not None for first, _ in hits.values()),
        "in_time": sum(first is not None and at is not None and first[0] <= at + SOON for first, at in hits.values()),
    }


def _pairs_in_order(healthy: Sequence[RunRows], broken: Sequence[RunRows]) -> float | None:
    """Share of pairs of a healthy and a broken run in which the rank fell less in the healthy one."""
    change = [
        [run.signals[1.0][RANK_METRIC] - run.signals[0.0][RANK_METRIC] for run in runs] for runs in (healthy, broken)
    ]
    pairs = [(h > b) + (h == b) / 2 for h in change[0] for b in change[1]]
    return round(sum(pairs) / len(pairs), 2) if pairs else None


def main() -> None:
    runs = read_runs(confirm=True)
    random = [run for run in runs if run.kind == "random"]
    result = {half: summarize([run for run in random if run.half == half]) for half in ("explore", "confirm")}
    settings = [run for run in runs if run.kind == "broken"]
    result["settings"] = summarize(settings) | {"alarms": {run.name: first_alarm(run) for run in settings}}
    write_text(RESULTS / "alarms.json", json.dumps(result, indent=1) + "\n")
    for name, content in result.items():
        print(f"{name}: false alarms {len(content['false'])} of {content['healthy']}, found {content['found']} of "
              f"{len(content['broken'])}, in time {content['in_time']}")  # fmt: skip


if __name__ == "__main__":
    main()
