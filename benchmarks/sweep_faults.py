"""Trials of the smallest real `fmtrain fit` by four drivers on PostgreSQL, with kills and an outage: is any lost?

    python benchmarks/sweep_faults.py [--trials 64] [--drivers 4] [--folder build/sweep-faults]

One driver is killed (−9), one trial is killed (−9), PostgreSQL is stopped for 20 seconds, and every process of the job
receives SIGTERM, each while trials train. A driver that ended is started again. In the end, the trials must be finished
and distinct, and none may have trained from step 0 again after its first checkpoint. 20 seconds of CPU time per trial.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import optuna
import yaml

from fmtrain.sweeps.settings import LAUNCHER

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "helpers"))

from fit_runs import SMALL, write_manifest  # noqa: E402
from postgresql import PostgreSQL, server_binaries  # noqa: E402

STEPS = 60
OUTAGE_SECONDS = 20
STUDY = "faults"


def write_sweep(folder: Path, url: str, *, trials: int, launcher: str) -> Path:
    """Write slides, manifest, configuration and sweep file."""
    if not (folder / "manifest.json").is_file():
        write_manifest(folder)
    config = yaml.safe_load(SMALL)
    config["trainer"]["max_steps"] = STEPS
    config["monitor"] = {"every_n_steps": 20, "metrics": ["rankme"]}
    config["checkpoint"] = {"every_n_train_steps": 5}
    (folder / "small.yaml").write_text(yaml.safe_dump(config))
    entries = {
        "study": STUDY,
        "fit": "--config small.yaml --data.manifest manifest.json --data.num_workers 0",
        "metric": "rankme",
        "trials": trials,
        "launcher": launcher,
        "storage": {"url": url, "heartbeat_seconds": 5, "grace_seconds": 60},
        "parameters": {"model.schedules.lr": {"low": 1e-4, "high": 1e-2, "log": True}},
    }
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump(entries))
    return path


def processes() -> dict[int, tuple[int, list[str]]]:
    """Parent and command line of every process."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            found[int(entry.name)] = (parent, words)
    return found


def family(pid: int) -> dict[int, list[str]]:
    """Command lines of a process and of all that it started."""
    known, members = processes(), [pid]
    for member in members:
        members += [child for child, (parent, _) in known.items() if parent == member]
    return {member: known[member][1] for member in members if member in known}


def fit_process(driver: subprocess.Popen[bytes]) -> tuple[int, Path] | None:
    """Process of the driver's trial, and the folder of its run."""
    for pid, words in family(driver.pid).items():
        if "fit" in words and "--out" in words and not any("watchdog" in word for word in words):
            return pid, Path(words[words.index("--out") + 1])
    return None


def has_checkpoint(run: Path) -> bool:
    return any((run / "checkpoints").glob("*.ckpt"))


