"""Cost of everything in an evaluation but the encoder, compared with one SVD of the same features.

    python benchmarks/evaluation_cost.py [--repeats 7] [--shapes 4096x384 …] [--out benchmarks/results]

A real monitor evaluates an identity encoder over features in memory, in 64 groups and 4 classes, drawn with a decaying
spectrum. Times are wall time with two threads; --one-thread counts CPU seconds, which other load changes little. Each
round runs everything in turn, and ratios are taken within a round; medians and quartiles over rounds are written. The
unit is one `torch.linalg.svdvals` of the features in float64. The kNN probe is left out of the whole, and compared
with one float32 product U·Uᵀ of the same rows. Signals that were added later are measured as what they add to the
default metrics, up to 10 000 rows; metrics that compare views read pairs of features of every second row.

With --against, another checkout of the project takes turns with this one, each in a process of its own, and the ratios
of both are written too: under the load of other programs, two runs one after the other do not compare.

Extra memory is the growth of the peak resident set of a fresh process in its second evaluation, and in that with kNN.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

# read when torch is imported
os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1" if "--one-thread" in sys.argv else "2"

import torch
from metrics import machine, resident

from repmetrics.atomic_write import write_text
from repmetrics.data.features import Features
from repmetrics.decisions.alarms import collapse_stats
from repmetrics.functional.neighbors import MAX_ROWS
from repmetrics.measurement.moments import Moments
from repmetrics.measurement.registry import DEFAULT_METRICS, DEFAULT_SIGNALS, METRICS
from repmetrics.monitoring import measure_features as of_features
from repmetrics.monitoring.monitor import Monitor
from repmetrics.probes.knn import knn_probe
from repmetrics.probes.linear import linear_probe

ROOT = Path(__file__).resolve().parent.parent
THREADS = int(os.environ["OMP_NUM_THREADS"])
GROUPS, CLASSES, BATCH = 64, 4, 512
SHAPES = ("4096x384", "4096x1024", "25600x1024")
TARGETS = {"4096x384": 1.3, "4096x1024": 1.0, "25600x1024": 1.1}
KNN_TARGET = 1.3
PAUSE = 0.1
"""Seconds before each call: the threads of a pool still spin after one."""
LATER = ("participation_ratio", "mean_direction", "alpha_distance", "cluster_agreement", "cluster_learnability")
"""Signals added after the targets were set."""


def draw(n: int, d: int) -> tuple[Features, Features]:
    """Features with labels, and pairs of views of every second row."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(n, d, generator=generator) * torch.logspace(0, -2, d)
    rows = rows @ torch.linalg.qr(torch.randn(d, d, generator=generator))[0]
    groups = tuple(f"slide {i * GROUPS // n}" for i in range(n))
    half = rows[::2]
    views = torch.stack([half + 0.1 * half.std() * torch.randn(half.shape, generator=generator) for _ in range(2)], 1)
    labels = torch.randint(0, CLASSES, (n,), generator=generator)
    return Features(rows, groups, labels), Features(views, groups[::2])


def evaluation(features: Features) -> Callable[[], object]:
    """A whole evaluation with the default metrics, by a monitor that has evaluated before."""
    assert features.labels is not None
    assert features.groups is not None
    monitor, encoder = Monitor(metrics=DEFAULT_METRICS, progress=None), torch.nn.Identity()
    starts = range(0, len(features.values), BATCH)
    batches = [
        (features.values[i : i + BATCH], features.labels[i : i + BATCH], features.groups[i : i + BATCH]) for i in starts
    ]
    return lambda: monitor.measure(encoder, batches, step=len(monitor.history))


