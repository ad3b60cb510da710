"""The tables of the experiment as runs: one array per signal and probe."""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import math
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from settings import plan

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parent / "results" / "trust"
RULES = HERE / "rules.json"
PLAN = {run.name: run for run in plan()}

Array = NDArray[np.float64]


class RunRows(NamedTuple):
    """One run: its evaluations by share of training.

    Attributes:
        signals: Share → values of signals, with the loss.
        probes: Share → values of probes; few labels are lists.
        alarmed: Shares at which an alarm was active.
    """

    name: str
    domain: str
    method: str
    kind: str
    half: str
    signals: Mapping[float, Mapping[str, float]]
    probes: Mapping[float, Mapping[str, Any]]
    alarmed: Sequence[float]


def read_gzip(path: Path) -> list[dict[str, str]]:
    """Rows of a compressed table."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def read_runs(folder: Path = RESULTS, *, confirm: bool = False) -> list[RunRows]:
    """All runs that have finished; probes of the confirming half only with committed rules.

    Args:
        folder: Folder of the tables.
        confirm: Whether to open the sealed table.

    Raises:
        RuntimeError: The rules or the analysis are not committed.
    """
    probes = read_gzip(folder / "probes.csv.gz")
    if confirm:
        check_committed()
        probes += read_gzip(folder / "sealed.csv.gz")
    by_run: dict[str, dict[float, dict[str, Any]]] = {}
    for row in probes:
        parsed = {
            key: _parse(key, text) for key, text in row.items() if text and key not in ("run", "domain", "method")
        }
        by_run.setdefault(row["run"], {})[float(row["share"])] = parsed
    runs: dict[str, RunRows] = {}
    for row in read_gzip(folder / "signals.csv.gz"):
        if row["finished"] != "1":
            continue
        about = ("run", "domain", "method", "kind", "half", "alarms")
        values = {k: float(v) for k, v in row.items() if k not in about and not k.startswith("param.") and v}
        run = runs.setdefault(
            row["run"],
            RunRows(
                row["run"], row["domain"], row["method"], row["kind"], row["half"], {}, by_run.get(row["run"], {}), []
            ),
        )
        share = float(row["share"])
        run.signals[share] = values  # type: ignore[index]  # filled here alone
        if row["alarms"] or values.get("nonfinite"):
            run.alarmed.append(share)  # type: ignore[attr-defined]
    return list(runs.values())


def _parse(key: str, text: str) -> float | list[float]:
    return [float(part) for part in text.split()] if key.startswith("labels_") else float(text)


def check_committed() -> None:
    """Refuse unless the rules and the analysis are in git as they are on disk."""
    files = [RULES, HERE / "analysis.py", HERE / "table.py"]
    for file in files:
        known = subprocess.run(["git", "ls-files", "--error-unmatch", file], cwd=HERE, capture_output=True)
        changed = subprocess.run(["git", "diff", "--quiet", "HEAD", "--", file], cwd=HERE)
        if known.returncode or changed.returncode:
            raise RuntimeError(f"{file.name} is not committed: commit the rules before the confirming half is opened")


def rules() -> dict[str, Any]:
    """The rules, with the hash of their file."""
    content: dict[str, Any] = json.loads(RULES.read_text(encoding="utf-8"))
    return content | {"sha256": hashlib.sha256(RULES.read_bytes()).hexdigest()}


def values(runs: Sequence[RunRows], signal: str, *, share: float) -> Array:
    """Values (n,) of a signal at a share of training; NaN where not measured."""
    return np.array([run.signals.get(share, {}).get(signal, math.nan) for run in runs])


def targets(runs: Sequence[RunRows], *, share: float = 1.0, probe: str = "probe") -> Array:
    """Values (n,) of a probe at a share of training."""
    return np.array([run.probes.get(share, {}).get(probe, math.nan) for run in runs])
