"""The command line as a user runs it: exit code, stdout and stderr."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from processes import Program
from timm.models.vision_transformer import VisionTransformer

from repmetrics import cli
from repmetrics.cli_errors import format_error
from repmetrics.data.features import embed
from repmetrics.decisions.run_selection import WORTH_IN_LABELS
from repmetrics.measurement.measure import measure

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 1}
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "repmetrics"


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """The command in this process: exit code, stdout, stderr."""

    def command(*args: str | Path) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stop:
            cli.main([str(arg) for arg in args])
        out, err = capsys.readouterr()
        return int(stop.value.code or 0), out, err

    return command


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("run") / "last.ckpt"
    model = VisionTransformer(**TINY, num_classes=0)
    hparams = {"arch": "vit_small_patch16_224", "arch_kwargs": TINY, "mean": [0.5] * 3, "std": [0.5] * 3}
    state = {f"teacher.backbone.{key}": value for key, value in model.state_dict().items()}
    torch.save({"hyper_parameters": hparams, "state_dict": state, "global_step": 12}, path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """100 images from 10 slides, two classes; one more is broken."""
    root = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    rows = ["file,label,slide"]
    for i in range(100):
        pixels = generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        pixels[..., 0] //= 1 + 3 * (i % 2)
        Image.fromarray(pixels).save(root / f"{i:03}.png")
        rows.append(f"{i:03}.png,{('stroma', 'tumour')[i % 2]},S{i // 10}")
    (root / "100.png").write_text("no image")
    (root / "labels.csv").write_text("\n".join([*rows, "100.png,tumour,S0"]))
    return root


def imported_by(*args: str) -> set[str]:
    code = f"import sys; from repmetrics.cli import main\ntry: main({list(args)!r})\nexcept SystemExit: pass\n"
    code += "print('MODULES', *sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    return {name.split(".")[0] for name in out.rpartition("MODULES")[2].split()}


@pytest.mark.parametrize("args", [["--help"], ["score", "--help"], ["board", "--help"], ["--version"], ["score"]])
def test_help_imports_nothing_heavy(args: list[str]) -> None:
    heavy = {"torch", "timm", "lightning", "torchvision", "scipy", "torchmetrics", "tensorboard"}
    assert not imported_by(*args) & (heavy | {"numpy"})


def test_that_test_would_see_torch() -> None:
    assert "torch" in imported_by("score", "nowhere.npy")


def test_scores_a_checkpoint_on_a_folder(run: Run, checkpoint: Path, folder: Path) -> None:
    code, out, err = run("score", checkpoint, "--data", folder)
    assert (code, err) == (0, "")
    for word in ("rankme", "odcorr", "linear_probe", "step 12", "skipped 1 unreadable images: 100.png"):
        assert word in out


def test_images_declared_independent_have_errors_and_a_warning(run: Run, checkpoint: Path, folder: Path) -> None:
    arguments = ("score", checkpoint, "--data", folder, "--json", "--metrics", "rankme,view_retrieval")
    code, out, err = run(*arguments, "--groups", "independent")
    assert code == 0
    assert err.count("errors hold for independent samples") == 1
    measured = json.loads(out)["scores"][0]["measurements"]
    assert {name: m["groups"] for name, m in measured.items()} == {
        "rankme": 100, "view_retrieval": 50, "linear_probe": 100, "knn": 100
    }  # fmt: skip
    assert all(m["standard_error"] is not None for m in measured.values())
    assert all(any("independent samples" in text for text in m["warnings"]) for m in measured.values())
    code, out, err = run(*arguments, "--groups", "none")
    assert "independent samples" not in out + err
    assert {m["standard_error"] for m in json.loads(out)["scores"][0]["measurements"].values()} == {None}


def test_json_equals_what_python_measures(run: Run, checkpoint: Path, folder: Path) -> None:
    from repmetrics.data.batches import load_batches
    from repmetrics.data.open import open_data
    from repmetrics.encoders.checkpoint import load_encoder

    code, out, _ = run("score", checkpoint, "--data", folder, "--json")
    assert code == 0
    (read,) = json.loads(out)["scores"]
    batches = load_batches(open_data(folder), image_size=32)
    values, groups, _ = embed(load_encoder(checkpoint), batches)
    for name, m in measure(values, groups=groups).items():
        assert read["measurements"][name] == json.loads(json.dumps(m.to_json()))
    assert read["measurements"]["rankme"]["groups"] == 10
    assert read["measurements"]["rankme"]["standard_error"] > 0
    assert read["classes"] == ["stroma", "tumour"]
    assert [item["name"] for item in read["unreadable"]] == ["100.png"]


def test_a_second_run_embeds_nothing(run: Run, checkpoint: Path, folder: Path, cache_folder: Path) -> None:
    def scored(*more: str | Path) -> dict[str, Any]:
        code, out, _ = run("score", checkpoint, "--data", folder, "--json", *more)
        assert code == 0
        (read,) = json.loads(out)["scores"]
        assert isinstance(read, dict)
        return read

    first, second = scored(), scored("--metrics", "stable_rank,rankme")
    assert (first["from_cache"], second["from_cache"]) == (False, True)
    assert second["measurements"]["rankme"] == first["measurements"]["rankme"]
    assert second["unreadable"] == first["unreadable"]
    assert len(list(cache_folder.iterdir())) == 1
    for more in (["--batch-size", "32"], ["--mean", "0.4"], ["--groups", "none"], ["--no-cache"]):
        assert not scored(*more)["from_cache"]


@pytest.mark.parametrize("named", [True, False], ids=["named", "inferred"])
def test_a_second_run_builds_no_encoder(
    run: Run, checkpoint: Path, run_folder: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, named: bool
) -> None:
    args = ["score", checkpoint if named else run_folder / "step=1.pt", "--data", folder, "--image-size", "32"]
    args += ["--metrics", "rankme,alignment", "--views", "2", "--json"]
    first = json.loads(run(*args)[1])["scores"][0]
    monkeypatch.setattr("repmetrics.encoders.encoder.build", lambda *args: pytest.fail("built"))
    second = json.loads(run(*args)[1])["scores"][0]
    assert (first.pop("from_cache"), second.pop("from_cache")) == (False, True)
    assert first.pop("seconds") > second.pop("seconds")
    assert first.pop("images_per_second") > 0
    assert second.pop("images_per_second") is None
    assert first == second
    assert "alignment" in first["measurements"]
    with pytest.raises(pytest.fail.Exception, match="built"):
        run(*args, "--mean", "0.1")


def test_a_cache_that_cannot_be_is_told_before_anything_is_embedded(
    run: Run, checkpoint: Path, folder: Path, cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache_folder.parent.write_text("a file in the way")
    monkeypatch.setattr("repmetrics.scoring.embed.embed", lambda *args, **kwargs: pytest.fail("embedded"))
    code, _, err = run("score", checkpoint, "--data", folder)
    assert (code, len(err.splitlines())) == (1, 1)
    assert str(cache_folder) in err


def test_the_student_where_there_are_two(run: Run, checkpoint: Path, folder: Path, tmp_path: Path) -> None:
    content = torch.load(checkpoint, weights_only=True)
    both = content["state_dict"] | {
        key.replace("teacher", "student"): value + 0.1 for key, value in content["state_dict"].items()
    }
    torch.save({**content, "state_dict": both}, tmp_path / "both.ckpt")
    names = [
        json.loads(run("score", tmp_path / "both.ckpt", "--data", folder, "--json", *which)[1])["scores"][0]["name"]
        for which in ([], ["--teacher"], ["--student"])
    ]
    assert names == [f"both.ckpt:{which}.backbone" for which in ("teacher", "teacher", "student")]


def test_lidar_and_alignment_of_seeded_views(run: Run, checkpoint: Path, folder: Path) -> None:
    some = folder / "some.csv"
    some.write_text("file,slide\n" + "".join(f"{i:03}.png,S{i // 10}\n" for i in range(30)))
    args = ["score", checkpoint, "--data", some, "--metrics", "alignment,rankme,lidar", "--views", "3", "--json"]
    results = [json.loads(run(*args, "--no-cache")[1])["scores"][0] for _ in range(2)]
    measured = results[0]["measurements"]
    assert list(measured)[:3] == ["alignment", "rankme", "lidar"]
    assert (measured["alignment"]["n"], measured["rankme"]["n"]) == (90, 30)
    assert 0 < measured["alignment"]["value"] < 4
    assert measured == results[1]["measurements"]
    assert any(note.startswith("alignment, lidar: 3 views of each image") for note in results[0]["notes"])


def test_view_retrieval_of_a_named_set_and_the_rotation_probe(run: Run, checkpoint: Path, folder: Path) -> None:
    args = ["score", checkpoint, "--data", folder, "--metrics", "view_retrieval,rotation_probe,rankme", "--json"]
    (result,) = json.loads(run(*args)[1])["scores"]
    measured = result["measurements"]
    # every second image, among which the broken one (number 100) is
    assert [measured[name]["n"] for name in ("view_retrieval", "rotation_probe", "rankme")] == [100, 100, 100]
    assert measured["view_retrieval"]["convention"].endswith(
        "; geometry: crop 0.2–1 of the area, ln aspect ± 0.29, flip 0.5"
    )
    assert measured["view_retrieval"]["groups"] == 10
    assert 0 <= measured["view_retrieval"]["value"] <= 1
    (natural,) = json.loads(run(*args, "--view-set", "natural")[1])["scores"]
    assert any("two views of every second image, natural: crop" in note for note in natural["notes"])
    assert natural["measurements"]["rotation_probe"] == measured["rotation_probe"]
    code, _, err = run(*args, "--view-set", "odd")
    assert (code, "unknown view set 'odd': choose among geometry, natural, weak" in err) == (1, True)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three checkpoints of a run, each less collapsed than the last, and a broken one."""
    root = tmp_path_factory.mktemp("checkpoints")
    for step in (1, 2, 10):
        torch.manual_seed(0)
        model = VisionTransformer(**TINY, num_classes=0)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.02 * step * torch.randn_like(parameter))
        torch.save({"model": model.state_dict(), "step": step}, root / f"step={step}.pt")
    (root / "step=5.pt").write_bytes(b"PK\x03\x04 no more")
    return root


