"""Check before the sweep starts that `fmtrain fit` accepts its trials and logs the target metrics."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution

from fmtrain.sweeps.settings import Sweep
from repmetrics import __version__
from repmetrics.atomic_write import write_text
from repmetrics.measurement.registry import PROBES

CHECKED = "checked.json"


def check_runs_apart(sweep: Sweep) -> Sweep:
    """:func:`check_runs` in a process of its own, so that the driver does not load torch.

    The result is stored in the folder of the sweep. Another driver of the same sweep takes it over, unless a file that
    `fit` names has changed.
    """
    if sweep.command is not None and sweep.probe is None:
        return check_script(sweep)
    path, key = sweep.out / CHECKED, _digest(sweep)
    if path.is_file() and (stored := json.loads(path.read_text(encoding="utf-8")))["key"] == key:
        return replace(sweep, run_steps=stored["run_steps"])
    checked = check_runs(sweep) if "torch" in sys.modules else _checked_by_child(sweep)
    write_text(path, json.dumps({"key": key, "run_steps": checked.run_steps}) + "\n")
    return checked


def _digest(sweep: Sweep) -> str:
    """Hash of all that the check reads: the sweep, this version, and the files that `fit` names."""
    digest = hashlib.sha256(json.dumps([__version__, sweep.identity(), sweep.first, repr(sweep)], default=str).encode())
    for word in sweep.fit:
        file = Path(word.partition("=")[2] or word)
        if file.is_file():
            digest.update(file.read_bytes())
    return digest.hexdigest()


def _checked_by_child(sweep: Sweep) -> Sweep:
    command = [sys.executable, "-m", "fmtrain.sweeps.preflight"]
    child = subprocess.run(
        command, input=pickle.dumps(sweep), stdout=subprocess.PIPE, start_new_session=True, check=False
    )
    if child.returncode:
        raise RuntimeError(f"the check of the runs ended with exit code {child.returncode}: see above")
    result = pickle.loads(child.stdout)
    if isinstance(result, Exception):
        raise result
    assert isinstance(result, Sweep)
    return result


def main() -> None:
    """Check the sweep on standard input, and write the checked one, or the error, to standard output."""
    with os.fdopen(os.dup(1), "wb") as output:
        os.dup2(2, 1)  # libraries may print
        sweep = pickle.load(sys.stdin.buffer)
        result: Sweep | Exception
        try:
            result = check_runs(sweep)
        except OSError as error:
            result = error
        except ValueError as error:
            result = ValueError(str(error))  # some subclasses cannot be pickled
        pickle.dump(result, output)


def check_runs(sweep: Sweep) -> Sweep:
    """Have `fmtrain fit` parse trials at the ends of every range, and check metrics, view set and labels.

    Returns:
        The sweep with the length of a run. That of any other command is not known.
    """
    if sweep.probe is not None:
        from fmtrain.training.datamodule import labeled_images

        labeled_images(Path(sweep.probe.data))
    if sweep.command is not None:
        return check_script(sweep)
    from fmtrain.manifest.manifest import Manifest
    from fmtrain.sweeps.command_line import cli_value
    from fmtrain.training.config import parse_config
    from fmtrain.training.fit import silence_lightning

    silence_lightning()
    args, configs = split_config_args(sweep.fit)
    lengths = []
    for params in [*boundary_params(sweep.parameters), *sweep.first]:
        settings = [part for name, value in params.items() for part in (f"--{name}", cli_value(value))]
        config = parse_config([*args, *settings], configs=configs, out=sweep.out)
        labeled = bool(config["data"]["probe"] or Manifest.load(Path(config["data"]["manifest"])).classes)
        check_metrics(sweep, config, labeled=labeled)
        lengths.append(run_length(config["trainer"]))
    return sweep if None in lengths else replace(sweep, run_steps=sweep.run_steps or max(lengths))  # type: ignore[type-var]


def check_script(sweep: Sweep) -> Sweep:
    """Check that the program of a command exists."""
    from fmtrain.sweeps.command_line import fill_command

    params = boundary_params(sweep.parameters)[0]
    program = fill_command(str(sweep.command), params=params, folder=sweep.out, number=0)[0]
    if shutil.which(program) is None:
        raise ValueError(f"command begins with {program}, which is no program")
    return sweep


def check_metrics(sweep: Sweep, config: Mapping[str, Any], *, labeled: bool) -> None:
    """Refuse metrics that the runs will not log, and views that do not suit the domain."""
    known = logged_metrics(config, labeled=labeled)
    if absent := [name for name in sweep.metrics if name not in known]:
        raise ValueError(
            f"{', '.join(absent)} will never be logged by these runs: choose among {', '.join(known)}, or "
            + ("give them labels by --data.probe" if set(absent) & set(PROBES) else "add it to --monitor.metrics")
            + " in fit"
        )
    if sweep.view_set is not None and config["monitor"]["view_set"] != sweep.view_set:
        raise ValueError(
            f"the domain of this sweep needs views {sweep.view_set!r}, the runs use {config['monitor']['view_set']!r}: "
            f'set --monitor.view_set {sweep.view_set} in fit, or domain = "custom"'
        )


def run_length(trainer: Mapping[str, Any]) -> int | None:
    """Optimizer steps of a run, or None where the configuration does not state them.

    Example:
        >>> run_length({"max_steps": -1, "max_epochs": 3, "limit_train_batches": 10, "accumulate_grad_batches": 2})
        15
    """
    if trainer["max_steps"] > 0:
        return int(trainer["max_steps"])
    epochs, batches = trainer.get("max_epochs"), trainer.get("limit_train_batches")
    if not isinstance(epochs, int) or epochs < 1 or not isinstance(batches, int):
        return None
    return epochs * batches // int(trainer.get("accumulate_grad_batches") or 1)


def split_config_args(fit: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split arguments of `fmtrain fit` into other arguments and the names of the configurations.

    Example:
        >>> split_config_args(["--config", "demo", "--trainer.max_steps", "3", "--config=small.yaml"])
        (['--trainer.max_steps', '3'], ['demo', 'small.yaml'])
    """
    args: list[str] = []
    configs: list[str] = []
    rest = iter(fit)
    for part in rest:
        name, _, value = part.partition("=")
        if name == "--config":
            configs.append(value or next(rest, ""))
        else:
            args.append(part)
    return args, configs


def boundary_params(space: Mapping[str, BaseDistribution]) -> list[dict[str, Any]]:
    """Settings in which every choice and both ends of every range occur.

    Example:
        >>> from optuna.distributions import FloatDistribution
        >>> boundary_params({"lr": FloatDistribution(0.1, 0.2), "loss": CategoricalDistribution(["a", "b", "c"])})
        [{'lr': 0.1, 'loss': 'a'}, {'lr': 0.2, 'loss': 'b'}, {'lr': 0.2, 'loss': 'c'}]
    """
    ends = {name: d.choices if isinstance(d, CategoricalDistribution) else (d.low, d.high) for name, d in space.items()}  # type: ignore[attr-defined]
    count = max(len(values) for values in ends.values())
    return [{name: values[min(i, len(values) - 1)] for name, values in ends.items()} for i in range(count)]


def logged_metrics(config: Mapping[str, Any], *, labeled: bool) -> list[str]:
    """Names that a run of this configuration writes into measurements.jsonl."""
    names = [*config["monitor"]["metrics"], *(PROBES if labeled else ())]
    layers = config["monitor"]["layers"] or []
    return [*names, *(f"{layer}/{name}" for layer in layers for name in names), "loss"]


if __name__ == "__main__":
    main()
