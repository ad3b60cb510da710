"""Do label-free signals track a probe? Many small runs of five methods on three domains, each measured both ways.

    python benchmarks/trust/experiment.py --list
    python benchmarks/trust/experiment.py --workers 2 [--only REGEX] [--steps 1200]
    python benchmarks/trust/experiment.py --device cuda --workers 14 --minutes 7

Each run trains a plain LightningModule under RepresentationMonitor. Its rows are appended to files in --out as each
evaluation ends. Finished runs are skipped, so the command can be run again to resume. With --minutes, the number of
steps per run is chosen once, from a timing of all workers, so that all runs fit; the command stops at that time.

`tables()` joins the rows into signals.csv, probes.csv (half "explore", and broken runs) and sealed.csv (half
"confirm"). Nothing reads sealed.csv before the rules are committed, see analysis.py.

Raw data come from REPMETRICS_TEST_DATA (default ../shared/data).
"""

from __future__ import annotations

import argparse
import csv
import gzip
import io
import json
import math
import multiprocessing
import os
import re
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import Empty
from typing import Any, NamedTuple

from settings import METHODS, Run, plan

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
DATA = Path(os.environ.get("REPMETRICS_TEST_DATA", ROOT / ".." / "shared" / "data")).resolve()

SHARES = (0.05, 0.15, 0.3, 0.5, 0.75, 1.0)
"""Shares of training at which a run is evaluated, besides its start."""

FEW_LABEL_SHARES = (0.3, 1.0)
FROM_FEATURES = ("moments", "directions", "features", "previous")
"""Inputs of the metrics that the monitor measures; `signals.py` measures those of views, turns and tokens."""

TIMED_STEPS = (20, 300)
"""Steps of two short runs before the experiment; the second is timed, the first is its warm-up."""

SAFETY = 0.88
"""Share of the time limit that the runs are planned to take."""

TIMING_SHARE = 0.35
"""Largest share of the time limit that is waited for the timing."""

MIN_STEPS, MAX_STEPS = 100, 20_000


class Options(NamedTuple):
    """Options that workers share."""

    out: Path
    device: str
    steps: int
    batch_size: int
    probe_rows: int
    few_label_draws: int


def epochs(steps: int) -> list[int]:
    """Number of steps between evaluations.

    Example:
        >>> epochs(100)
        [5, 10, 15, 20, 25, 25]
    """
    ends = [round(share * steps) for share in SHARES]
    return [end - start for start, end in zip([0, *ends[:-1]], ends, strict=True)]


