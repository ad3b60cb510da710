"""Signals as one request to stop, and the request to SLURM, without a run."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import slurm_stub

from fmtrain import stop_signals
from fmtrain.training import slurm


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP])
def test_one_signal_many_times_is_one_request(number: signal.Signals) -> None:
    received: list[int] = []
    request = stop_signals.StopRequest(received.append)
    before = signal.getsignal(number)
    with request.installed():
        for _ in range(5):
            signal.raise_signal(number)
        signal.raise_signal(signal.SIGINT)  # Ctrl-C once is the same request
    assert received == [number]
    assert request.received == {number, signal.SIGINT}
    assert signal.getsignal(number) == before


def test_ctrl_c_again_stops_at_once_but_a_forwarded_one_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(stop_signals.time, "monotonic", lambda: now)
    request = stop_signals.StopRequest(lambda _: None)
    with request.installed():
        signal.raise_signal(signal.SIGINT)
        now += 0.5  # from the terminal and from the launcher
        signal.raise_signal(signal.SIGINT)
        now += 2.0
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_an_ignored_hangup_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        request = stop_signals.StopRequest(lambda _: None)
        with request.installed():
            signal.raise_signal(signal.SIGHUP)
        assert not request.requested
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_requeued_job_knows_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "run"
    out.mkdir()
    for name in ("SLURM_ARRAY_JOB_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_JOB_ID", slurm_stub.JOB)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert slurm.requeue(out) == (
        "scontrol cannot be run (No such file or directory): submit the job again with --resume auto"
    )
    for name, value in slurm_stub.install(tmp_path / "slurm").items():
        monkeypatch.setenv(name, value + (f":{os.defpath}" if name == "PATH" else ""))
    assert slurm.requeue(out) == "requeued SLURM job 7, which will continue this run"
    assert slurm.is_restart(out)
    assert not slurm.is_restart(tmp_path), "another run in the same job"
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    assert not slurm.is_restart(out), "another job"
    assert "scontrol requeue 8 failed (Invalid job id specified for requeue 8)" in slurm.requeue(out)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert slurm.is_restart(out)
    monkeypatch.delenv("SLURM_JOB_ID")
    assert not slurm.is_restart(out)
