"""`fmtrain fit --check`, and reading processes that the system ends."""

from __future__ import annotations

import os
import re
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from fit_runs import SMALL, call
from small_runs import LIGHTNING_NOISE

from fmtrain.patches.dataset import TrainingPatches
from fmtrain.training import check_run, fit

pytestmark = [
    *(pytest.mark.filterwarnings(line) for line in LIGHTNING_NOISE),
    pytest.mark.filterwarnings("ignore:.*args parameter is intended to run.*"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:lightning"),
]


@pytest.fixture
def arguments(manifest: Path, tmp_path: Path) -> list[Any]:
    config = tmp_path / "small.yaml"
    config.write_text(SMALL)
    return ["fit", "--config", config, "--data.manifest", manifest, "--out", tmp_path / "runs" / "run"]


def test_a_check_reads_and_steps_reports_and_writes_nothing(
    arguments: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fit, "check_run", partial(check_run.check_run, reading_seconds=0.1, stepping_seconds=1.0))
    call(*arguments, "--check", "--trainer.max_steps", 100_000)  # waiting counts as a problem on a busy machine
    text = capsys.readouterr().out
    assert not (tmp_path / "runs").exists()
    number = r"([\d.]+(?:e\+\d+)?)"
    speeds = re.search(f"data path alone: {number} img/s; model alone: {number} img/s; together: {number} img/s", text)
    assert speeds is not None, text
    read, model, together = map(float, speeds.groups())
    assert 0 < together <= model * 1.001
    assert read > 0
    ends = re.search(
        r"to the end: (\d+):(\d\d)(?::(\d\d))? for 100000 steps, without evaluations \((\d+) measured\)", text
    )
    assert ends is not None, text
    first, second, third = (int(part or -1) for part in ends.groups()[:3])
    seconds = 60 * first + second if third < 0 else 3600 * first + 60 * second + third
    assert seconds == pytest.approx(100_000 * 8 / together, rel=0.01)  # batches of 8
    size = re.search(r"checkpoints: 4 of ([\d.]+) GB", text)
    assert size is not None, text


def test_problems_come_first() -> None:
    good = check_run.Measured(
        read_rate=900, rate=300, wait=0.01, memory=10**9, memory_available=10**10, gpu_memory=(10**9, 10**10),
        shm=(10**8, 10**9), checkpoint=10**9, files=3, disk_free=10**12, hours=2.0, steps=50,
    )  # fmt: skip
    assert check_run.problems(good) == []
    assert check_run.report(good, ranks=1, steps=10).startswith("no problems\ndata path alone: 900 img/s")
    bad = good._replace(
        wait=0.4, memory=9.5 * 10**9, gpu_memory=(9.5 * 10**9, 10**10), shm=(2 * 10**9, 10**9), disk_free=10**9
    )
    assert [line.partition(":")[0] for line in check_run.problems(bad)] == [
        "the checkpoints need 3.0 GB, and 1.0 GB are free",
        "the workers need 2.0 GB of /dev/shm, and 1.0 GB are free",
        "a rank with its workers takes 9.5 GB of 10.0 GB",
        "a rank takes 9.5 GB of its GPU's 10.0 GB",
        "40% of the time is spent waiting for patches",
    ]
    assert good.model_rate == pytest.approx(303.03, abs=0.01)
    report = check_run.report(bad, ranks=2, steps=10).splitlines()
    assert [line.startswith("problem: ") for line in report[:6]] == [True] * 5 + [False]


def test_a_killed_worker_names_memory_and_the_last_good_checkpoint(
    arguments: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    read, main = TrainingPatches.read_into, os.getpid()

    def read_or_die(self: TrainingPatches, indices: Any, out: Any) -> None:
        if os.getpid() != main and min(indices) >= 8 * 8:  # the ninth batch
            os.kill(os.getpid(), signal.SIGKILL)
        read(self, indices, out)

    monkeypatch.setattr(TrainingPatches, "read_into", read_or_die)
    # PyTorch sets its handler once in a process, and the end of an earlier run of Lightning's removed it.
    monkeypatch.setattr("torch.utils.data._utils.signal_handling._SIGCHLD_handler_set", False)
    assert call(*arguments, "--data.num_workers", 1, "--trainer.max_steps", 20, "--data.crops_per_block", 1) == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert "was killed (Killed), probably because memory ran out: lower data.num_workers" in message
    last = max((tmp_path / "runs/run/checkpoints").glob("step-*.ckpt"))
    assert re.search(r"the last good checkpoint is .*(last|step-\d+)\.ckpt: --resume continues from there", message)
    assert last.is_file()
    assert fit.killed_worker_message(RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. It")) == (
        "the reading process 7 was killed (Bus error), because /dev/shm is full: lower data.num_workers, or give the "
        "container more shared memory"
    )
