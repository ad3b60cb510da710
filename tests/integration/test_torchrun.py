"""Two processes under torchrun: one is killed and the job goes on to the same weights; two nodes are one with two."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from fit_runs import SMALL, equal

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.slow


TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
ONE_NODE = [*TORCHRUN, "--standalone", "--nproc-per-node", "2"]
TWO_RANKS = ["--trainer.devices", "2"]


@pytest.fixture
def fit(manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    config = tmp_path / "small.yaml"
    config.write_text(SMALL)
    return [
        *["-m", "fmtrain", "fit", "--config", str(config), "--data.manifest", str(manifest)],
        *["--trainer.strategy", "ddp", "--trainer.max_steps", "12"],
    ]


def ranks(out: Path) -> dict[int, int]:
    """Rank → process, of the ranks that work on a run now."""
    found = {}
    for folder in Path("/proc").iterdir():
        try:
            environment, arguments = (folder / "environ").read_bytes(), (folder / "cmdline").read_bytes()
        except OSError:  # no process, or one that has just ended
            continue
        ours = [item for item in environment.split(b"\0") if item.startswith(b"LOCAL_RANK=")]
        if ours and str(out).encode() in arguments:
            found[int(ours[0].partition(b"=")[2])] = int(folder.name)
    return found


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the ranks in /proc")
def test_a_job_that_loses_a_rank_ends_and_resumes_to_the_same_weights(fit: list[str], tmp_path: Path) -> None:
    out, command = tmp_path / "killed", [*ONE_NODE, *fit, *TWO_RANKS]
    slow = ["--progress.every_seconds", "0.01"]
    process = subprocess.Popen([*command, *slow, "--out", str(out)], stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 300
    while not (out / "checkpoints" / "step-00000004.ckpt").exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < until
        time.sleep(0.01)
    os.kill(ranks(out)[1], signal.SIGKILL)
    error = process.communicate(timeout=300)[1]
    assert process.returncode not in (0, None)
    assert ranks(out) == {}, "no process is left behind"
    assert "rank 0 lost another at step" in error
    assert "--resume goes on from there" in error

    whole = tmp_path / "whole"
    for arguments in (["--out", str(out), "--resume"], ["--out", str(whole)]):
        done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
    assert equal(weights(out), weights(whole))


def test_two_nodes_of_one_rank_train_as_one_node_of_two(fit: list[str], tmp_path: Path) -> None:
    """Two launchers that meet at an address; both stand on this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = ["--master-addr", "127.0.0.1", "--master-port", str(free.getsockname()[1])]
    apart = [*fit, "--trainer.num_nodes", "2", "--trainer.devices", "1", "--out", str(tmp_path / "two")]
    nodes = [
        subprocess.Popen(
            [*TORCHRUN, "--nnodes", "2", "--nproc-per-node", "1", "--node-rank", str(rank), *address, *apart],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        told = [node.communicate(timeout=300)[1] for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert [node.returncode for node in nodes] == [0, 0], told
    assert "step 12/12" in told[0]
    assert "step" not in told[1]
    together = [*ONE_NODE, *fit, *TWO_RANKS, "--out", str(tmp_path / "one")]
    subprocess.run(together, capture_output=True, text=True, timeout=300, check=True)
    assert equal(weights(tmp_path / "two"), weights(tmp_path / "one"))


def weights(out: Path) -> dict[str, Any]:
    """Of the last checkpoint."""
    return dict(torch.load(out / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"])