def parts(n: int, d: int) -> dict[str, Callable[[], object]]:
    """What is timed, by name."""
    features, views = draw(n, d)
    rows, groups, labels = features
    assert labels is not None
    kept = rows[torch.arange(min(n, MAX_ROWS)) * n // min(n, MAX_ROWS)]
    unit = torch.nn.functional.normalize(kept)
    known = Moments(rows)
    whole = evaluation(features)
    without = knn_probe(rows[:64], labels[:64])

    def evaluate_without_knn() -> None:
        with patch.object(of_features, "knn_probe", lambda *_, **__: without):
            whole()

    def metrics(names: tuple[str, ...], method: str = "first_order") -> Callable[[], object]:
        return lambda: of_features.measure_features(features, metrics=names, pairs=views, jackknife=method)  # type: ignore[arg-type]

    of_views = tuple(name for name in DEFAULT_SIGNALS if METRICS[name].inputs == "views")
    later = {f"later: {name}": metrics((*DEFAULT_METRICS, name)) for name in LATER}
    later |= {
        "later: view retrieval": metrics(of_views),
        "later: view retrieval without errors": metrics(of_views, "none"),
    }
    return {
        "SVD": lambda: torch.linalg.svdvals(rows.double()),
        "everything but the encoder and kNN": evaluate_without_knn,
        "metrics with errors": metrics(DEFAULT_METRICS),
        "metrics without errors": metrics(DEFAULT_METRICS, "none"),
        "linear probe": lambda: linear_probe(rows, labels, groups=groups),
        "statistics of alarms": lambda: collapse_stats(rows, moments=known),
        "kNN probe": lambda: knn_probe(rows, labels, groups=groups),
        "U·Uᵀ in float32": lambda: unit @ unit.T,
        **(later if n <= MAX_ROWS else {}),
    }


def seconds(function: Callable[[], object]) -> float:
    clock = time.process_time if THREADS == 1 else time.perf_counter
    start = clock()
    function()
    return clock() - start


def summary(values: list[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": round(middle, 3), "lower_quartile": round(low, 3), "upper_quartile": round(high, 3)}


def measure_shape(shape: str, repeats: int) -> dict[str, Any]:
    functions = parts(*map(int, shape.split("x")))
    rounds: list[dict[str, float]] = []
    for _ in range(repeats + 1):
        rounds.append({})
        for name, function in functions.items():
            rounds[-1][name] = seconds(function)
            time.sleep(PAUSE)
    ratios: dict[str, list[float]] = {name: [] for name in (*functions, "kNN probe over U·Uᵀ")}
    for times in rounds[1:]:
        for name in functions:
            added = times[name] - (times["metrics with errors"] if name.removeprefix("later: ") in LATER else 0.0)
            ratios[name].append(added / times["SVD"])
        ratios["kNN probe over U·Uᵀ"].append(times["kNN probe"] / times["U·Uᵀ in float32"])
    svd = statistics.median(times["SVD"] for times in rounds[1:])
    return {"SVD seconds": round(svd, 4), "over the SVD": {name: summary(values) for name, values in ratios.items()}}


def take_turns(shape: str) -> None:
    """Answer each line on stdin with the ratio of an evaluation without kNN to the SVD; in a process of its own."""
    functions = parts(*map(int, shape.split("x")))
    names = "everything but the encoder and kNN", "SVD"
    for name in names:
        functions[name]()
    for _ in sys.stdin:
        times = []
        for name in names:
            time.sleep(PAUSE)
            times.append(seconds(functions[name]))
        print(times[0] / times[1], flush=True)


def compare(shape: str, other: Path, repeats: int) -> dict[str, dict[str, float]]:
    """Ratio of an evaluation without kNN to the SVD, here and in another checkout by turns."""
    flags = ["--one-thread"] if THREADS == 1 else []
    command = [sys.executable, __file__, "--turns", shape, *flags]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    workers = {
        name: subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(folder)}, **pipes)
        for name, folder in (("this", ROOT), ("the other", other.resolve()))
    }
    ratios: dict[str, list[float]] = {name: [] for name in workers}
    for _ in range(repeats):
        for name, worker in workers.items():
            assert worker.stdin is not None
            assert worker.stdout is not None
            worker.stdin.write("go\n")
            worker.stdin.flush()
            ratios[name].append(float(worker.stdout.readline()))
    for worker in workers.values():
        worker.communicate()
    return {name: summary(values) for name, values in ratios.items()}


def memory(shape: str) -> dict[str, float]:
    """Extra MiB of an evaluation, without and with kNN; in a process of its own."""
    features, _ = draw(*map(int, shape.split("x")))
    run = evaluation(
        Features(features.values[:256, :64].contiguous(), features.groups[::16][:256], features.labels[:256])
    )  # type: ignore[index]
    run()
    whole, result = evaluation(features), {}
    without = knn_probe(features.values[:64], features.labels[:64])  # type: ignore[index]
    for name in ("extra MiB without kNN", "extra MiB with kNN"):
        Path("/proc/self/clear_refs").write_text("5")
        before = resident("VmRSS")
        if name == "extra MiB without kNN":
            with patch.object(of_features, "knn_probe", lambda *_, **__: without):
                whole()
        else:
            whole()
        result[name] = round((resident("VmHWM") - before) / 1024, 1)
    n, d = features.values.shape
    result["features MiB"] = n * d * 4 / 2**20
    result["aim MiB"] = round(0.25 * result["features MiB"] + 6 * d * d * 8 / 2**20, 1)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--one-thread", action="store_true", help="CPU seconds on one thread")
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES))
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--against", type=Path, metavar="CHECKOUT", help="another checkout, which takes turns")
    parser.add_argument("--memory", metavar="SHAPE", help=argparse.SUPPRESS)
    parser.add_argument("--turns", metavar="SHAPE", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    if options.memory:
        print(json.dumps(memory(options.memory)))
        return
    if options.turns:
        take_turns(options.turns)
        return
    clock = "CPU seconds on one thread" if options.one_thread else f"wall time, {THREADS} threads"
    result: dict[str, Any] = {"machine": machine(), "clock": clock, "repeats": options.repeats, "shapes": {}}
    for shape in options.shapes:
        row = measure_shape(shape, options.repeats)
        command = [sys.executable, __file__, "--memory", shape]
        row["memory"] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        row["targets"] = {"everything but the encoder and kNN": TARGETS.get(shape), "kNN probe over U·Uᵀ": KNN_TARGET}
        if options.against:
            row["everything but the encoder and kNN, by turns"] = compare(shape, options.against, options.repeats)
        result["shapes"][shape] = row
        print(shape, f"SVD {row['SVD seconds']} s", row["memory"])
        for name, value in row["over the SVD"].items():
            print(f"  {name:38} {value['median']:6.2f}  {value['lower_quartile']:.2f} … {value['upper_quartile']:.2f}")
        sys.stdout.flush()
        write_text(options.out / "evaluation_cost.json", json.dumps(result, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
