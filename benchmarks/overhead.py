"""Share of time that evaluations take in a real run of two minutes, with the monitor's default cadence.

    python benchmarks/overhead.py [--slides FOLDER] [--minutes 2] [--held-out 64] [--out FILE]

`fmtrain manifest` reads a folder of slides (default: `tcga_slides` in REPMETRICS_TEST_DATA, default ../shared/data).
Then `fmtrain fit` trains the configuration `demo` on them until the time is over. The result holds every
evaluation with its seconds, and the last logged values of `repmetrics/overhead`, the share of the time between the
first and the last step, which is kept to 1 %, and of `repmetrics/overhead_total`, the share of the whole fit.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from metrics import machine

from repmetrics.atomic_write import write_text
from repmetrics.monitoring.record import read_jsonl

AIM = 0.012
ROOT = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("REPMETRICS_TEST_DATA", ROOT / ".." / "shared" / "data")).resolve()
PROGRAM = Path(sysconfig.get_path("scripts"), "fmtrain")
LOGGER = "lightning.pytorch.loggers.CSVLogger"


def train(slides: Path, folder: Path, *, minutes: int, held_out: int) -> None:
    manifest = folder / "manifest.json"
    subprocess.run(
        [PROGRAM, "manifest", slides, "--out", manifest, "--held-out", str(held_out), "--size-px", "64"], check=True
    )
    subprocess.run(
        [PROGRAM, "fit", "--config", "demo", "--out", folder / "run", "--data.manifest", manifest,
         "--monitor.every_n_steps", "null", "--trainer.max_steps", "1000000",
         "--trainer.max_time", f"00:00:{minutes:02}:00",
         "--trainer.logger", LOGGER, "--trainer.logger.save_dir", folder / "log"],
        check=True,
    )  # fmt: skip


def last_logged(folder: Path, key: str) -> float:
    """Last value of a column of the CSV log."""
    (path,) = folder.rglob("metrics.csv")
    with path.open(newline="") as file:
        values = [row[key] for row in csv.DictReader(file) if row.get(key)]
    return float(values[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slides", type=Path, default=DATA / "tcga_slides")
    parser.add_argument("--minutes", type=int, default=2)
    parser.add_argument("--held-out", type=int, default=64)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "overhead.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        train(options.slides, folder, minutes=options.minutes, held_out=options.held_out)
        (measurements,) = folder.rglob("measurements.jsonl")
        records = read_jsonl(measurements)
        shares = {key: last_logged(folder, f"repmetrics/{key}") for key in ("overhead", "overhead_total")}
    result: dict[str, Any] = {
        "machine": machine(),
        "minutes": options.minutes,
        "held_out": options.held_out,
        "evaluations": [{"step": record["step"], "seconds": round(record["seconds"], 2)} for record in records],
        **{key: round(value, 5) for key, value in shares.items()},
        "aim of overhead": AIM,
    }
    write_text(options.out, json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
