"""Overhead of the sweep's driver per trial: one trivial command, run directly and as a trial, in turn.

    python benchmarks/sweep.py [--trials 20] [--out benchmarks/results]

The command starts an interpreter, writes one line of measurements and ends. Everything beyond that is the driver's
time: ask, start of the watchdog, polling, tell, journal. Whole driver, default settings, wall clock.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

from optuna.distributions import FloatDistribution

from fmtrain.sweeps.driver import SweepWorker
from fmtrain.sweeps.settings import Sweep

LINE = {"step": 1, "loss": 1.0, "alarms": [], "measurements": {"rankme": {"value": 9.0, "standard_error": 0.5}}}
TRIVIAL = f"""import pathlib, sys
out = pathlib.Path(sys.argv[1])
out.mkdir(parents=True)
(out / "measurements.jsonl").write_text({json.dumps(LINE)!r} + "\\n")
"""


def bare(script: Path, out: Path) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, script, out], check=True)
    return time.perf_counter() - start


def trials(script: Path, out: Path, count: int) -> list[float]:
    """Seconds of each trial, from the end of the previous trial to its end."""
    ends = []

    def log(line: str) -> None:
        if " has rankme " in line:
            ends.append(time.perf_counter())

    sweep = Sweep(
        study="overhead",
        fit=("--config", "none"),
        metrics=("rankme",),
        directions=("maximize",),
        parameters={"x": FloatDistribution(0, 1)},
        trials=count,
        out=out,
        launcher=f"{{python}} {script} {{out}}",
    )
    driver = SweepWorker(sweep, log=log)
    start = time.perf_counter()
    driver.run()
    return [end - begin for begin, end in zip([start, *ends], ends, strict=False)]


def summary(seconds: list[float]) -> dict[str, float]:
    low, median, high = statistics.quantiles(seconds, n=4)
    return {"median": median, "quartiles": [low, high], "max": max(seconds)}  # type: ignore[dict-item]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        script = folder / "trivial.py"
        script.write_text(TRIVIAL)
        direct, driven = [], []
        for k in range(args.trials):  # in turn, so that both run under the same load
            direct.append(bare(script, folder / "bare" / str(k)))
            driven += trials(script, folder / "sweep", k + 1)
    result = {
        "bare_seconds": summary(direct),
        "trial_seconds": summary(driven),
        "overhead_seconds": summary([d - a for d, a in zip(driven, direct, strict=True)]),
        "trials": args.trials,
        "python": platform.python_version(),
        "optuna": version("optuna"),
        "cores": os.cpu_count(),
        "load_at_the_end": os.getloadavg()[0],
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "sweep.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
