"""Does training teach what a random network does not know? DINO and DINOv2 for at most 20 CPU-minutes each.

    python benchmarks/trust/learning.py [--out build/learning]

The experiment's default runs at twice the resolution: base.yaml with 96 px crops, each run on one core. Every look
states the labelled probes, their paired gain over the random initialisation and what colour statistics alone give, with
RankMe and ODCorr beside. A finished run is not run again. Writes benchmarks/results/learning.csv.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from experiment import AUGMENT, DINO, DINOV2, INIT, ROOT, TABLE, Run, prepare, table, train, write

CHANGES: dict[str, Any] = {
    "trainer.max_steps": 240,
    "monitor.every_n_steps": 80,
    "checkpoint.every_n_train_steps": 240,
    f"{INIT}.arch_kwargs.img_size": 96,
    f"{AUGMENT}.global_size": 96,
    f"{AUGMENT}.local_size": 48,
    "data.size_px": 160,
    "data.mpp": [0.5, 0.7, 1.0],
}


def plan() -> Iterator[Run]:
    """One run a method."""
    for short, method in (("dino", DINO), ("dinov2", DINOV2)):
        yield Run(f"{short}-seed0", method, 0, "learning", CHANGES)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 1)), help="runs at once")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "learning")
    args = parser.parse_args()
    prepare(args.out, size_px=96, mpps="0.7,1.0")
    with ThreadPoolExecutor(args.jobs) as pool:
        for line in pool.map(lambda run: train(run, args.out), plan()):
            print(line, flush=True)
    rows = table(args.out, plan())
    for row in rows:
        seconds = (args.out / row["run"] / "done").read_text().split()[0]
        row["cpu_seconds"] = seconds
    write(rows, TABLE.with_name("learning.csv"))


if __name__ == "__main__":
    main()
