"""Every command and snippet of the README and the docs, as printed, in small folders with the names that they use."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import pytest
import timm
import torch
import typer
from paths import ROOT
from PIL import Image
from small_runs import LIGHTNING_NOISE, HeldOutImages, loader, simclr

import fmtrain.cli
import repmetrics.cli
from repmetrics.data.images import read_image
from repmetrics.monitoring.record import read_jsonl

PAGES = ["README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]
PACKAGE = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EARLIER = ROOT / "tests" / "data" / "earlier_run"
RECORDS = EARLIER / "run" / "measurements.jsonl"
PROGRAMS = {"repmetrics": repmetrics.cli, "fmtrain": fmtrain.cli}
# Commands that train for long, need data that nobody ships, or serve: their options are parsed, and no more.
PARSED = {"fmtrain demo", "fmtrain manifest", "fmtrain sweep", "fmtrain evaluate", "repmetrics board"}


def blocks(page: str, languages: str) -> list[str]:
    text = (ROOT / page).read_text(encoding="utf-8")
    found = re.findall(rf"^( *)```(?:{languages})\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL)
    return [re.sub(rf"^{indent}", "", block, flags=re.MULTILINE) for indent, block in found]


def commands() -> list[str]:
    """Command lines of all pages. In a block with prompts, lines without one are output."""
    lines: list[str] = []
    for page in PAGES:
        for block in blocks(page, "console|sh"):
            block = re.sub(r"\\\n *", "", block)
            prompted = [line[2:] for line in block.splitlines() if line.startswith("$ ")]
            lines += prompted or [line for line in block.splitlines() if line and not line.startswith("#")]
    parts = (part.partition("  #")[0].strip() for line in lines for part in line.split("&&"))
    return list(dict.fromkeys(parts))


COMMANDS = commands()


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Files with the names that the commands use: checkpoints, images, embeddings, runs."""
    root = tmp_path_factory.mktemp("docs")
    state = torch.load(EARLIER / "run" / "checkpoints" / "last.ckpt", weights_only=False)
    weights = [value for value in state["state_dict"].values() if value.is_floating_point() and value.ndim == 2]
    for step, names in (
        (4, ("a.ckpt", "runs/a/step=4.ckpt")),
        (8, ("b.ckpt", "c.ckpt", "checkpoint.ckpt", "last.ckpt")),
    ):
        state["global_step"] = step
        for weight in weights:
            weight.mul_(1 + step / 100)
        for name in (*names, f"runs/a/step={step}.ckpt", f"runs/b/step={step}.ckpt", f"checkpoints/step={step}.ckpt",
                     f"run/teachers/step={step}.ckpt"):  # fmt: skip
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            torch.save(state, root / name)
    for folder in ("run/checkpoints", "demo/run/checkpoints", "run/dino/checkpoints"):
        (root / folder).mkdir(parents=True)
        shutil.copy(root / "last.ckpt", root / folder)
    generator = torch.Generator().manual_seed(0)
    for folder in ("images", "held_out", "pcam"):
        for k in range(16):
            path = root / folder / f"class{k % 2}" / f"{k}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = torch.randint(0, 256, (32, 32, 3), generator=generator, dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(path)
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=4, num_classes=0)
    torch.save(vit.state_dict(), root / "vit.pth")
    np.save(root / "embeddings.npy", torch.randn(64, 8, generator=generator).numpy())
    shutil.copytree(EARLIER, root, dirs_exist_ok=True, ignore=shutil.ignore_patterns("run"))
    for folder in ("run", "manifest", "demo"):
        shutil.copy(root / "manifest.json", root / folder)
        (root / folder / "slides").symlink_to(root / "slides")
    scores = [entry | {"name": f"step={entry['step']}.ckpt", "run": ""} for entry in read_jsonl(RECORDS)]
    (root / "scores.json").write_text(json.dumps({"scores": scores}), encoding="utf-8")
    for folder in (
        "run",
        "demo/run",
        "runs/a",
        "runs/b",
        "runs/c",
        "RUNS/a",
        "RUNS/b",
        "RUNS/c",
        "lightning_logs/version_0",
    ):
        (root / folder).mkdir(parents=True, exist_ok=True)
        shutil.copy(RECORDS, root / folder)
    rows = [
        f"{run},{step},{step + k},{0.5 + step / 100},{0.4 + k / 9},{0.3 + k * step / 99}"
        for k, run in enumerate("abc")
        for step in (0, 5, 9)
    ]
    (root / "table.csv").write_text("run,step,rankme,pcam,oscc,nuclei\n" + "\n".join(rows) + "\n", encoding="utf-8")
    for page in PAGES:  # files that the pages print, named in their first line
        for block in blocks(page, "yaml|toml"):
            if name := re.match(r"# (\S+\.(?:yaml|toml))\n", block):
                (root / name[1]).write_text(block, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        yield root


def unknown_extras(words: list[str]) -> list[str]:
    named = [name for word in words for group in re.findall(r"\[(.*?)\]", word) for name in group.split(",")]
    assert named, "a pip command of the docs names an extra"
    return [name for name in named if name not in PACKAGE["optional-dependencies"]]


def parse_only(words: list[str]) -> None:
    """Parse a command's options, without running it."""
    command: Any = typer.main.get_command(PROGRAMS[words[0]].app)
    command.commands[words[1]].make_context(words[1], words[2:])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_of_the_docs_works(
    line: str, workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line, _, redirected = line.partition(" > ")
    words = shlex.split(line.replace("…", ""))
    program, rest = words[0], words[1:]
    if program == "pip":
        assert unknown_extras(rest) == []
        return
    if program == "make":
        assert re.search(rf"^{rest[0]}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        return
    if program == "python":
        assert (ROOT / rest[0]).is_file()
        return
    if program in ("torchrun", "srun"):
        words = words[words.index("fmtrain") :]
    if " ".join(words[:2]) in PARSED:
        parse_only(words)
        return
    if words[1] == "fit":
        words.append("--print_config")
    if words[1] == "trust":
        words += ["--draws", "100"]
    if "--watch" in words:
        first = workspace / "runs" / "a" / "step=4.ckpt"
        monkeypatch.setattr("repmetrics.scoring.checkpoints.watch_checkpoints", lambda *_, **__: [first])
    with pytest.raises(SystemExit) as ended:
        PROGRAMS[words[0]].main(words[1:])
    shown = capsys.readouterr()
    assert ended.value.code in (0, None), shown.err
    assert shown.out
    if redirected:
        assert json.loads(shown.out)


def test_the_readme_states_the_variant_of_a_timm_network(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without the arguments, the network's own size and ImageNet's mean and std would be taken."""
    (line,) = (line for line in COMMANDS if " vit.pth " in line)
    with pytest.raises(SystemExit):
        repmetrics.cli.main([*shlex.split(line)[1:], "--json"])
    (score,) = json.loads(capsys.readouterr().out)["scores"]
    assert score["encoder"] == "vit_tiny_patch16_224"
    assert not any("ImageNet" in note or "resampled" in note for note in score["notes"])
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=4, num_classes=0).eval()
    model.load_state_dict(torch.load(workspace / "vit.pth"))
    files = sorted((workspace / "images").rglob("*.png"), key=lambda file: file.relative_to(workspace).as_posix())
    images = torch.stack([read_image(file) for file in files])
    with torch.no_grad():
        value = repmetrics.measure(model(images / 255), metrics=["rankme"])["rankme"].value
    assert score["measurements"]["rankme"]["value"] == pytest.approx(value, rel=1e-5)


class Teacher(torch.nn.Module):
    """A teacher with the backbone that the snippets name."""

    def __init__(self, backbone: torch.nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = self.backbone(images)
        return features


def snippets(page: str) -> list[str]:
    """Python of a page that is no doctest. That for Hugging Face has its own tests, with a Trainer of transformers."""
    plain = [block for block in blocks(page, "python") if not block.startswith(">>>")]
    return [block for block in plain if "integrations.huggingface" not in block]


@pytest.mark.parametrize("page", [page for page in PAGES if snippets(page)])
@pytest.mark.filterwarnings(*LIGHTNING_NOISE, "ignore:.*GPU available.*", "ignore:no probe")
def test_the_snippets_of_a_page_work(page: str, workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert workspace == Path.cwd()
    model = simclr()
    model.teacher = Teacher(model.teacher)
    model.train_dataloader = loader
    real = lightning.Trainer
    monkeypatch.setattr(lightning, "Trainer", lambda **options: real(**options, max_steps=4, accelerator="cpu"))
    held_out = HeldOutImages(64)
    names: dict[str, Any] = {"model": model, "held_out": held_out, "held_out_dataset": held_out}
    for snippet in snippets(page):
        exec(compile(snippet, page, "exec"), names)
    if page == "README.md":
        assert model.trainer.global_step == 4  # nothing stopped it
        assert [entry["step"] for entry in read_jsonl(Path(model.trainer.log_dir) / "measurements.jsonl")] == [0, 4]
