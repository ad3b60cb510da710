"""Settings of a run, from the configuration next to its measurements."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

FILES = {"config.yaml": ("model", "data", "trainer"), "hparams.yaml": ()}
"""Files of `fmtrain fit` or LightningCLI, and of Lightning's loggers → the keys to read; none: all."""


def read_settings(folder: Path, files: Iterable[str] = FILES) -> tuple[str, dict[str, str]]:
    """Method and settings of a run; empty without a configuration file.

    Raises:
        ValueError: A file is not YAML, or no mapping.
    """
    file = next((folder / name for name in files if (folder / name).is_file()), None)
    if file is None:
        return "", {}
    import yaml

    try:
        config = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not YAML: {error}") from error
    if not isinstance(config, Mapping):
        raise ValueError(f"{file} is no configuration: expected a mapping, got a {type(config).__name__}")
    keys = FILES[file.name] or config
    leaves = dict(_leaves({key: config[key] for key in keys if key in config}))
    return leaves.get("model.class_path", "").rpartition(".")[2], leaves


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    for name, value in tree.items():
        key = f"{prefix}.{name}" if prefix else str(name)
        if isinstance(value, Mapping):
            yield from _leaves(value, key)
        elif value is not None:
            yield key, str(value)


def varying_settings(runs: Sequence[Mapping[str, str]]) -> list[str]:
    """Names of the settings that differ between runs.

    Example:
        >>> varying_settings([{"lr": "0.1", "wd": "0"}, {"lr": "0.2", "wd": "0"}])
        ['lr']
    """
    names = dict.fromkeys(name for settings in runs for name in settings)
    return [name for name in names if len({settings.get(name) for settings in runs}) > 1]
