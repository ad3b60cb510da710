"""Cost of one evaluation by the monitor, compared with the encoder's forward pass and with a training step.

    python benchmarks/monitor.py [--repeats 7] [--out benchmarks/results]

On the CPU everything runs on one thread and is measured in CPU seconds, so that other load changes little. The forward
pass is timed over --images images and scaled to N, in which it is linear. If build/peers holds stable-pretraining
(benchmarks/peers/install.py), the work of its queue at every training step is timed too, with the arguments of its
documentation. With --device cuda, whole evaluations and training steps are timed in wall time.
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
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import timm
import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from repmetrics.atomic_write import write_text
from repmetrics.callbacks.representation_monitor import RepresentationMonitor
from repmetrics.data.features import Features
from repmetrics.decisions.alarms import collapse_stats
from repmetrics.measurement.measure import measure
from repmetrics.measurement.moments import Moments
from repmetrics.measurement.registry import DEFAULT_METRICS
from repmetrics.monitoring.monitor import Monitor
from repmetrics.monitoring.record import Record, append_jsonl
from repmetrics.probes.knn import knn_probe
from repmetrics.probes.linear import linear_probe
from repmetrics.tensorboard.writer import write_summaries

ROOT = Path(__file__).resolve().parent.parent
PEERS = ROOT / "build" / "peers" / "bin" / "python"
N, D, GROUPS, CLASSES = 4096, 384, 64, 4
STEPS_PER_EPOCH = 1000  # the default is one evaluation per epoch
QUEUE = """
import time, statistics, torch
torch.set_num_threads(1)
from stable_pretraining.callbacks.queues import OrderedQueue
queue, batch = OrderedQueue(20000, 768, torch.float32), torch.randn(64, 768)
for _ in range(320): queue.append(batch)
times = []
for _ in range(50):
    start = time.process_time(); queue.append(batch); times.append(time.process_time() - start)
print(statistics.median(times), min(times), max(times))
"""


def timed(function: Callable[[], Any], *, repeats: int, clock: Callable[[], float] = time.process_time) -> list[float]:
    """Seconds of each call, after a warm-up call."""
    function()
    seconds = []
    for _ in range(repeats):
        start = clock()
        function()
        seconds.append(clock() - start)
    return seconds


def spread(seconds: list[float]) -> dict[str, float]:
    return {"median": statistics.median(seconds), "min": min(seconds), "max": max(seconds)}


def features() -> Features:
    """Features with a decaying spectrum, a class signal, and slides."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(N) % CLASSES
    values = torch.randn(N, D, generator=generator) * torch.arange(1, D + 1) ** -0.5
    values += 0.2 * torch.randn(CLASSES, D, generator=generator)[labels]
    return Features(values, tuple(f"slide {i * GROUPS // N}" for i in range(N)), labels)


def parts(repeats: int) -> dict[str, list[float]]:
    """CPU seconds of each part of an evaluation but the encoder."""
    data = features()
    x, groups, labels = data.values, data.groups, data.labels
    assert groups is not None
    assert labels is not None
    measured = {**measure(x, groups=groups), "linear_probe": linear_probe(x, labels, groups=groups)}
    sigma = tuple((Moments(x).spectrum(centered=True).eigenvalues / N).sqrt().tolist())
    history = [Record(i, i, 1.0, measured, collapse_stats=collapse_stats(x), singular_values=sigma) for i in range(20)]
    with tempfile.TemporaryDirectory() as folder:
        writer = SummaryWriter(folder)

        def log() -> None:
            for key, value in history[-1].scalars().items():
                writer.add_scalar(key, value, 0)
            write_summaries(writer, history, prefix="repmetrics")
            append_jsonl(Path(folder, "measurements.jsonl"), history[-1])

        return {
            "values of the metrics": timed(lambda: measure(x, metrics=DEFAULT_METRICS), repeats=repeats),
            "with their errors, 32 replicates": timed(lambda: measure(x, groups=groups), repeats=repeats),
            "vital signs and spectrum": timed(
                lambda: (collapse_stats(x), Moments(x).spectrum(centered=True)), repeats=repeats
            ),
            "logging, cards and pictures included": timed(log, repeats=repeats),
            "linear probe": timed(lambda: linear_probe(x, labels, groups=groups), repeats=repeats),
            "kNN": timed(lambda: knn_probe(x, labels, groups=groups), repeats=repeats),
        }


def forward(images: int, repeats: int) -> list[float]:
    """CPU seconds of ViT-S/16 over N images of 224 px."""
    encoder = timm.create_model("vit_small_patch16_224", num_classes=0).eval()
    batch = torch.randn(images, 3, 224, 224)
    with torch.no_grad():
        return [seconds * N / images for seconds in timed(lambda: encoder(batch), repeats=repeats)]


def hook(repeats: int) -> list[float]:
    """CPU seconds that the monitor adds to a training step without an evaluation."""

    class Trainer:
        accumulate_grad_batches = 1
        global_step = 1

    monitor = RepresentationMonitor([])
    monitor._interval = 0  # as after a first step
    loss = {"loss": torch.tensor(1.0)}
    run: Any = monitor.on_train_batch_end

    def run_1000() -> None:
        for index in range(1000):
            run(Trainer, None, loss, None, index)

    return [seconds / 1000 for seconds in timed(run_1000, repeats=repeats)]


