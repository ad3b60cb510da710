"""Drivers of sweeps: their cold start, four slots of real trials, and an array of 16 drivers with 1,000 trials.

    python benchmarks/sweep_drivers.py cold-start [--tree FOLDER]    # FOLDER: the code of an earlier version
    python benchmarks/sweep_drivers.py slots [--trials 64] [--slots 4]
    python benchmarks/sweep_drivers.py array [--trials 1000] [--drivers 16]

Each writes its part of results/sweep_drivers.json. The real trials are forks of one process with torch imported: they
measure the driver, not the import. The array runs under the tests' stub of SLURM, on PostgreSQL.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "helpers"))
RESULTS = Path(__file__).parent / "results" / "sweep_drivers.json"
SHELL_TRIAL = """#!/bin/sh
mkdir -p "$1"
for step in 0 10 20; do
  echo '{"step": '$step', "measurements": {"rankme": {"value": '$2$step'}}}' >> "$1/measurements.jsonl"
done
"""
PARAMETERS = {"x": {"low": 1.0, "high": 2.0}}


def save(section: str, result: dict[str, Any]) -> None:
    result |= {"cores": os.cpu_count(), "load_at_the_end": os.getloadavg()[0]}
    result |= {"python": platform.python_version(), "optuna": version("optuna")}
    content = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    RESULTS.write_text(json.dumps({**content, section: result}, indent=2) + "\n")
    print(json.dumps(result, indent=2))


# ── cold start ─────────────────────────────────────────────────────────────────────────────────────────────────────


def cpu_seconds(pid: int) -> float:
    """CPU time of a process and of its ended children."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def resident_mb(pid: int) -> float:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1e3


