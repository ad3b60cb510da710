"""Local names say what they hold: words that say nothing are banned."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from paths import ROOT

WORDS = "found told said made own mine stated beside anew one how there look bear mend stand house room river"
BANNED = set(WORDS.split())
MODULES = sorted(path for package in ("repmetrics", "fmtrain") for path in (ROOT / package).rglob("*.py"))


def local_names(source: str) -> set[str]:
    """Names of variables and parameters."""
    nodes = list(ast.walk(ast.parse(source)))
    variables = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    return variables | {node.arg for node in nodes if isinstance(node, ast.arg)}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_banned_name(path: Path) -> None:
    assert not local_names(path.read_text()) & BANNED


def test_a_banned_name_would_fail() -> None:
    assert local_names("def f(own):\n    found = 1\n    for one, x in ():\n        pass") & BANNED == {
        "own",
        "found",
        "one",
    }
