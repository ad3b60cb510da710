"""Two processes under torchrun: resuming after a killed rank, and two nodes compared with one."""

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
from processes import Program, run_fmtrain, run_ranks, torchrun_forks

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.slow


TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
FMTRAIN = ["-m", "fmtrain"]
TWO_RANKS = ["--trainer.devices", "2"]


@pytest.fixture(scope="module")
def fit(manifest: Path) -> list[str]:
    config = manifest.parent / "small.yaml"
    config.write_text(SMALL)
    return [
        *["fit", "--config", str(config), "--data.manifest", str(manifest)],
        *["--trainer.strategy", "ddp", "--trainer.max_steps", "12"],
    ]


@pytest.fixture(scope="module")
def expected(fit: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Weights of a run of two ranks that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    run_ranks(run_fmtrain, *fit, *TWO_RANKS, "--out", folder / "run", folder=folder)
    return weights(folder / "run")


def ranks(out: Path) -> dict[int, int]:
    """Process ids of a run by rank."""
    processes = {}
    for folder in Path("/proc").iterdir():
        try:
            environment, arguments = (folder / "environ").read_bytes(), (folder / "cmdline").read_bytes()
        except OSError:  # not a process, or it has ended
            continue
        local_rank = [item for item in environment.split(b"\0") if item.startswith(b"LOCAL_RANK=")]
        if local_rank and str(out).encode() in arguments:
            processes[int(local_rank[0].partition(b"=")[2])] = int(folder.name)
    return processes


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="reads /proc")
def test_a_job_that_loses_a_rank_ends_and_resumes_to_the_same_weights(
    fit: list[str], expected: dict[str, Any], tmp_path: Path
) -> None:
    out = tmp_path / "killed"
    command = [*TORCHRUN, "--standalone", "--nproc-per-node", "2", *FMTRAIN, *fit, *TWO_RANKS, "--out", str(out)]
    process = subprocess.Popen([*command, "--progress.every_seconds", "0.01"], stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 300
    while not (out / "checkpoints" / "step-00000004.ckpt").exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < until
        time.sleep(0.01)
    os.kill(ranks(out)[1], signal.SIGKILL)
    error = process.communicate(timeout=300)[1]
    assert process.returncode not in (0, None)
    assert ranks(out) == {}, "no process remains"
    assert "rank 0 lost the connection to another rank at step" in error
    assert "--resume continues from there" in error

    run_ranks(run_fmtrain, *fit, *TWO_RANKS, "--out", out, "--resume", folder=tmp_path)
    assert equal(weights(out), expected)


def test_two_nodes_of_one_rank_train_as_one_node_of_two(
    fit: list[str], expected: dict[str, Any], tmp_path: Path
) -> None:
    """Two launchers with one rendezvous address, both on this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = ["--master-addr", "127.0.0.1", "--master-port", str(free.getsockname()[1])]
    separate = [*fit, "--trainer.num_nodes", "2", "--trainer.devices", "1", "--out", str(tmp_path / "two")]
    nodes = []
    for rank in range(2):
        folder = tmp_path / f"node-{rank}"
        folder.mkdir()
        options = ["--nnodes", "2", "--nproc-per-node", "1", "--node-rank", str(rank), *address]
        nodes.append(Program(torchrun_forks, *options, "--no-python", "fmtrain", *separate, folder=folder))
    try:
        codes = [node.wait(timeout=300) for node in nodes]
    finally:
        for node in nodes:
            if node.poll() is None:
                node.kill()
    errors = [node.stderr.read_text() for node in nodes]
    assert codes == [0, 0], errors
    assert "step 12/12" in errors[0]
    assert "step" not in errors[1]
    assert equal(weights(tmp_path / "two"), expected)


def weights(out: Path) -> dict[str, Any]:
    """Weights of the last checkpoint."""
    return dict(torch.load(out / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"])
