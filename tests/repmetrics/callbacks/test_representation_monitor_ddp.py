"""Two gloo ranks: the values of one process, the same decisions on both, and unchanged training."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from ddp_run import METRICS, fit_in_background, fit_monitored, measure_sharded, measure_uneven
from processes import run_ranks
from small_runs import HeldOutImages, simclr

from repmetrics.monitoring.monitor import Monitor


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["validation", "no-validation", "compiled", "steps"])
def test_two_ranks(tmp_path: Path, mode: str) -> None:
    run_ranks(fit_monitored, tmp_path, mode, folder=tmp_path)
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2))

    assert first == second  # to the last bit: decisions are made on them
    assert first["stopped"] > 0
    assert first["epochs"] < 12
    assert {"repmetrics/loss", "repmetrics/alarm", "repmetrics/odcorr_se", "repmetrics/knn"} <= set(first["every"])
    assert all(math.isfinite(best) for both in first["every"].values() for best in both)
    steps = [record["step"] for record in first["history"]]
    # 96 images, 2 ranks, batches of 16: 3 steps per epoch, at whose end EarlyStopping reads a key
    assert steps == [step for step in range(steps[-1] + 1) if step % 3 == 0 or (mode == "steps" and step % 2 == 0)]
    assert mode == "steps" or len(steps) == first["epochs"] + 1
    assert first["identical"]
    assert Path(first["best"]).is_file()

    torch.set_num_threads(1)
    layers = ["backbone.1", "backbone.3"] if mode == "compiled" else []
    alone = Monitor(batch_size=4, layers=layers, metrics=METRICS).measure(simclr(), HeldOutImages(33))
    together = first["history"][0]["measurements"]
    assert together.keys() == alone.measurements.keys()
    assert all(f"{layer}/rankme" in together for layer in layers)
    for name, measurement in alone.measurements.items():
        assert together[name]["n"] == measurement.n == (34 if "view_" in name else 33)  # two views of 17 images
        # the same batches, gathered in the same order
        assert together[name]["value"] == measurement.to_json()["value"]
        assert together[name]["standard_error"] == measurement.standard_error
    lines = (tmp_path / "measurements.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == steps


def test_evaluations_in_the_background(tmp_path: Path) -> None:
    run_ranks(fit_in_background, tmp_path, folder=tmp_path)
    for rank in range(2):
        report = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert report == {"identical": True, "equal": True, "steps": [0, 2, 4, 6]}


def test_a_rank_without_a_batch_and_a_rank_that_fails(tmp_path: Path) -> None:
    """Neither must make ranks wait for each other forever."""
    run_ranks(measure_uneven, tmp_path, folder=tmp_path)
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2))
    assert first["n"] == second["n"] == [4, 12]
    assert first["error"].startswith("RuntimeError rank 1 could not read its held-out batches")
    assert second["error"].startswith("TypeError a batch mapping must have the key 'image'")


def test_parameters_that_fsdp2_shards_are_measured_as_whole_ones(tmp_path: Path) -> None:
    run_ranks(measure_sharded, tmp_path, folder=tmp_path)
    for rank in range(2):
        report = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert [len(values) for values in report["whole"]] == [4, 4]
        assert report["sharded"] == report["whole"]
        assert report["identical"]
        assert "only the forward pass of the whole module gathers" in report["error"]
