"""Comparison of our linear probe with eva's, on the same embeddings, for both protocols.

    python -m venv build/eva && build/eva/bin/pip install 'kaiko-eva[vision]==0.4.5'
    python benchmarks/eva/compare.py embeddings.npz ... --eva build/eva/bin/python

Each file is a file of embeddings with labels that `repmetrics score` reads. Three quarters of its rows train and a
quarter validates, the same rows for both. Writes benchmarks/results/eva.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from repmetrics.data.features import Features
from repmetrics.data.open import open_data
from repmetrics.probes.eva import eva_probe, eva_v0_4, paper

RESULTS = Path(__file__).resolve().parent.parent / "results" / "eva.json"
TOLERANCE = 0.005  # of the balanced accuracy


def split(features: Features) -> tuple[Features, Features]:
    """Three quarters and a quarter of the rows, in a fixed shuffled order."""
    assert features.labels is not None
    order = torch.randperm(len(features.values), generator=torch.Generator().manual_seed(0))
    cut = 3 * len(order) // 4
    return tuple(  # type: ignore[return-value]
        Features(features.values[rows], None, features.labels[rows]) for rows in (order[:cut], order[cut:])
    )


def run_eva(python: str, job: dict[str, Any]) -> list[float]:
    """Eva's balanced accuracies, one per seed."""
    with tempfile.TemporaryDirectory() as folder:
        torch.save(job, Path(folder) / "job.pt")
        script = Path(__file__).with_name("head.py")
        command = [python, str(script), str(Path(folder) / "job.pt")]
        result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    values: list[float] = json.loads(result.stdout.strip().splitlines()[-1])
    return values


def main() -> None:
    """Compare and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--eva", required=True, help="path to the Python of an environment with kaiko-eva")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    environment = {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(), "kaiko-eva": "0.4.5"}
    environment |= {name: version(name) for name in ("torch", "lightning")}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for file in args.files:
        source = open_data(file)
        assert source.features is not None
        train, val = split(source.features)
        for protocol in (paper(), eva_v0_4()):
            patience = protocol.patience_for(len(train.values))
            ours = list(eva_probe(train, val, protocol=protocol, runs=args.runs)[0].values)
            job = {
                "train": (train.values, train.labels),
                "val": (val.values, val.labels),
                "classes": len(source.classes),
                "protocol": protocol.name,
                "batch_size": protocol.batch_size,
                "lr": protocol.lr,
                "max_steps": protocol.max_steps,
                "patience": patience,
                "runs": args.runs,
            }
            evas = run_eva(args.eva, job)
            gap = statistics.mean(ours) - statistics.mean(evas)
            rows.append(
                {
                    "embeddings": file.name,
                    "rows": [len(train.values), len(val.values)],
                    "width": train.values.shape[1],
                    "classes": len(source.classes),
                    "protocol": protocol.name,
                    "patience": patience,
                    "repmetrics": ours,
                    "eva": evas,
                    "gap": gap,
                    "agrees": abs(gap) <= TOLERANCE,
                }
            )
            print(f"{file.name} {protocol.name}: ours {statistics.mean(ours):.4f}, eva {statistics.mean(evas):.4f}")
            results = {"environment": environment, "tolerance": TOLERANCE, "comparisons": rows}
            args.out.write_text(json.dumps(results, indent=2) + "\n")  # after each comparison, which takes minutes


if __name__ == "__main__":
    main()
