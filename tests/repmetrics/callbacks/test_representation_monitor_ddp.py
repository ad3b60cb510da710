"""Two gloo ranks: the values of one process, the same decisions on both, and unchanged training."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from paths import HELPERS
from small_runs import HeldOutImages, simclr

from repmetrics.monitoring.monitor import Monitor


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["validation", "no-validation", "compiled", "steps"])
def test_two_ranks(tmp_path: Path, mode: str) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    result = subprocess.run(
        [*torchrun, str(HELPERS / "ddp_run.py"), str(tmp_path), mode], capture_output=True, text=True, timeout=240
    )
    assert result.returncode == 0, result.stderr[-3000:]
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
    alone = Monitor(batch_size=4, layers=layers).measure(simclr(), HeldOutImages(33))
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


def test_a_rank_without_a_batch_and_a_rank_that_fails(tmp_path: Path) -> None:
    """Neither must make ranks wait for each other forever."""
    script = tmp_path / "ranks.py"
    script.write_text(
        "import torch, torch.distributed as dist\n"
        "from repmetrics.monitoring.monitor import Monitor\n"
        "dist.init_process_group('gloo')\n"
        "encoder = torch.nn.Flatten()\n"
        "images = torch.arange(24.0).reshape(4, 3, 1, 2).sin()\n"
        "record = Monitor().measure(encoder, [images])\n"
        "assert record.measurements['rankme'].n == 4\n"
        "rows = torch.randn(12, 5, generator=torch.Generator().manual_seed(0))\n"
        "class Share(torch.utils.data.IterableDataset):\n"
        "    def __iter__(self):\n"
        "        return iter(rows[dist.get_rank()::2])\n"
        "share = Monitor().measure(encoder, torch.utils.data.DataLoader(Share(), 2)).measurements['rankme']\n"
        "assert share.n == 12, share.n\n"
        "try:\n"
        "    Monitor().measure(encoder, [images, {}])\n"
        "except Exception as error:\n"
        "    with open(f'saw-{dist.get_rank()}', 'w') as file:\n"
        "        file.write(f'{type(error).__name__} {error}')\n"
        "from torch.distributed.fsdp import fully_shard\n"
        "def make():\n"
        "    torch.manual_seed(0)\n"
        "    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 8), torch.nn.Linear(8, 6))\n"
        "mesh = torch.distributed.device_mesh.init_device_mesh('cpu', (2,))\n"
        "whole, sharded = make(), make()\n"
        "for part in (sharded[1], sharded):\n"
        "    fully_shard(part, mesh=mesh)\n"
        "batches = [torch.randn(8, 3, 2, 2, generator=torch.Generator().manual_seed(i)) for i in range(3)]\n"
        "options = {'metrics': ['rankme', 'alignment'], 'views': 2, 'layers': ['1'], 'augmentation': torch.relu}\n"
        "of_whole, of_sharded = Monitor(**options), Monitor(**options)\n"
        "for step in range(2):\n"
        "    values = [\n"
        "        {k: v.value for k, v in m.measure(e, batches, step=step).measurements.items()}\n"
        "        for m, e in ((of_whole, whole), (of_sharded, sharded))\n"
        "    ]\n"
        "    assert values[0] == values[1] and len(values[0]) == 4, values\n"
        "    for model in (whole, sharded):\n"
        "        model(batches[0]).square().mean().backward()\n"
        "        torch.optim.SGD(model.parameters(), 0.1).step()\n"
        "        model.zero_grad()\n"
        "assert all(torch.equal(a, b.full_tensor()) for a, b in zip(whole.parameters(), sharded.parameters()))\n"
        "try:\n"
        "    Monitor().measure(sharded, batches, path='1')\n"
        "except ValueError as error:\n"
        "    assert 'only the forward pass of the whole module gathers' in str(error)\n"
        "dist.destroy_process_group()\n"
    )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    result = subprocess.run([*torchrun, str(script)], capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    assert (tmp_path / "saw-0").read_text().startswith("RuntimeError rank 1 could not read its held-out batches")
    assert (tmp_path / "saw-1").read_text().startswith("TypeError a batch mapping must have the key 'image'")
