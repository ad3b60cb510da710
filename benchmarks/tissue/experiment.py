"""Do label-free signals track a linear probe? Many small runs, each measured both ways.

    python benchmarks/tissue/experiment.py [--jobs 2] [--only REGEX] [--out build/tissue]

Each run is `fmtrain fit` with base.yaml and the changes of plan(), on one core. Its monitor writes label-free signals,
`probes.Probes` the labeled ones. Finished runs are skipped, so the command can be run again to resume. `table()` joins
the finished runs into tissue.csv in --out, which `repmetrics trust` reads. When all runs of plan() are finished, it is
copied to benchmarks/results/tissue.csv.

Slides and tiles come from REPMETRICS_TEST_DATA (default ../shared/data).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from probes import color_baseline, load_targets

from repmetrics.atomic_write import write_csv
from repmetrics.monitoring.record import read_jsonl

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
DATA = Path(os.environ.get("REPMETRICS_TEST_DATA", ROOT / ".." / "shared" / "data")).resolve()
TABLE = HERE.parent / "results" / "tissue.csv"
SIZE_PX = 48

DINO, DINOV2 = "fmtrain.methods.DINO", "fmtrain.methods.DINOv2"
INIT, SCHEDULES, AUGMENT = "model.init_args", "model.init_args.schedules", "model.init_args.augment"

# Axis → settings, each a dict of changes; the default is run with every seed.
AXES: dict[str, list[dict[str, Any]]] = {
    "lr": [{f"{SCHEDULES}.lr": lr} for lr in (1e-4, 3e-4, 3e-3, 1e-2)],
    "teacher_temp": [{f"{SCHEDULES}.teacher_temp": t, f"{SCHEDULES}.warmup_teacher_temp": t} for t in (0.07, 0.1)],
    "weight_decay": [{f"{SCHEDULES}.weight_decay": 2.0, f"{SCHEDULES}.weight_decay_end": 2.0}],
    "momentum": [{f"{SCHEDULES}.momentum_teacher": 0.9}],
    "crop_scale": [
        {f"{AUGMENT}.global_crops_scale": [0.2, 1.0], f"{AUGMENT}.local_crops_scale": [0.05, 0.2]},
        {f"{AUGMENT}.global_crops_scale": [0.1, 0.15], f"{AUGMENT}.local_crops_scale": [0.03, 0.05]},
    ],
    "colour": [
        {f"{AUGMENT}.{name}": 0.0 for name in ("brightness", "contrast", "saturation", "hue", "stain")},
    ],
    "targets": [{f"{INIT}.centering": "centering"}, {f"{INIT}.centering": "centering", f"{INIT}.center_momentum": 1.0}],
    "slides": [{"data.slide_fraction": 0.1}, {"data.slide_fraction": 0.3}],
}
V2_AXES: dict[str, list[dict[str, Any]]] = {
    "lr": [{f"{SCHEDULES}.lr": 3e-3}],
    "regularizer_weight": [{f"{INIT}.regularizer_weight": w} for w in (0.0, 1.0)],
}
SEEDS = (0, 1, 2)


class Run(NamedTuple):
    """A run and its changes to base.yaml."""

    name: str
    method: str
    seed: int
    axis: str
    changes: dict[str, Any]


def plan() -> Iterator[Run]:
    """All runs of the experiment."""
    methods = (("dino", DINO, AXES), ("dinov2", DINOV2, V2_AXES))
    for seed in SEEDS:
        for short, method, _ in methods:
            yield Run(f"{short}-default-seed{seed}", method, seed, "default", {})
    for short, method, axes in methods:
        for axis, settings in axes.items():
            for number, changes in enumerate(settings):
                yield Run(f"{short}-{axis}-{number}", method, 0, axis, changes)
    for short, method, _ in methods:
        yield Run(f"{short}-init-drawn", method, 0, "init", {f"{INIT}.init": "{out}/drawn.ckpt"})


def configuration(run: Run, out: Path) -> dict[str, Any]:
    """base.yaml with the settings of a run and the probes."""
    config: dict[str, Any] = yaml.safe_load((HERE / "base.yaml").read_text())
    config["seed_everything"] = run.seed
    config["model"]["class_path"] = run.method
    config["model"]["init_args"]["augment"]["seed"] = run.seed
    config["data"] |= {"seed": run.seed, "manifest": str(out / "manifest.json")}
    for name, value in run.changes.items():
        *path, key = name.split(".")
        node = config
        for part in path:
            node = node[part]
        node[key] = value.replace("{out}", str(out)) if isinstance(value, str) else value
    every = config["monitor"]["every_n_steps"]
    probes = {"targets": str(out / "targets.pt"), "out": str(out / run.name), "every_n_steps": every}
    config["trainer"]["callbacks"] = [{"class_path": "probes.Probes", "init_args": probes}]
    return config


def train(run: Run, out: Path) -> str:
    """Train one run in its own process with one thread; its output goes to a log file."""
    folder, file, done = out / run.name, out / f"{run.name}.yaml", out / run.name / "done"
    if done.exists():
        return f"{run.name}: already done"
    file.write_text(yaml.safe_dump(configuration(run, out)))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    log = out / f"{run.name}.log"
    with log.open("w") as output:
        command = [sys.executable, "-m", "fmtrain", "fit", "--config", str(file), "--out", str(folder), "--overwrite"]
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        return f"{run.name}: failed with exit code {os.waitstatus_to_exitcode(status)}, see {log}"
    done.write_text(f"{usage.ru_utime + usage.ru_stime:.0f} CPU-seconds\n")
    return f"{run.name}: done in {done.read_text().strip()}"


def prepare(out: Path) -> None:
    """Write the manifest, the labeled tiles in one file, and the color baseline."""
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "manifest.json").exists():
        subprocess.run(
            [sys.executable, "-m", "fmtrain", "manifest", str(DATA / "tcga_slides"), "--out",
             str(out / "manifest.json"), "--size-px", str(SIZE_PX), "--mpps", "1.0,1.5", "--held-out", "768"],
            check=True,
        )  # fmt: skip
    if not (out / "colour.json").exists():
        targets = load_targets(DATA, size_px=SIZE_PX)
        torch.save({name: target._asdict() for name, target in targets.items()}, out / "targets.pt")
        (out / "colour.json").write_text(json.dumps(color_baseline(targets), indent=1) + "\n")


def draw_weights(out: Path) -> None:
    """Train the initial weights of the runs that start from a network trained on drawn slides."""
    if not (out / "drawn.ckpt").exists():
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run([sys.executable, "-m", "fmtrain", "demo", "--out", f"{folder}/demo"], check=True)
            shutil.copy(f"{folder}/demo/run/checkpoints/last.ckpt", out / "drawn.ckpt")


def table(out: Path, runs: Iterable[Run]) -> list[dict[str, Any]]:
    """One row per evaluation of each finished run: its settings, all signals and all probes, each with its error."""
    color = json.loads((out / "colour.json").read_text())
    rows = []
    for name, method, seed, axis, changes in runs:
        if not (out / name / "done").exists():
            continue
        lines = (out / name / "probes.jsonl").read_text().splitlines()
        probes = {line["step"]: line for line in map(json.loads, lines)}
        for entry in read_jsonl(out / name / "measurements.jsonl"):
            row: dict[str, Any] = {"run": name, "method": method.rpartition(".")[2], "seed": seed, "axis": axis}
            row |= {"step": entry["step"], "loss": entry["loss"], "alarms": len(entry["alarms"])}
            row |= {f"param.{key.rpartition('.')[2]}": value for key, value in changes.items()}
            for metric, m in entry["measurements"].items():
                row |= {metric: m["value"], f"{metric}_se": m["standard_error"]}
            row |= {key: value for key, value in probes[entry["step"]].items() if key != "step"}
            row |= {f"{target}_colour": value for target, value in color.items()}
            rows.append({key: f"{v:.6g}" if isinstance(v, float) else v for key, v in row.items()})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 1)), help="number of parallel runs")
    parser.add_argument("--only", default="", help="regular expression of the names of runs")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "tissue")
    args = parser.parse_args()
    selected = [run for run in plan() if re.search(args.only, run.name)]
    prepare(args.out)
    if any(run.axis == "init" for run in selected):
        draw_weights(args.out)
    with ThreadPoolExecutor(args.jobs) as pool:
        for line in pool.map(lambda run: train(run, args.out), selected):
            print(line, flush=True)
            rows = table(args.out, plan())
            write_csv(args.out / TABLE.name, list(dict.fromkeys(key for row in rows for key in row)), rows)
    if all((args.out / run.name / "done").exists() for run in plan()):
        shutil.copy(args.out / TABLE.name, TABLE)


if __name__ == "__main__":
    main()
