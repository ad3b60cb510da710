"""Files to score: folders, globs, watched folders; the cache of features; views."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from repmetrics.data.batches import ReadReport
from repmetrics.data.features import Features
from repmetrics.data.source import Unreadable, hash_strings
from repmetrics.data.views import MultiViewDataset, augment
from repmetrics.scoring import file_names, score
from repmetrics.scoring.checkpoints import find_checkpoints, watch_checkpoints
from repmetrics.scoring.embedded import Embedded
from repmetrics.scoring.feature_cache import load_or_compute
from repmetrics.scoring.score import Score
from repmetrics.scoring.settings import cache_folder


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")


def test_a_folder_gives_its_checkpoints_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    touch(tmp_path, "a/step=10.ckpt", "a/step=9.ckpt", "a/hparams.yaml", "b/model.safetensors", "events.out")
    (tmp_path / "last.ckpt").symlink_to(tmp_path / "a" / "step=10.ckpt")
    names = [file.relative_to(tmp_path).as_posix() for file in find_checkpoints([tmp_path])]
    assert names == ["a/step=9.ckpt", "a/step=10.ckpt", "b/model.safetensors"]


def test_globs_and_files_once_each(tmp_path: Path) -> None:
    touch(tmp_path, "1.pt", "2.pt", "3.pth")
    assert find_checkpoints([tmp_path / "*.pt", tmp_path / "2.pt"]) == [tmp_path / "1.pt", tmp_path / "2.pt"]
    assert find_checkpoints([tmp_path / "missing.pt"]) == [tmp_path / "missing.pt"]  # the reader says what is wrong
    with pytest.raises(ValueError, match=r"nothing matches .*\*\.ckpt"):
        find_checkpoints([tmp_path / "*.ckpt"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty holds no checkpoint: expected \.ckpt \.pt"):
        find_checkpoints([tmp_path / "empty"])


def test_the_matches_of_a_shell_are_in_natural_order(tmp_path: Path) -> None:
    touch(tmp_path, "ckpt-10.pt", "ckpt-2.pt", "run-10/last.pt", "run-9/last.pt", "folder/x.pt")
    files = [tmp_path / name for name in ("ckpt-10.pt", "ckpt-2.pt", "run-10/last.pt", "run-9/last.pt")]
    found = find_checkpoints([*files, tmp_path / "folder", tmp_path / "ckpt-10.pt"])
    names = [file.relative_to(tmp_path).as_posix() for file in found]
    assert names == ["ckpt-2.pt", "ckpt-10.pt", "run-9/last.pt", "run-10/last.pt", "folder/x.pt"]


def test_a_folder_is_followed_and_a_half_written_file_waited_for(tmp_path: Path) -> None:
    writes: list[Any] = [
        lambda: touch(tmp_path, "1.ckpt", "notes.txt"),
        lambda: (tmp_path / "2.ckpt").write_bytes(b"half"),
        lambda: (tmp_path / "2.ckpt").write_bytes(b"half and half"),
        lambda: None,
        lambda: (tmp_path / "1.ckpt").unlink(),
        lambda: (tmp_path / "2.ckpt").write_bytes(b"another, under the same name"),
        lambda: None,
    ]
    polls: list[int] = []

    def sleep(seconds: float) -> None:
        assert seconds == 5
        polls.append(len(yielded))
        writes.pop(0)()

    yielded: list[str] = []
    for file in watch_checkpoints(tmp_path, poll_seconds=5, sleep=sleep, until=lambda: not writes):
        yielded.append(file.name)  # noqa: PERF401  # `sleep` reads it meanwhile
    assert yielded == ["1.ckpt", "2.ckpt", "2.ckpt"]
    assert polls == [0, 0, 1, 1, 2, 2, 2]  # one poll after it stopped changing


def test_features_are_made_once(tmp_path: Path) -> None:
    calls = []
    whole = Features(torch.randn(5, 3), ("a", "a", "b", "b", "b"), torch.arange(5))
    read = [True, True, False, True, True, True]

    def make(start: int) -> list[Embedded]:
        calls.append(start)
        return [Embedded(whole, ReadReport(list(read), [Unreadable("x.png", "broken")], several_frames=2))]

    def load(key: str) -> Embedded:
        return load_or_compute(tmp_path / "new", key, make, total=6)

    for expected in (False, True):
        features, report, cached, _ = load("key")
        assert cached is expected
        assert torch.equal(features.values, whole.values)
        assert features.groups == whole.groups
        assert features.labels is not None
        assert features.labels.tolist() == [0, 1, 2, 3, 4]
        assert report == ReadReport(read, [Unreadable("x.png", "broken")], several_frames=2)
    assert calls == [0]
    assert not load("other").from_cache
    assert sorted(file.name for file in (tmp_path / "new").iterdir()) == ["key.safetensors", "other.safetensors"]
    (tmp_path / "new" / "key.safetensors").write_bytes(b"damaged")
    assert not load("key").from_cache
    assert load("key").from_cache


def test_an_interrupted_computation_continues(tmp_path: Path) -> None:
    values, starts = torch.randn(10, 3), []

    def compute(start: int, *, stop: int) -> Iterator[Embedded]:
        starts.append(start)
        for k in range(start, stop, 2):
            yield Embedded(Features(values[k : k + 2]), ReadReport([True, True]))
        if stop < 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load_or_compute(tmp_path, "key", partial(compute, stop=6), total=10)
    (tmp_path / "key.parts" / "00002.safetensors").write_bytes(b"damaged")
    with pytest.raises(KeyboardInterrupt):
        load_or_compute(tmp_path, "key", partial(compute, stop=8), total=10)
    embedded = load_or_compute(tmp_path, "key", partial(compute, stop=10), total=10)
    assert starts == [0, 4, 8]
    assert torch.equal(embedded.features.values, values)
    assert embedded.report.readable == [True] * 10
    assert [file.name for file in tmp_path.iterdir()] == ["key.safetensors"]


def test_the_key_depends_on_every_part() -> None:
    assert hash_strings(["a", "b"]) == hash_strings(["a", "b"])
    assert (
        len({hash_strings(["a", "b"]), hash_strings(["ab"]), hash_strings(["b", "a"]), hash_strings(["a", "b", ""])})
        == 4
    )


def test_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "repmetrics"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "repmetrics"


class Pictures(torch.utils.data.Dataset[Any]):
    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> Any:
        if index == 1:
            return Unreadable("1.png", "broken")
        generator = torch.Generator().manual_seed(index)
        return {
            "image": torch.randint(0, 256, (3, 20, 30), dtype=torch.uint8, generator=generator),
            "group": str(index),
        }


def test_views_are_a_function_of_seed_and_index() -> None:
    views = MultiViewDataset(Pictures(), count=4, size=16)
    assert len(views) == 12
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    first = [views[i] for i in range(4)]
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(item["image"].shape == (3, 16, 16) and item["group"] == "0" for item in first)
    assert not torch.equal(first[0]["image"], first[1]["image"])
    assert torch.equal(views[2]["image"], first[2]["image"])
    assert not torch.equal(MultiViewDataset(Pictures(), count=4, size=16, seed=1)[2]["image"], first[2]["image"])
    assert views[5] == Unreadable("1.png", "broken")
    with pytest.raises(ValueError, match="at least 2 per image, got 1"):
        MultiViewDataset(Pictures(), count=1, size=16)


def test_without_a_size_a_view_is_as_large_as_its_image() -> None:
    assert augment(Pictures()[0]["image"], size=None, seed=0).shape == (3, 20, 30)


def test_a_folder_named_by_a_detour_is_named_without_it(tmp_path: Path) -> None:
    files = [tmp_path / "a" / ".." / "b" / "1.pt", tmp_path / "c" / "1.pt"]
    base = file_names.common_folder(files)
    assert base == tmp_path
    named = [score.with_run_name(Score("1.pt", None, None, "d", {}), file, base=base) for file in files]
    assert [(score.run, score.name) for score in named] == [("b", "b/1.pt"), ("c", "c/1.pt")]


def test_natural_order() -> None:
    assert file_names.natural_key(Path("a9")) < file_names.natural_key(Path("a10")) < file_names.natural_key(Path("b1"))