def start_driver(folder: Path, tree: Path, entries: dict[str, Any]) -> dict[str, float]:
    """Seconds, CPU seconds and memory of a driver when its first trial begins."""
    folder.mkdir(exist_ok=True)
    (folder / "sweep.yaml").write_text(json.dumps(entries))
    for name in ("trials", "locks"):  # what an earlier driver knows of the settings stays
        shutil.rmtree(folder / entries["study"] / name, ignore_errors=True)
    (folder / entries["study"] / "journal.log").unlink(missing_ok=True)
    driver = subprocess.Popen(
        [sys.executable, "-m", "fmtrain", "sweep", "sweep.yaml"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    start, out = time.monotonic(), folder / entries["study"] / "trials"
    while not list(out.glob("*/log.txt")):
        assert driver.poll() is None, "the driver ended"
        time.sleep(0.01)
    result = {"seconds": time.monotonic() - start}
    result |= {"cpu_seconds": cpu_seconds(driver.pid), "memory_mb": resident_mb(driver.pid)}
    driver.send_signal(signal.SIGINT)
    driver.wait()
    return result


def cold_start(tree: Path, repeats: int) -> None:
    from fit_runs import SMALL, write_manifest

    sleeping = {"launcher": "sleep 99 {out}", "metric": "rankme", "trials": 1}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_manifest(folder)
        (folder / "small.yaml").write_text(SMALL)
        fit = {**sleeping, "fit": "--config small.yaml --data.manifest manifest.json"}
        fit["parameters"] = {"model.schedules.lr": {"low": 1e-4, "high": 1e-3}}
        command = {"command": "sleep 99 {out} {x}", "metric": "rankme", "trials": 1, "parameters": PARAMETERS}
        runs: dict[str, list[dict[str, float]]] = {"first": [], "further": [], "command": []}
        for k in range(repeats):
            runs["first"].append(start_driver(folder, tree, {**fit, "study": f"fit{k}"}))
            runs["further"].append(start_driver(folder, tree, {**fit, "study": f"fit{k}"}))
            runs["command"].append(start_driver(folder, tree, {**command, "study": f"own{k}"}))
    medians = {
        kind: {key: round(statistics.median(run[key] for run in several), 2) for key in several[0]}
        for kind, several in runs.items()
    }
    save("cold start, earlier version" if tree != ROOT else "cold start", {"repeats": repeats, **medians})


# ── slots ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def serve(path: str) -> None:
    """Fork a process with torch imported for each connection: it runs `fmtrain`, and its exit code is the answer."""
    import torch

    import fmtrain.methods
    import fmtrain.training.fit  # noqa: F401 — only imported
    import repmetrics.monitoring.monitor  # noqa: F401
    from fmtrain.cli import main

    server = socket.socket(socket.AF_UNIX)
    server.bind(path)
    server.listen(64)
    print("ready", flush=True)
    while True:
        connection = server.accept()[0]
        message, descriptors, _, _ = socket.recv_fds(connection, 1 << 20, 1)
        request = json.loads(message)
        pid = os.fork()
        if pid:
            os.close(descriptors[0])
            threading.Thread(target=answer, args=(connection, pid), daemon=True).start()
            continue
        os.dup2(descriptors[0], 1)
        os.dup2(descriptors[0], 2)
        os.environ.update(request["environment"])
        os.chdir(request["folder"])
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        entry = {name: os.environ.get(name) for name in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        entry |= {"start": time.time(), "threads": torch.get_num_threads(), "code": 0}
        try:
            main(request["arguments"])
        except SystemExit as ended:
            entry["code"] = ended.code
        sys.stdout.flush()
        with Path(request["log"]).open("a") as log:
            log.write(json.dumps({**entry, "end": time.time()}) + "\n")
        os._exit(int(entry["code"] or 0))


def answer(connection: socket.socket, pid: int) -> None:
    _, status = os.waitpid(pid, 0)
    connection.sendall(str(os.waitstatus_to_exitcode(status)).encode())
    connection.close()


CLIENT = """import json, os, socket, sys
connection = socket.socket(socket.AF_UNIX)
connection.connect(sys.argv[1])
request = {"environment": dict(os.environ), "folder": os.getcwd(), "arguments": sys.argv[4:], "log": sys.argv[2]}
socket.send_fds(connection, [json.dumps(request).encode()], [1])
sys.exit(int(connection.recv(16)))
"""


def slots(trials: int, count: int, steps: int) -> None:
    import yaml
    from fit_runs import SMALL, write_manifest

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_manifest(folder)
        config = yaml.safe_load(SMALL)
        config["trainer"]["max_steps"] = steps
        config["monitor"] = {"every_n_steps": steps // 2, "metrics": ["rankme"]}
        (folder / "small.yaml").write_text(yaml.safe_dump(config))
        (folder / "client.py").write_text(CLIENT)
        log = folder / "trials.jsonl"
        server = subprocess.Popen(
            [sys.executable, __file__, "serve", str(folder / "socket")], stdout=subprocess.PIPE, text=True
        )
        assert server.stdout is not None
        assert server.stdout.readline() == "ready\n"
        entries = {
            "study": "slots",
            "fit": "--config small.yaml --data.manifest manifest.json --data.num_workers 0",
            "metric": "rankme",
            "trials": trials,
            "jobs": count,
            "launcher": f"{{python}} -S -E {folder}/client.py {folder}/socket {log} {{command}}",
            "parameters": {"model.schedules.lr": {"low": 1e-4, "high": 1e-2, "log": True}},
        }
        (folder / "sweep.yaml").write_text(yaml.safe_dump(entries))
        variables = {name: value for name, value in os.environ.items() if not name.endswith("_NUM_THREADS")}
        variables["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, range(count)))
        start = time.monotonic()
        command = [sys.executable, "-m", "fmtrain", "sweep", "sweep.yaml", "--json"]
        done = subprocess.run(command, cwd=folder, env=variables, stdout=subprocess.PIPE, text=True, check=True)
        seconds = time.monotonic() - start
        server.kill()
        states = [trial["state"] for trial in json.loads(done.stdout)["trials"]]
        ran = [json.loads(line) for line in log.read_text().splitlines()]
    save(
        "slots",
        {"trials": len(states), "complete": states.count("complete"), "slots": count, "seconds": round(seconds)}
        | idle(ran),
    )


def idle(ran: list[dict[str, Any]]) -> dict[str, Any]:
    """Pauses of each slot between two trials, and what the trials were given."""
    by_device: dict[str, list[tuple[float, float]]] = {}
    for entry in ran:
        by_device.setdefault(entry["CUDA_VISIBLE_DEVICES"], []).append((entry["start"], entry["end"]))
    pauses = [after[0] - before[1] for spans in by_device.values() for before, after in pairwise(sorted(spans))]
    busy = sum(entry["end"] - entry["start"] for entry in ran)
    return {
        "devices": {device: len(spans) for device, spans in sorted(by_device.items())},
        "two_trials_on_a_device_at_once": sum(pause < 0 for pause in pauses),
        "threads": sorted({(e["OMP_NUM_THREADS"], e["MKL_NUM_THREADS"], e["threads"]) for e in ran}),
        "trial_seconds": round(busy / len(ran), 2),
        "pause_seconds": {"median": round(statistics.median(pauses), 2), "max": round(max(pauses), 2)},
        "idle_share": round(sum(pauses) / (sum(pauses) + busy), 4),
    }


# ── an array ───────────────────────────────────────────────────────────────────────────────────────────────────────


def array(trials: int, drivers: int) -> None:
    import slurm_stub
    import sqlalchemy
    from postgresql import PostgreSQL, server_binaries

    binaries = server_binaries()
    assert binaries is not None, "PostgreSQL is not installed: apt-get install postgresql"
    data = Path(tempfile.mkdtemp(prefix="repmetrics-postgresql-"))  # its user cannot enter every folder
    server = PostgreSQL(binaries, data)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ.update(slurm_stub.install(folder / "slurm"))
        trial = folder / "trial.sh"
        trial.write_text(SHELL_TRIAL)
        trial.chmod(0o755)
        entries = {
            "study": "array",
            "command": f"{trial} {{out}} {{x}}",
            "metric": "rankme",
            "domain": "custom",
            "trials": trials,
            "storage": server.url,
            "parameters": PARAMETERS,
        }
        (folder / "sweep.yaml").write_text(json.dumps(entries))
        sweep = [sys.executable, "-m", "fmtrain", "sweep", "sweep.yaml"]
        script = subprocess.run(
            [*sweep, "--slurm", str(drivers)], cwd=folder, capture_output=True, text=True, check=True
        ).stdout
        (folder / "drivers.sh").write_text(script)
        start, before = time.monotonic(), os.times()
        subprocess.run(["sbatch", "--wait", "drivers.sh"], cwd=folder, check=True)
        seconds, after = time.monotonic() - start, os.times()
        ended = time.monotonic()
        subprocess.run([*sweep, "--table"], cwd=folder, capture_output=True, text=True, check=True)
        result = {
            "trials": trials,
            "drivers": drivers,
            "seconds": round(seconds, 1),
            "driver_and_trial_cpu_seconds_per_trial": round(
                (after.children_user + after.children_system - before.children_user - before.children_system) / trials,
                3,
            ),
            "table_seconds": round(time.monotonic() - ended, 1),
            "database": database_load(sqlalchemy.create_engine(server.url), server.server.pid, trials),
        }
        shares = [(folder / f"array-{slurm_stub.JOB}_{k}.log").read_text().count(" has rankme") for k in range(drivers)]
        result["trials_per_driver"] = {"min": min(shares), "max": max(shares)}
    server.stop()
    shutil.rmtree(data)
    save("array", result)


def database_load(engine: Any, pid: int, trials: int) -> dict[str, float]:
    """Transactions and rows of the database, and CPU time of its processes that have ended, per trial."""
    import sqlalchemy

    with engine.connect() as connection:
        time.sleep(2)  # statistics arrive late
        columns = "xact_commit, tup_fetched, tup_inserted + tup_updated"
        query = f"SELECT {columns} FROM pg_stat_database WHERE datname = 'postgres'"
        commits, read, written = connection.execute(sqlalchemy.text(query)).one()
    return {
        "transactions_per_trial": round(commits / trials, 1),
        "rows_read_per_trial": round(read / trials),
        "rows_written_per_trial": round(written / trials, 1),
        "cpu_seconds_per_trial": round(cpu_seconds(pid) / trials, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    cold = parts.add_parser("cold-start")
    cold.add_argument("--tree", type=Path, default=ROOT)
    cold.add_argument("--repeats", type=int, default=3)
    real = parts.add_parser("slots")
    real.add_argument("--trials", type=int, default=64)
    real.add_argument("--slots", type=int, default=4)
    real.add_argument("--steps", type=int, default=6)
    many = parts.add_parser("array")
    many.add_argument("--trials", type=int, default=1000)
    many.add_argument("--drivers", type=int, default=16)
    parts.add_parser("serve").add_argument("socket")
    args = parser.parse_args()
    if args.part == "serve":
        serve(args.socket)
    elif args.part == "cold-start":
        cold_start(args.tree.resolve(), args.repeats)
    elif args.part == "slots":
        slots(args.trials, args.slots, args.steps)
    else:
        array(args.trials, args.drivers)


if __name__ == "__main__":
    main()
