"""Slides on remote storage are read as local ones are, through a cache of bounded size."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from multi_file_slides import write_mrxs
from storage_servers import RangeHandler, s3_server, web_server

from fmtrain.manifest.build import build_manifest
from fmtrain.manifest.file_kinds import dicom_header
from fmtrain.manifest.manifest import Manifest
from fmtrain.manifest.search import search
from fmtrain.patches.dataset import HeldOutPatches, TrainingPatches
from fmtrain.slides import remote, staging
from fmtrain.slides.info import fingerprint
from fmtrain.slides.remote import StorageError
from fmtrain.slides.staging import stage
from fmtrain.slides.synthetic import write_slides
from fmtrain.slides.tiles import SlideError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("storage") / "slides"
    write_slides(path, count=6, size_px=1024, mpp=0.5, seed=0)
    (path / "labels.csv").unlink()
    (path / ".hidden").mkdir()
    shutil.copy(sorted(path.glob("*.tif*"))[0], path / ".hidden" / "again.tif")
    return path


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(staging.FOLDER, str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "WAITS", (0.01, 0.02, 0.04))
    monkeypatch.setattr(remote, "FEW_WAITS", (0.01, 0.02))
    return tmp_path / "cache"


@pytest.fixture
def server(folder: Path) -> Iterator[Path]:
    with web_server(folder.parent) as address:
        yield Path(address) / "slides"


@pytest.fixture
def s3(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with s3_server(folder, "bucket/study", monkeypatch) as path:
        yield path


def staged(cache: Path) -> list[Path]:
    return [path for path in cache.iterdir() if path.is_dir() and path.name != "locks"]


def test_a_remote_folder_gives_the_manifest_and_the_patches_of_a_local_one(
    folder: Path, server: Path, cache: Path, tmp_path: Path
) -> None:
    options = {"held_out": 12, "size_px": 128}
    local = build_manifest(folder, tmp_path / "local.json", **options)
    far = build_manifest(server, tmp_path / "far.json", **options)
    assert far.content_hash() == local.content_hash()
    assert [slide.path for slide in Manifest.load(far.path).slides] == [slide.path for slide in far.slides]
    assert json.loads(far.path.read_text())["root"] == remote.url(server)
    assert any(str(cache) in line and staging.LIMIT_GB in line for line in far.warnings)
    near, distant = (TrainingPatches(path, size_px=64, seed=3, crops_per_block=2) for path in (local.path, far.path))
    first, second = (np.empty((24, 64, 64, 3), np.uint8) for _ in range(2))
    near.read_into(range(24), first)
    distant.read_into(range(24), second)
    assert np.array_equal(first, second)
    assert not distant.quarantined
    held_out = HeldOutPatches(far.path)
    held_out.build_cache()
    plain = HeldOutPatches(local.path, cache=False)
    assert all((held_out[i]["image"] == plain[i]["image"]).all() for i in range(len(plain)))
    extended = build_manifest(server, far.path, **options)  # again: nothing is new, and nothing has changed
    assert extended.content_hash() == far.content_hash()


def test_each_slide_is_fetched_once_by_all_threads(server: Path, cache: Path, folder: Path) -> None:
    path = search(server).slides[0].path
    threads = [threading.Thread(target=lambda: stage(path, digest=fingerprint(path)).close()) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (copy,) = staged(cache)
    assert (copy / path.name).read_bytes() == (folder / path.name).read_bytes()
    RangeHandler.served.clear()
    digest = fingerprint(folder / path.name)
    stage(path, digest=digest).close()
    assert RangeHandler.served == []  # a slide of the cache needs no server


def test_a_full_cache_removes_what_was_not_used_for_longest_and_never_what_is_open(
    server: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    paths = [slide.path for slide in search(server).slides]
    sizes = [remote.size(path) for path in paths]
    monkeypatch.setenv(staging.LIMIT_GB, str(2.5 * max(sizes) / 1e9))
    opened = stage(paths[0])
    stage(paths[1]).close()
    os.utime(stage(paths[1]).path.parent, (1.0, 1.0))
    stage(paths[2]).close()
    names = {next(folder.iterdir()).name for folder in staged(cache)}
    assert names == {paths[0].name, paths[2].name}  # the second gave way
    assert opened.path.exists()
    monkeypatch.setenv(staging.LIMIT_GB, str(1.5 * max(sizes) / 1e9))
    monkeypatch.setattr(staging, "PATIENCE_SECONDS", 0.2)
    stage(paths[3]).close()
    assert "the slide cache exceeds" in caplog.text  # said, since the only other slide is open
    opened.close()
    monkeypatch.setenv(staging.LIMIT_GB, str(0.5 * min(sizes) / 1e9))
    with pytest.raises(StorageError, match=r"more than the slide cache of .* GB: raise FMTRAIN_SLIDE_CACHE_GB"):
        stage(paths[4])


def test_half_a_slide_of_a_process_that_died_is_removed(server: Path, cache: Path) -> None:
    path = search(server).slides[0].path
    (cache / "0123.part").mkdir(parents=True)
    (cache / "0123.part" / "a.tif").write_bytes(b"half")
    stage(path).close()
    assert [folder.suffix for folder in staged(cache)] == [""]


def test_storage_that_fails_for_a_while_is_waited_for(
    server: Path, cache: Path, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = search(server).slides[0].path
    RangeHandler.failing = 3
    with stage(path) as local:
        assert local.read_bytes() == (folder / path.name).read_bytes()
    assert "retrying for" in caplog.text


def test_an_outage_ends_the_run_and_quarantines_nothing(folder: Path, cache: Path, tmp_path: Path) -> None:
    with web_server(folder.parent) as address:
        port = int(address.rpartition(":")[2])
        manifest = build_manifest(Path(address) / "slides", tmp_path / "far.json", held_out=12, size_px=128)
        patches = TrainingPatches(manifest.path, size_px=64, seed=3)
    shutil.rmtree(cache)
    out = np.empty((8, 64, 64, 3), np.uint8)
    with pytest.raises(StorageError, match=r"cannot be read .*the storage has not answered"):
        patches.read_into(range(8), out)
    assert not patches.quarantined
    with web_server(folder.parent, port=port):
        patches.read_into(range(8), out)
        missing = patches.slides[0]
        (folder / missing.path.name).rename(folder / "moved.bak")
        try:
            shutil.rmtree(cache)
            with pytest.raises(SlideError, match="cannot be read at http"):
                stage(missing.path, digest=missing.info.fingerprint)
            (folder / missing.path.name).write_bytes((folder / "moved.bak").read_bytes()[:-1] + b"x")
            with pytest.raises(SlideError, match="has changed since"):
                stage(missing.path, digest=missing.info.fingerprint)
        finally:
            (folder / "moved.bak").replace(folder / missing.path.name)
    with pytest.raises(ValueError, match=r"http://127.* has not answered"):
        search(Path(f"http://127.0.0.1:{port}/slides"))


def test_an_s3_bucket_is_a_folder_of_slides(folder: Path, s3: Path, cache: Path, tmp_path: Path) -> None:
    local = build_manifest(folder, tmp_path / "local.json", held_out=12, size_px=128)
    far = build_manifest(s3, tmp_path / "far.json", held_out=12, size_px=128)
    assert far.content_hash() == local.content_hash()
    pixels = [np.empty((12, 64, 64, 3), np.uint8) for _ in range(2)]
    for path, out in zip((local.path, far.path), pixels, strict=True):
        TrainingPatches(path, size_px=64, seed=3).read_into(range(12), out)
    assert np.array_equal(*pixels)
    with pytest.raises(SlideError, match=r"none\.tif: cannot be read at s3://bucket"):
        stage(s3 / "none.tif")  # at once: what is missing stays missing
    with pytest.raises(ValueError, match="s3://elsewhere/x: The specified bucket does not exist"):
        search(Path("s3://elsewhere/x"))
    with pytest.raises(ValueError, match="contains no slides"):
        search(s3 / "nothing")


def test_a_folder_that_cannot_be_listed_ends_the_search(server: Path, cache: Path, folder: Path) -> None:
    (folder / "more").mkdir(exist_ok=True)
    shutil.copy(sorted(folder.glob("*.tif*"))[0], folder / "more" / "last.tif")
    try:
        assert len(search(server).slides) == 7
        RangeHandler.failing = 1
        assert len(search(server).slides) == 7
        RangeHandler.failing = 1000
        with pytest.raises(ValueError, match=r"503.*the storage has not answered"):
            search(server)
    finally:
        RangeHandler.failing = 0
        shutil.rmtree(folder / "more")


NAMES = ["[g].tiff", "a b.tiff", "c#d.tiff", "e%20f.tiff", "h+i.tiff", "j?k.tiff", "ü.tiff"]


def test_names_are_those_of_a_local_folder(folder: Path, cache: Path, tmp_path: Path) -> None:
    first, many = sorted(folder.glob("*.tif*"))[0], tmp_path / "my slides"
    many.mkdir()
    for name in NAMES:
        shutil.copy(first, many / name)
    with (
        web_server(tmp_path) as address,
        pytest.MonkeyPatch.context() as patch,
        s3_server(many, "bucket/my slides", patch) as bucket,
    ):
        for root in (remote.decoded(Path(address) / "my%20slides"), bucket):
            slides = search(root).slides
            assert [slide.name for slide in slides] == NAMES
            for slide in slides:
                with stage(slide.path) as local:
                    assert local.name == slide.name


def test_processes_that_fill_and_empty_one_cache_lose_no_slide(
    server: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slides = [(slide.path, fingerprint(slide.path)) for slide in search(server).slides]
    monkeypatch.setenv(staging.LIMIT_GB, str(2.5 * max(remote.size(path) for path, _ in slides) / 1e9))
    monkeypatch.setattr(staging, "PATIENCE_SECONDS", 0.2)
    errors: list[Exception] = []

    def read(first: int) -> None:
        try:
            for k in range(30):
                path, digest = slides[(first + k * (first + 1)) % len(slides)]
                with stage(path, digest=digest) as local:
                    assert fingerprint(local) == digest
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=read, args=(k,)) for k in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


def test_an_outage_while_a_header_is_read_excludes_no_slide(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "a.dcm").write_bytes(b"\0" * 128 + b"DICM")
    with web_server(tmp_path) as address:
        path = Path(address) / "a.dcm"
    with pytest.raises(StorageError, match="has not answered"):
        dicom_header(path)


def test_a_full_disk_is_an_error_of_the_cache_and_not_of_the_slide(
    server: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: int) -> None:
        raise OSError(28, "No space left on device")

    path = search(server).slides[0].path
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(StorageError, match=r"the slide cache .* cannot be used .*No space left.*_CACHE"):
        stage(path)
    assert staged(cache) == []


def test_a_slide_of_several_files_is_staged_with_all_of_them(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "many").mkdir()
    local = write_mrxs(tmp_path / "many" / "a.mrxs", np.full((512, 512, 3), 200, np.uint8))
    with web_server(tmp_path) as address:
        (slide,) = search(Path(address) / "many").slides
        assert len(slide.files) > 2
        with stage(slide.path, slide.files) as path:
            assert fingerprint(path, slide.files) == fingerprint(local, slide.files)


def absent(*_: object, **__: object) -> None:
    raise ImportError("Install s3fs to access S3")


def test_what_cannot_be_is_refused_in_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "FEW_WAITS", ())
    with pytest.raises(ValueError, match="nosuch"):
        search(Path("nosuch://bucket/slides"))
    (tmp_path / "key").write_text("x" * 64)
    with pytest.raises(ValueError, match="--pseudonyms links local files"):
        build_manifest(Path("s3://bucket/slides"), tmp_path / "m.json", pseudonyms=tmp_path / "key")
    monkeypatch.setenv(staging.LIMIT_GB, "many")
    with pytest.raises(ValueError, match="FMTRAIN_SLIDE_CACHE_GB must be a size in GB"):
        staging.cache_limit()
    monkeypatch.setattr("fsspec.core.url_to_fs", absent)
    with pytest.raises(ValueError, match=r"is remote, and a package is missing.*repmetrics\[remote\].*aws s3 sync"):
        build_manifest(Path("s3://bucket/slides"), tmp_path / "m.json")
    assert not (tmp_path / "m.json").exists()
    with pytest.raises(StorageError, match="a package is missing"):  # of a worker, which excludes no slide for that
        stage(Path("s3://bucket/slides/a.tiff"))
