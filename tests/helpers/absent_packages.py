"""Code in a process of its own, in which packages are not installed."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from processes import Program

RELOADED = {"repmetrics", "fmtrain", "lightning", "pytorch_lightning", "lightning_fabric"}
"""Packages whose import depends on others: their modules, imported already, are imported again."""


class Outcome(NamedTuple):
    """Exit code and standard error of a process."""

    code: int
    stderr: str


class Absent(MetaPathFinder):
    """Finder of modules, as if ``packages`` were not installed."""

    def __init__(self, packages: Sequence[str]) -> None:
        self.packages = packages

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> None:
        package = name.partition(".")[0]
        if package in self.packages:
            raise ModuleNotFoundError(f"No module named {name!r}", name=package)


def run_code(code: str, *, absent: Sequence[str] = (), folder: Path) -> Outcome:
    """Run code in a process that has none of our modules loaded and in which packages are not installed.

    Args:
        code: Statements.
        absent: Packages that are not installed.
        folder: New folder of the output.
    """
    folder.mkdir()
    program = Program(_execute, code, absent, folder=folder)
    return Outcome(program.wait(), program.stderr.read_text())


def _execute(code: str, absent: Sequence[str]) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] in {*absent, *RELOADED}]:
        del sys.modules[name]
    sys.meta_path.insert(0, Absent(absent))
    exec(code, {"__name__": "__main__"})
