from __future__ import annotations

import errno
import hashlib
import logging
import pickle
import shutil
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import openslide
import pytest
import torch
from coded_slides import decode, write_coded
from torch.utils.data import DataLoader

from fmtrain.manifest.build import build_manifest
from fmtrain.manifest.manifest import Manifest
from fmtrain.patches import slide_pool
from fmtrain.patches.dataset import HeldOutPatches, TooManyFailedSlidesError, TrainingPatches, manifest_source
from fmtrain.patches.loader import KEPT_WINDOWS, StepSampler, training_batches
from fmtrain.patches.planner import aligned_block
from fmtrain.patches.slide_pool import SlidePool
from fmtrain.slides.info import Region
from fmtrain.slides.retries import with_retries
from fmtrain.slides.slide import resize
from fmtrain.slides.synthetic import write_pyramid, write_slides
from fmtrain.slides.tiles import SlideError, TileReader
from fmtrain.slides.tissue import load_mask, stained_share
from repmetrics.data.open import open_data

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("slides")
    write_slides(folder, count=8, size_px=1024, mpp=0.5, seed=0)
    (folder / "labels.csv").unlink()
    return build_manifest(folder, tmp_path_factory.mktemp("out"), held_out=24, mpps=(0.5, 1.0)).path


@pytest.fixture(scope="module")
def coded_manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Slides whose pixels code their position; all cells count as tissue."""
    folder = tmp_path_factory.mktemp("coded")
    for k, lossless in enumerate(["jpeg2000", "deflate", "jpeg2000", "deflate"]):
        write_coded(folder / f"slide{k}.svs", [(1900, 1400), (947, 698)], mpp=0.25, tile=128, lossless=lossless)
    out = tmp_path_factory.mktemp("out")
    return build_manifest(folder, out, held_out=30, size_px=128, mpps=(0.25,), min_tissue=0.0).path


def opened(manifest: Path, **options: Any) -> TrainingPatches:
    return TrainingPatches(manifest, **{"size_px": 128, "seed": 0} | options)


def digest(items: Any) -> list[str]:
    return sorted(hashlib.sha256(item.contiguous().numpy().tobytes()).hexdigest() for batch in items for item in batch)


# A function of the seed and the index


@pytest.mark.parametrize("crops", [1, 4])
def test_a_patch_is_a_function_of_seed_and_index(manifest: Path, crops: int) -> None:
    first, second = opened(manifest, crops_per_block=crops), opened(manifest, crops_per_block=crops)
    forwards = [first[k] for k in range(12)]
    backwards = [second[k] for k in reversed(range(12))][::-1]
    assert all(torch.equal(a, b) for a, b in zip(forwards, backwards, strict=True))
    assert forwards[0].shape == (3, 128, 128)
    assert forwards[0].dtype == torch.uint8
    other = opened(manifest, seed=1, crops_per_block=crops)
    assert not any(torch.equal(a, other[k]) for k, a in enumerate(forwards))
    assert len({item.numpy().tobytes() for item in forwards}) == 12
    together = np.empty((4, 128, 128, 3), np.uint8)
    first.read_into([7, 2, 7, 0], together)
    for k, pixels in zip([7, 2, 7, 0], together, strict=True):
        np.testing.assert_array_equal(pixels.transpose(2, 0, 1), forwards[k])


def test_two_patches_never_share_memory(manifest: Path) -> None:
    patches = opened(manifest, crops_per_block=4)
    first, second = patches[0], patches[1]
    before = second.clone()
    first.zero_()
    assert torch.equal(patches[1], before)
    assert torch.equal(second, before)
    assert int(patches[0].sum()) > 0


@pytest.mark.parametrize("crops", [1, 3])
def test_any_number_of_workers_and_ranks_reads_the_same_patches(manifest: Path, crops: int) -> None:
    patches = opened(manifest, crops_per_block=crops)
    sets = {}
    for workers in (0, 1, 2):
        for world in (1, 2):
            steps = [
                list(
                    islice(
                        training_batches(patches, batch_size=6 // world, rank=rank, world=world, num_workers=workers), 6
                    )
                )
                for rank in range(world)
            ]
            sets[workers, world] = [digest([batches[k] for batches in steps]) for k in range(6)]
    assert all(batches == sets[0, 1] for batches in sets.values())
    assert len({name for step in sets[0, 1] for name in step}) == 36


@pytest.mark.parametrize("crops", [1, 3])
@pytest.mark.parametrize("start", [1, 4, 6])
def test_a_killed_run_continues_exactly(manifest: Path, crops: int, start: int) -> None:
    whole = list(islice(training_batches(opened(manifest, crops_per_block=crops), batch_size=4), 8))
    resumed = training_batches(opened(manifest, crops_per_block=crops), batch_size=4, start_step=start)
    for expected, batch in zip(whole[start:], resumed, strict=False):
        assert torch.equal(expected, batch)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_that_are_kept_stay_as_they_were(manifest: Path, workers: int) -> None:
    """The ring of memory is reused; batches returned earlier must not change, nor what was made from them."""
    patches = opened(manifest, crops_per_block=2)
    kept = list(islice(training_batches(patches, batch_size=4, num_workers=workers), 24))
    fresh = [batch.clone() for batch in islice(training_batches(patches, batch_size=4), 24)]
    assert all(torch.equal(a, b) for a, b in zip(kept, fresh, strict=True))
    assert len({batch.data_ptr() for batch in kept}) == 24
    rows = [batch[1, :, :3] for batch in islice(training_batches(patches, batch_size=4, num_workers=workers), 24)]
    assert all(torch.equal(row, batch[1, :, :3]) for row, batch in zip(rows, fresh, strict=True))


@pytest.mark.parametrize("crops", [1, 2])
def test_a_slot_is_used_again_once_its_batches_are_freed(manifest: Path, crops: int) -> None:
    """Without copies: as many addresses as slots. With one batch of the first window kept, its slot is not used."""
    patches = opened(manifest, crops_per_block=crops)
    batches = training_batches(patches, batch_size=4)
    slots = 1 + KEPT_WINDOWS
    addresses = {next(batches).data_ptr() for _ in range(10 * slots)}
    assert len(addresses) == crops * slots
    first = next(batches)
    assert first.data_ptr() in addresses
    others = {next(batches).data_ptr() for _ in range(20 * slots)}
    assert first.data_ptr() not in others
    assert others < addresses


def test_a_plain_loader_with_the_sampler_gives_the_same(manifest: Path) -> None:
    patches = opened(manifest)
    plain = DataLoader(patches, batch_size=4, sampler=StepSampler(batch_size=4, start_step=2), num_workers=1)
    for batch, expected in zip(islice(training_batches(patches, batch_size=4, start_step=2), 3), plain, strict=False):
        assert torch.equal(batch, expected)


def test_the_dataset_travels_to_spawned_workers(manifest: Path) -> None:
    patches = opened(manifest)
    expected = patches[3]
    assert torch.equal(pickle.loads(pickle.dumps(patches))[3], expected)
    loader = DataLoader(patches, batch_sampler=[[3]], num_workers=1, multiprocessing_context="spawn")
    assert torch.equal(next(iter(loader))[0], expected)


# Pixels


@pytest.mark.parametrize("options", [{}, {"crops_per_block": 4}, {"size_px": 200, "crops_per_block": 2}])
def test_patches_show_what_was_planned(coded_manifest: Path, options: dict[str, int]) -> None:
    patches = opened(coded_manifest, **options)
    levels = Counter()
    for index in range(40):
        plan = patches.plan(index)
        assert plan is not None
        x, y, level = decode(patches[index].permute(1, 2, 0).numpy())
        crop = plan.crop
        assert (x[0, 0], y[0, 0]) == (crop.x, crop.y)
        assert (x[-1, -1], y[-1, -1]) == (crop.x + crop.side - 1, crop.y + crop.side - 1)
        assert (level == crop.level).all()
        levels[crop.level] += 1
        bx, by, bw, bh = plan.block
        assert bx <= crop.x <= bx + bw - crop.side
        assert by <= crop.y <= by + bh - crop.side
    assert set(levels) == {0}


def test_other_magnifications_come_from_their_level_at_the_right_place(coded_manifest: Path) -> None:
    patches = opened(coded_manifest, mpp=[0.5 * 1900 / 947 / 2], min_tissue=0.0)
    for index in range(20):
        plan = patches.plan(index)
        assert plan is not None
        x, y, level = decode(patches[index].permute(1, 2, 0).numpy())
        if patches.slides[plan.slide].info.reader == "tiles":  # OpenSlide interpolates between the codes
            assert (level == 1).all()
            assert (x[0, 0], y[0, 0]) == (plan.crop.x, plan.crop.y)


def test_blocks_are_read_once_and_hold_their_crops(manifest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    patches = opened(manifest, crops_per_block=4, mpp=[0.5])
    decoded: list[tuple[int, int]] = []
    decode_tile = TileReader._decode
    monkeypatch.setattr(
        TileReader, "_decode", lambda self, *tile: (decoded.append(tile[1:]), decode_tile(self, *tile))[1]
    )
    list(islice(training_batches(patches, batch_size=8), 4))
    assert len(decoded) <= 8 * 4  # 32 patches of 8 blocks of four tiles
    plans = [patches.plan(k) for k in range(32)]
    assert all(plans[k] is not None for k in range(32))
    assert all(plan.block[0] % 256 == plan.block[1] % 256 == 0 for plan in plans if plan is not None)
    crops = {(plan.slide, plan.crop) for plan in plans if plan is not None}
    assert len(crops) == 32


def test_neighbors_never_share_a_batch(manifest: Path) -> None:
    patches = opened(manifest, crops_per_block=4)
    for numbers in (StepSampler(batch_size=16, crops_per_block=4).batch(step) for step in range(8)):
        assert len({number // 4 for number in numbers}) == 16
    assert patches.crops_per_block == 4


def test_aligned_blocks_stay_within_the_level_and_hold_the_patch() -> None:
    rng = np.random.default_rng(0)
    for _ in range(500):
        w, h, side, tile = (int(rng.integers(a, b)) for a, b in ((300, 3000), (300, 3000), (16, 300), (64, 512)))
        where = Region(0, int(rng.integers(0, w - side + 1)), int(rng.integers(0, h - side + 1)), side)
        x, y, bw, bh = aligned_block(where, (w, h), (tile, tile))
        assert x % tile == y % tile == 0
        assert 0 <= x <= x + side <= x + bw <= w
        assert 0 <= y <= y + side <= y + bh <= h


def test_real_slides_give_the_pixels_openslide_gives(data_dir: Path, tmp_path: Path) -> None:
    built = build_manifest(data_dir / "tcga_slides", tmp_path, mpps=(0.25, 0.5), held_out=20)
    for crops in (1, 4):
        patches = opened(built.path, size_px=224, crops_per_block=crops)
        for index in range(12):
            plan = patches.plan(index)
            assert plan is not None
            entry, crop = patches.slides[plan.slide], plan.crop
            assert crop.side == round(224 * plan.mpp / 0.25)
            with openslide.OpenSlide(entry.path) as slide:
                pixels = slide.read_region((crop.x, crop.y), crop.level, (crop.side, crop.side)).convert("RGB")
            expected = resize(np.asarray(pixels), 224)
            np.testing.assert_array_equal(patches[index].permute(1, 2, 0).numpy(), expected)


# Sampling


def test_patches_hold_tissue(manifest: Path) -> None:
    patches = opened(manifest, mpp=[0.5])
    shares = []
    for index in range(200):
        plan = patches.plan(index)
        assert plan is not None
        entry = patches.slides[plan.slide]
        mask = patches.manifest.mask(entry)
        cell = entry.info.size[0] / mask.shape[1]
        rows, columns = (slice(round(at / cell), round((at + 128) / cell)) for at in (plan.crop.y, plan.crop.x))
        shares.append(mask[rows, columns].mean())
    assert np.mean(np.array(shares) >= 0.4) > 0.98  # jitter within a cell may cost a share of a cell's width


def test_slides_and_magnifications_are_drawn_as_asked(manifest: Path) -> None:
    patches = opened(manifest, mpp=[0.5, 1.0, 2.0], mpp_weights=[1, 3, 0], slide_weighting="patient")
    plans = [patches.plan(k) for k in range(600)]
    drawn = [plan for plan in plans if plan is not None]
    assert Counter(plan.mpp for plan in drawn)[1.0] / len(drawn) == pytest.approx(0.75, abs=0.07)  # 4 sd
    assert {plan.mpp for plan in drawn} == {0.5, 1.0}
    patients = Counter(patches.slides[plan.slide].patient for plan in drawn)
    assert max(patients.values()) / min(patients.values()) < 1.6
    continuous = opened(manifest, mpp=[0.5, 2.0], continuous_mpp=True)
    mpps = [plan.mpp for plan in map(continuous.plan, range(100)) if plan is not None]
    assert len(set(mpps)) > 90
    assert 0.5 <= min(mpps) < 0.7
    assert 1.4 < max(mpps) <= 2.0


def test_only_training_slides_are_read(manifest: Path) -> None:
    held_out = {slide.patient for slide in Manifest.load(manifest).slides_in("held_out")}
    assert held_out
    assert not held_out & {slide.patient for slide in opened(manifest).slides}


def test_ablations(manifest: Path) -> None:
    everything = opened(manifest)
    some = opened(manifest, slide_fraction=0.34)
    assert len(some.slides) == round(0.34 * len(Manifest.load(manifest).slides_in("train")))
    assert {s.info.name for s in some.slides} < {s.info.name for s in everything.slides}
    each = opened(manifest, patches_per_slide=2, mpp=[0.5])
    counts = Counter((plan.slide, plan.mpp, plan.crop) for plan in map(each.plan, range(300)) if plan is not None)
    assert len(counts) == 2 * len(each.slides)
    assert max(counts.values()) / min(counts.values()) < 3
    total = opened(manifest, patches_in_total=9, mpp=[0.5])
    assert len({(p.slide, p.crop) for p in map(total.plan, range(300)) if p is not None}) == 9
    endless = opened(manifest, mpp=[0.5])
    assert len({(p.slide, p.crop) for p in map(endless.plan, range(300)) if p is not None}) > 295


def test_the_filter_by_hue_redraws(manifest: Path) -> None:
    plain, filtered = opened(manifest), opened(manifest, min_stained=0.9)
    shares = [[stained_share(p[k].permute(1, 2, 0).contiguous().numpy()) for k in range(30)] for p in (plain, filtered)]
    assert min(shares[0]) < 0.9 <= min(shares[1])
    kept = [k for k in range(30) if shares[0][k] >= 0.9]
    assert kept
    assert all(torch.equal(plain[k], filtered[k]) for k in kept)


# Held out


def test_held_out_patches_are_frozen_and_grouped(manifest: Path) -> None:
    held = HeldOutPatches(manifest)
    assert len(held) == 24
    patch = held.manifest.held_out[5]
    item = held[5]
    assert item["image"].shape == (3, 256, 256)
    assert item["group"] == patch.slide[:12]
    assert "label" not in item
    batch = next(iter(DataLoader(held, batch_size=24, num_workers=1)))
    assert torch.equal(batch["image"][5], item["image"])
    assert torch.equal(pickle.loads(pickle.dumps(held))[5]["image"], item["image"])


def test_a_manifest_is_a_source_for_scoring(manifest: Path, tmp_path: Path) -> None:
    for path in (manifest, manifest.parent):
        source = open_data(path)
        assert source.kind == "slides manifest"
        assert source.images is not None
        assert torch.equal(source.images[0]["image"], HeldOutPatches(manifest)[0]["image"])
        assert source.fingerprint is not None
        assert source.fingerprint() == Manifest.load(manifest).content_hash()
    (tmp_path / "other.json").write_text("{}")
    assert manifest_source(tmp_path / "other.json") is None
    assert manifest_source(tmp_path) is None


def test_labels_are_indices_into_the_classes(tmp_path: Path) -> None:
    write_slides(tmp_path / "slides", count=4, size_px=1024, mpp=0.5, seed=1)
    held = HeldOutPatches(build_manifest(tmp_path / "slides", tmp_path / "out", held_out=12).path)
    assert held.classes == tuple(sorted(held.classes))
    assert [held.classes[held[k]["label"]] for k in range(12)] == [patch.label for patch in held.manifest.held_out]


def test_a_broken_held_out_slide_stops_the_measurement(manifest: Path, tmp_path: Path) -> None:
    folder = tmp_path / "slides"
    shutil.copytree(Manifest.load(manifest).slides[0].path.parent, folder)
    built = build_manifest(folder, tmp_path / "out", held_out=10)
    held = HeldOutPatches(built.path)
    path = folder / built.held_out[0].slide
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 3])
    with pytest.raises((SlideError, ValueError), match=path.name):
        [held[k] for k in range(10)]
    with pytest.raises(SlideError, match=f"{path.name} has changed since"):
        HeldOutPatches(built.path)


# Faults


@pytest.fixture
def breakable(manifest: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "slides"
    shutil.copytree(Manifest.load(manifest).slides[0].path.parent, folder)
    return build_manifest(folder, tmp_path / "out", held_out=10).path


def break_slide(patches: TrainingPatches, number: int, *, first: int = 0) -> str:
    """Corrupt the tiles of a slide from number `first` on, but not its directory; returns its name."""
    entry = patches.slides[number]
    with SlidePool().get(entry) as slide:
        assert slide.tiles is not None
        at, kind = slide.tiles[0].offsets_at, slide.tiles[0].offsets_type
    data = bytearray(entry.path.read_bytes())
    for offset in np.frombuffer(data, kind, 16, at)[first:].tolist():
        data[offset : offset + 200] = bytes(200)
    entry.path.write_bytes(data)
    return entry.info.name


@pytest.mark.parametrize("workers", [0, 2])
def test_a_slide_that_fails_is_quarantined_and_redrawn(
    breakable: Path, monkeypatch: pytest.MonkeyPatch, workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(slide_pool, "check_unchanged", lambda entry: None)
    clean = [opened(breakable, mpp=[0.5], max_failed_fraction=0.5)[k].clone() for k in range(24)]
    patches = opened(breakable, mpp=[0.5], max_failed_fraction=0.5)
    name = break_slide(patches, 1)
    with caplog.at_level(logging.WARNING):
        batches = list(islice(training_batches(patches, batch_size=8, num_workers=workers), 3))
    assert list(patches.quarantined) == [name]
    if workers == 0:
        assert caplog.text.count("slide quarantined") == 1
        assert f"(1 of {len(patches.slides)}): {name}" in caplog.text
    plans = [opened(breakable, mpp=[0.5]).plan(k) for k in range(24)]
    hit = [plan is not None and plan.slide == 1 for plan in plans]
    assert any(hit)
    for k, item in enumerate(item for batch in batches for item in batch):
        if not hit[k]:  # the others are what they would have been
            assert torch.equal(item, clean[k])
    again = opened(breakable, mpp=[0.5], max_failed_fraction=0.5)
    redrawn = list(islice(training_batches(again, batch_size=8), 3))
    assert all(torch.equal(a, b) for a, b in zip(batches, redrawn, strict=True))


def test_a_slide_that_fails_is_avoided_in_the_rest_of_its_window(
    breakable: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All patches of a window are planned before the first is read: a fault must still change the later ones."""
    monkeypatch.setattr(slide_pool, "check_unchanged", lambda entry: None)
    patches = opened(breakable, mpp=[0.5], max_failed_fraction=0.5)
    name = break_slide(patches, 1, first=10)
    out, expected = (np.empty((96, 128, 128, 3), np.uint8) for _ in range(2))
    patches.read_into(range(96), out)
    since = patches.quarantined[name]
    plans = [opened(breakable, mpp=[0.5]).plan(k) for k in range(96)]
    assert any(plan is not None and plan.slide == 1 for plan in plans[:since])  # good tiles before the fault
    assert sum(plan is not None and plan.slide == 1 for plan in plans[since + 1 :]) > 3
    again = opened(breakable, mpp=[0.5], max_failed_fraction=0.5)
    again.quarantine(patches.quarantined)
    again.read_into(range(96), expected)
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_faults_stop_the_run_with_their_names(
    breakable: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    monkeypatch.setattr(slide_pool, "check_unchanged", lambda entry: None)
    patches = opened(breakable, mpp=[0.5])
    names = [break_slide(patches, k) for k in range(len(patches.slides))]
    with pytest.raises(
        TooManyFailedSlidesError, match=rf"^2 of {len(names)} slides failed, more than 10%: TCGA"
    ) as caught:
        list(islice(training_batches(patches, batch_size=8, num_workers=workers), 3))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("crops", [1, 4])
def test_a_resumed_run_avoids_the_slides_that_the_interrupted_one_avoided(
    breakable: Path, monkeypatch: pytest.MonkeyPatch, crops: int
) -> None:
    """A slide that is damaged in places: its good tiles are read before the fault is met, and never after it."""
    monkeypatch.setattr(slide_pool, "check_unchanged", lambda entry: None)
    options: dict[str, Any] = {"mpp": [0.5], "max_failed_fraction": 0.5, "crops_per_block": crops}
    patches = opened(breakable, **options)
    name = break_slide(patches, 1, first=10)
    batches = list(islice(training_batches(patches, batch_size=8), 24))
    assert list(patches.quarantined) == [name]

    def resumed(quarantined: dict[str, int], step: int) -> list[bool]:
        again = opened(breakable, **options)
        again.quarantine(quarantined)
        rest = islice(training_batches(again, batch_size=8, start_step=step), 24 - step)
        return [torch.equal(a, b) for a, b in zip(rest, batches[step:], strict=True)]

    for step in (0, 1, 5, 14):
        assert all(resumed(patches.quarantined, step))
    assert not all(all(resumed({}, step)) for step in range(2, 20, 3))


def test_a_slide_that_changed_is_refused_at_the_start_and_quarantined_later(breakable: Path) -> None:
    patches = opened(breakable, max_failed_fraction=0.5)
    patches.check_unchanged()
    changed = patches.slides[0]
    with changed.path.open("ab") as file:
        file.write(b"x")
    with pytest.raises(SlideError, match=f"^{changed.info.name} has changed since the manifest was written"):
        patches.check_unchanged()
    list(islice(training_batches(patches, batch_size=16), 4))
    assert list(patches.quarantined) == [changed.info.name]


def test_a_slide_that_vanishes_is_quarantined(breakable: Path) -> None:
    patches = opened(breakable, max_failed_fraction=0.5)
    gone = patches.slides[2]
    gone.path.unlink()
    list(islice(training_batches(patches, batch_size=16), 3))
    assert list(patches.quarantined) == [gone.info.name]


def test_errors_of_openslide_are_retried_with_a_new_handle(
    manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OpenSlide's errors latch, and have no errno: a storage that fails for a moment must not quarantine slides."""
    monkeypatch.setattr("fmtrain.slides.retries.WAITS_SECONDS", (0.0, 0.0))
    for k in range(3):
        write_coded(tmp_path / "s" / f"{k}.tif", [(600, 600)], lossless="deflate")
    path = build_manifest(tmp_path / "s", tmp_path / "out", held_out=4, mpps=(0.25,)).path
    patches, read = opened(path, size_px=128, mpp=[0.25]), openslide.OpenSlide.read_region
    handles: list[openslide.OpenSlide] = []

    def fail(slide: openslide.OpenSlide, *args: Any) -> Any:
        handles.append(slide)
        if len(handles) < 3:
            raise openslide.OpenSlideError("Cannot read tile")
        return read(slide, *args)

    expected = patches[0]
    monkeypatch.setattr(openslide.OpenSlide, "read_region", fail)
    assert torch.equal(patches[0], expected)
    assert not patches.quarantined
    assert len({id(handle) for handle in handles}) == len(handles) == 3


def test_a_slide_keeps_its_share_if_its_tissue_has_no_room_for_large_patches(tmp_path: Path) -> None:
    size, (y, x) = 1536, np.mgrid[:1536, :1536]
    noise = np.random.default_rng(0).integers(0, 40, (size, size, 1))
    tissue = (np.array([190, 110, 170]) + noise - 20).astype(np.uint8)
    spots = np.hypot(y % 512 - 256, x % 512 - 256) < 90
    for name, picture in (
        ("full.tif", tissue),
        ("spots.tif", np.where(spots[..., None], tissue, 243).astype(np.uint8)),
        ("held.tif", tissue[::-1]),
    ):
        write_pyramid(tmp_path / "s" / name, np.ascontiguousarray(picture), mpp=0.5)
    table = tmp_path / "t.csv"
    table.write_text("file,split\nfull.tif,train\nspots.tif,train\nheld.tif,held_out\n")
    built = build_manifest(tmp_path / "s", tmp_path / "out", held_out=4, table=table, mpps=(0.5, 1.0, 2.0))
    for options in ({"mpp_weights": [1.0, 1.0, 6.0]}, {"continuous_mpp": True}):
        patches = opened(built.path, size_px=256, **options)
        plans = [patches.plan(index) for index in range(800)]
        counts = Counter(patches.slides[plan.slide].info.name for plan in plans if plan is not None)
        assert sum(counts.values()) == 800
        assert abs(counts["spots.tif"] - 400) < 5 * np.sqrt(800) / 2


def test_slow_storage_is_retried_and_broken_files_are_not() -> None:
    waits: list[float] = []
    outcomes: list[Any] = [OSError(errno.EIO, "transient"), SlideError("a: cannot be opened"), "pixels"]
    outcomes[1].__cause__ = OSError(errno.ESTALE, "stale")

    def action() -> str:
        outcome = outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return str(outcome)

    assert with_retries(action, wait=waits.append) == "pixels"
    assert waits == pytest.approx([0.1, 0.4])
    outcomes[:] = [SlideError("a: broken")]
    with pytest.raises(SlideError, match="broken"):
        with_retries(action, wait=waits.append)
    outcomes[:] = [OSError(errno.EIO, "gone")] * 9
    with pytest.raises(OSError, match="gone"):
        with_retries(action, wait=waits.append)
    assert waits[2:] == pytest.approx([0.1, 0.4, 1.6, 6.4])
    assert len(outcomes) == 4


def test_handles_are_bounded(manifest: Path) -> None:
    entries = Manifest.load(manifest).slides
    slides = SlidePool(capacity=3)
    kept = [slides.get(entry) for entry in entries]
    assert len(slides._open) == 3
    assert slides.get(entries[-1]) is kept[-1]
    with pytest.raises(OSError, match="Bad file descriptor"):
        kept[0].read(0, 0, 0, (10, 10))
    reopened = slides.get(entries[0])
    assert reopened.tiles is kept[0].tiles  # not parsed again
    np.testing.assert_array_equal(reopened.read(0, 0, 0, (10, 10)).shape, (10, 10, 3))


# Invalid options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size_px": 0}, "size_px must be 1 or more, got 0"),
        ({"mpp": [-1.0]}, "mpp must be above 0, got -1"),
        ({"mpp": []}, "mpp must have a value"),
        ({"mpp": [0.1]}, "none of the .* training slides serves patches of 128 px at mpp 0.1"),
        ({"size_px": 5000}, "none of the .* training slides serves"),
        ({"mpp_weights": [1.0]}, "as many weights"),
        ({"mpp_weights": [0.0, 0.0]}, "mpp_weights must have a value above 0"),
        ({"min_tissue": 1.5}, "min_tissue must be 0 or more and at most 1, got 1.5"),
        ({"slide_fraction": 0.0}, "slide_fraction must be above 0 and at most 1, got 0"),
        ({"patches_per_slide": 1, "patches_in_total": 1}, "not both"),
        ({"patches_per_slide": 0}, "patches_per_slide must be 1 or more, got 0"),
        ({"patches_per_slide": 8, "crops_per_block": 4}, "crops_per_block must be"),
        ({"slide_weighting": "site"}, "'slide', 'patient' or 'area'"),
    ],
)
def test_invalid_options_are_rejected(manifest: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        opened(manifest, **options)


def test_no_patch_passes_the_filter(manifest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fmtrain.patches.dataset.stained_share", lambda pixels: 0.9)
    with pytest.raises(TooManyFailedSlidesError, match="could not be drawn in 64 attempts"):
        opened(manifest, min_stained=1.0)[0]
    for options in ({"rank": 2, "world": 2}, {"start_step": -1}):
        with pytest.raises(ValueError, match="invalid rank or step"):
            StepSampler(batch_size=1, **options)


def test_masks_lie_beside_the_manifest(manifest: Path) -> None:
    entry = Manifest.load(manifest).slides[0]
    mask, note = load_mask(manifest.parent / "manifest" / "tissue" / f"{entry.info.name}.png")
    assert mask.any()
    assert entry.info.fingerprint in note
