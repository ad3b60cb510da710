"""Time and extra memory of all metrics together against a single metric of each peer, in one run on one machine.

    python benchmarks/metrics.py [--quick] [--peers build/peers] [--out benchmarks/results/metrics.json]

Each contender runs in its own process, with the same features mapped from one file. Each round starts with another
contender, so that slow phases of the machine affect all of them. Times are medians over rounds, with quartiles.

Extra memory is the growth of the process's peak resident set (VmHWM, reset through /proc/self/clear_refs) during its
first call on the features. A call on 256×64 before it loads libraries and starts thread pools.

Peers are the real packages, from the environment of benchmarks/peers/install.py. Both sides import the same torch and
NumPy.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median, quantiles
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from repmetrics.atomic_write import write_text

HERE = Path(__file__).resolve().parent
SLIDES = 64


class Size(NamedTuple):
    """Features (n, d), number of rounds, and whether contenders that copy N×D several times take part."""

    n: int
    d: int
    rounds: int
    everyone: bool = True


SIZES = (Size(2048, 384, 15), Size(8192, 768, 9), Size(25_600, 1024, 7), Size(256_000, 1024, 3, everyone=False))
QUICK = (Size(2048, 384, 3),)


# ── contenders ──────────────────────────────────────────────────────────────────────────────────────────────────


def _measured(features: Tensor, *needs: str, errors: bool = False) -> float:
    from repmetrics.measurement.measure import measure
    from repmetrics.measurement.registry import METRICS

    groups = [i * SLIDES // len(features) for i in range(len(features))] if errors else None
    names = [name for name, metric in METRICS.items() if metric.inputs in needs]
    return measure(features, groups=groups, metrics=names)["rankme"].value


def catalogue(features: Tensor) -> float:
    """All metrics of moments, of the features and of their directions: two accumulations."""
    return _measured(features, "moments", "directions")


def catalogue_of_features(features: Tensor) -> float:
    """All metrics of the moments of the features: one accumulation."""
    return _measured(features, "moments")


def catalogue_with_errors(features: Tensor) -> float:
    """All metrics of moments, each with its jackknife error over 64 slides."""
    return _measured(features, "moments", "directions", errors=True)


def svd_float64(features: Tensor) -> float:
    """RankMe by its formula: SVD of the features in float64."""
    sigma = torch.linalg.svdvals(features.double())
    p = sigma / sigma.sum()
    return float(torch.exp(-torch.special.xlogy(p, p).sum()))


def peer(name: str) -> Callable[[Tensor], float]:
    sys.path.insert(0, str(HERE / "peers"))
    import ports

    function: Callable[[Tensor], float] = getattr(ports, name)
    return function


OURS: dict[str, Callable[[Tensor], float]] = {
    "catalogue": catalogue,
    "catalogue_of_features": catalogue_of_features,
    "catalogue_with_errors": catalogue_with_errors,
    "svd_float64": svd_float64,
}
PEERS = {"stable_pretraining": "stable-pretraining", "reptrix": "reptrix", "monai": "monai", "lightly": "lightly"}
AT_ANY_SIZE = ("catalogue", "catalogue_of_features", "catalogue_with_errors", "stable_pretraining", "lightly")

TARGETS = {"svd_float64": 0.6, "stable_pretraining": 0.9, "reptrix": 0.4, "monai": 0.4, "lightly": 1.0}
"""Largest ratio of the time of our metrics to that of the contender, at 25 600 × 1024."""


# ── process of a contender ──────────────────────────────────────────────────────────────────────────────────────


def work(name: str, path: Path) -> None:
    """Answer each line on stdin with the seconds of a call, and the first also with the value and the extra memory."""
    answer = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # output of a peer must not count as an answer
    contender = OURS[name] if name in OURS else peer(name)
    contender(torch.randn(256, 64, generator=torch.Generator().manual_seed(0)))
    features = torch.from_numpy(np.load(path, mmap_mode="c"))
    features.sum()  # makes every page resident before the baseline is read
    first = True
    for _ in sys.stdin:
        result: dict[str, float] = {}
        if first:
            Path("/proc/self/clear_refs").write_text("5")
            before = resident("VmRSS")
        start = time.perf_counter()
        value = contender(features)
        result["seconds"] = time.perf_counter() - start
        if first:
            result |= {"value": value, "extra_mib": (resident("VmHWM") - before) / 1024}
        first = False
        answer.write(json.dumps(result) + "\n")


def resident(field: str) -> int:
    """Read a field of /proc/self/status, in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))


# ── the run ─────────────────────────────────────────────────────────────────────────────────────────────────────


def write_features(path: Path, size: Size) -> None:
    """Write Gaussian columns of decreasing scale with an offset, in float32, block by block."""
    features = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(size.n, size.d))
    scale = np.arange(1, size.d + 1, dtype=np.float32) ** np.float32(-0.5)
    draw = np.random.default_rng(0)
    for start in range(0, size.n, 8192):
        block = features[start : start + 8192]
        draw.standard_normal(out=block, dtype=np.float32)
        block *= scale
        block += np.float32(0.01)
    features.flush()


