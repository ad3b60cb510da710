"""What an installation with some extras can do, and what the README and errors say about it."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from installed import PROJECT, absent, distributions
from paths import HELPERS, ROOT

from fmtrain import cli as fmtrain_cli
from repmetrics.cli_errors import EXTRAS

SOURCES = [path for package in ("repmetrics", "fmtrain") for path in sorted((ROOT / package).rglob("*.py"))]


@pytest.mark.parametrize(("module", "remedy"), [*EXTRAS.items(), *fmtrain_cli.EXTRAS.items()])
def test_the_extra_that_an_error_names_suffices(module: str, remedy: str) -> None:
    extra = re.fullmatch(r"repmetrics\[(\w+)\]", remedy)
    if extra is None:
        assert remedy == module
    else:
        assert module not in absent([extra[1]])
    assert module in absent([])


def test_a_command_of_fmtrain_names_all_that_it_needs() -> None:
    named = set(fmtrain_cli.EXTRAS.values())
    assert not {"repmetrics[score]", "repmetrics[lightning]", "repmetrics[report]"} & named
    assert not {"lightning", "PIL", "timm", "yaml", "openslide", "jsonargparse"} & absent(["train"])


def test_every_extra_that_the_code_names_exists() -> None:
    named = {name for path in SOURCES for name in re.findall(r"repmetrics\[(\w+)\]", path.read_text(encoding="utf-8"))}
    assert named <= set(PROJECT["optional-dependencies"])


def test_the_callback_has_all_that_its_metrics_need() -> None:
    assert not {"lightning", "tensorboard", "torchvision"} & absent(["lightning"])
    assert {"timm", "matplotlib"} <= absent(["lightning"])  # the check can fail


def test_the_readme_lists_every_extra() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"^\| `\[(\w+)\]` \|", readme, re.MULTILINE))
    assert listed == set(PROJECT["optional-dependencies"])


def test_embeddings_are_scored_with_the_base_packages_alone(tmp_path: Path) -> None:
    for name in ("x", "y"):
        np.save(tmp_path / f"{name}.npy", np.random.default_rng(0).standard_normal((64, 8)))
    program = tmp_path / "program.py"
    program.write_text("import sys\nfrom repmetrics.cli import main\nmain(sys.argv[1:])\n", encoding="utf-8")
    for arguments in (["score", "x.npy"], ["select", "x.npy", "y.npy"]):
        command = [sys.executable, HELPERS / "installed.py", "", program, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert "rankme" in done.stdout
    assert "timm" not in distributions([])


def test_the_links_of_a_release_are_absolute() -> None:
    script = runpy.run_path(str(ROOT / ".github" / "set_addresses.py"))
    readme = script["absolute_links"]((ROOT / "README.md").read_text(encoding="utf-8"), "https://host/o/n", "v1")
    targets = re.findall(r"\]\(([^)]+)\)", readme)
    assert targets
    assert all(target.startswith(("https://", "#")) for target in targets)
    assert "https://host/o/n/raw/v1/docs/images/board-healthy.png" in targets
    project = script["project_urls"]((ROOT / "pyproject.toml").read_text(encoding="utf-8"), "https://host/o/n", "v1")
    assert '[project.urls]\nRepository = "https://host/o/n"' in project


@pytest.mark.parametrize(("program", "module"), [("repmetrics", "repmetrics.cli"), ("fmtrain", "fmtrain.cli")])
def test_the_shell_completes_commands(
    program: str, module: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(f"_{program.upper()}_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", f"{program} s")
    monkeypatch.setenv("COMP_CWORD", "1")
    monkeypatch.setattr(sys, "argv", [program])
    with pytest.raises(SystemExit) as ended:
        import_module(module).main()
    assert ended.value.code == 0
    completed = capsys.readouterr().out.split()
    assert completed
    assert all(word.startswith("s") for word in completed)
