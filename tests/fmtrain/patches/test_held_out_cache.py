"""Held-out patches decoded once equal those decoded at each reading, whoever reads them."""

from __future__ import annotations

import errno
import io
import os
import pickle
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from fit_runs import SMALL, call
from small_runs import LIGHTNING_NOISE

from fmtrain.patches import held_out_cache
from fmtrain.patches.dataset import HeldOutPatches

pytestmark = [
    *(pytest.mark.filterwarnings(line) for line in LIGHTNING_NOISE),
    pytest.mark.filterwarnings("ignore:.*args parameter is intended to run.*"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@pytest.fixture
def copy(manifest: Path, tmp_path: Path) -> Path:
    """A manifest whose folder may be written to."""
    shutil.copytree(manifest.with_suffix(""), tmp_path / "manifest", ignore=shutil.ignore_patterns("held_out-*"))
    shutil.copytree(manifest.parent / "slides", tmp_path / "slides")
    return Path(shutil.copy(manifest, tmp_path / "manifest.json"))


def same(first: dict[str, Any], second: dict[str, Any]) -> bool:
    pixels = torch.equal(first["image"], second["image"])
    return pixels and all(first[key] == second[key] for key in ("group", "label"))


@pytest.mark.parametrize("workers", [0, 2, None])
def test_cached_patches_are_those_of_the_slides(
    copy: Path, workers: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, cached = HeldOutPatches(copy, cache=False), HeldOutPatches(copy)
    expected = [plain[i] for i in range(len(plain))]
    if workers is None:
        with ThreadPoolExecutor(1) as executor:  # one thread, as each process of an executor
            cached.build_cache(executor=executor)
    else:
        cached.build_cache(num_workers=workers)
    monkeypatch.setattr(HeldOutPatches, "_decode", lambda *_: pytest.fail("decoded again"))
    for dataset in (cached, HeldOutPatches(copy), pickle.loads(pickle.dumps(cached))):
        dataset.build_cache(num_workers=0)
        assert all(same(expected[i], dataset[i]) for i in range(len(dataset)))
    before = cached[0]["image"].clone()
    cached[0]["image"].zero_()  # a copy: the file is shared by all runs
    assert torch.equal(cached[0]["image"], before)
    path = held_out_cache.cache_path(cached.manifest)
    assert [file.name for file in path.parent.glob("held_out-*")] == [path.name]
    size = path.stat().st_size
    assert call("clear-cache", copy) == 0
    assert not path.exists()
    assert size > before.numel() * len(cached)


def test_small_disks_and_foreign_files(
    copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Usage(NamedTuple):
        free: int

    dataset = HeldOutPatches(copy)
    with monkeypatch.context() as patch:
        patch.setattr(held_out_cache.shutil, "disk_usage", lambda _: Usage(1000))
        with pytest.raises(ValueError, match=r"60 held-out patches take 0 MB .* give --data.cache false"):
            dataset.build_cache(num_workers=0)

    def refuse(*_: Any, **__: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(held_out_cache, "atomic_path", refuse)
        dataset.build_cache(num_workers=0)
    assert "held-out patches are decoded at each evaluation" in capsys.readouterr().err
    assert dataset[0]["image"].shape == (3, 32, 32)
    path = held_out_cache.cache_path(dataset.manifest)
    np.save(path, np.zeros((2, 2), np.uint8))
    with pytest.raises(ValueError, match="delete it"):
        HeldOutPatches(copy)[0]
    for kept in (0, 60, 400):  # nothing, a part of the header, a part of the patches
        np.save(path, np.zeros((60, 3, 32, 32), np.uint8))
        os.truncate(path, kept)
        with pytest.raises(ValueError, match=r"held_out-.* is damaged, as by an interrupted copy .*: delete it"):
            HeldOutPatches(copy)[0]
    os.unlink(path)


class FullFile(io.BytesIO):
    """File on a disk that another program fills after the header."""

    def write(self, content: Any) -> int:
        if self.tell() > 1000:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(content)


def test_a_disk_that_fills_up_is_named(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def on_full_disk(path: Path) -> Iterator[Any]:
        yield SimpleNamespace(open=lambda mode: FullFile())

    monkeypatch.setattr(held_out_cache, "atomic_path", on_full_disk)
    with pytest.raises(ValueError, match=r"no space left for the 0 MB of 60 held-out patches: give --data.cache false"):
        HeldOutPatches(copy).build_cache(num_workers=0)


def test_a_run_decodes_them_once(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    decode = HeldOutPatches._decode
    monkeypatch.setattr(HeldOutPatches, "_decode", lambda self, patch: calls.append(1) or decode(self, patch))
    config = tmp_path / "small.yaml"
    config.write_text(SMALL)
    arguments = ["fit", "--config", config, "--data.manifest", copy, "--monitor.metrics", "[rankme]"]
    assert call(*arguments, "--trainer.max_steps", 3, "--out", tmp_path / "run") == 0
    assert len(calls) == 60  # two evaluations