class Watch:
    """Which trials trained from step 0 again after their first checkpoint: their run has another id."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.saved: dict[str, str] = {}  # id of the run at its first checkpoint, by folder
        self.retrained: list[str] = []

    def update(self) -> None:
        """Compare the ids of all runs with those at their first checkpoints."""
        for run in self.out.glob("trials/*/run"):
            name = run.parent.name
            try:
                first = (run / "measurements.jsonl").read_text().partition("\n")[0]
                identity = str(json.loads(first)["run"])
            except (OSError, ValueError):
                continue
            if name in self.saved and self.saved[name] != identity:
                self.retrained.append(name)
            if name in self.saved or has_checkpoint(run):
                self.saved[name] = identity


class Job:
    """Drivers of one study, and the faults that strike them."""

    def __init__(self, sweep: Path, server: PostgreSQL, *, drivers: int) -> None:
        self.sweep, self.server, self.count = sweep, server, drivers
        self.out = sweep.parent / STUDY
        self.drivers: list[subprocess.Popen[bytes]] = []
        self.watch = Watch(self.out)
        self.faults: list[dict[str, Any]] = []
        self.log = (sweep.parent / "drivers.log").open("ab")

    def start(self) -> None:
        """Start drivers in the place of those that have ended."""
        self.drivers = [driver for driver in self.drivers if driver.poll() is None]
        while len(self.drivers) < self.count:
            command = [sys.executable, "-m", "fmtrain", "sweep", self.sweep.name, "--json"]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            self.drivers.append(
                subprocess.Popen(
                    command,
                    cwd=self.sweep.parent,
                    env=environment,
                    stdout=subprocess.DEVNULL,
                    stderr=self.log,
                )
            )

    def training(self) -> list[tuple[subprocess.Popen[bytes], int, Path]]:
        """Driver, process and folder of each trial that trains and has saved a checkpoint."""
        found = [(driver, fit_process(driver)) for driver in self.drivers if driver.poll() is None]
        return [(driver, *fit) for driver, fit in found if fit is not None and has_checkpoint(fit[1])]

    def strike(self, fault: str) -> bool:
        """Let one fault happen, if trials train that have saved. Return whether it did."""
        training = self.training()
        if len(training) < (2 if fault == "SIGTERM to all" else 1):
            return False
        driver, fit, run = training[0]
        trials = [entry[2].parent.name for entry in training]
        if fault == "driver killed":
            driver.kill()
            driver.wait()
            trials = [run.parent.name]
        elif fault == "trial killed":
            try:
                os.kill(fit, signal.SIGKILL)
            except ProcessLookupError:  # it has just ended
                return False
            trials = [run.parent.name]
        elif fault == "database stopped":
            self.server.stop()
            time.sleep(OUTAGE_SECONDS)
            self.server.start()
        else:
            members = [pid for one in self.drivers for pid in family(one.pid)]
            for pid in members:
                try:
                    os.kill(pid, signal.SIGTERM)
                except ProcessLookupError:
                    continue
            for one in self.drivers:
                one.wait(120)
        self.faults.append({"fault": fault, "trials": trials})
        print(f"{fault}: trials {', '.join(trials)}", flush=True)
        return True

    def finished(self) -> int:
        """Trials that have ended, as their folders tell."""
        lines = (self.sweep.parent / "drivers.log").read_text(errors="replace")
        return lines.count(" has rankme ")

    def run(self, faults: dict[str, int]) -> None:
        """Run all trials. Each fault waits until its number of trials has ended."""
        waiting = dict(faults)
        self.start()
        while True:
            self.watch.update()
            due = [fault for fault, number in waiting.items() if self.finished() >= number]
            if due and self.strike(due[0]):
                waiting.pop(due[0])
                self.start()
            ended = [driver for driver in self.drivers if driver.poll() is not None]
            if any(driver.returncode != 0 for driver in ended):
                raise RuntimeError(f"a driver ended with {[driver.returncode for driver in ended]}: see drivers.log")
            if len(ended) == len(self.drivers):
                if waiting:
                    raise RuntimeError(f"the trials ended before {', '.join(waiting)}")
                return
            time.sleep(0.1)


def summary(url: str, job: Job, *, wanted: int, seconds: float) -> dict[str, Any]:
    """What the study holds, and the checks."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    trials = optuna.load_study(study_name=STUDY, storage=url).trials
    complete = [t for t in trials if t.state.name == "COMPLETE"]
    steps = [t.user_attrs["look"]["step"] for t in complete]
    resumed = (job.sweep.parent / "drivers.log").read_text(errors="replace").count(" resumes: ")
    return {
        "trials": len(complete),
        "distinct_settings": len({t.params["model.schedules.lr"] for t in complete}),
        "all_at_the_last_step": set(steps) == {STEPS},
        "attempts": len(trials),
        "attempts_that_ended_early": sum(t.state.name == "FAIL" and "surplus" not in t.user_attrs for t in trials),
        "attempts_that_resumed": resumed,
        "retrained_from_zero": job.watch.retrained,
        "faults": job.faults,
        "passed": len(complete) == wanted
        and len({t.params["model.schedules.lr"] for t in complete}) == wanted
        and set(steps) == {STEPS}
        and not job.watch.retrained,
        "seconds": round(seconds),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "optuna": version("optuna"),
        "postgresql": subprocess.run(
            [job.server.binaries / "postgres", "--version"], capture_output=True, text=True, check=True
        ).stdout.split()[2],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=64)
    parser.add_argument("--drivers", type=int, default=4)
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "sweep-faults")
    parser.add_argument("--launcher", default=LAUNCHER, help="As in a sweep file.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    binaries = server_binaries()
    if binaries is None:
        parser.error("PostgreSQL is not installed: apt-get install postgresql")
    shutil.rmtree(args.folder, ignore_errors=True)
    args.folder.mkdir(parents=True)
    data = Path(tempfile.mkdtemp(prefix="repmetrics-postgresql-"))  # its user cannot enter every folder
    server = PostgreSQL(binaries, data)
    try:
        sweep = write_sweep(args.folder.resolve(), server.url, trials=args.trials, launcher=args.launcher)
        job = Job(sweep, server, drivers=args.drivers)
        names = ("driver killed", "trial killed", "database stopped", "SIGTERM to all")
        start = time.monotonic()
        job.run({name: args.trials * (k + 1) // 6 for k, name in enumerate(names)})
        result = summary(server.url, job, wanted=args.trials, seconds=time.monotonic() - start)
        result |= {"default_launcher": args.launcher == LAUNCHER, "load_at_the_end": os.getloadavg()[0]}
    finally:
        server.stop()
        shutil.rmtree(data)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "sweep_faults.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))
    sys.exit(not result["passed"])


if __name__ == "__main__":
    main()
