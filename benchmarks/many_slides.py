"""Cost of a manifest of many slides: size, loading, the start of a rank, and the memory of its reading processes.

Slides are hard links to one synthetic slide, with one mask each. Only their number matters here: no manifest has been
scanned slide by slide. Each measurement is a process of its own. CPU time is stated next to wall time, because other
programs change only the latter.

    python benchmarks/many_slides.py --slides 1000 10000 30000
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from fmtrain.manifest.build import build_manifest
from fmtrain.manifest.manifest import Manifest, assets_dir
from fmtrain.slides.synthetic import write_slides

ROOT = Path(__file__).parents[1]
WORKERS, BATCH, BATCHES = 4, 64, 40
RANKS_PER_NODE, WORKERS_PER_RANK = 8, 16  # of the extrapolation


def timed(action: Callable[[], Any]) -> tuple[dict[str, float], Any]:
    """Wall and CPU seconds of an action, and its result."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = action()
    return {"wall": round(time.perf_counter() - wall, 2), "cpu": round(time.process_time() - cpu, 2)}, result


def memory(pid: int | str = "self") -> dict[str, float]:
    """MiB of a process: resident, and its proportional share of what it shares with others."""
    lines = dict(line.split(":") for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:])
    return {key.lower(): round(int(lines[key].split()[0]) / 1024, 1) for key in ("Rss", "Pss")}


def simulate(folder: Path, count: int) -> Path:
    """Manifest of `count` slides, which are links to those of a small one; a quarter of the patients is held out."""
    small = folder / "small"
    write_slides(small, count=4, size_px=1024, mpp=0.5, seed=0)
    manifest = build_manifest(small, folder / "small_manifest.json", held_out=64, size_px=224)
    slides, masks = folder / "slides", folder / "many" / "tissue"
    for new in (slides, masks):
        new.mkdir(parents=True)
    train, held_out = manifest.slides_in("train"), manifest.slides_in("held_out")
    entries = []
    for k in range(count - len(held_out)):
        source = train[k % len(train)]
        name = f"TCGA-{k // 10000:02d}-{k % 10000:04d}-01Z-00-DX1.tiff"
        os.link(source.path, slides / name)
        os.link(assets_dir(manifest.path) / "tissue" / f"{source.info.name}.png", masks / f"{name}.png")
        info = replace(source.info, name=name)
        entries.append(replace(source, path=slides / name, info=info, patient=name[:12]))
    for source in held_out:
        os.link(source.path, slides / source.info.name)
        os.link(assets_dir(manifest.path) / "tissue" / f"{source.info.name}.png", masks / f"{source.info.name}.png")
        entries.append(replace(source, path=slides / source.info.name))
    entries.sort(key=lambda entry: entry.path)
    replace(manifest, path=folder / "many.json", slides=tuple(entries)).save(root=slides)
    return folder / "many.json"


def measure_survey(folder: Path) -> dict[str, Any]:
    """Search of the folder, patients and split, without a scan."""
    from fmtrain.manifest.collection import survey
    from fmtrain.manifest.options import ManifestOptions

    seconds, collection = timed(lambda: survey(folder / "slides", ManifestOptions(), skip=[]))
    return {"seconds": seconds, "slides": len(collection.files.slides), "memory_mib": memory()}


def measure_load(folder: Path) -> dict[str, Any]:
    """Loading the file, and comparing all slides with their fingerprints."""
    before = memory()
    seconds, manifest = timed(lambda: Manifest.load(folder / "many.json"))
    after = memory()
    from fmtrain.manifest.manifest import check_all_unchanged

    check, _ = timed(lambda: check_all_unchanged(manifest.slides))
    return {
        "seconds": seconds,
        "memory_mib": round(after["rss"] - before["rss"], 1),
        "file_mb": round((folder / "many.json").stat().st_size / 1e6, 2),
        "comparing_fingerprints": check,
    }


def measure_rank(folder: Path) -> dict[str, Any]:
    """One rank as `fmtrain fit` starts it: imports, manifest, first batch; then the memory of its workers."""
    import multiprocessing

    imports, _ = timed(lambda: __import__("fmtrain.training.datamodule"))
    from fmtrain.patches.dataset import TrainingPatches
    from fmtrain.patches.loader import training_batches

    start, patches = timed(lambda: TrainingPatches(folder / "many.json", size_px=224, seed=0))
    batches = training_batches(patches, batch_size=BATCH, num_workers=WORKERS)
    first, _ = timed(lambda: next(batches))
    for _ in range(BATCHES):
        next(batches)
    workers = [memory(child.pid or "self") for child in multiprocessing.active_children()]
    return {
        "imports": imports,
        "training_patches": start,
        "first_batch": first,
        "patches_read": (BATCHES + 1) * BATCH,
        "rank_mib": memory(),
        "workers_mib": workers,
    }


PARTS = {"survey": measure_survey, "load": measure_load, "rank": measure_rank}


def extrapolated(rank: dict[str, Any]) -> dict[str, Any]:
    """Memory of a node: every rank and every worker as its largest here."""
    worker = max(each["pss"] for each in rank["workers_mib"])
    own = rank["rank_mib"]["pss"]
    total = RANKS_PER_NODE * (own + WORKERS_PER_RANK * worker) / 1024
    return {
        "worker_pss_mib": worker,
        "rank_pss_mib": own,
        "node_gib": round(total, 1),
        "arithmetic": f"{RANKS_PER_NODE} × ({own:.0f} + {WORKERS_PER_RANK} × {worker:.0f}) MiB = {total:.1f} GiB",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slides", type=int, nargs="+", default=[1000, 10000, 30000], help="numbers of slides")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "many_slides.json")
    args = parser.parse_args()
    if args.part is not None:
        print(json.dumps(PARTS[args.part](args.folder)))
        return
    report: dict[str, Any] = {"cores": os.cpu_count(), "load_before": os.getloadavg()[0], "workers": WORKERS}
    for count in args.slides:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            simulate(folder, count)
            report[f"{count} slides"] = measured = {}
            for part in PARTS:
                command = [sys.executable, __file__, "--part", part, "--folder", str(folder)]
                out = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
                measured[part] = json.loads(out.splitlines()[-1])
            measured["node"] = extrapolated(measured["rank"])
        print(count, json.dumps(measured), flush=True)
    args.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
