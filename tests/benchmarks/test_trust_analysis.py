"""The analysis of the experiment on trust, on drawn tables whose truth is known."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

TRUST = Path(__file__).resolve().parents[2] / "benchmarks" / "trust"
sys.path.insert(0, str(TRUST))

import alarms  # noqa: E402
import analysis  # noqa: E402
import experiment  # noqa: E402
import table  # noqa: E402
from settings import plan  # noqa: E402

SHARES = (0.0, *experiment.SHARES)
VIEWS = {"cifar10": "natural", "cells": "turned", "nuclei": "stain"}


@pytest.fixture
def tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Runs whose views follow the probe, whose rank is noise, and of which the broken have alarms from 30 % on."""
    monkeypatch.setattr(analysis, "DRAWS", 50)
    monkeypatch.setattr(analysis, "POOLS", 5)
    rng = np.random.default_rng(0)
    rows: dict[str, list[dict[str, Any]]] = {"signals": [], "probes": [], "sealed": []}
    for run in plan():
        quality = rng.random()
        about = {"run": run.name, "domain": run.domain, "method": run.method}
        for share in SHARES:
            probe = 0.5 + 0.2 * quality * share
            signals = {"loss": rng.random(), "rankme": rng.random(), "odcorr": rng.random()}
            signals |= {f"view_retrieval_whitened_{s}": probe + 0.001 * rng.random() for s in VIEWS.values()}
            alarms = "dead features" if run.kind == "broken" and share >= 0.3 else ""
            row = {"kind": run.kind, "half": run.half, "finished": 1, "step": 0, "share": share, "alarms": alarms}
            rows["signals"].append(about | row | {"nonfinite": 0} | signals)
            labels = {f"labels_{n}": f"{probe:.4f} {rng.random():.4f}" for n in analysis.BUDGETS}
            kind = "sealed" if run.half == "confirm" else "probes"
            rows[kind].append(about | {"share": share, "probe": probe, "probe_se": 0.01} | labels)
    for kind, content in rows.items():
        experiment.write_gzip(tmp_path / f"{kind}.csv.gz", content)
    return tmp_path


def registered() -> dict[str, Any]:
    rules = {domain: [f"view_retrieval_whitened_{name}"] for domain, name in VIEWS.items()}
    families = {"views": ["view_retrieval_whitened_natural"], "rank": ["rankme"]}
    return {"rules": {"views": rules}, "families": families, "sensitivity": []}


def test_a_signal_of_the_probe_wins_and_noise_does_not(tables: Path) -> None:
    runs = table.read_runs(tables)
    report = analysis.explore(runs, "cells", registered())
    assert report["runs"] == 25
    assert report["rules"]["views"]["pairwise"][0] > 0.95
    assert report["rules"]["views"]["gain"][1] > 0
    assert report["rules"]["RankMe"]["gain"][1] < 0.01
    assert report["early"][0.3]["views"]["pairwise"][0] > 0.9
    assert report["halving"]["15 and 30 %"]["saved"] == pytest.approx(0.6)
    assert report["halving"]["15 and 30 %"]["lost_probed"][0] < 0.01
    assert report["checkpoints"]["last"][0] == pytest.approx(0, abs=1e-9)  # the probe rises to the end
    budget = report["few_labels"][1.0][0]
    assert budget["probe_pairwise"][0] == pytest.approx(0.75, abs=0.1)  # one draw is the truth, the other noise
    assert budget["chosen"]["views"] >= 1


def test_alarms_on_broken_and_healthy_runs(tables: Path) -> None:
    report = analysis.alarms(table.read_runs(tables))
    assert report["detected"] == report["broken"] == 15
    assert set(report["delays"].values()) == {0.3}
    assert report["false"] == []


def test_the_confirming_half_needs_committed_rules(
    tables: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = table.read_runs(tables)
    assert not analysis.of_domain(runs, "cifar10", half="confirm")  # their probes are sealed
    monkeypatch.setattr(table, "RULES", tmp_path / "rules.json")
    (tmp_path / "rules.json").write_text("{}")
    with pytest.raises(RuntimeError, match=r"rules\.json is not committed"):
        table.read_runs(tables, confirm=True)


def test_a_lower_loss_and_dimension_are_better() -> None:
    assert [analysis.sign_of(name) for name in ("loss", "odcorr", "view_infonce_weak", "rankme")] == [-1, -1, -1, 1]


def test_the_alarms_on_the_recorded_runs_are_those_that_the_page_states() -> None:
    """The tables hold what the monitor read, so that a changed constant shows here."""
    runs = [run for run in table.read_runs() if run.kind == "random" and run.half == "explore"]
    result = alarms.summarize(runs)
    assert result["healthy"] == 67
    assert not result["false"]
    assert (len(result["broken"]), result["found"], result["in_time"]) == (8, 6, 6)
    stored = json.loads((table.RESULTS / "alarms.json").read_text(encoding="utf-8"))
    assert json.loads(json.dumps(result)) == stored["explore"]
    assert len(stored["confirm"]["false"]) <= 0.02 * stored["confirm"]["healthy"]
