from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import BrokenExecutor, ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from tasks import crash_on, device_of, wait_then_return

from repmetrics.executor import Processes, as_completed, cores, gpu_environments, in_order, open_executor, quotas


def test_results_are_in_the_order_of_tasks_whatever_the_order_of_arrival() -> None:
    delays = [0.2, 0.0, 0.1, 0.05]
    with ThreadPoolExecutor(4) as threads:
        arrived = [number for number, _ in as_completed(threads, wait_then_return, delays, died=abs)]
        assert sorted(arrived) == [0, 1, 2, 3]
        assert arrived != [0, 1, 2, 3]
        assert list(in_order(threads, wait_then_return, delays, died=abs)) == delays
    assert list(in_order(None, wait_then_return, delays, died=abs)) == delays


def test_a_task_that_kills_its_process_fails_no_other() -> None:
    with Processes(2) as executor:
        assert list(in_order(executor, crash_on, [1, 13, 2, 3, 4], died=lambda task: -task)) == [1, -13, 2, 3, 4]


def test_a_task_that_dies_once_runs_again_alone(tmp_path: Path) -> None:
    """As a process that is killed for the memory that all of them take."""
    with Processes(2) as executor:
        tasks = [(k, tmp_path) for k in range(4)]
        assert list(in_order(executor, crash_on, tasks, died=lambda task: None)) == tasks
    assert len(list(tmp_path.iterdir())) == 4


def test_each_process_has_one_of_the_visible_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5, GPU-7,2,0,1,3,4,6")
    assert [e["CUDA_VISIBLE_DEVICES"] for e in gpu_environments(3, available=8)] == ["5", "GPU-7", "2"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    with open_executor(gpus=2, available_gpus=8) as executor:
        assert set(in_order(executor, device_of, [0.3] * 4, died=str)) == {"0", "1"}
    with (
        pytest.raises(ValueError, match=r"--gpus 2: this machine shows 1 GPUs"),
        open_executor(gpus=2, available_gpus=1),
    ):
        pass


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        ("0::/\n", {"cpu.max": "250000 100000"}, [2.5]),  # a container
        ("0::/\n", {"cpu.max": "max 100000"}, []),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000", "a/cpu.max": "50000 100000"}, [0.5]),  # a slice of systemd
        (
            "4:cpu,cpuacct:/x\n1:cpuset:/\n",
            {"cpu/cpu.cfs_quota_us": "300000", "cpu/cpu.cfs_period_us": "100000"},
            [3.0],
        ),
        ("4:cpu:/x\n", {"cpu/x/cpu.cfs_quota_us": "-1", "cpu/x/cpu.cfs_period_us": "100000"}, []),
    ],
)
def test_quotas_of_control_groups(tmp_path: Path, groups: str, files: dict[str, str], expected: list[float]) -> None:
    (tmp_path / "groups").write_text(groups)
    for name, text in files.items():
        (tmp_path / "mount" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "mount" / name).write_text(text + "\n")
    assert list(quotas(tmp_path / "groups", tmp_path / "mount")) == expected
    assert list(quotas(tmp_path / "absent", tmp_path / "mount")) == []


def test_processes_are_no_more_than_a_quota_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(64)))
    for limits, expected in (([], 64), ([2.5], 3), ([80.0, 0.2], 1)):
        monkeypatch.setattr("repmetrics.executor.quotas", lambda limits=limits: iter(limits))
        assert cores() == expected


class SlowStop:
    """The connection that stops a process, which ends before its ``close`` returns."""

    def __init__(self, stop: Connection) -> None:
        self.stop = stop

    def close(self) -> None:
        self.stop.close()
        time.sleep(0.5)


def test_a_process_may_die_while_all_are_ended() -> None:
    executor = Processes(2)
    futures = [executor.submit(time.sleep, 3600) for _ in range(2)]
    while len(executor._stops) < 2:
        time.sleep(0.01)
    executor._stops = {pool: SlowStop(stop) for pool, stop in executor._stops.items()}  # type: ignore[misc]
    executor.__exit__(KeyError, KeyError(), None)
    assert all(isinstance(future.exception(), BrokenExecutor) for future in futures)


def test_an_error_ends_the_processes_at_once() -> None:
    executor = Processes(2)
    executor.submit(os.getpid).result()
    futures = [executor.submit(time.sleep, 3600) for _ in range(3)]
    executor.__exit__(KeyError, KeyError(), None)
    assert all(future.done() for future in futures)


def test_processes_do_not_outlive_a_killed_parent() -> None:
    code = (
        "import os, time\n"
        "from repmetrics.executor import Processes\n"
        "if __name__ == '__main__':\n"
        "    executor = Processes(1)\n"
        "    executor.submit(os.getpid).result()\n"
        "    executor.submit(time.sleep, 600)\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    # The pipe ends when the last process that has it open exits.
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL
