"""A driver of fake trials, for tests of several drivers: python sweep_driver.py OUT STUDY TRIALS SECONDS STORAGE."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import Any

from optuna.distributions import FloatDistribution

from fmtrain.sweeps.driver import run_sweep
from fmtrain.sweeps.settings import Storage, Sweep

FAKE = Path(__file__).parent / "fake_trial.py"
SPACE = FloatDistribution(0.0, 1.0)


def make(out: Path, **changes: Any) -> Sweep:
    entries: dict[str, Any] = {
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
    return Sweep(**entries | changes)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # it is ignored if the tests run in the background
    out, study, trials, seconds, storage = sys.argv[1:]
    options = Storage(**json.loads(storage))
    sweep = make(Path(out), study=study, trials=int(trials), fit=("--config", seconds), storage=options)
    run_sweep(sweep, log=lambda line: print(line, file=sys.stderr, flush=True), again="sweep.toml")