def test_a_run_folder_is_scored_in_order_and_a_broken_file_skipped(run: Run, run_folder: Path, folder: Path) -> None:
    code, out, err = run("score", run_folder, "--data", folder, "--csv", "--metrics", "rankme")
    assert code == 1  # not everything asked for was done
    assert "step=5.pt is truncated or damaged" in err
    rows = list(csv.DictReader(io.StringIO(out)))
    assert [row["step"] for row in rows if row["metric"] == "rankme"] == ["1", "2", "10"]


def test_an_error_of_several_files_is_one_line_with_their_names(run: Run, folder: Path, tmp_path: Path) -> None:
    files = [tmp_path / f"{name}.ckpt" for name in "abc"]
    for file in files:
        file.write_text("no checkpoint")
    code, out, err = run("score", *files, tmp_path / "absent.ckpt", "--data", folder)
    assert (code, out) == (1, "")
    lines = [line for line in err.splitlines() if line.startswith("skipped")]
    assert lines[0].startswith(f"skipped 3 files ({', '.join(map(str, files))}): a.ckpt is not a checkpoint")
    assert [line.partition(": ")[0] for line in lines[1:]] == [f"skipped {tmp_path / 'absent.ckpt'}"]


def test_tensorboard_and_sorting(run: Run, run_folder: Path, folder: Path, tmp_path: Path) -> None:
    files = [run_folder / "step=1.pt", run_folder / "step=10.pt"]
    code, out, _ = run("score", *files, "--data", folder, "--sort", "odcorr", "--tensorboard", tmp_path / "board")
    assert code == 0
    assert list((tmp_path / "board").glob("events.*"))
    table = out.split("┘")[0]
    values = [float(line.split("│")[6].split()[0]) for line in table.splitlines() if ".pt:model" in line]
    assert len(values) == 2
    assert values == sorted(values)