class Worker:
    """What one process keeps between runs: data and views on the device.

    Args:
        options: Shared options.
    """

    def __init__(self, options: Options) -> None:
        import torch

        torch.set_num_threads(1)
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True
        self.options = options
        self.domains: dict[str, Any] = {}

    def domain(self, name: str) -> Any:
        """A domain on the device, and its fixed views."""
        from domains import load
        from signals import fixed_views

        if name not in self.domains:
            domain = load(name, data=DATA, cache=self.options.out / "cache").to(self.options.device)
            self.domains[name] = domain, fixed_views(domain)
        return self.domains[name]

    def train(self, run: Run, *, write: Callable[[str, dict[str, Any]], None], callbacks: tuple[Any, ...] = ()) -> None:
        """Train one run; `write` receives its rows."""
        from evaluation import Evaluator
        from lightning.pytorch import Trainer, seed_everything
        from lightning.pytorch.callbacks import ModelCheckpoint
        from methods import METHODS as MODULES

        options = self.options
        domain, views = self.domain(run.domain)
        seed_everything(run.seed, verbose=False)
        lengths = epochs(options.steps)
        parts = {"epochs": lengths, "batch_size": options.batch_size, "quarter_turns": domain.orientation_free}
        rows = domain.train[: max(options.batch_size, round(run.fraction * len(domain.train)))]
        module = MODULES[run.method](run.settings, images=domain.images, rows=rows, **parts)
        if run.pretrain:
            module.load_state_dict(self._pretrain(run, parts))
        evaluator = Evaluator(
            domain,
            views,
            total_steps=options.steps,
            probe_rows=options.probe_rows,
            few_label_draws=options.few_label_draws,
            few_label_shares=FEW_LABEL_SHARES,
            write=write,
        )
        monitor = make_monitor(domain, encoder=module.encoder)
        # The callback that watches a key of the monitor makes it measure at each end of an epoch.
        watcher = ModelCheckpoint(self.options.out / "unused", monitor="repmetrics/rankme", save_top_k=0)
        Trainer(**self._trainer(lengths), callbacks=[*callbacks, monitor, evaluator, watcher]).fit(module)

    def _pretrain(self, run: Run, parts: dict[str, Any]) -> dict[str, Any]:
        """Weights of the same method and settings, trained on another domain."""
        from lightning.pytorch import Trainer
        from methods import METHODS as MODULES

        domain, _ = self.domain(run.pretrain)
        module = MODULES[run.method](run.settings, images=domain.images, rows=domain.train, **parts)
        Trainer(**self._trainer(parts["epochs"])).fit(module)
        return module.state_dict()

    def _trainer(self, lengths: list[int]) -> dict[str, Any]:
        return {
            "accelerator": "gpu" if self.options.device == "cuda" else "cpu",
            "devices": 1,
            "max_epochs": len(lengths),
            "reload_dataloaders_every_n_epochs": 1,
            "use_distributed_sampler": False,
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "log_every_n_steps": 10**9,
            "default_root_dir": self.options.out / "unused",
        }


def make_monitor(domain: Any, *, encoder: str) -> Any:
    """The package's monitor with every metric that takes one vector per image."""
    import torch
    from random_views import ViewSettings, random_views
    from signals import to_unit

    from repmetrics import RepresentationMonitor
    from repmetrics.measurement.registry import METRICS

    settings = ViewSettings(0.2, 1.0, 0.2, domain.orientation_free)

    def augmentation(images: torch.Tensor) -> torch.Tensor:
        return random_views(images * 255, settings, size=images.shape[-1])

    batches = [part.cpu() for part in to_unit(domain.images[domain.held_out]).split(250)]
    names = [name for name, spec in METRICS.items() if spec.inputs in FROM_FEATURES] + ["lidar", "alignment"]
    return RepresentationMonitor(
        batches, encoder=encoder, metrics=names, views=4, augmentation=augmentation, jsonl=False, on_alarm="log"
    )


def work(options: Options, tasks: Any, results: Any) -> None:
    """Loop of a worker process: tasks are the name of a domain to decode, of a method to time, or a run."""
    import logging
    import warnings

    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    worker = Worker(options)
    while (task := tasks.get()) is not None:
        kind, content = task
        start = time.perf_counter()
        try:
            if kind == "prepare":
                worker.domain(content)
                results.put(("prepared", content, None))
                continue
            if kind == "time":
                results.put(("timed", content, measure_speed(worker, content)))
                continue
            run, steps = content
            worker.options = options._replace(steps=steps)
            finish = train_and_record(worker, run)
            results.put(("done", run.name, finish | {"seconds": round(time.perf_counter() - start, 1)}))
        except Exception:
            results.put(("failed", str(content[0].name if kind == "run" else content), traceback.format_exc()))
            return  # an error may leave the device unusable in this process; another takes its place