def run_size(size: Size, names: list[str], python: Path, folder: Path) -> dict[str, Any]:
    path = folder / f"{size.n}x{size.d}.npy"
    write_features(path, size)
    command = [python, "-W", "ignore", Path(__file__).resolve(), "--path", path, "--work"]
    quiet = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    workers = {name: subprocess.Popen([*map(str, command), name], **quiet) for name in names}  # type: ignore[call-overload]
    try:
        answers: dict[str, list[dict[str, float]]] = {name: [ask(name, workers[name])] for name in names}
        for turn in range(size.rounds):
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                answers[name].append(ask(name, workers[name]))
                time.sleep(0.05)  # thread pools still spin after a call: do not count that for the next contender
    finally:
        for worker in workers.values():
            worker.stdin.close()
            worker.wait()
        path.unlink()
    return {"n": size.n, "d": size.d, "rounds": size.rounds, "contenders": {k: summary(v) for k, v in answers.items()}}


def ask(name: str, worker: subprocess.Popen[str]) -> dict[str, float]:
    assert worker.stdin is not None
    assert worker.stdout is not None
    worker.stdin.write("go\n")
    worker.stdin.flush()
    line = worker.stdout.readline()
    if not line:
        raise SystemExit(f"{name} died: run benchmarks/metrics.py --work {name} --path <file.npy> to see why")
    answer: dict[str, float] = json.loads(line)
    return answer


def summary(answers: list[dict[str, float]]) -> dict[str, float]:
    seconds = [a["seconds"] for a in answers[1:]]
    low, _, high = quantiles(seconds, n=4, method="inclusive")
    return {
        "value": answers[0]["value"],
        "median_seconds": median(seconds),
        "lower_quartile": low,
        "upper_quartile": high,
        "min_seconds": min(seconds),
        "extra_mib": answers[0]["extra_mib"],
    }


def machine() -> dict[str, Any]:
    model = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "cpu": model[0].split(":")[1].strip() if model else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "platform": platform.platform(),
        "python": platform.python_version(),
    }


def versions(python: Path, names: tuple[str, ...]) -> dict[str, str]:
    code = (
        f"import json; from importlib.metadata import version; print(json.dumps({{n: version(n) for n in {names!r}}}))"
    )
    output = subprocess.run([python, "-c", code], check=True, capture_output=True).stdout
    packages: dict[str, str] = json.loads(output)
    return packages


def show(results: list[dict[str, Any]]) -> None:
    for result in results:
        contenders = result["contenders"]
        ours = contenders["catalogue"]["median_seconds"]
        print(f"\n{result['n']} × {result['d']}, {result['rounds']} rounds")
        print(f"{'':24}{'value':>10}{'median ms':>12}{'quartiles':>20}{'extra MiB':>11}{'catalogue ÷ it':>16}")
        for name, c in contenders.items():
            spread = f"{c['lower_quartile'] * 1e3:.1f} … {c['upper_quartile'] * 1e3:.1f}"
            line = f"{name:24}{c['value']:10.2f}{c['median_seconds'] * 1e3:12.1f}{spread:>20}{c['extra_mib']:11.1f}"
            print(f"{line}{ours / c['median_seconds']:16.2f}")


def targets(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Targets, and the values reached."""
    at = {(r["n"], r["d"]): r["contenders"] for r in results}
    main = at.get((25_600, 1024))
    if main is None:
        return []
    ours = main["catalogue"]
    rows = [
        {
            "target": f"{metrics} ÷ {name}, time",
            "at most": limit,
            "measured": main[metrics]["median_seconds"] / main[name]["median_seconds"],
        }
        for metrics in ("catalogue", "catalogue_of_features")
        for name, limit in TARGETS.items()
        if name in main
    ]
    errors = main["catalogue_with_errors"]["median_seconds"] / ours["median_seconds"] - 1
    rows.append({"target": "error bars' cost ÷ values'", "at most": 2.0, "measured": errors})
    rows.append({"target": "extra MiB", "at most": 64.0, "measured": ours["extra_mib"]})
    if (256_000, 1024) in at:
        ten = at[256_000, 1024]["catalogue"]["extra_mib"]
        rows.append({"target": "extra MiB at ten times N", "at most": 64.0, "measured": ten})
    return [row | {"met": row["measured"] <= row["at most"]} for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="only 2048×384, three rounds")
    parser.add_argument("--peers", type=Path, default=HERE.parent / "build" / "peers", help="install.py's environment")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "metrics.json")
    parser.add_argument("--work", metavar="CONTENDER", help=argparse.SUPPRESS)
    parser.add_argument("--path", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        work(arguments.work, arguments.path)
        return
    if not Path("/proc/self/clear_refs").exists():
        raise SystemExit("extra memory is read from /proc: run this benchmark on Linux")
    python = arguments.peers / "bin" / "python"
    peers = python.is_file()
    if not peers:
        python = Path(sys.executable)
        print(f"no peers at {arguments.peers}: run benchmarks/peers/install.py to compare with them", file=sys.stderr)
    names = [*OURS, *(PEERS if peers else ())]
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for size in QUICK if arguments.quick else SIZES:
            taking_part = names if size.everyone else [name for name in names if name in AT_ANY_SIZE]
            results.append(run_size(size, taking_part, python, Path(folder)))
            show(results[-1:])
    packages = ("repmetrics", "torch", "numpy", "scipy", *(PEERS.values() if peers else ()))
    reached = targets(results)
    for row in reached:
        print(
            f"{'met   ' if row['met'] else 'MISSED'} {row['target']}: {row['measured']:.2f}, at most {row['at most']}"
        )
    record = {"machine": machine(), "versions": versions(python, packages), "sizes": results, "targets": reached}
    write_text(arguments.out, json.dumps(record, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
