"""Run a program as if only the packages of some extras were installed: all other packages cannot be imported.

python installed.py "lightning,report" program.py …
"""

from __future__ import annotations

import re
import runpy
import sys
import tomllib
from collections.abc import Iterable, Sequence
from functools import cache
from importlib.machinery import ModuleSpec, PathFinder
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path
from typing import Any

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def parse(requirement: str) -> tuple[str, tuple[str, ...]]:
    """Name and extras of a requirement."""
    match = re.match(r"([\w.-]+)(?:\[([\w,\s-]+)\])?", requirement)
    assert match is not None
    return normal(match[1]), tuple(extra.strip() for extra in (match[2] or "").split(",") if extra)


def requirements(extras: Iterable[str]) -> list[str]:
    """Requirements of the project with extras, those that extras name included."""
    listed = list(PROJECT["dependencies"])
    for extra in extras:
        for requirement in PROJECT["optional-dependencies"][extra]:
            name, further = parse(requirement)
            listed += requirements(further) if name == normal(PROJECT["name"]) else [requirement]
    return listed


def distributions(extras: Iterable[str]) -> set[str]:
    """All distributions that an installation with extras has, by what the installed ones require."""
    known: set[tuple[str, tuple[str, ...]]] = set()
    pending = [parse(requirement) for requirement in requirements(extras)]
    while pending:
        name, chosen = item = pending.pop()
        if item in known:
            continue
        known.add(item)
        try:
            needed = requires(name) or []
        except PackageNotFoundError:
            continue
        for requirement in needed:
            condition = requirement.partition(";")[2]
            wanted = re.search(r"extra *== *['\"]([\w.-]+)['\"]", condition)
            if "extra" not in condition or (wanted and wanted[1] in chosen):
                pending.append(parse(requirement))
    return {name for name, _ in known}


class Present:
    """Finder in place of Python's, which finds no module of an absent distribution."""

    def __init__(self, absent: set[str]) -> None:
        self.absent = absent

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if fullname.partition(".")[0] in self.absent:
            return None
        return PathFinder.find_spec(fullname, path, target)

    def invalidate_caches(self) -> None:
        PathFinder.invalidate_caches()


def absent(extras: Iterable[str]) -> set[str]:
    """Modules that an installation with extras lacks."""
    present = distributions(extras) | {"repmetrics", "pip", "setuptools"}
    return {module for module, names in owners().items() if not names & present}


@cache
def owners() -> dict[str, set[str]]:
    """Distributions of each module that is installed."""
    return {module: {normal(name) for name in names} for module, names in packages_distributions().items()}


def main(argv: Sequence[str]) -> None:
    extras, *command = argv
    finder = Present(absent(extras.split(",") if extras else []))
    sys.meta_path = [finder if entry is PathFinder else entry for entry in sys.meta_path]  # type: ignore[list-item]
    sys.argv = list(command)
    runpy.run_path(command[0], run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