def test_compare(run: Run, run_folder: Path, folder: Path) -> None:
    a, b = run_folder / "step=1.pt", run_folder / "step=10.pt"
    code, out, _ = run("compare", a, b, "--data", folder, "--json")
    assert code == 0
    by_name = {v["name"]: v for v in json.loads(out)["b_against_a"]}
    assert by_name["rankme"]["standard_error"] > 0
    assert by_name["rankme"]["outcome"] in ("better", "worse", "no difference")
    code, out, _ = run("compare", a, a, "--data", folder)
    assert code == 0
    assert "no difference on rankme, rankme_centered" in out


def test_select(run: Run, run_folder: Path, folder: Path) -> None:
    files = [run_folder / f"step={step}.pt" for step in (10, 1, 2)]
    code, out, _ = run("select", *files, "--data", folder, "--by", "rankme", "--json")
    assert code == 0
    read = json.loads(out)
    assert [score["step"] for score in read["scores"]] == [1, 2, 10]
    best = max(read["scores"], key=lambda score: score["measurements"]["rankme"]["value"])
    assert read["scores"][read["choice"]["peak"]]["name"] == best["name"]
    assert read["choice"]["run"] == ""
    read = json.loads(run("select", *files, "--data", folder, "--json")[1])
    assert (read["choice"]["by"], read["choice"]["keep"]) == ("last", "step=10.pt:model")
    assert run("select", files[0], "--data", folder)[2] == "repmetrics: a choice needs at least 2 checkpoints, got 1\n"


