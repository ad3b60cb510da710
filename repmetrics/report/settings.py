"""Settings of a run, from whatever lies beside its measurements: Lightning, fmtrain, Hydra, W&B, Ray, or a table."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from repmetrics.data.read_csv import read_csv

FILES = (
    "config.yaml",  # fmtrain, LightningCLI, W&B's files/
    "hparams.yaml",  # Lightning's loggers
    "params.json",  # Ray Tune
    ".hydra/config.yaml",
    "files/config.yaml",  # W&B
    "trial.json",  # a sweep's
)
"""Files that state settings, in the order in which they count."""
TRAINER_KEYS = ("model", "data", "trainer")
"""Keys of LightningCLI's configuration that hold settings; others hold paths and callbacks."""


def find_settings(file: Path, *, root: Path) -> tuple[str, dict[str, str]]:
    """Training method and settings of the run whose measurements are in a file; empty if nothing states them.

    The folder of the file counts first, then those above it, below `root`.

    Args:
        file: ``measurements.jsonl``.
        root: Folder of all runs. What lies in it belongs to none of them, unless the file lies there too.
    """
    folders = [file.parent, *(folder for folder in file.parents[1:] if root in folder.parents)]
    for folder in folders:
        for name in FILES:
            if (folder / name).is_file() and (settings := read_settings(folder / name)):
                method = settings.get("model.class_path") or settings.get("method") or ""
                return method.rpartition(".")[2], settings
    return "", {}


def read_settings(file: Path) -> dict[str, str]:
    """Settings in a YAML or JSON file, with dots between nested names."""
    import yaml

    class Loader(yaml.SafeLoader):
        """Reads tags such as those of Python objects, which Lightning writes, as text."""

    Loader.add_multi_constructor("", lambda loader, suffix, node: str(node.value))
    try:
        text = file.read_text(encoding="utf-8")
        config = json.loads(text) if file.suffix == ".json" else yaml.load(text, Loader)
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{file} is not {'JSON' if file.suffix == '.json' else 'YAML'}: {error}") from error
    if config is None:
        return {}
    if not isinstance(config, Mapping):
        raise ValueError(f"{file} is no configuration: expected a mapping, got a {type(config).__name__}")
    if isinstance(config.get("model"), Mapping) and "class_path" in config["model"]:
        config = {key: config[key] for key in TRAINER_KEYS if key in config}
    if file.name == "trial.json" and isinstance(config.get("params"), Mapping):
        config = config["params"]
    plain = {key: _unwrap(value) for key, value in config.items() if key not in ("_wandb", "wandb_version")}
    return dict(leaves(plain))


def _unwrap(value: Any) -> Any:
    """The value in an entry of W&B's config.yaml."""
    return (
        value["value"]
        if isinstance(value, Mapping) and value.keys() <= {"value", "desc"} and "value" in value
        else value
    )


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    """Values of nested mappings as text, by names with dots.

    Example:
        >>> dict(leaves({"model": {"lr": 0.1, "arch": None}, "seed": 3}))
        {'model.lr': '0.1', 'seed': '3'}
    """
    for name, value in tree.items():
        key = f"{prefix}.{name}" if prefix else str(name)
        if isinstance(value, Mapping):
            yield from leaves(value, key)
        elif value is not None:
            yield key, str(value)


def read_settings_table(path: Path) -> dict[str, dict[str, str]]:
    """Settings by run from a CSV table with a column `run`.

    Raises:
        ValueError: There is no such column.
    """
    columns, rows = read_csv(path)
    if "run" not in columns:
        raise ValueError(f"{path.name} has no column run: a row holds the settings of one run")
    return {row["run"]: {k: v for k, v in row.items() if k != "run" and v} for row in rows}


def varying_settings(runs: Sequence[Mapping[str, str]]) -> list[str]:
    """Names of the settings that differ between runs.

    Example:
        >>> varying_settings([{"lr": "0.1", "wd": "0"}, {"lr": "0.2", "wd": "0"}])
        ['lr']
    """
    names = dict.fromkeys(name for settings in runs for name in settings)
    return [name for name in names if len({settings.get(name) for settings in runs}) > 1]