def train_and_record(worker: Worker, run: Run) -> dict[str, Any]:
    """Train a run and append its rows to its file; probes of the confirming half go to a separate folder."""
    out, steps = worker.options.out, worker.options.steps
    folders = {"signals": out / "signals", "probes": out / ("sealed" if run.half == "confirm" else "probes")}
    for folder in folders.values():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{run.name}.jsonl").unlink(missing_ok=True)

    def write(kind: str, row: dict[str, Any]) -> None:
        with (folders[kind] / f"{run.name}.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"run": run.name, **row}) + "\n")

    worker.train(run, write=write)
    (out / "done").mkdir(exist_ok=True)
    (out / "done" / run.name).write_text(f"{steps}\n")
    return {"steps": steps}


def measure_speed(worker: Worker, method: str) -> dict[str, float]:
    """Seconds per step and per evaluation of a method, on a machine as busy as in the experiment."""
    import torch
    from lightning.pytorch import Callback

    def now() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    class Stopwatch(Callback):
        seconds = 0.0

        def on_train_epoch_start(self, *_: Any) -> None:
            self.start = now()

        def on_train_epoch_end(self, *_: Any) -> None:  # before the monitor's, which follows in the list
            self.seconds += now() - self.start

    run = next(r for r in plan() if r.method == method and r.domain == "cifar10")
    for steps in TIMED_STEPS:
        worker.options = worker.options._replace(steps=steps)
        watch, start = Stopwatch(), now()
        worker.train(run, write=lambda *_: None, callbacks=(watch,))
        total = now() - start
    return {"step": watch.seconds / steps, "rest": total - watch.seconds}


def steps_that_fit(timings: list[dict[str, float]], *, runs: int, workers: int, seconds: float) -> int:
    """Number of steps per run with which all runs fit into the time.

    Example:
        >>> steps_that_fit([{"step": 0.01, "rest": 5.0}], runs=20, workers=10, seconds=100)
        3890
    """
    step, rest = (sum(t[key] for t in timings) / len(timings) for key in ("step", "rest"))
    fitting = (SAFETY * seconds * workers / runs - rest) / step
    return int(min(max(fitting, MIN_STEPS), MAX_STEPS)) // 10 * 10


class Pool:
    """Worker processes and their queues."""

    def __init__(self, options: Options, *, workers: int) -> None:
        os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        context = multiprocessing.get_context("spawn")
        self.tasks, self.results = context.Queue(), context.Queue()
        arguments = (options, self.tasks, self.results)
        self._new = lambda: context.Process(target=work, args=arguments, daemon=True)
        self.processes: list[Any] = []
        for _ in range(workers):
            self.add()

    def add(self) -> None:
        """Start one more process."""
        self.processes.append(self._new())
        self.processes[-1].start()

    def answers(self, count: int, *, deadline: float) -> Iterator[tuple[str, str, Any]]:
        """Up to `count` results, as they come; fewer if the deadline passes or all processes end."""
        while count and time.monotonic() < deadline:
            try:
                answer = self.results.get(timeout=min(5.0, max(0.1, deadline - time.monotonic())))
                if answer[0] == "failed":
                    self.add()
                yield answer
                count -= 1
            except Empty:
                if not any(process.is_alive() for process in self.processes):
                    return

    def stop(self) -> None:
        """End all processes."""
        for process in self.processes:
            process.kill()  # Lightning postpones SIGTERM to the end of an epoch
        for process in self.processes:
            process.join(10)


def tables(out: Path, to: Path) -> None:
    """Join the rows of all runs into signals.csv.gz, probes.csv.gz and sealed.csv.gz."""
    runs = {run.name: run for run in plan()}
    for kind in ("signals", "probes", "sealed"):
        rows = []
        for file in sorted((out / kind).glob("*.jsonl")):
            run = runs[file.stem]
            about: dict[str, Any] = {"run": run.name, "domain": run.domain, "method": run.method}
            if kind == "signals":
                about |= {"kind": run.kind, "half": run.half, "finished": int((out / "done" / run.name).exists())}
                about |= {f"param.{key}": value for key, value in run.settings.items()}
            lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
            rows += [about | json.loads(line) for line in lines if line.endswith("\n")]  # the last may be unfinished
        if rows:
            write_gzip(to / f"{kind}.csv.gz", rows)


def write_gzip(path: Path, rows: list[dict[str, Any]]) -> None:
    """Rows as a compressed table; the same bytes for the same rows."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        plain = {key: "" if v is None else f"{v:.5g}" if isinstance(v, float) else v for key, v in row.items()}
        writer.writerow(plain)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_bytes(gzip.compress(text.getvalue().encode(), mtime=0))
    partial.rename(path)


def run_all(runs: list[Run], options: Options, *, workers: int, minutes: float, to: Path) -> None:
    """Train all runs that are not finished, within the time limit if there is a positive one."""
    start = time.monotonic()
    deadline = start + 60 * minutes if minutes else math.inf
    about: dict[str, Any] = {"device": options.device, "workers": workers, "batch_size": options.batch_size}
    pool, saved = Pool(options, workers=workers), start
    try:
        domains = sorted({run.domain for run in runs} | {run.pretrain for run in runs} - {""})
        for name in domains:
            pool.tasks.put(("prepare", name))
        report(list(pool.answers(len(domains), deadline=deadline)), options.out)
        steps = options.steps
        if minutes:
            for k in range(workers):
                pool.tasks.put(("time", METHODS[k % len(METHODS)]))
            answers = list(pool.answers(workers, deadline=start + TIMING_SHARE * 60 * minutes))
            report(answers, options.out)
            about["timings"] = [[name, value] for kind, name, value in answers if kind == "timed"]
            timings = [value for _, value in about["timings"]]
            if timings:
                steps = steps_that_fit(timings, runs=len(runs), workers=workers, seconds=deadline - time.monotonic())
        about |= {"steps": steps, "prepared_seconds": time.monotonic() - start}
        print(json.dumps(about), flush=True)
        for run in runs:
            pool.tasks.put(("run", (run, steps)))
        for count, answer in enumerate(pool.answers(len(runs), deadline=deadline), start=1):
            report([answer], options.out)
            print(f"{time.monotonic() - start:.0f} s, {count}/{len(runs)}: {answer[1]} {answer[0]}", flush=True)
            if time.monotonic() - saved > 60:
                tables(options.out, to)
                saved = time.monotonic()
    finally:
        pool.stop()
        tables(options.out, to)
        (to / "experiment.json").write_text(json.dumps(about | {"seconds": time.monotonic() - start}, indent=1) + "\n")


def report(answers: list[tuple[str, str, Any]], out: Path) -> None:
    """Append the traceback of each failure to errors.txt, and print its last line."""
    for kind, name, content in answers:
        if kind == "failed":
            with (out / "errors.txt").open("a", encoding="utf-8") as file:
                file.write(f"{name}\n{content}\n")
            print(f"failed: {name}: {content.strip().splitlines()[-1]}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="list the runs, and which are finished")
    parser.add_argument("--only", default="", help="regular expression of the names of runs")
    parser.add_argument("--workers", type=int, default=2, help="number of processes")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--steps", type=int, default=1200, help="steps per run, without --minutes")
    parser.add_argument("--minutes", type=float, default=0, help="time limit; steps per run are chosen to fit")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--probe-rows", type=int, default=0, help="rows of the probes; default 5,000, on cuda 30,000")
    parser.add_argument("--draws", type=int, default=10, help="draws of few labels")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "trust")
    parser.add_argument("--tables", type=Path, help="folder of the tables, default --out")
    args = parser.parse_args()
    done = {path.name for path in (args.out / "done").glob("*")}
    runs = [run for run in plan() if re.search(args.only, run.name)]
    if args.list:
        for run in runs:
            print(f"{run.name:28}{run.kind:8}{run.half:9}{'finished' if run.name in done else ''}")
        return
    runs = [run for run in runs if run.name not in done]
    args.out.mkdir(parents=True, exist_ok=True)
    rows = args.probe_rows or (30_000 if args.device == "cuda" else 5_000)
    options = Options(args.out.resolve(), args.device, args.steps, args.batch_size, rows, args.draws)
    run_all(runs, options, workers=args.workers, minutes=args.minutes, to=args.tables or args.out)


if __name__ == "__main__":
    main()
