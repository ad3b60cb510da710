"""Throughput of reading patches from slides, relative to pure decoding, OpenSlide and tiffslide.

    python benchmarks/patching.py [--seconds 0.3] [--repeats 9] [--loader] [--out benchmarks/results/patching.json]

Rates are per CPU-second, which other load on the machine changes little. All readers read the same locations, in turn,
within one run. Ratios are computed within each turn; their median and range are reported. The limit is the rate of
decoding the same tiles, already in memory, with the same codec.

Real slides are read from REPMETRICS_TEST_DATA (default ../shared/data) if it exists. tiffslide is included if it can be
imported, also from build/tiffslide:

    pip install --no-deps --target build/tiffslide tiffslide "zarr<3.2" numcodecs donfig google-crc32c
"""

from __future__ import annotations

import argparse
import ctypes
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import openslide
from openslide import lowlevel
from tifffile import TiffFile

from fmtrain.manifest.build import build_manifest
from fmtrain.slides.info import SlideInfo
from fmtrain.slides.inspection import inspect_slide
from fmtrain.slides.resolution import GivenMpp
from fmtrain.slides.slide import Slide
from fmtrain.slides.synthetic import draw, write_pyramid
from fmtrain.slides.tiles import TiledLevel, aligned_buffer
from repmetrics.atomic_write import write_text
from repmetrics.executor import Processes, cores

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("REPMETRICS_TEST_DATA", ROOT / ".." / "shared" / "data")).resolve()
REAL = {
    "CMU-1-Small-Region (Aperio, JPEG 240)": "slides/CMU-1-Small-Region.svs",
    "TCGA mosaic (JPEG 256)": "tcga_mosaics/breast.derived.svs",
    "TCGA-CR-7395 (Aperio, JPEG 2000 256)": "slides/TCGA-CR-7395-01A-01-TS1.svs",
}
CROPS = 4  # patches cut from each block
WORKERS = 2  # of the DataLoader
TARGETS = {  # by prefix of the task
    "random 256": {"fmtrain / limit": 0.85, "fmtrain / OpenSlide to PIL": 2.0},
    "patches from aligned": {"fmtrain / limit": 0.85, "fmtrain / OpenSlide to PIL": 5.0},
}
LOADER_TARGET, MEMORY_TARGET_MIB = 0.9, 600

Read = Callable[[int, int, int], Any]  # x, y, side → pixels


