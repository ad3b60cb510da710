"""A real dask scheduler with two workers: the results are those of this process, also if a worker is killed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tasks import crash_on

from fmtrain.manifest.build import build_manifest
from fmtrain.slides.synthetic import write_slides
from repmetrics.executor import dask_executor, in_order

pytest.importorskip("distributed")
CLUSTER = """
import sys
from distributed import LocalCluster
if __name__ == "__main__":
    with LocalCluster(n_workers=2, threads_per_worker=int(sys.argv[1]), dashboard_address=None) as cluster:
        print(cluster.scheduler_address, flush=True)
        sys.stdin.read()
"""


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    helpers = str(Path(__file__).parents[1] / "helpers")
    path = os.pathsep.join([str(Path(__file__).parents[2]), helpers])
    cluster = subprocess.Popen(
        [sys.executable, "-c", CLUSTER, "1"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert cluster.stdin is not None
    assert cluster.stdout is not None
    yield cluster.stdout.readline().strip()
    cluster.communicate()


def test_the_task_of_a_worker_that_dies_runs_on_another(address: str, tmp_path: Path) -> None:
    tasks = [1, 2, (3, tmp_path), 4, 5]  # the third one kills its worker once
    with dask_executor(address) as executor:
        assert list(in_order(executor, crash_on, tasks, died=lambda task: None)) == tasks


def test_a_manifest_is_the_same_byte_for_byte(address: str, tmp_path: Path) -> None:
    write_slides(tmp_path / "slides", count=4, size_px=512, mpp=0.5, seed=0)
    options = {"held_out": 12, "size_px": 64}
    here = build_manifest(tmp_path / "slides", tmp_path / "a" / "m.json", **options)
    with dask_executor(address) as executor:
        there = build_manifest(tmp_path / "slides", tmp_path / "b" / "m.json", executor=executor, **options)
    assert there.path.read_bytes() == here.path.read_bytes()


def test_what_dask_cannot_do_is_one_sentence(
    address: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("repmetrics.executor.CONNECT_SECONDS", 1)
    with pytest.raises(ValueError, match=r"--dask tcp://127\.0\.0\.1:1: no scheduler answers there within 1 s"):
        dask_executor("tcp://127.0.0.1:1").__enter__()
    monkeypatch.setattr("repmetrics.__version__", "7.0")
    with dask_executor(address) as executor, pytest.raises(ValueError, match=r"has repmetrics .*, this process 7\.0"):
        executor.submit(abs, 1).result()
