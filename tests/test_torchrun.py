"""Two processes under torchrun: one is killed, the job ends, and goes on to the same weights."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_fit import SMALL, manifest  # noqa: F401 - a fixture
from test_resume import equal

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.slow


@pytest.fixture
def command(manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:  # noqa: F811
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    config = tmp_path / "small.yaml"
    config.write_text(SMALL)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    two = ["--trainer.devices", "2", "--trainer.strategy", "ddp", "--trainer.max_steps", "12"]
    return [*torchrun, "-m", "fmtrain", "fit", "--config", str(config), "--data.manifest", str(manifest), *two]


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
def test_a_job_that_loses_a_rank_ends_and_resumes_to_the_same_weights(command: list[str], tmp_path: Path) -> None:
    out = tmp_path / "killed"
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
    killed, uninterrupted = (
        torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"] for folder in (out, whole)
    )
    assert equal(dict(killed), dict(uninterrupted))
