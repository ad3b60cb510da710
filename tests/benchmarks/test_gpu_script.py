"""benchmarks/gpu.py runs end to end on a CPU at its tiny sizes."""

from __future__ import annotations

import importlib
import json
import logging
import sys
from pathlib import Path

import processes  # noqa: F401 — its ranks are forks of the server that it sets
import pytest
from paths import ROOT


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the script ignores them
def test_the_script_runs_without_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "gpu.json"
    monkeypatch.syspath_prepend(ROOT / "benchmarks")  # its two ranks import it by name
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--device", "cpu", "--tiny", "--out", str(out)])
    try:
        importlib.import_module("gpu").main()
    finally:
        logging.disable(logging.NOTSET)
    report = json.loads(out.read_text())
    assert report["left_out"] == []
    assert report["resume"]["bit_identical"]
    assert report["ranks"]["equal_on_both_ranks"]
    assert report["ranks"]["largest_relative_difference_to_one_process"] < 1e-9  # the order of float64 sums
    assert 0 < report["evaluation"]["vit_tiny_patch16_224"]["share_of_training"] < 1
    assert report["training"]["vit_tiny_patch16_224"]["images_per_second_from_slides"] > 0