def queue() -> list[float] | None:
    """CPU seconds of stable-pretraining's queue per training step, 20000×768: median, minimum, maximum."""
    if not PEERS.is_file():
        return None
    done = subprocess.run([PEERS, "-c", QUEUE], capture_output=True, text=True)
    return [float(part) for part in done.stdout.splitlines()[-1].split()] if done.returncode == 0 else None


def on_cpu(repeats: int, images: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    costs = {name: spread(seconds) for name, seconds in parts(repeats).items()}
    evaluation = costs["with their errors, 32 replicates"]["median"] + sum(
        costs[name]["median"] for name in ("vital signs and spectrum", "logging, cards and pictures included")
    )
    encoder = spread(forward(images, repeats))
    peer = queue()
    return {
        "n": N,
        "d": D,
        "groups": GROUPS,
        "parts_cpu_seconds": costs,
        "encoder_forward_cpu_seconds": encoder,
        "metric_part_over_forward": evaluation / encoder["median"],
        "with_probes_over_forward": (evaluation + costs["linear probe"]["median"] + costs["kNN"]["median"])
        / encoder["median"],
        "hook_cpu_seconds_a_step": spread(hook(repeats)),
        "stable_pretraining_queue_cpu_seconds_a_step": peer and dict(zip(("median", "min", "max"), peer, strict=True)),
    }


def on_cuda(repeats: int) -> dict[str, Any]:
    """Wall seconds of an evaluation, and of a training step of ViT-S/16 in bf16 at batch 256, on the device."""
    encoder = timm.create_model("vit_small_patch16_224", num_classes=0).cuda()
    optimizer = torch.optim.AdamW(encoder.parameters())
    batch = torch.randn(256, 3, 224, 224, device="cuda")
    held_out = [{"image": torch.randn(64, 3, 224, 224), "group": [str(i % 16)] * 64} for i in range(N // 64)]
    monitor = Monitor()

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            loss: Tensor = encoder(batch).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        torch.cuda.synchronize()

    steps = timed(step, repeats=10 * repeats, clock=time.perf_counter)
    evaluations = timed(lambda: monitor.measure(encoder, held_out), repeats=repeats, clock=time.perf_counter)
    seconds, step_seconds = statistics.median(evaluations), statistics.median(steps)
    return {
        "gpu": torch.cuda.get_device_name(),
        "look_seconds": spread(evaluations),
        "training_step_seconds": spread(steps),
        "steps_between_looks": STEPS_PER_EPOCH,
        "share_of_training_time": seconds / (seconds + STEPS_PER_EPOCH * step_seconds),
    }


def table(result: dict[str, Any]) -> str:
    cpu = result["cpu"]
    total = cpu["encoder_forward_cpu_seconds"]["median"]
    lines = [
        f"ViT-S/16, N = {N}, D = {D}, {GROUPS} groups, one CPU thread ({result['hardware']}), CPU seconds:",
        "",
        "| part of an evaluation | seconds | of the forward pass |",
        "|---|---|---|",
        f"| encoder's forward pass | {total:.1f} | 100 % |",
    ]
    for name, cost in cpu["parts_cpu_seconds"].items():
        lines.append(f"| {name} | {cost['median']:.3f} | {cost['median'] / total:.2%} |")
    metric_part, with_probes = cpu["metric_part_over_forward"], cpu["with_probes_over_forward"]
    lines.append(f"\nThe metric part (errors, spectrum, logging) is **{metric_part:.2%}** of the forward pass,")
    lines.append(f"with both probes {with_probes:.2%}.")
    lines.append(
        f"\nA training step without an evaluation costs {1e6 * cpu['hook_cpu_seconds_a_step']['median']:.0f} µs"
    )
    if peer := cpu["stable_pretraining_queue_cpu_seconds_a_step"]:
        lines[-1] += f"; stable-pretraining's queue costs {1e3 * peer['median']:.1f} ms at each (20000×768)"
    lines[-1] += "."
    if gpu := result.get("cuda"):
        evaluation, step = gpu["look_seconds"]["median"], gpu["training_step_seconds"]["median"]
        lines.append(f"\nOn {gpu['gpu']}: an evaluation {evaluation:.2f} s, a training step of batch 256 {step:.3f} s.")
        lines[-1] += f" An evaluation every {gpu['steps_between_looks']} steps is "
        lines[-1] += f"{gpu['share_of_training_time']:.2%} of the time."
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--images", type=int, default=16, help="images in the timed forward pass on the CPU")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args()
    result: dict[str, Any] = {
        "hardware": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {name: version(name) for name in ("torch", "numpy", "scipy", "timm", "tensorboard")},
        "repeats": options.repeats,
        "cpu": on_cpu(options.repeats, options.images),
    }
    if options.device == "cuda":
        result["cuda"] = on_cuda(options.repeats)
    for name, text in (("monitor.json", json.dumps(result, indent=1) + "\n"), ("monitor.md", table(result))):
        write_text(options.out / name, text)
    sys.stdout.write(table(result))


if __name__ == "__main__":
    main()
