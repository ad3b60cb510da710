"""Configurations that fmtrain ships, by name."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path


def shipped_configs() -> list[str]:
    """Names of the shipped configurations."""
    return sorted(path.stem for path in _folder().glob("*.yaml"))


def config_file(name: str) -> Path:
    """Path of a configuration file, or of the shipped configuration of that name."""
    if Path(name).is_file():
        return Path(name)
    if (file := _folder() / f"{name}.yaml").is_file():
        return file
    raise ValueError(f"no configuration {name}: neither a file nor one of {', '.join(shipped_configs())}")


def _folder() -> Path:
    return Path(str(files("fmtrain") / "configs"))
