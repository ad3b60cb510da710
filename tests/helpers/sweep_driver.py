"""A driver of fake trials, for tests of several drivers: python sweep_driver.py OUT STUDY TRIALS SECONDS STORAGE."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import Any

from optuna.distributions import FloatDistribution

from fmtrain.sweeps.config import Storage, Sweep
from fmtrain.sweeps.driver import run_sweep

FAKE = Path(__file__).parent / "fake_trial.py"
SPACE = FloatDistribution(0.0, 1.0)


def make(out: Path, **changes: Any) -> Sweep:
    stated: dict[str, Any] = {
        "study": "test",
        "fit": ("--config", "0"),
        "metrics": ("rankme",),
        "directions": ("maximize",),
        "parameters": {"x": SPACE},
        "trials": 3,
        "out": out,
        "launcher": f"{{python}} {FAKE} {{out}} {{command}}",
        "stop_seconds": 5.0,
        "poll_seconds": 0.02,
    }
    return Sweep(**stated | changes)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # where the tests run in the background, it is ignored
    out, study, trials, seconds, storage = sys.argv[1:]
    place = Storage(*json.loads(storage))
    sweep = make(Path(out), study=study, trials=int(trials), fit=("--config", seconds), storage=place)
    run_sweep(sweep, say=lambda line: print(line, file=sys.stderr, flush=True), again="sweep.toml")