def test_tensorboard_has_a_run_for_each_folder_and_no_copies(
    run: Run, two_runs: Path, folder: Path, tmp_path: Path
) -> None:
    code, out, err = run(
        "score", two_runs, "--data", folder, "--tensorboard", tmp_path / "board", "--metrics", "rankme"
    )
    assert (code, err) == (0, "")
    assert out.split("┘")[0].count(".pt:model") == 2
    assert ".pt:model is a copy of b/step=10" in out
    assert sorted(events.parent.name for events in (tmp_path / "board").rglob("events.*")) == ["a", "b"]


def test_what_cannot_be_watched_is_refused(run: Run, run_folder: Path, folder: Path) -> None:
    for name in ("step=1.pt", "stpe=1"):
        code, _, err = run("score", run_folder / name, "--data", folder, "--watch")
        assert code == 1
        assert f"{name}: pass the one that the checkpoints are written to" in err


def test_select_skips_a_broken_file_and_names_it(run: Run, run_folder: Path, folder: Path) -> None:
    code, out, err = run("select", run_folder, "--data", folder)
    assert code == 1
    assert "step=5.pt is truncated or damaged" in err
    assert "a choice within one training run" in out


@pytest.fixture
def two_runs(run_folder: Path, tmp_path: Path) -> Path:
    """Two runs whose checkpoints have the same name, the worse one first, and a copy of one of them."""
    root = tmp_path / "runs"
    for name, step in (("a/last.pt", 1), ("b/last.pt", 10), ("b/step=10.pt", 10)):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(run_folder / f"step={step}.pt", root / name)
    return root


def test_equal_names_in_several_runs_stay_apart(run: Run, two_runs: Path, folder: Path) -> None:
    args = [two_runs / "a", two_runs / "b" / "last.pt", "--data", folder, "--json"]
    for sort in ("rankme", "odcorr"):
        scores = json.loads(run("score", *args, "--sort", sort)[1])["scores"]
        assert {(score["run"], score["name"]) for score in scores} == {
            ("a", "a/last.pt:model"), ("b", "b/last.pt:model")
        }  # fmt: skip
        values = [score["measurements"][sort]["value"] for score in scores]
        assert values == sorted(values, reverse=sort == "rankme")
    read = json.loads(run("compare", two_runs / "a" / "last.pt", *args[1:])[1])
    assert (read["a"]["name"], read["b"]["name"]) == ("a/last.pt:model", "b/last.pt:model")
    read = json.loads(run("select", *args)[1])
    assert read["choice"]["keep"] == f"{read['choice']['run']}/last.pt:model"
    out = run("select", *args[:-1])[1]
    assert "keep a/last.pt" in out or "keep b/last.pt" in out
    assert "a choice among 2 folders (a, b): if they are separate training runs" in out
    whole = json.loads(run("select", two_runs, *args[2:])[1])
    assert [score["name"] for score in whole["scores"]] == ["a/last.pt:model", "b/last.pt:model"]  # and no copy