class Decoder:
    """The limit: decodes the tiles of a region from memory into one buffer, without using them."""

    def __init__(self, path: Path, level: TiledLevel) -> None:
        self.level = level
        with TiffFile(path) as tif:
            page = next(p for p in tif.pages if p.is_tiled and (p.imagewidth, p.imagelength) == level.size)
            data = path.read_bytes()
            self.tiles = [data[o : o + n] for o, n in zip(page.dataoffsets, page.databytecounts, strict=True)]
        self.buffer = aligned_buffer(*level.tile)

    def __call__(self, x: int, y: int, side: int) -> None:
        w, h = self.level.tile
        for row in range(y // h, (y + side - 1) // h + 1):
            for column in range(x // w, (x + side - 1) // w + 1):
                data = self.tiles[row * self.level.columns + column]
                if self.level.color_space is None:
                    imagecodecs.jpeg2k_decode(data, out=self.buffer)
                else:
                    imagecodecs.jpeg8_decode(
                        data,
                        tables=self.level.tables,
                        colorspace=self.level.color_space,
                        outcolorspace="rgb",
                        out=self.buffer,
                    )


def to_numpy(slide: openslide.OpenSlide, x: int, y: int, side: int) -> np.ndarray:
    """OpenSlide's BGRA buffer as RGB, without Pillow."""
    buffer = np.empty((side, side, 4), np.uint8)
    pointer = buffer.ctypes.data_as(ctypes.POINTER(ctypes.c_uint32))
    lowlevel._read_region(slide._osr, pointer, x, y, 0, side, side)
    return buffer[..., 2::-1]


def contenders(path: Path, info: SlideInfo) -> dict[str, Read]:
    """All readers, by name; each returns RGB pixels of level 0."""
    slide = Slide(path, info)
    assert slide.tiles is not None, info.reader_reason
    reference = openslide.OpenSlide(path)
    # No cache: the small slides here would fit into it, but among thousands of slides it is never hit.
    reference.set_cache(openslide.OpenSlideCache(0))
    readers: dict[str, Read] = {
        "limit": Decoder(path, slide.tiles[0]),
        "fmtrain": lambda x, y, side: slide.read(0, x, y, (side, side)),
        "OpenSlide to PIL": lambda x, y, side: reference.read_region((x, y), 0, (side, side)).convert("RGB"),
        "OpenSlide to NumPy": lambda x, y, side: np.ascontiguousarray(to_numpy(reference, x, y, side)),
    }
    sys.path.append(str(ROOT / "build" / "tiffslide"))
    try:
        from tiffslide import TiffSlide
    except ImportError:
        return readers
    tiffslide = TiffSlide(path)
    return readers | {"tiffslide": lambda x, y, side: tiffslide.read_region((x, y), 0, (side, side), as_array=True)}


def rate(read: Read, places: Sequence[tuple[int, int]], side: int, seconds: float) -> float:
    """Reads per CPU-second."""
    done, start = 0, time.process_time()
    while (spent := time.process_time() - start) < seconds:
        for x, y in places[done % len(places) : done % len(places) + 8]:
            read(x, y, side)
            done += 1
    return done / spent


def rate_together(read: Read, places: Sequence[tuple[int, int]], side: int, seconds: float, *, processes: int) -> float:
    """Reads per CPU-second of each of several concurrent processes: cores share caches, memory and clock rate."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def work() -> None:
        sender.send(rate(read, places, side, seconds))

    workers = [context.Process(target=work) for _ in range(processes)]
    for worker in workers:
        worker.start()
    rates = [receiver.recv() for _ in workers]
    for worker in workers:
        worker.join()
    return statistics.mean(rates)


def race(
    readers: dict[str, Read], places: Sequence[tuple[int, int]], side: int, args: argparse.Namespace
) -> dict[str, Any]:
    """Rates of all readers at the same locations, turn by turn; ratios within turns."""
    for read in readers.values():
        rate(read, places, side, args.seconds / 4)  # warm
    turns: dict[str, list[float]] = {name: [] for name in readers}
    for turn in range(args.repeats):
        names = list(readers)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            turns[name].append(rate(readers[name], places, side, args.seconds))
    ratios = {
        f"fmtrain / {name}": [a / b for a, b in zip(turns["fmtrain"], turns[name], strict=True)]
        for name in readers
        if name != "fmtrain"
    }
    return {
        "per CPU-second": {k: spread(v) for k, v in turns.items()},
        "ratios": {k: spread(v) for k, v in ratios.items()},
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and range over all turns."""
    return {key: float(f"{f(values):.4g}") for key, f in (("median", statistics.median), ("low", min), ("high", max))}


def reading(path: Path, mpp: float | None, args: argparse.Namespace) -> dict[str, Any]:
    """Rates on one slide: random patches, and blocks on the grid of tiles."""
    info = inspect_slide(path, given=GivenMpp(mpp))
    readers = contenders(path, info)
    (w, h), rng = info.size, np.random.default_rng(0)
    slide = Slide(path, info)
    assert slide.tiles is not None
    tile = slide.tiles[0].tile[0]
    block = 2 * tile
    random = list(zip(rng.integers(0, w - 256, 4096).tolist(), rng.integers(0, h - 256, 4096).tolist(), strict=True))
    columns, rows = (w - block) // tile + 1, (h - block) // tile + 1
    aligned = [(int(i) * tile, int(j) * tile) for i, j in rng.integers(0, (columns, rows), (4096, 2))]
    offsets = rng.integers(0, block - 256 + 1, (CROPS, 2)).tolist()

    def cut(read: Read) -> Read:
        """Reader of one block that copies its patches, each into its own memory."""

        def crops(x: int, y: int, side: int) -> list[np.ndarray]:
            pixels = np.asarray(read(x, y, side))
            return [np.ascontiguousarray(pixels[v : v + 256, u : u + 256]) for u, v in offsets]

        return crops

    def read_many(x: int, y: int, side: int) -> None:
        outs = [np.empty((256, 256, 3), np.uint8) for _ in offsets]
        slide.read_many(0, [(x + u, y + v) for u, v in offsets], (256, 256), outs=outs)

    cutting = {name: cut(read) for name, read in readers.items()} | {"limit": readers["limit"], "fmtrain": read_many}
    blocks = race(cutting, aligned, block, args)
    blocks["per CPU-second"] = {
        name: {key: value * CROPS for key, value in row.items()} for name, row in blocks["per CPU-second"].items()
    }
    return {
        "size": info.size,
        "tile": tile,
        "random 256": race(readers, random, 256, args),
        f"patches from aligned {block} blocks": blocks,
        "tiles under a random patch": round(
            float(np.mean([len({x // tile, (x + 255) // tile}) for x, _ in random])) ** 2, 2
        ),
    }


def cpu_seconds(pids: Sequence[int]) -> float:
    """CPU time of processes, from the scheduler's statistics."""
    return sum(int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) for pid in pids) * 1e-9


def through_the_loader(manifest: Path, slide: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Patches per CPU-second of workers and main process together, with drawing, reading and sending.

    Args:
        manifest: Manifest of slides with the same pixels as `slide`.
        slide: Slide for the limit, which decodes the patches that the loader reads one by one. It is measured
            before and after every turn: of one process alone, and of two concurrent processes, as many as workers.
        args: Arguments of the command line.
    """
    import torch

    from fmtrain.patches.dataset import TrainingPatches
    from fmtrain.patches.loader import training_batches

    torch.set_num_threads(1)
    info = inspect_slide(slide)
    with Slide(slide, info) as opened:
        assert opened.tiles is not None
        decoder = Decoder(slide, opened.tiles[0])
    random = TrainingPatches(manifest, size_px=256, seed=0)
    places = [(plan.crop.x, plan.crop.y) for plan in map(random.plan, range(4096)) if plan is not None]
    result: dict[str, Any] = {}
    for crops in (1, CROPS):
        patches = TrainingPatches(manifest, size_px=256, seed=0, crops_per_block=crops)
        turns, walls, shares = [], [], []
        alone: list[float] = []

        def limits() -> tuple[float, float]:
            together = rate_together(decoder, places, 256, args.seconds, processes=WORKERS)
            return rate(decoder, places, 256, args.seconds), together

        for _ in range(max(3, args.repeats // 2)):
            limits_before = limits()
            before = set(children())
            batches = training_batches(patches, batch_size=64, num_workers=WORKERS)
            for _ in islice(batches, 24 * crops):  # until every worker has touched every page of the ring
                pass
            pids = [os.getpid(), *(p for p in children() if p not in before)]
            start, wall = cpu_seconds(pids), time.perf_counter()
            count = sum(len(batch) for batch in islice(batches, args.loader_batches))
            turns.append(count / (cpu_seconds(pids) - start))
            walls.append(count / (time.perf_counter() - wall))
            batches.close()  # type: ignore[attr-defined]
            single, together = (statistics.mean(pair) for pair in zip(limits_before, limits(), strict=True))
            alone.append(turns[-1] / single)
            shares.append(turns[-1] / together)
        result["random 256" if crops == 1 else f"{CROPS} patches a block"] = {
            "patches per CPU-second": spread(turns),
            "patches per second": spread(walls),
            "share of the limit of two processes, random 256": spread(shares),
            "share of the limit of one process, random 256": spread(alone),
        }
    return result


def children() -> list[int]:
    """Child processes of this process."""
    pids = []
    for path in Path("/proc").iterdir():
        if path.name.isdigit():
            try:
                parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            except (OSError, IndexError):
                continue
            if parent == os.getpid():
                pids.append(int(path.name))
    return pids


def opening(path: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Rate if every patch is from another slide: open, read once, close."""
    info = inspect_slide(path)
    with Slide(path, info) as slide:
        tiles = slide.tiles

    def fmtrain_read(x: int, y: int, side: int) -> None:
        with Slide(path, info, tiles=tiles) as slide:
            slide.read(0, x, y, (side, side))

    def openslide_read(x: int, y: int, side: int) -> None:
        with openslide.OpenSlide(path) as slide:
            slide.read_region((x, y), 0, (side, side)).convert("RGB")

    rng = np.random.default_rng(1)
    places = [(int(x), int(y)) for x, y in rng.integers(0, min(info.size) - 256, (4096, 2))]
    return race({"fmtrain": fmtrain_read, "OpenSlide to PIL": openslide_read}, places, 256, args)


MEMORY = """
import sys
from dataclasses import replace
from pathlib import Path
import numpy as np
import torch
from fmtrain.manifest.manifest import Manifest
from fmtrain.patches.slide_pool import SlidePool
from fmtrain.slides.resolution import GivenMpp, region
def status():
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {line[0][:-1]: int(line[1]) // 1024 for line in lines if line[0] in ("VmRSS:", "RssAnon:", "VmHWM:")}
manifest = Manifest.load(Path(sys.argv[1]))
start, slides, rng = status(), SlidePool(), np.random.default_rng(0)
for entry in manifest.slides:
    if sys.argv[2] == "openslide":
        entry = replace(entry, info=replace(entry.info, reader="openslide"))
    slide = slides.get(entry)
    for _ in range(8):
        location = rng.integers(0, np.array(entry.info.size) - 256).tolist()
        patch = region(entry.info, location, size_px=256, mpp=entry.info.mpp)
        slide.read_patches([patch], outs=[np.empty((256, 256, 3), np.uint8)])
end = status()
print(len(manifest.slides), start["VmRSS"], end["VmRSS"], end["VmHWM"], start["RssAnon"], end["RssAnon"])
"""


def memory(folder: Path, slide: Path, count: int) -> dict[str, Any]:
    """Resident memory of a process that reads eight patches from each of many slides. Most of it is torch."""
    slides = folder / "many"
    slides.mkdir()
    for k in range(count):
        os.link(slide, slides / f"TCGA-{k // 10000:02d}-{k % 10000:04d}-01Z-00-DX1.tiff")
    with Processes(cores()) as executor:
        manifest = build_manifest(slides, folder / "many_out", held_out=2, mpps=(0.25,), executor=executor).path
    keys = ("slides", "after imports", "at the end", "at the peak", "its own after imports", "its own at the end")
    result: dict[str, Any] = {}
    for reader in ("tiles", "openslide"):
        out = subprocess.run(
            [sys.executable, "-c", MEMORY, str(manifest), reader], capture_output=True, text=True, check=True
        ).stdout.split()
        result[reader] = dict(zip(keys, map(int, out), strict=True))
    return {"unit": "MiB", **result}


def hardware() -> dict[str, Any]:
    """Hardware and versions of the measurement."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine()
    )
    names = ("numpy", "imagecodecs", "tifffile", "openslide-python", "openslide-bin", "pillow", "torch")
    return {
        "cpu": model,
        "cores": cores(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "python": platform.python_version(),
        "load_before": os.getloadavg()[0],
        "versions": {name: version(name) for name in names},
    }


def missed_targets(slide: str, measured: dict[str, Any]) -> list[str]:
    """Missed targets, one line each."""
    return [
        f"{slide}, {task}: {ratio} = {got} < {wanted}"
        for begins, targets in TARGETS.items()
        for task in measured
        if task.startswith(begins)
        for ratio, wanted in targets.items()
        if (got := measured[task]["ratios"][ratio]["median"]) < wanted
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=0.3, help="CPU-seconds of each contender in each turn")
    parser.add_argument("--repeats", type=int, default=9, help="turns")
    parser.add_argument("--loader-batches", type=int, default=160, help="batches of 64 through the DataLoader")
    parser.add_argument("--slides", type=int, default=1000, help="slides opened for the measurement of memory")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "patching.json")
    parser.add_argument("--loader", action="store_true", help="measure the DataLoader alone: its part of the file")
    args = parser.parse_args()

    report: dict[str, Any] = {"hardware": hardware(), "seconds": args.seconds, "repeats": args.repeats, "reading": {}}
    if args.loader:
        report = json.loads(args.out.read_text())
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "two").mkdir()
        synthetic = folder / "two" / "TCGA-AA-0001-01Z-00-DX1.tiff"
        pixels = draw(size_px=6144, mpp=0.25, seed=0).pixels
        write_pyramid(synthetic, pixels, mpp=0.25)
        write_pyramid(folder / "two" / "TCGA-AA-0002-01Z-00-DX1.tiff", pixels, mpp=0.25)
        slides = {"synthetic (JPEG 256)": synthetic} | {
            name: DATA / file for name, file in REAL.items() if (DATA / file).is_file()
        }
        for name, path in ({} if args.loader else slides).items():
            print(f"reading {name}", file=sys.stderr, flush=True)
            report["reading"][name] = reading(path, 0.25, args)
        print("through the DataLoader", file=sys.stderr, flush=True)
        manifest = build_manifest(folder / "two", folder / "out", mpps=(0.25,), held_out=2).path
        load = os.getloadavg()[0]
        report["DataLoader, 2 workers"] = through_the_loader(manifest, synthetic, args)
        report["load before the DataLoader"] = load
        if not args.loader:
            print("another slide for every patch", file=sys.stderr, flush=True)
            report["another slide for every patch"] = opening(synthetic, args)
            print(f"memory over {args.slides} slides", file=sys.stderr, flush=True)
            report["memory"] = memory(folder, synthetic, args.slides)
    report["missed"] = [line for name, measured in report["reading"].items() for line in missed_targets(name, measured)]
    for name, measured in report["DataLoader, 2 workers"].items():
        if (got := measured["share of the limit of two processes, random 256"]["median"]) < LOADER_TARGET:
            report["missed"].append(f"DataLoader, {name}: {got} of the limit < {LOADER_TARGET}")
    for reader in ("tiles", "openslide"):
        if (got := report["memory"][reader]["at the peak"]) > MEMORY_TARGET_MIB:
            report["missed"].append(f"memory, {reader}: {got} MiB > {MEMORY_TARGET_MIB}")
    write_text(args.out, json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    print(json.dumps(report, indent=1, ensure_ascii=False))


if __name__ == "__main__":
    main()
