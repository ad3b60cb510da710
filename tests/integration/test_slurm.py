"""One command begins or continues a run under a stub of SLURM: preempted five times, it ends as if it never was."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import slurm_stub
import torch
from fit_runs import SMALL, equal, rows
from processes import RANKS, ensure_server, run_fmtrain, run_ranks
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fmtrain.training import slurm

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]  # six starts of two ranks
STEPS = 60
TORCHRUN = [
    *[slurm_stub.TORCHRUN, "--nproc-per-node", "2", "--max-restarts", "1"],
    *["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "--rdzv-id", slurm_stub.JOB],
    *["--signals-to-handle", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1", "--no-python", "fmtrain"],
]


@pytest.fixture
def arguments(manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    for name, value in slurm_stub.install(tmp_path / "slurm").items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv(RANKS, str(tmp_path / "slurm"))
    ensure_server()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    # Otherwise a restarted rank may read the other's address of the attempt before, from the store they share.
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    config = tmp_path / "small.yaml"
    config.write_text(SMALL.replace("every_n_steps: 3", "every_n_steps: 20"))
    return [
        *["fit", "--config", str(config), "--data.manifest", str(manifest)],
        *["--trainer.devices", "2", "--trainer.strategy", "ddp", "--trainer.max_steps", str(STEPS), "--resume", "auto"],
        *["--trainer.log_every_n_steps", "1", "--checkpoint.save_top_k", "-1", "--monitor.metrics", "[rankme,odcorr]"],
    ]


def newest(out: Path) -> int:
    """Step of the newest periodic checkpoint."""
    return max([int(path.stem.partition("-")[2]) for path in out.glob("checkpoints/step-*.ckpt")], default=0)


def wait(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 240
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def final(out: Path) -> dict[str, Any]:
    content = torch.load(out / "checkpoints" / "last.ckpt", weights_only=True)
    assert content["global_step"] == STEPS
    return {key: content[key] for key in ("state_dict", "optimizer_states")}


def losses(out: Path) -> list[tuple[int, float]]:
    events = EventAccumulator(str(out))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars("train/loss")]


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="the stub reads /proc")
def test_a_run_preempted_five_times_ends_as_one_that_never_was(arguments: list[str], tmp_path: Path) -> None:
    out, script = tmp_path / "run", tmp_path / "job.sh"
    line = " ".join([*TORCHRUN, *arguments, "--out", str(out)])
    limited = f"{line} --trainer.max_time '{{milliseconds: 100}}'"
    script.write_text(
        f'if [ "$SLURM_RESTART_COUNT" = 2 ]; then srun {limited}; touch {tmp_path}/limited; fi\nsrun {line}\n'
    )
    job = subprocess.Popen(["sbatch", "--wait", script], stderr=subprocess.PIPE, text=True)

    def after_new_checkpoint() -> None:
        start = newest(out)
        wait(lambda: newest(out) > start or job.poll() is not None)
        assert job.poll() is None, job.communicate()[1]

    after_new_checkpoint()
    subprocess.run(["scancel", "--signal=USR1", slurm_stub.JOB], check=True)  # the run asks to be requeued
    wait((out / slurm.MARKER).exists)
    after_new_checkpoint()
    (tmp_path / "slurm" / "requeue").touch()  # preemption: SLURM requeues by itself
    subprocess.run(["scancel", "--signal=TERM", slurm_stub.JOB], check=True)
    wait((tmp_path / "limited").exists)  # the third job ends by its time limit and is continued
    after_new_checkpoint()
    os.kill(int((tmp_path / "slurm" / "1").read_text()), signal.SIGKILL)  # torchrun starts both ranks again
    after_new_checkpoint()
    (tmp_path / "slurm" / "requeue").touch()  # a failed node
    subprocess.run(["scancel", "--signal=KILL", slurm_stub.JOB], check=True)
    error = job.communicate(timeout=400)[1]
    assert job.returncode == 0, error
    assert "requeued SLURM job 7" in error

    whole = tmp_path / "whole"
    run_ranks(run_fmtrain, *arguments, "--out", whole, folder=tmp_path)
    assert equal(final(out), final(whole))
    assert losses(out) == losses(whole)
    assert [step for step, _ in losses(out)] == list(range(1, STEPS + 1))
    measured = [(row["step"], {k: m["value"] for k, m in row["measurements"].items()}) for row in rows(out)]
    expected = [(row["step"], {k: m["value"] for k, m in row["measurements"].items()}) for row in rows(whole)]
    assert [row for row in measured if row[0] % 20 == 0] == expected
