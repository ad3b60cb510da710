"""A run that is killed and resumed equals one that is not."""

from __future__ import annotations

import json
import resource
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from fit_runs import SMALL, call, equal, rows
from processes import Program, run_fmtrain
from small_runs import LIGHTNING_NOISE
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fmtrain.manifest.build import build_manifest
from fmtrain.manifest.manifest import Manifest
from fmtrain.training.checkpoints import AtomicCheckpointIO, find_nonfinite
from fmtrain.training.resume import latest_checkpoint
from repmetrics.data import held_out
from repmetrics.monitoring.record import Record, write_history

pytestmark = [
    *(pytest.mark.filterwarnings(line) for line in LIGHTNING_NOISE),
    pytest.mark.filterwarnings("ignore:.*args parameter is intended to run.*"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:lightning"),
]
STEPS = 30
STEPS_ACCUMULATED = 15
ACCUMULATED = ["--trainer.accumulate_grad_batches", "3", "--trainer.max_steps", str(STEPS_ACCUMULATED)]
ACCUMULATED += ["--monitor.metrics", "[rankme]"]


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # in the processes started here too: equal weights need equal splits
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def arguments_in(folder: Path, manifest: Path) -> list[str]:
    config = folder / "small.yaml"
    config.write_text(SMALL)
    drop = [
        "--model.init_args.drop_path_rate",
        "0.3",
        "--trainer.log_every_n_steps",
        "1",
        "--checkpoint.save_top_k",
        "-1",
    ]  # stochastic depth draws from torch's global generator
    return ["fit", "--config", str(config), "--data.manifest", str(manifest), "--trainer.max_steps", str(STEPS), *drop]


@pytest.fixture
def arguments(manifest: Path, tmp_path: Path) -> list[str]:
    return arguments_in(tmp_path, manifest)


@pytest.fixture(scope="module")
def uninterrupted(manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The end of a run with accumulated gradients that no signal interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    program = Program(
        run_fmtrain, *arguments_in(folder, manifest), *ACCUMULATED, "--out", folder / "run", folder=folder
    )
    assert program.wait() == 0, program.stderr.read_text()
    return final(folder / "run", STEPS_ACCUMULATED)


def started(arguments: list[str], out: Path) -> Program:
    """Start a run in a new process and wait for its sixth step."""
    program = Program(run_fmtrain, *arguments, "--out", out, folder=out.parent)
    until = time.monotonic() + 300
    while not (out / "checkpoints" / "step-00000006.ckpt").exists():
        assert program.poll() is None, program.stderr.read_text()
        assert time.monotonic() < until
        time.sleep(0.01)
    return program


def final(out: Path, steps: int = STEPS) -> dict[str, Any]:
    content = torch.load(out / "checkpoints" / "last.ckpt", weights_only=True)
    assert content["global_step"] == steps
    return {key: content[key] for key in ("state_dict", "optimizer_states")}


@pytest.mark.slow
def test_killed_and_resumed_is_bit_for_bit_the_same(arguments: list[str], tmp_path: Path) -> None:
    process = started(arguments, tmp_path / "killed")
    process.kill()
    process.wait()
    forget_checkpoints_after(tmp_path / "killed", 6)  # logs of later steps are on the disk
    torch.rand(17)  # the state of the global generator has no effect
    assert call(*arguments, "--out", tmp_path / "killed", "--resume") == 0
    assert call(*arguments, "--out", tmp_path / "whole") == 0
    assert equal(final(tmp_path / "killed"), final(tmp_path / "whole"))

    def measured(out: Path) -> list[Any]:
        rows = [json.loads(line) for line in (out / "measurements.jsonl").read_text().splitlines()]
        return [(row["step"], {k: m["value"] for k, m in row["measurements"].items()}) for row in rows]

    assert measured(tmp_path / "killed") == measured(tmp_path / "whole")
    for tag in ("train/loss", "train/grad_norm", "schedule/lr"):
        assert logged(tmp_path / "killed", tag) == logged(tmp_path / "whole", tag)
    assert [step for step, _ in logged(tmp_path / "killed", "train/loss")] == list(range(1, STEPS + 1))


def forget_checkpoints_after(out: Path, step: int) -> None:
    """Delete later checkpoints, as if the run had been killed before the next one."""
    for path in (out / "checkpoints").glob("*.ckpt"):
        if path.name > f"step-{step:08d}.ckpt" or path.name == "last.ckpt":
            path.unlink()


def logged(out: Path, tag: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(out))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


@pytest.mark.parametrize(
    "options",
    [
        ["--trainer.accumulate_grad_batches", "2"],
        ["--trainer.precision", "bf16-mixed"],
        ["--model.grad_checkpointing", "true", "--data.num_workers", "2"],
        ["--model", "fmtrain.methods.DINOv2", "--model.centering", "sinkhorn_knopp"],
    ],
    ids=["accumulated", "bf16", "checkpointed, two workers", "DINOv2"],
)
def test_any_run_resumes_from_a_middle_checkpoint_to_the_same_weights(
    options: list[str],
    manifest: Path,
    tmp_path: Path,
) -> None:
    config, whole, cut = tmp_path / "small.yaml", tmp_path / "whole", tmp_path / "cut"
    config.write_text(SMALL.replace("patch_size: 8", "patch_size: 4"))
    arguments = ["fit", "--config", config, "--data.manifest", manifest, "--checkpoint.save_top_k", -1]
    arguments += ["--model.init_args.drop_path_rate", 0.3, "--monitor.every_n_steps", 100, *options]
    assert call(*arguments, "--out", whole) == 0
    (cut / "checkpoints").mkdir(parents=True)
    shutil.copy(whole / "checkpoints" / "step-00000002.ckpt", cut / "checkpoints")  # and half a file, as after a crash
    (cut / "checkpoints" / "last.ckpt").write_bytes((whole / "checkpoints" / "last.ckpt").read_bytes()[:1000])
    assert call(*arguments, "--out", cut, "--resume") == 0
    assert [path.name for path in (cut / "checkpoints").glob("last*")] == ["last.ckpt"]
    a, b = (torch.load(out / "checkpoints" / "last.ckpt", weights_only=True) for out in (whole, cut))
    assert a["global_step"] == b["global_step"] == 6
    assert all(value.dtype == torch.float32 for value in a["state_dict"].values() if value.is_floating_point())
    assert equal(a["state_dict"], b["state_dict"])
    assert equal(a["optimizer_states"], b["optimizer_states"])


def test_two_workers_train_the_same_weights_as_none(manifest: Path, tmp_path: Path) -> None:
    config = tmp_path / "small.yaml"
    config.write_text(SMALL)
    arguments = ["fit", "--config", config, "--data.manifest", manifest, "--trainer.max_steps", 3]
    for workers in (0, 2):
        assert call(*arguments, "--data.num_workers", workers, "--out", tmp_path / str(workers)) == 0
    none, two = (torch.load(tmp_path / n / "checkpoints" / "last.ckpt", weights_only=True) for n in ("0", "2"))
    assert equal(none["state_dict"], two["state_dict"])


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_saves_and_prints_how_to_resume(
    number: int, arguments: list[str], uninterrupted: dict[str, Any], tmp_path: Path
) -> None:
    arguments = [*arguments, *ACCUMULATED]
    process = started(arguments, tmp_path / "run")
    process.send_signal(number)
    assert process.wait() == 130
    error = process.stderr.read_text()
    assert "--resume continues from there" in error
    assert "Traceback" not in error
    assert call(*arguments, "--out", tmp_path / "run", "--resume") == 0
    assert equal(final(tmp_path / "run", STEPS_ACCUMULATED), uninterrupted)
    steps = [row["step"] for row in rows(tmp_path / "run")]
    assert steps == sorted(set(steps)), "each evaluation once"


@pytest.mark.parametrize(("batch", "steps"), [(1, []), (5, [0])])  # in the first evaluation; in that of step 3
def test_a_signal_ends_an_evaluation_and_the_run_resumes(
    batch: int, steps: list[int], manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, embed_batch = iter(range(100)), held_out.embed_batch

    def interrupted(*args: Any, **options: Any) -> Any:
        if next(calls) == batch:
            signal.raise_signal(signal.SIGINT)
        return embed_batch(*args, **options)

    config = tmp_path / "small.yaml"
    config.write_text(SMALL)
    arguments = [
        "fit",
        "--config",
        config,
        "--data.manifest",
        manifest,
        "--monitor.batch_size",
        16,
        "--monitor.metrics",
        "[rankme]",
    ]
    with monkeypatch.context() as patch:
        patch.setattr(held_out, "embed_batch", interrupted)
        assert call(*arguments, "--out", tmp_path / "run") == 130
    assert next(calls) == batch + 1, "the evaluation ended with the batch"
    if steps:
        assert [row["step"] for row in rows(tmp_path / "run")] == steps
        assert call(*arguments, "--out", tmp_path / "run", "--resume") == 0
        assert [row["step"] for row in rows(tmp_path / "run")] == [0, 3, 6]


def test_a_runs_config_can_be_used_for_another_folder(manifest: Path, tmp_path: Path) -> None:
    config, first, second = tmp_path / "small.yaml", tmp_path / "first", tmp_path / "second"
    config.write_text(SMALL)
    assert call("fit", "--config", config, "--out", first, "--data.manifest", manifest, "--trainer.max_steps", 2) == 0
    before = {path: path.read_bytes() for path in first.rglob("*") if path.is_file()}
    assert call("fit", "--config", first / "config.yaml", "--out", second) == 0
    assert {path: path.read_bytes() for path in first.rglob("*") if path.is_file()} == before
    kinds = [sorted(path.name.partition(".out.")[0] for path in out.rglob("*")) for out in (first, second)]
    assert kinds[0] == kinds[1]
    assert equal(
        *(torch.load(out / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"] for out in (first, second))
    )


def test_measurements_after_the_checkpoint_are_deleted(tmp_path: Path) -> None:
    path = tmp_path / "measurements.jsonl"
    history = [Record(step, 0, 1.0, run="this") for step in (0, 3)]
    write_history(path, history)
    whole = path.read_text()
    other = '{"run": "other", "step": 9}\n'
    path.write_text(f'{whole}{other}{{"run": "this", "step": 6}}\n{{"st')  # killed while writing
    write_history(path, history)
    assert path.read_text() == other + whole
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_half_written_checkpoint_is_skipped_by_name(tmp_path: Path) -> None:
    for step in (2, 4):
        torch.save({"global_step": step, "weights": torch.zeros(1000)}, tmp_path / f"step-{step}.ckpt")
    whole = (tmp_path / "step-4.ckpt").read_bytes()
    (tmp_path / "last.ckpt").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.ckpt").write_bytes(b"")
    skipped: list[str] = []
    path, step = latest_checkpoint(tmp_path, on_skipped=lambda path, _: skipped.append(path.name))
    assert (path.name, step) == ("step-4.ckpt", 4)
    assert sorted(skipped) == ["empty.ckpt", "last.ckpt"]
    with pytest.raises(ValueError, match="no good checkpoint"):
        latest_checkpoint(tmp_path / "none", on_skipped=lambda *_: None)


def test_a_failed_write_keeps_the_previous_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"global_step": 1}, path)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        AtomicCheckpointIO().save_checkpoint({"global_step": 2}, path)
    assert torch.load(path, weights_only=True) == {"global_step": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]


def content(step: int, value: float = 0.0) -> dict[str, Any]:
    moments = {"state": {0: {"exp_avg": torch.zeros(2000)}}}
    return {
        "global_step": step, "state_dict": {"weight": torch.full((2000,), value)}, "optimizer_states": [moments],
        "callbacks": {"ModelCheckpoint{}": {"last_model_path": str(value)}, "Timer": {"elapsed": 3.0}, "history": []},
    }  # fmt: skip


def test_the_newest_checkpoint_without_nan_is_resumed(tmp_path: Path) -> None:
    torch.save(content(2), tmp_path / "step-2.ckpt")
    torch.save(content(4, value=torch.nan), tmp_path / "step-4.ckpt")  # as written by another program
    bad = content(6)
    bad["optimizer_states"][0]["state"][0]["exp_avg"][7] = torch.inf
    torch.save(bad, tmp_path / "last.ckpt")
    weights = {"global_step": 8, "state_dict": {}, "loops": {}}
    torch.save(weights, tmp_path / "weights.ckpt")
    skipped: dict[str, str] = {}
    path, step = latest_checkpoint(tmp_path, on_skipped=lambda path, reason: skipped.update({path.name: reason}))
    assert (path.name, step) == ("step-2.ckpt", 2)
    assert skipped == {
        "last.ckpt": "optimizer_states.0.state.0.exp_avg holds NaN or infinity",
        "step-4.ckpt": "state_dict.weight holds NaN or infinity",
        "weights.ckpt": "it holds the weights alone, without the optimizer's state",
    }
    masked = content(1)
    masked["state_dict"]["mask"] = torch.tensor([0.0, -torch.inf])
    assert find_nonfinite(masked) is None


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="reads /proc")
def test_finding_the_newest_of_three_reads_none_of_them_whole(tmp_path: Path) -> None:
    large = content(0) | {"state_dict": {"weight": torch.zeros(2_000_000)}}
    for step in (2, 4, 6):
        AtomicCheckpointIO().save_checkpoint(large | {"global_step": step}, tmp_path / f"step-{step}.ckpt")

    def bytes_read() -> int:
        return int(Path("/proc/self/io").read_text().split("rchar: ")[1].split()[0])

    before = bytes_read()
    assert latest_checkpoint(tmp_path, on_skipped=lambda *_: None)[1] == 6
    assert bytes_read() - before < 0.2 * (tmp_path / "step-6.ckpt").stat().st_size


def test_one_state_is_written_once_under_two_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    io, step, last = AtomicCheckpointIO(), tmp_path / "step-2.ckpt", tmp_path / "last.ckpt"
    io.save_checkpoint(content(2), step)
    io.save_checkpoint(content(2, value=0.0), last)
    assert step.samefile(last)
    io.save_checkpoint(content(4), last)  # a rename: the other name keeps its content
    assert torch.load(step, weights_only=True)["global_step"] == 2
    assert torch.load(last, weights_only=True)["global_step"] == 4
    measured = content(4)
    measured["callbacks"]["history"].append(0.5)  # the monitor's evaluation of the last step
    io.save_checkpoint(measured, last)
    assert torch.load(last, weights_only=True)["callbacks"]["history"] == [0.5]
    measured["callbacks"]["history"].append(0.7)  # in place, as callbacks do
    io.save_checkpoint(measured, last)
    assert torch.load(last, weights_only=True)["callbacks"]["history"] == [0.5, 0.7]

    def refused(*_: object) -> None:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr("os.link", refused)  # a file system without hard links
    io.save_checkpoint(measured, step)
    assert torch.load(step, weights_only=True)["global_step"] == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.ckpt", "step-2.ckpt"]


def test_the_time_of_earlier_jobs_does_not_count(tmp_path: Path) -> None:
    AtomicCheckpointIO().save_checkpoint(content(2), tmp_path / "last.ckpt")
    assert "Timer" not in AtomicCheckpointIO().load_checkpoint(tmp_path / "last.ckpt")["callbacks"]


@contextmanager
def no_file_larger_than(size: int) -> Iterator[None]:
    """Let writes fail half-way as on a full disk, in this process and the threads that write its logs."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_ends_the_run_with_one_sentence_and_keeps_the_last_good_checkpoint(
    manifest: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config, out = tmp_path / "small.yaml", tmp_path / "run"
    config.write_text(SMALL)
    arguments = ["fit", "--config", config, "--out", out, "--data.manifest", manifest]
    arguments += ["--monitor.pictures", "false"]  # the checkpoint is to be the first file that is too large
    assert call(*arguments, "--trainer.max_steps", 2) == 0
    last = out / "checkpoints" / "step-00000002.ckpt"
    files = sorted(path.name for path in last.parent.iterdir())
    capsys.readouterr()
    with no_file_larger_than(last.stat().st_size // 2):
        assert call(*arguments, "--resume") == 1
    (message,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("fmtrain:")]
    path = out / "checkpoints" / "step-00000004.ckpt"
    assert f"writing {path} failed at step 4: File too large; the last good checkpoint is {out}" in message
    assert message.endswith("--resume continues from there")
    assert sorted(path.name for path in last.parent.iterdir()) == files
    assert call(*arguments, "--resume") == 0
    assert torch.load(last.with_name("last.ckpt"), weights_only=True)["global_step"] == 6


def test_a_full_disk_leaves_no_incomplete_line_of_measurements(
    manifest: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config, out = tmp_path / "small.yaml", tmp_path / "run"
    config.write_text(SMALL)
    arguments = ["fit", "--config", config, "--out", out, "--data.manifest", manifest, "--trainer.logger", "false"]
    assert call(*arguments, "--trainer.max_steps", 2) == 0
    measurements = out / "measurements.jsonl"
    before = measurements.read_bytes()
    with no_file_larger_than(len(before) + 100):
        assert call(*arguments, "--resume") == 1
    assert "File too large; the last good checkpoint is" in capsys.readouterr().err
    assert measurements.read_bytes() == before


def test_a_run_is_not_resumed_with_other_slides_and_its_card_names_its_slides(
    manifest: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config, out, other = tmp_path / "small.yaml", tmp_path / "run", tmp_path / "other.json"
    config.write_text(SMALL)
    arguments = ["fit", "--config", config, "--out", out, "--trainer.max_steps", 1, "--data.manifest"]
    assert call(*arguments, manifest) == 0
    assert call("manifest", manifest.parent / "slides", "--out", other, "--held-out", 40, "--size-px", 32) == 0
    first, second = (json.loads(path.read_text())["hash"] for path in (manifest, other))
    capsys.readouterr()
    assert call(*arguments, other, "--resume") == 1
    message = (
        f"started with the manifest of hash {first[:12]}, but data.manifest has {second[:12]}: resume with the first"
    )
    assert message in capsys.readouterr().err
    assert call("export", out / "checkpoints" / "last.ckpt", "--out", tmp_path / "encoder") == 0
    card = (tmp_path / "encoder" / "README.md").read_text()
    assert f"- manifest: {first}\n- training slides: 5\n" in card
    assert "At step 1, on the held-out patches" in card
    assert "max_steps: 1\n" in card


def test_a_run_goes_on_with_its_slides_after_the_manifest_was_extended(
    manifest: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    root, config, whole, cut = (tmp_path / name for name in ("slides", "small.yaml", "whole", "cut"))
    config.write_text(SMALL)
    shutil.copytree(manifest.parent / "slides", root)
    new = max(root.glob("*.tiff"))
    new.rename(tmp_path / new.name)
    options: dict[str, Any] = {"held_out": 60, "held_out_fraction": 0.5, "size_px": 32}
    built = build_manifest(root, tmp_path / "m", **options)
    arguments = ["fit", "--config", config, "--data.manifest", built.path, "--checkpoint.save_top_k", -1]
    arguments += ["--trainer.max_steps", 4, "--monitor.every_n_steps", 100]
    assert call(*arguments, "--out", whole) == 0
    (cut / "checkpoints").mkdir(parents=True)
    shutil.copy(whole / "checkpoints" / "step-00000002.ckpt", cut / "checkpoints")
    (tmp_path / new.name).rename(new)
    assert len(build_manifest(root, tmp_path / "m", **options).slides) == len(built.slides) + 1
    assert call(*arguments, "--out", cut, "--resume") == 0
    assert "the manifest was extended since the run started: its 1 new slides are not used" in caplog.text
    a, b = (torch.load(out / "checkpoints" / "last.ckpt", weights_only=True) for out in (whole, cut))
    assert a["global_step"] == b["global_step"] == 4
    assert equal(a["state_dict"], b["state_dict"])
    assert a["SlidePatches"]["manifest"] == b["SlidePatches"]["manifest"] == built.content_hash()


def test_a_run_of_another_architecture_is_not_resumed(
    manifest: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config, out = tmp_path / "small.yaml", tmp_path / "run"
    config.write_text(SMALL)
    arguments = ["fit", "--config", config, "--out", out, "--data.manifest", manifest, "--trainer.max_steps", 1]
    assert call(*arguments) == 0
    before = (out / "config.yaml").read_text()
    capsys.readouterr()
    shapes = "student.head.last_layer.parametrizations.weight.original0: (64, 1) instead of (128, 1)"
    for option, value, message in (
        ("arch_kwargs.depth", 3, "its encoder is a ViT of width 32, 2 blocks, patches of 8 px, the configuration's"),
        ("n_prototypes", 128, shapes),
    ):
        assert call(*arguments, "--resume", f"--model.init_args.{option}", value) == 1
        error = capsys.readouterr().err
        assert str(out / "checkpoints") in error
        assert message in error
        assert "resume with its run's config.yaml" in error
        assert len(error.strip().splitlines()) == 1
    assert (out / "config.yaml").read_text() == before


def test_a_slide_that_fails_during_a_run_stops_neither_it_nor_its_resumption(
    manifest: Path,
    arguments: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(Manifest.load(manifest).slides[0].path.parent, tmp_path / "slides")
    built = build_manifest(tmp_path / "slides", tmp_path / "copy", held_out=60, held_out_fraction=0.5, size_px=32)
    arguments = [*arguments, "--data.manifest", str(built.path), "--out", str(tmp_path / "run")]
    assert call(*arguments, "--trainer.max_steps", "6") == 0
    broken = built.slides_in("train")[0]
    with broken.path.open("ab") as file:
        file.write(b"x")
    capsys.readouterr()
    assert call(*arguments, "--trainer.max_steps", "18", "--resume") == 0
    state = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)["SlidePatches"]
    assert list(state["quarantined"]) == [broken.info.name]
    assert call(*arguments, "--trainer.max_steps", "20", "--resume") == 0
    assert call(*arguments, "--overwrite") == 1
    assert f"fmtrain: {broken.info.name} has changed since" in capsys.readouterr().err
    assert (tmp_path / "run" / "checkpoints").is_dir()
