"""Fixtures shared by all tests."""

from __future__ import annotations

import math
import os
import sys
from itertools import groupby
from pathlib import Path

# Before torch is imported, and for what tests start: tiny tensors on many threads only wait for each other, and
# the tests already run in as many processes as there are cores.
for library in ("OMP", "OPENBLAS", "MKL"):
    os.environ.setdefault(f"{library}_NUM_THREADS", "1")

import pytest

ROOT = Path(__file__).resolve().parent.parent


def pytest_configure(config: pytest.Config) -> None:
    """Start the server of forks that the processes of pytest share."""
    if config.getoption("numprocesses", None) and not hasattr(config, "workerinput"):
        from processes import start_server

        config.add_cleanup(start_server())


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Let each of several processes begin with its share of the slow tests: the last to start would run alone.

    xdist gives each process one section of the list. The slow tests of a file stay together, for the fixtures of their
    module.
    """
    count = getattr(config, "workerinput", {}).get("workercount", 1)
    slow = [item for item in items if item.get_closest_marker("slow")]
    fast = [item for item in items if not item.get_closest_marker("slow")]
    if count == 1 or not fast:
        return
    sections: list[list[pytest.Item]] = [[] for _ in range(count)]
    for index, (_, tests) in enumerate(groupby(slow, key=lambda item: item.path)):
        sections[index % count] += tests
    for section in sections[:-1]:
        number = max(len(items) // count - len(section), 0)
        section += fast[:number]
        del fast[:number]
    items[:] = [item for section in sections for item in section] + fast


@pytest.fixture(autouse=True)
def _counted_intervals(monkeypatch: pytest.MonkeyPatch) -> None:
    """Default intervals are counted, not timed, so that runs on a loaded machine evaluate at the same steps."""
    if (interval := sys.modules.get("repmetrics.monitoring.interval")) is not None:
        monkeypatch.setattr(interval, "SHORT_SECONDS", math.inf)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Real slides and labelled tiles; tests that need them skip where they are absent."""
    path = Path(os.environ.get("REPMETRICS_TEST_DATA", ROOT / ".." / "shared" / "data")).resolve()
    if not (path / "README.md").is_file():
        if os.environ.get("REPMETRICS_REQUIRE_ALL"):
            pytest.fail(f"no test data at {path}, and REPMETRICS_REQUIRE_ALL is set")
        pytest.skip(f"no test data at {path}: set REPMETRICS_TEST_DATA")
    return path


@pytest.fixture(scope="session")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Manifest of eight drawn slides, for runs of `fmtrain fit`."""
    from fit_runs import write_manifest

    return write_manifest(tmp_path_factory.mktemp("fit"))