def test_a_few_labels_are_probed_and_choose_where_they_are_worth_it(
    run: Run, two_runs: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = tmp_path / "few.csv"
    few.write_text("file,label\n" + "".join(f"{i:03}.png,{'ab'[i % 2]}\n" for i in range(0, 100, 3)))
    args = [two_runs / "a", two_runs / "b" / "last.pt", "--data", folder, "--labels", few, "--domain", "custom"]
    choice, scores = json.loads(run("select", *args, "--json")[1]).values()
    assert choice["by"] == "view_retrieval_whitened"
    assert "34 labels do not choose: up to 100 a probe chose no better than this domain's views" in choice["reason"]
    assert [score["measurements"]["linear_probe"]["n"] for score in scores] == [34, 34]
    assert scores[0]["measurements"]["rankme"]["groups"] == 10  # of labels.csv in the folder
    monkeypatch.setitem(WORTH_IN_LABELS, "custom", 33)
    choice = json.loads(run("select", *args, "--json")[1])["choice"]
    assert choice["by"] == "linear_probe"
    assert "34 labels choose: above 33" in choice["reason"]
    assert "name the --domain" in run("select", *args[:-2])[2]
    for row, message in (("x.png,a", "1 of its 35 files are not among the 101 images, first 'x.png'"),
                         ("000.png,a", "lists '000.png' 2 times")):  # fmt: skip
        (tmp_path / "bad.csv").write_text(few.read_text() + row)
        code, _, err = run("select", *args[:5], tmp_path / "bad.csv", "--domain", "custom")
        assert (code, message in err, len(err.splitlines())) == (1, True, 1)


def test_watch_scores_what_appears_until_interrupted(
    run_folder: Path, folder: Path, tmp_path: Path, cache_folder: Path
) -> None:
    watched = tmp_path / "run"
    watched.mkdir()
    args = ["score", watched, "--data", folder, "--watch", "--poll-seconds", "0.2", "--json", "--metrics", "rankme"]
    environment = {"XDG_CACHE_HOME": str(cache_folder.parent)}
    (watched / "step=1.pt").write_bytes((run_folder / "step=1.pt").read_bytes())
    program = Program(cli.main, [str(arg) for arg in args], folder=tmp_path, environment=environment)

    def steps() -> list[int]:
        return [int(step) for step in re.findall(r'"step": (\d+)', program.stdout.read_text())]

    def wait_for(expected: list[int]) -> None:
        while (printed := steps()) != expected:
            assert printed == expected[: len(printed)]
            assert program.poll() is None, program.stderr.read_text()
            time.sleep(0.05)

    try:
        wait_for([1])
        (watched / "step=2.pt").write_bytes((run_folder / "step=2.pt").read_bytes())
        wait_for([1, 2])
        program.send_signal(signal.SIGINT)
        assert program.wait() == 130
    finally:
        if program.poll() is None:
            program.kill()
    assert steps() == [1, 2]


def test_several_files_of_embeddings(run: Run, tmp_path: Path) -> None:
    for i in range(2):
        np.save(tmp_path / f"{i}.npy", np.random.default_rng(i).normal(size=(200, 5)))
    code, out, _ = run("score", tmp_path / "0.npy", tmp_path / "1.npy", "--metrics", "rankme,odcorr", "--json")
    assert code == 0
    scores = json.loads(out)["scores"]
    assert [score["name"] for score in scores] == ["0.npy", "1.npy"]
    assert [list(score["measurements"]) for score in scores] == [["rankme", "odcorr"]] * 2


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["score", "nowhere.ckpt", "--data", "{folder}"], "nowhere.ckpt: No such file or directory"),
        (["score", "{checkpoint}", "--data", "nowhere"], "nowhere does not exist"),
        (["score", "{folder}/000.png", "--data", "{folder}"], "000.png is not a checkpoint: expected a PyTorch file"),
        (["score", "{folder}"], "holds images: pass it as --data, and a checkpoint"),
        (["score", "{checkpoint}"], "a checkpoint is scored on images: name them with --data"),
        (["score", "{checkpoint}", "--data", "{folder}", "--image-size", "24"], "takes images of (32, 32), got (24"),
        (["score", "{bare}", "--data", "{folder}", "--image-size", "30"], "(30) should be divisible by patch size (8)"),
        (["score", "{bare}"], "step=1.pt holds several matrices: found model.cls_token (1, 1, 64) torch.float32, "),
        (["score", "{checkpoint}", "--data", "{folder}", "--arch", "vit_nano"], "timm has no architecture 'vit_nano'"),
        (["score", "{checkpoint}", "--data", "{folder}", "--metrics", "rank"], "unknown metric 'rank': choose among"),
        (["score", "{checkpoint}", "--data", "{folder}", "--sort", "rank"], "unknown metric 'rank': choose among"),
        (["score", "{checkpoint}", "--data", "{folder}", "--labels", "organ"], "--labels organ: labels.csv has the"),
        (["score", "{checkpoint}", "--data", "{folder}", "--device", "cuda:77"], "no device 'cuda:77' on this machine"),
        (["score", "{checkpoint}", "--data", "{folder}", "--metrics", "dse"], "dse needs tokens, which score does not"),
        (["board", "nowhere"], "nowhere"),
    ],
)  # fmt: skip
def test_bad_input_is_one_sentence(
    run: Run, checkpoint: Path, run_folder: Path, folder: Path, args: list[str], message: str
) -> None:
    bare = run_folder / "step=1.pt"
    code, out, err = run(*(arg.format(checkpoint=checkpoint, bare=bare, folder=folder) for arg in args))
    assert (code, out) == (1, "")
    assert message in err
    assert err.startswith("repmetrics: ")
    assert len(err.strip().splitlines()) == 1
    assert len(err) < 600


