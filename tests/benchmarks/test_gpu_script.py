"""benchmarks/gpu.py runs end to end on a CPU at its tiny sizes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from paths import ROOT


@pytest.mark.slow
def test_the_script_runs_without_a_gpu(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    command = [sys.executable, ROOT / "benchmarks" / "gpu.py", "--device", "cpu", "--tiny", "--out", out]
    subprocess.run(command, check=True, capture_output=True)
    report = json.loads(out.read_text())
    assert report["left_out"] == []
    assert report["resume"]["bit_identical"]
    assert report["ranks"]["equal_on_both_ranks"]
    assert report["ranks"]["largest_relative_difference_to_one_process"] < 1e-9  # the order of float64 sums
    assert 0 < report["evaluation"]["vit_tiny_patch16_224"]["share_of_training"] < 1
    assert report["training"]["vit_tiny_patch16_224"]["images_per_second_from_slides"] > 0
