"""Help of every command: examples that parse, groups of options, and lines that fit narrow terminals."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

import fmtrain.cli
import repmetrics.cli

APPS = {module.app.info.name: typer.main.get_command(module.app) for module in (repmetrics.cli, fmtrain.cli)}
COMMANDS = [(program, name) for program, group in APPS.items() for name in group.commands]  # type: ignore[attr-defined]


def help_of(program: str, name: str) -> tuple[Any, str]:
    command = APPS[program].commands[name]  # type: ignore[attr-defined]
    return command, command.get_help(command.context_class(command, info_name=f"{program} {name}"))


@pytest.mark.parametrize(("program", "name"), COMMANDS)
def test_examples_parse_and_lines_fit(program: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for file in ("last.ckpt", "manifest.json"):
        Path(file).touch()
    for columns in (60, 80):
        monkeypatch.setenv("COLUMNS", str(columns))
        command, text = help_of(program, name)
        assert max(map(len, text.splitlines())) <= columns
    printed = text.partition("Examples:\n")[2].replace("\\\n", "")
    lines = [shlex.split(line) for line in printed.splitlines()]
    assert 1 <= len(lines) <= 2
    for words in lines:
        assert words[:2] == [program, name]
        command.make_context(name, words[2:])


def test_options_are_grouped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    _, text = help_of("repmetrics", "score")
    titles = re.findall(r"^(\w[\w ]*):$", text, re.MULTILINE)
    assert titles == ["Arguments", "Data", "Encoder", "Computation", "Metrics", "Output", "Watching", "Options"]
    encoder = text[text.index("Encoder:") : text.index("Computation:")]
    assert "--pool" in encoder
    assert "--json" not in encoder