@pytest.mark.parametrize(
    "args",
    [
        ["score"],
        ["score", "a", "--mean", "0.5,0.5"],
        ["score", "a", "--mean", "nan"],
        ["score", "a", "--std", "0.5,0,0.5"],
        ["score", "a", "--arch-kwargs", "[1]"],
        ["score", "a", "--arch-kwargs", "{"],
        ["score", "a", "--batch-size", "0"],
        ["score", "a", "--json", "--csv"],
        ["score", "a", "--metrics", ""],
        ["score", "a", "--watch"],
        ["score", "a", "--tensorboard", "board"],
        ["score", "a", "--data", "b", "--tensorboard", __file__],
        ["compare", "a"],
        ["nope"],
    ],
)
def test_wrong_usage_is_2(run: Run, args: list[str]) -> None:
    code, _, err = run(*args)
    assert code == 2
    assert "Usage: " in err
    assert "Traceback" not in err


def test_debug_shows_the_traceback() -> None:
    with pytest.raises(FileNotFoundError):
        cli.main(["score", "nowhere.npy", "--debug"])


def test_interrupt_is_130(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("repmetrics.scoring.score.score_embeddings", interrupted)
    assert run("score", "a.npy")[0] == 130


def test_an_unforeseen_failure_says_how_to_see_more(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise KeyError("surprise")

    monkeypatch.setattr("repmetrics.scoring.score.score_embeddings", broken)
    code, _, err = run("score", "a.npy")
    assert code == 1
    assert err.splitlines() == ["repmetrics: KeyError: 'surprise'", "run 'repmetrics --debug ...' for the traceback"]


def test_a_terminal_of_ascii_ends_no_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    np.save(tmp_path / "features.npy", np.random.default_rng(0).normal(size=(64, 8)))
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    with pytest.raises(SystemExit) as ended:
        cli.main(["score", str(tmp_path / "features.npy"), "--metrics", "rankme"])
    assert ended.value.code == 0
    stream.flush()
    assert "rankme" in stream.buffer.getvalue().decode("ascii")  # type: ignore[attr-defined]


def test_a_missing_extra_is_named() -> None:
    error = ModuleNotFoundError("No module named 'timm'", name="timm")
    assert format_error(error) == "this needs timm: pip install 'repmetrics[score]'"


def test_mean_and_std_change_the_features(run: Run, checkpoint: Path, folder: Path) -> None:
    results = [
        json.loads(run("score", checkpoint, "--data", folder, "--json", *more)[1])["scores"][0]["measurements"]
        for more in ([], ["--mean", "0.5", "--std", "0.5,0.5,0.5"], ["--mean", "0.1"])
    ]
    assert results[0] == results[1]
    assert results[0]["rankme"] != results[2]["rankme"]


@pytest.mark.parametrize("package", ["repmetrics", "fmtrain"])
def test_the_version_is_told(package: str) -> None:
    done = subprocess.run([sys.executable, "-m", package, "--version"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{version('repmetrics')}\n", "")
